"""Write one JSON per part: results, settings, date and machine. A finished part is measured again only on request."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmark.audits import measure_audit
from benchmark.compiled import measure_compile
from benchmark.config import BenchConfig
from benchmark.learning import measure_learning
from benchmark.steps import measure_memory, measure_profile, measure_steps, measure_throughput
from benchmark.variance import measure_variance
from benchmark.world import conditions, describe, finish, weights_fingerprint
from fairdiff import fingerprint
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

SHORT: dict[str, Callable[[BenchConfig], dict]] = {
    "steps": measure_steps,
    "variance": measure_variance,
    "memory": measure_memory,
    "profile": measure_profile,
    "audit": measure_audit,
    "compile": measure_compile,
    "throughput": measure_throughput,
}
# Settings that choose the parts, the output, or what is computed from finished runs, and that change no run.
ELSEWHERE = ("part", "resume", "report", "audit", "plan", "thresholds", "hub", "tracker_options")


def measure(part: str, config: BenchConfig, folder: Path, console: Console) -> None:
    """Measure one part and write folder/<part>.json, unless the file already holds this measurement."""
    config = finish(config)
    path = folder / f"{part}.json"
    settings = {k: v for k, v in asdict(config).items() if k not in ELSEWHERE}
    key = fingerprint.of_values(settings, describe(config), weights_fingerprint(config))
    known = read(path) if config.resume else None
    if not config.resume:
        shutil.rmtree(folder / part / key, ignore_errors=True)
    if known and known["key"] != key:
        raise FairDiffError(
            f"{path}: holds a measurement with other settings or weights; choose another hydra.run.dir or measure anew with "
            "resume=false"
        )
    if known and known["complete"] and known["thresholds"] == config.thresholds:
        console.print(f"{part}: measured {known['conditions']['date']}; resume=false measures anew ({path})")
        return
    console.print(f"{part}: {describe(config)}")
    about = {"part": part, "key": key, "command": command_of(sys.argv[1:], folder.name), "thresholds": config.thresholds}
    about |= {"settings": describe(config), "conditions": known["conditions"] if known else conditions(config)}

    def keep(result: dict, complete: bool) -> None:
        write_json(path, about | {"complete": complete, "result": result})

    if part in SHORT:
        keep(SHORT[part](config), True)
    else:
        measure_learning(part, config, folder / part / key, keep)


def command_of(overrides: list[str], name: str) -> str:
    """Return the command of a measurement by this name, independent of the folders of its output and its page."""
    settings = [o for o in overrides if o.partition("=")[0] not in ("hydra.run.dir", "report")]
    placed = [f"hydra.run.dir=outputs/bench/{name}" for o in overrides if o.startswith("hydra.run.dir=")]
    return shlex.join(["python", "scripts/bench.py", *settings, *placed])


def read(path: Path) -> dict | None:
    """Read a measurement, None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise FairDiffError(f"{path}: is not JSON; delete it, or measure anew with resume=false") from error
