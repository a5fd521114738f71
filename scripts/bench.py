"""What a step costs and what it gains, against the reference algorithm, literally: docs/performance.md.

python scripts/bench.py                                              steps, variance, memory and profile, on Portraits
python scripts/bench.py 'part=[time_to_bias,ablation]'               the long ones; the same command goes on with them
python scripts/bench.py device=cuda model=sd15_random                seconds a step at the size of SD 1.5
python scripts/bench.py 'part=[]'                                    only writes the page anew
"""

from pathlib import Path

from benchmark.config import BenchConfig, use_schema
from benchmark.page import write_page
from benchmark.results import measure

from fairdiff.cli import main
from fairdiff.tracking import make_console


def job(config: BenchConfig, folder: Path) -> None:
    console = make_console()
    for part in config.part:
        measure(part, config, folder, console)
    write_page(folder.parent, Path(config.report))  # of everything measured so far, on whatever model and machine
    print(f"report: {config.report}")


if __name__ == "__main__":
    use_schema()
    main(job, "bench")()
