"""Audit occupations in other languages: bias, and CLIP-T and no-face rate because a fair model may ignore the prompt.

python scripts/languages.py                                             the embedded model; repeat it to continue
python scripts/languages.py --adapter outputs/gender/default/seed0/adapter        without and with an adapter
python scripts/languages.py --set model=sd15                            Stable Diffusion 1.5, for which the lists are made
python scripts/languages.py --languages german turkish --both-forms     two languages, also with names of both genders
python scripts/languages.py --render                                    only the page; --publish writes docs/studies

The lists are in fairdiff/studies/translations, one file per language. `--translations FOLDER` takes others, which must
include english.csv. Every language uses the noise of the English prompts, and CLIP-T compares with the English text. The
numbers for the page are kept in outputs/reproduced/measurements/studies.
"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness.audits import Method, audited
from harness.languages_page import LEFT_OUT, REFERENCE, SAME, page
from harness.methods import adapter, reworded
from harness.publish import add_study, conclude
from reproduce.place import ROOT
from rich.progress import track

from fairdiff import fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.audit.records import load_records
from fairdiff.audit.wording import targeted
from fairdiff.cli.compose import overrides_of, with_defaults
from fairdiff.cli.ending import ending
from fairdiff.config import Config
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.plan import Plan
from fairdiff.studies import languages
from fairdiff.studies.curves import outcome, usual_rows
from fairdiff.studies.page import Page
from fairdiff.studies.words import Rewrite


def files_of(folder: Path, names: list[str] | None) -> list[Path]:
    """Return the files of these languages, by default of all but English."""
    known = sorted(path.stem for path in folder.glob("*.csv") if path.stem != languages.ENGLISH)
    if wrong := [name for name in names or [] if name not in known]:
        raise FairDiffError(f"--languages: found {wrong[0]}, allowed: {', '.join(known)}")
    return [folder / f"{name}.csv" for name in names or known]


def of_plan(rewrite: Callable[[list, Config], Rewrite]) -> Callable[[Config, Plan], Rewrite]:
    return lambda config, plan: rewrite([*plan.audit], config)


def methods(args: argparse.Namespace, own: Method | None) -> dict[str, Method]:
    """Return row name -> method to audit, for the model with the adapter `own`, or without one if it is None."""
    none = of_plan(lambda prompts, config: languages.left_out(prompts, config.prompts.template))
    rows = {LEFT_OUT: reworded(LEFT_OUT, (LEFT_OUT,), none, own)}
    english = args.translations / f"{languages.ENGLISH}.csv"
    asked = [(SAME, languages.read_words(english))]
    for file in files_of(args.translations, args.languages):
        words = languages.read_words(file)
        asked.append((file.stem, words))
        if words.forms and args.both_forms:
            asked.append((f"{file.stem}, both forms", languages.read_words(file, both_forms=True)))
    for name, words in asked:
        rewrite = of_plan(lambda prompts, config, words=words: languages.translated(prompts, words))
        rows[name] = reworded(name, (fingerprint.of_values(sorted(words.texts.items())),), rewrite, own)
    return {REFERENCE: own} | rows if own else rows


def row_of(where: Path, model: str) -> dict:
    """Return one model's numbers for the page: bias and CLIP-T of each prompt (null if undefined) and the no-face rate."""
    audit, records = read_audit(where / "audit.json"), load_records(where / "records.parquet")
    entry, bias = audit["models"][model], {}
    for name in targeted(audit):
        classes = tuple(audit["attributes"][name])
        found = outcome(name, usual_rows(records, model), name, classes, "clip_t")
        bias[name] = {"values": _plain(found.bias_P), "floor": entry["attributes"][name]["bias"]["floor"]}
    return {"bias": bias, "clip_t": _plain(found.semantics_P), "no_face": entry["no_face"]}


def _plain(values_P: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_P]


def measure(args: argparse.Namespace, kept_in: Path) -> None:
    """Audit every row without and with the adapter, and write each to `kept_in` as soon as it is done."""
    english = args.translations / f"{languages.ENGLISH}.csv"
    usual = overrides_of({"prompts": {"test": english}, "audit": {"split": "test", "named": None, "without_people": 1}})
    settings = with_defaults(args.set, usual)
    parts = {"without an adapter": None}
    if args.adapter is not None:
        parts["with the adapter"] = adapter(REFERENCE, args.adapter)
    shown = [text.replace(f"{ROOT.as_posix()}/", "") for text in settings]
    record: dict = {"settings": shown, "adapter": args.adapter and args.adapter.as_posix(), "parts": {}}
    every = [(part, name, method) for part, own in parts.items() for name, method in methods(args, own).items()]
    for part, name, method in track(every, "languages"):
        where = audited(settings, method, args.folder / part.replace(" ", "_"))
        rows = record["parts"].setdefault(part, {})
        if not rows and parts[part] is None:
            rows[REFERENCE] = row_of(where, "before")
        rows[name] = row_of(where, "after")
        audit = read_audit(where / "audit.json")
        record |= {"prompts": audit["prompts"], "images": audit["images_per_prompt"]}
        record |= {"model": audit["provenance"]["model"], "target": audit["provenance"]["target"]}
        write_json(kept_in, record)


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, metavar="PATH", help="the folder or file of an adapter")
    parser.add_argument("--languages", nargs="+", metavar="NAME", help="some of them; default: all")
    parser.add_argument("--both-forms", action="store_true", help="a further row for names of both genders")
    parser.add_argument("--translations", type=Path, default=languages.FOLDER, metavar="FOLDER", help="a CSV a language")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    add_study(parser, "languages")
    args = parser.parse_args(argv)

    def made(found: dict) -> Page:
        adapted = ["--adapter", found["adapter"]] if found["adapter"] else []
        return page(found, shlex.join(["python", "scripts/languages.py", *adapted]))

    conclude(args, "languages", lambda kept: measure(args, kept), made)


if __name__ == "__main__":
    main()
