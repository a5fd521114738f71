"""Measure how much label noise of the training judge debiasing tolerates: train with noisy judges, audit with a clean one.

python scripts/judge_noise.py                               no noise, and 10 to 40 % of all faces; repeat it to continue
python scripts/judge_noise.py --rates 0 0.2 --seeds 0 1     other shares of wrong labels; seeds of labels, judge and adapter
python scripts/judge_noise.py --kinds uniform "only male"   wrong labels in one class only, or more often in one group
python scripts/judge_noise.py --set adapter=lora_text       with other settings of train.py
python scripts/judge_noise.py --render                      only the page; --publish writes docs/studies/judge_noise.md

Needs renders of Portraits: scripts/build_portraits/make_data.py --images 8000 --out outputs/judge_noise/renders, or others
with --renders. For each cell, some gender labels are flipped, and a judge with the architecture of the embedded training
judge is trained on them. train.py then trains an adapter with this judge. The embedded audit judge, which was trained
without flipped labels, audits the adapter on validation prompts. All files are in outputs/judge_noise, the numbers for the
page in outputs/reproduced/measurements/studies/judge_noise.json.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from harness.audits import prompt_biases
from harness.judge_noise_page import AUDIT, JUDGE_STEPS, RATES, SEEDS, key_of, page
from harness.labelled_renders import renders_hash, require_renders
from harness.noisy_judges import ATTRIBUTE, KINDS, errors_of, flipped, make_judge, read_faces
from harness.publish import add_study, conclude, read_record
from reproduce.place import ROOT
from rich.progress import track

from classifiers.data import LabelledFaces
from classifiers.training import FitPlan
from fairdiff import builder, fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.cli.command_line import key_of as key_of_setting
from fairdiff.cli.compose import composed, overrides_of, with_defaults
from fairdiff.cli.ending import ending
from fairdiff.config import Config
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.jobs import train_job
from fairdiff.training.tracking import read_metrics

OTHERS = ("race", "age")  # attributes without a target
OWN = ("judge.path", "seed", "hydra.run.dir")  # settings that differ between cells


@dataclass(frozen=True)
class Study:
    """What all cells share: the renders, the settings of the runs, the steps of the judges, and the output folder."""

    renders: Path
    settings: list[str]
    judge_steps: int
    folder: Path

    @cached_property
    def config(self) -> Config:
        """The configuration that all runs share."""
        return composed([*self.settings, *self.of_a_run(Path("judge"), 0, Path("run"))])[0]

    @cached_property
    def faces(self) -> tuple[LabelledFaces, LabelledFaces]:
        """The training faces and the held-out faces."""
        return read_faces(self.renders, builder.build_detector(self.config))

    @cached_property
    def about(self) -> dict:
        """What identifies a record: it holds cells with these values only."""
        known = {"renders": renders_hash(self.renders), "settings": self.settings, "judge_steps": self.judge_steps}
        return known | {"steps": self.config.steps}

    def judge(self, kind: str, rate: float, seed: int) -> tuple[Path, dict]:
        """Train a judge on these labels, and return its folder and its numbers for the page."""
        train, held_out = self.faces
        options = self.config.detector
        plan = FitPlan(self.judge_steps, seed=seed, expand=options.expand)
        label_N = flipped(train.labels, kind, rate, seed)
        made_of = fingerprint.of_values(self.about["renders"], kind, rate, vars(plan), vars(options))
        folder = self.folder / "judges" / f"{_place(kind, rate, seed)}-{made_of[:8]}"
        make_judge(folder, train, label_N, plan)
        wrong = float((label_N != train.labels[ATTRIBUTE]).mean())
        about = {"wrong": wrong, "faces": len(train)} | errors_of(folder, held_out, plan.expand)
        return folder, about

    def of_a_run(self, judge: Path, seed: int, folder: Path) -> list[str]:
        """Return the settings in which runs differ."""
        return overrides_of({"judge": {"path": str(judge)}, "seed": seed, "hydra": {"run": {"dir": str(folder)}}})

    def trained(self, judge: Path, kind: str, rate: float, seed: int) -> Path:
        """Train and audit an adapter with this training judge unless it is done, and return the run folder."""
        made_of = fingerprint.of_values(self.settings, overrides_of({"judge": {"path": str(judge)}, "seed": seed}))
        place = self.folder / "runs" / f"{_place(kind, rate, seed)}-{made_of[:8]}"
        config, folder = composed([*self.settings, *self.of_a_run(judge, seed, place)])
        train_job(config, folder)
        return folder

    def cell(self, kind: str, rate: float, seed: int) -> dict:
        """Return the numbers of a judge, its run and its audit for the page."""
        judge, about = self.judge(kind, rate, seed)
        run = self.trained(judge, kind, rate, seed)
        (file,) = run.glob("audits/*/audit.json")  # one audit: the folder's name covers the audit's settings
        return {"judge": about, "run": labels_kept(run)} | outcome(read_audit(file))


def _place(kind: str, rate: float, seed: int) -> str:
    """Return the folder name of a cell."""
    return key_of(kind, rate, seed).replace("/", "-").replace(" ", "_")


def labels_kept(run: Path) -> dict[str, int]:
    """Return the numbers of faces, of labels that were confident enough to be used, and of steps of a training."""
    rows = read_metrics(run / "metrics.jsonl")
    return {key: sum(row[key] for row in rows) for key in ("faces", "kept")} | {"steps": len(rows)}


def outcome(audit: dict) -> dict:
    """Return an audit's numbers for the page.

    bias: by attribute, each prompt's before and after. low_confidence (of faces), no_face (of images): [share, low, high].
    """
    models = {name: audit["models"][name] for name in ("before", "after")}
    attributes = [ATTRIBUTE, *(name for name in OTHERS if name in models["after"]["attributes"])]
    low = {name: model["attributes"][ATTRIBUTE]["low_confidence"] for name, model in models.items()}
    return {
        "bias": {a: {name: prompt_biases(audit, name, a) for name in models} for a in attributes},
        "floor": models["after"]["attributes"][ATTRIBUTE]["bias"]["floor"],
        "low_confidence": {name: [found["rate"], *found["ci95"]] for name, found in low.items()},
        "no_face": {name: [model["no_face"]["rate"], *model["no_face"]["ci95"]] for name, model in models.items()},
        "dino": models["after"]["dino"]["mean"],
        "size": [audit["prompts"], audit["images_per_prompt"]],
        "judges_differ": audit["judge"]["same_as_training_judge"] is False,
    }


def measure(args: argparse.Namespace, kept_in: Path) -> None:
    """Compute the cells that the record lacks, and write each at once. FairDiffError for a record of other settings."""
    require_renders(args.renders)
    steps = [] if args.steps is None else [f"steps={args.steps}"]
    study = Study(args.renders, with_defaults([*args.set, *steps], [*AUDIT]), args.judge_steps, args.folder)
    record = read_record(kept_in) if kept_in.exists() else {"about": study.about, "cells": {}}
    if record["about"] != study.about:
        differ = next(key for key in study.about if record["about"].get(key) != study.about[key])
        raise FairDiffError(
            f"{kept_in}: holds cells of {differ} {json.dumps(record['about'].get(differ))}, found "
            f"{json.dumps(study.about[differ])}, allowed: the same, another --docs, or no such file"
        )
    asked = dict.fromkeys((s, k if r else "none", r) for s, r, k in product(args.seeds, sorted(args.rates), args.kinds))
    for seed, kind, rate in track(list(asked), "cells"):
        if (key := key_of(kind, rate, seed)) not in record["cells"]:
            record["cells"][key] = study.cell(kind, rate, seed)
            write_json(kept_in, record)


def check(args: argparse.Namespace) -> None:
    """Raise FairDiffError for impossible arguments."""
    if wrong := [rate for rate in args.rates if not 0 <= rate < 0.5]:
        raise FairDiffError(f"--rates: found {wrong[0]:g}, allowed: from 0, below 0.5")
    for option, values, least in (("--seeds", args.seeds, 0), ("--judge-steps", [args.judge_steps], 1)):
        if wrong := [value for value in values if value < least]:
            raise FairDiffError(f"{option}: found {wrong[0]}, allowed: {least} or more")
    if wrong := [override for override in args.set if key_of_setting(override) in OWN]:
        raise FairDiffError(f"--set: found {wrong[0]}, allowed: settings but {', '.join(OWN)}, of which a cell has its own")


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="shares of wrong labels; default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["uniform"], help="default: uniform")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS], help="of labels, judge and adapter; default: 0")
    parser.add_argument("--steps", type=int, help="of each adapter; default: those of train.py")
    parser.add_argument("--judge-steps", type=int, default=JUDGE_STEPS, help="of each judge; default: %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    place = ROOT / "outputs" / "judge_noise" / "renders"
    parser.add_argument("--renders", type=Path, default=place, help="folder of shards; default: %(default)s")
    add_study(parser, "judge_noise")
    args = parser.parse_args(argv)

    def measured(kept_in: Path) -> None:
        check(args)
        torch.set_num_threads(1)
        measure(args, kept_in)

    conclude(args, "judge_noise", measured, page)


if __name__ == "__main__":
    main()
