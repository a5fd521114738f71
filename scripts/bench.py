"""What a step costs and what it gains, against the reference algorithm, literally: performance.md.

python scripts/bench.py                                              steps, variance, memory and profile, on Portraits
python scripts/bench.py 'part=[time_to_bias,ablation]'               the long ones; the same command goes on with them
python scripts/bench.py 'part=[audit]'                                images a second beside diffusers' pipeline
python scripts/bench.py 'part=[compile]'                              torch.compile and channels_last of the frozen networks
python scripts/bench.py device=cuda model=sd15_random                seconds a step at the size of SD 1.5
python scripts/bench.py 'part=[]'                                    only writes the page anew
python scripts/bench.py report=docs/performance.md                   writes the published page, not one of one's own

The page goes to outputs/reproduced/performance.md. Measurements are kept beside it in measurements/bench, each with its
command; there they join or replace the published ones.
"""

from pathlib import Path

from benchmark.config import BenchConfig, use_schema
from benchmark.page import write_page
from benchmark.results import measure
from reproduce.place import records_in

from fairdiff.cli.main import main
from fairdiff.files import write_bytes
from fairdiff.training.tracking import make_console


def job(config: BenchConfig, folder: Path) -> None:
    console, report = make_console(), Path(config.report)
    kept = records_in(report.parent, "bench")  # of everything measured so far, on whatever model and machine
    for part in config.part:
        try:
            measure(part, config, folder, console)
        finally:  # a long part that was interrupted has its first runs
            measured = folder / f"{part}.json"
            if measured.exists():
                write_bytes(kept / folder.name / measured.name, measured.read_bytes())
    write_page(kept, report)
    print(f"report: {report}")


if __name__ == "__main__":
    use_schema()
    main(job, "bench")()
