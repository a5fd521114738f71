"""Audit training-free debiasing methods with the same prompts, noise and attribute classifier as the adapters.

python scripts/baselines.py                                    all, on validation prompts; repeat it to continue
python scripts/baselines.py UCE debiasVL --adapter ours=outputs/gender/default/seed0/adapter    two of them and an adapter
python scripts/baselines.py --set audit.prompts=12 audit.images_per_prompt=24     with other settings of train.py
python scripts/baselines.py --test                             on test prompts, for the final page
python scripts/baselines.py --render                           only the page, outputs/reproduced/studies/baselines.md
python scripts/baselines.py --publish                          write docs/studies/baselines.md and its record instead

Two methods change the prompt: the ethical intervention, and an attribute phrase for each image, drawn from the target. UCE
and debiasVL edit weights in closed form. Each edit is also saved as a LoRA in outputs/baselines/<split>/<name>/adapter, for
`scripts/export.py` and `adapter.path`. Numbers for the page are kept in measurements/studies/baselines.json beside it. That
file starts as a copy of the published one.
"""

import argparse
from pathlib import Path

from harness.audits import Method, audited
from harness.baselines_page import page
from harness.methods import adapter, debias_vl, ethical, random_phrases, uce
from harness.publish import add_study, conclude, read_record
from reproduce.records import record
from rich.progress import track

from fairdiff.audit.read import read_audit
from fairdiff.cli.ending import ending
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

BASELINES = [ethical(), random_phrases(), uce(), debias_vl()]


def named_adapters(texts: list[str]) -> list[Method]:
    """Parse NAME=PATH arguments into methods that audit saved adapters."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, _, path in pairs if not (name and path)]:
        raise FairDiffError(f"--adapter: found {wrong[0]}, allowed: NAME=PATH")
    return [adapter(name, Path(path)) for name, _, path in pairs]


def chosen(names: list[str], adapters: list[str]) -> list[Method]:
    """Return the baselines with these names (all if none is given), and the adapters."""
    known = {method.name: method for method in BASELINES}
    if unknown := [name for name in names if name not in known]:
        raise FairDiffError(f"baseline: found {unknown[0]}, allowed: {', '.join(known)}")
    return [known[name] for name in names or known] + named_adapters(adapters)


def measure(methods: list[Method], settings: list[str], folder: Path, kept: Path, split: str) -> None:
    """Audit each method, and write its numbers for the page to the file `kept` as soon as it is done."""
    for method in track(methods, "methods"):
        found = read_record(kept) if kept.exists() else {}
        audit = read_audit(audited(settings, method, folder) / "audit.json")
        small = record(audit) | {"settings": settings, "paired_bias": _changes(audit)}
        found.setdefault(split, {})[method.name] = small
        write_json(kept, found)


def _changes(audit: dict) -> dict:
    """Return for each attribute the change of its bias, after minus before, on the same prompts and noise."""
    return {name: entry["bias"] for name, entry in audit["paired"]["attributes"].items()}


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="baseline", help=f"of {', '.join(m.name for m in BASELINES)}")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="NAME=PATH", help="saved adapters beside them")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    add_study(parser, "baselines")
    args = parser.parse_args(argv)
    split = "test" if args.test else "validation"

    def measured(kept: Path) -> None:
        settings = [f"audit.split={split}", *args.set]
        measure(chosen(args.names, args.adapter), settings, args.folder / split, kept, split)

    conclude(args, "baselines", measured, page)


if __name__ == "__main__":
    main()
