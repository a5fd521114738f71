"""Measure how an audit's bias, D and verdict change if 1 to 20 % of its faces are misclassified.

python scripts/reading_errors.py AUDIT                    an audit folder, RUN/audits/NAME; repeat it to continue
python scripts/reading_errors.py AUDIT --attribute race   another attribute than the first with a target
python scripts/reading_errors.py --render                 only the page; --publish writes docs/studies

The labels of the audited faces are changed at random, and the audit's numbers are computed again: without a correction, and
with a confusion matrix that counts the errors. Then the verdicts are computed for similar generators nearer to the target.
The numbers for the page are kept in outputs/reproduced/measurements/studies.
"""

import argparse
import json
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from harness.publish import add_study, conclude, read_record
from harness.reading_errors_page import COUNTED, DISTANCES, RATES, SEEDS, VERDICT_SEEDS, key_of, page
from rich.progress import track

from fairdiff.audit.axis import Axis, MetricSpec, axes_of, labels
from fairdiff.audit.read import read_audit
from fairdiff.audit.records import load_records
from fairdiff.audit.wording import last_model, targeted
from fairdiff.cli.ending import ending
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.studies.page import Page
from fairdiff.studies.reading_errors import audited, counts_of, error_rates, kinds, misread, nearer, transition


class Suite:
    """Prompt, label and group of each image of an audit's last model, for people prompts that name no class."""

    def __init__(self, folder: Path, attribute: str | None):
        audit, records = read_audit(folder / "audit.json"), load_records(folder / "records.parquet")
        spec = MetricSpec.from_json(json.loads((folder / "request.json").read_text(encoding="utf-8"))["spec"])
        names = [*spec.attributes]
        self.attribute = attribute or (targeted(audit) or names)[0]
        if self.attribute not in names:
            raise FairDiffError(f"--attribute: found {self.attribute}, allowed: {', '.join(names)}")
        self.model = "after" if last_model(audit) is audit["models"].get("after") else "before"
        rows = records[(records.names == "") & records.people & (records.model == self.model)]
        order = np.unique(rows.prompt_index)
        axes = {axis.name: axis for axis in axes_of(spec, len(order))}
        self.axis: Axis = axes[self.attribute]
        self.spec = replace(spec, provenance={})
        self.prompt_N = np.searchsorted(order, rows.prompt_index)
        self.label_N = labels(rows, spec.attributes, (self.attribute,))
        self.images_P = np.bincount(self.prompt_N, minlength=len(order))
        self.group, self.group_N = None, np.zeros(len(rows), bool)
        if others := [name for name in names if name != self.attribute]:
            other_N = labels(rows, spec.attributes, (others[0],))
            rarest = int(np.argmin([(other_N == k).sum() or len(rows) for k in range(len(spec.attributes[others[0]]))]))
            self.group, self.group_N = f"{others[0]} {spec.attributes[others[0]][rarest]}", other_N == rarest

    @property
    def counts_PK(self) -> np.ndarray:
        return counts_of(self.prompt_N, self.label_N, len(self.images_P), len(self.axis.classes))

    def counting(self, E_KK: np.ndarray | None) -> MetricSpec:
        """Return the audit's spec, with its confusion counts multiplied by the errors E_KK, if these are given. If there are
        no counts, a thousand labelled faces, equally many of each class, without errors take their place."""
        confusion = dict(self.spec.confusion)
        if E_KK is not None:
            K = len(self.axis.classes)
            confusion[self.attribute] = np.asarray(confusion.get(self.attribute, np.eye(K) * 1000 / K), float) @ E_KK
        return replace(self.spec, confusion=confusion)


def once(suite: Suite, kind: str, rate: float, seed: int) -> dict:
    """Return the audit's numbers with misclassified faces: {uncounted, counted}."""
    K, rng = len(suite.axis.classes), np.random.default_rng([41, seed, int(1000 * rate)])
    chance_N = error_rates(kind, suite.label_N, suite.group_N, rate, suite.axis.classes)
    counts = counts_of(suite.prompt_N, misread(suite.label_N, chance_N, K, rng), len(suite.images_P), K)
    E_KK = transition(suite.label_N, chance_N, K)
    return {c: audited(counts, suite.images_P, suite.axis, suite.counting(E_KK if c == "counted" else None)) for c in COUNTED}


def verdict_once(suite: Suite, distance: float, kind: str, rate: float, seed: int) -> dict[str, str]:
    """Return the verdicts on a generator with this D by a classifier that has only these errors: {uncounted, counted}."""
    K, prompts = len(suite.axis.classes), len(suite.images_P)
    rng = np.random.default_rng([42, seed, int(1000 * rate), int(1000 * distance)])
    shares_PK = nearer(suite.counts_PK, suite.axis.target_PK, distance)
    prompt_N = np.repeat(np.arange(prompts), suite.images_P)
    label_N = (rng.random(len(prompt_N))[:, None] > shares_PK.cumsum(1)[prompt_N, :-1]).sum(1)
    chance_N = error_rates(kind, label_N, np.zeros(len(label_N), bool), rate, suite.axis.classes)
    counts = counts_of(prompt_N, misread(label_N, chance_N, K, rng), prompts, K)
    exact = replace(suite.spec, confusion={})
    counted = {suite.attribute: np.eye(K) * 1000 / K @ transition(label_N, chance_N, K)}
    specs = {"uncounted": exact, "counted": replace(exact, confusion=counted)}
    return {c: audited(counts, suite.images_P, suite.axis, specs[c])["verdict"] for c in COUNTED}


def measure(folder: Path, attribute: str | None, kept_in: Path) -> None:
    """Compute what the record lacks. A record of another audit is replaced."""
    suite = Suite(folder, attribute)
    about = {"audit": folder.as_posix(), "attribute": suite.attribute, "model": suite.model, "group": suite.group}
    about |= {"classes": list(suite.axis.classes), "prompts": len(suite.images_P), "images": int(suite.images_P.max())}
    about |= {"faces": int((suite.label_N >= 0).sum()), "delta": suite.spec.delta}
    record = read_record(kept_in) if kept_in.exists() else {}
    if record.get("about") != about:
        record = {"about": about, "as read": audited(suite.counts_PK, suite.images_P, suite.axis, suite.spec)}
        record |= {"numbers": {}, "verdicts": {}}
    every = [kind for kind in kinds(suite.axis.classes) if kind != "by group" or suite.group]
    for seed, kind, rate in track(list(product(SEEDS, every, RATES)), "numbers"):
        if (key := key_of(kind, rate, seed)) not in record["numbers"]:
            record["numbers"][key] = once(suite, kind, rate, seed)
            write_json(kept_in, record)
    cells = [("uniform", 0.0), *product((kind for kind in every if kind != "by group"), RATES)]
    for seed, distance, (kind, rate) in track(list(product(VERDICT_SEEDS, DISTANCES, cells)), "verdicts"):
        if (key := f"{distance}/{key_of(kind, rate, seed)}") not in record["verdicts"]:
            record["verdicts"][key] = verdict_once(suite, distance, kind, rate, seed)
            write_json(kept_in, record)


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audit", nargs="?", type=Path, help="the folder of a finished audit")
    parser.add_argument("--attribute", help="default: the first with a target")
    add_study(parser, "reading_errors")
    args = parser.parse_args(argv)

    def measured(kept: Path) -> None:
        if args.audit is None:
            raise FairDiffError("AUDIT: found none, allowed: the folder of a finished audit, or --render")
        measure(args.audit, args.attribute, kept)

    def made(found: dict) -> Page:
        return page(found, shlex.join(["python", "scripts/reading_errors.py", found["about"]["audit"]]))

    conclude(args, "reading_errors", measured, made)


if __name__ == "__main__":
    main()
