"""Benchmark the cost and the gain of a training step against a literal reference implementation: performance.md.

python scripts/bench.py                                              steps, variance, memory and profile, on Portraits
python scripts/bench.py 'part=[time_to_bias,ablation]'               the long parts; repeat it to continue them
python scripts/bench.py 'part=[audit]'                                images per second, compared with diffusers' pipeline
python scripts/bench.py 'part=[compile]'                              torch.compile and channels_last of the frozen networks
python scripts/bench.py device=cuda model=sd15_random                seconds per step at the size of SD 1.5
python scripts/bench.py 'part=[]'                                    write only the page
python scripts/bench.py report=docs/performance.md                   write the published page instead

The page is written to outputs/reproduced/performance.md. Measurements are kept beside it in measurements/bench, each with
its command. New ones are added to a copy of the published ones or replace them.
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
    kept = records_in(report.parent, "bench")  # all measurements so far, of every model and machine
    for part in config.part:
        try:
            measure(part, config, folder, console)
        finally:  # an interrupted long part still has its first runs
            measured = folder / f"{part}.json"
            if measured.exists():
                write_bytes(kept / folder.name / measured.name, measured.read_bytes())
    write_page(kept, report)
    print(f"report: {report}")


if __name__ == "__main__":
    use_schema()
    main(job, "bench")()
