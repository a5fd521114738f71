"""Compare methods at equal bias and at equal semantics, and compute the price of a quota without training.

python scripts/frontier.py                                  baselines at several strengths; repeat it to continue
python scripts/frontier.py --adapter ours=outputs/gender/default/seed0/adapter       also a saved adapter at several scales
python scripts/frontier.py --runs "image share"=outputs/a "image share"=outputs/b    also audits of runs, one curve per name
python scripts/frontier.py --done                           only finished audits, such as those of scripts/baselines.py
python scripts/frontier.py --render                         only the page, outputs/reproduced/studies/frontier.md
python scripts/frontier.py --publish                        write docs/studies/frontier.md and its record instead

A curve has the points that a method reaches: its settings (strength, scale, loss weight, target), each applied to all images
or to a random share of them. `fairdiff-compare --picture` draws runs as points; this command compares the curves. The audits
are in outputs/baselines.
"""

import argparse
from pathlib import Path

from harness.audits import Method, audited
from harness.frontier_page import page
from harness.frontier_points import checked, measured, quotas
from harness.methods import adapter, debias_vl, ethical, random_phrases, uce
from harness.publish import add_study, conclude
from reproduce.plan import SCALES
from rich.progress import track

from fairdiff.audit.read import read_audit
from fairdiff.cli.ending import ending
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

SEMANTICS = ("dino", "clip_i", "clip_t")
TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 1.0)  # allowed deviations from a quota; 1 keeps all images


def curves(adapters: list[str]) -> dict[str, list[Method]]:
    """Return the methods of each curve by the curve's name."""
    found = {
        "ethical intervention": [ethical()],
        "random phrases": [random_phrases()],
        "UCE": [uce(strength) for strength in (1, 4, 16)],
        "debiasVL": [debias_vl(strength) for strength in (5, 500)],
    }
    for text in adapters:
        name, _, path = text.partition("=")
        if not (name and path):
            raise FairDiffError(f"--adapter: found {text}, allowed: NAME=PATH")
        found[name] = [adapter(name, Path(path), scale) for scale in SCALES]
    return found


def run_folders(texts: list[str]) -> dict[str, list[Path]]:
    """Return the folders of all audits below FOLDER, by name, for each NAME=FOLDER."""
    found: dict[str, list[Path]] = {}
    for text in texts:
        name, _, folder = text.rpartition("=")
        audits = sorted(path.parent for path in Path(folder).rglob("audit.json"))
        if not name or not audits:
            raise FairDiffError(f"--runs: found {text}, allowed: NAME=FOLDER with a finished audit in it or below")
        found.setdefault(name, []).extend(audits)
    return found


def measure(args: argparse.Namespace) -> dict:
    """Return the numbers of all curves, the results of quotas on the images of the model before, and the settings."""
    split = "test" if args.test else "validation"
    settings, root = [f"audit.split={split}", *args.set], args.folder / split
    places: dict[str, list[Path]] = {}
    every = [(name, method) for name, some in curves(args.adapter).items() for method in some]
    for name, method in track(every, "audits"):
        where = audited(settings, method, root, args.done)
        if where is not None:
            places.setdefault(name, []).append(where)
    for name, some in run_folders(args.runs).items():
        places.setdefault(name, []).extend(some)
    if not places:
        raise FairDiffError("--done: found no finished audit of these settings, allowed: some of scripts/baselines.py")
    audits = checked(places)
    first = read_audit(next(iter(audits.values())) / "audit.json")
    entries = first["models"]["before"]["attributes"]
    attribute = args.attribute or next(name for name, e in entries.items() if e["target"]["requested"])
    if attribute not in first["attributes"]:
        raise FairDiffError(f"--attribute: found {attribute}, allowed: {', '.join(first['attributes'])}")
    found = measured(places, attribute, args.semantics)
    found["quotas"] = quotas(next(iter(audits.values())), attribute, TOLERANCES)
    about = {"split": split, "settings": settings, "images": first["images_per_prompt"], "prompts": first["prompts"]}
    return found | about | {"seed": first["provenance"]["seed"]}


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", nargs="+", default=[], metavar="NAME=PATH", help="saved adapters, at several scales")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=FOLDER", help="runs that are audited already")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    parser.add_argument("--attribute", help="with a target; default: the first")
    parser.add_argument("--semantics", choices=SEMANTICS, default="dino", help="dino: the image encoder in DINO's place")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    parser.add_argument("--done", action="store_true", help="generate nothing")
    add_study(parser, "baselines")
    args = parser.parse_args(argv)
    def measured(kept: Path) -> None:
        write_json(kept, measure(args))

    conclude(args, "frontier", measured, lambda found: page(found, "python scripts/frontier.py"))


if __name__ == "__main__":
    main()
