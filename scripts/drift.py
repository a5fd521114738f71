"""Measure the effect of ordinary fine-tuning on a fair model: bias, semantics, unsafe rate, and the half-life of fairness.

python scripts/drift.py outputs/gender/default/seed0/adapter               LoRA; repeat it to continue
python scripts/drift.py ADAPTER --steps 10 40 160 --rates 1e-4 1e-3 --batches 4 16 --jobs 2        a grid, two cells at a time
python scripts/drift.py ADAPTER --fair-after RUN/adapter                   also "benign then fair": an adapter trained from
                                                                           the benign LoRA (train.py adapter.path=...)
python scripts/drift.py ADAPTER --detector PIPELINE_FOLDER --unsafe-prompts FILE       the pipeline's own safety checker
python scripts/drift.py ADAPTER --detector CLASSIFIER --unsafe-labels nsfw --unsafe-prompts FILE      or an image classifier
python scripts/drift.py --render                                           only the page, outputs/reproduced/studies/drift.md
python scripts/drift.py ADAPTER --publish                                  write docs/studies/drift.md and its record instead

The arms are base, fair, fair then tuned, base then tuned, and two remedies: the adapter on top of the tuned base (merged),
and tuning with additional images of the fair model's training prompts (replay). The images for tuning are benign (prompts
without people) or skewed (images of the last class, captioned without it). The model itself generates both.
Without a detector, harmless images stand for unsafe ones: prompts without people, which CLIP distinguishes from people.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from harness.audits import Generators, Method, audited, prompt_biases
from harness.drift_page import page
from harness.publish import add_study, conclude
from rich.progress import track

from fairdiff import fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import targeted
from fairdiff.builder import build_encoders, build_model
from fairdiff.builder.audit import build_generators
from fairdiff.cli.ending import ending
from fairdiff.config import Config
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.imports import file_of, import_lora
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_json
from fairdiff.plan import Plan
from fairdiff.prompts import with_phrase
from fairdiff.studies import detectors, drift
from fairdiff.studies.edits import require_stable_diffusion

KINDS = ("benign", "skewed")
ARMS = ("fair then tuned", "base then tuned", "merged", "replay")
RANK, EACH, UNSAFE, REPLAYED = 4, 8, 4, 8  # rank of a new LoRA; images per prompt; unsafe prompts; replayed prompts


@dataclass(frozen=True)
class Cell:
    """One arm with one tuning; `pictures` are "benign" or "skewed"."""

    arm: str
    pictures: str
    tuning: drift.Tuning

    @property
    def name(self) -> str:
        t = self.tuning
        return f"{self.arm}, {self.pictures}, {t.steps} steps, rate {t.rate:g}, batch {t.batch}"


@dataclass(frozen=True)
class Watch:
    """How unsafe images are detected. detector: a folder or hub id, None for CLIP with texts. labels: the classifier's unsafe
    labels; if empty, the detector is a pipeline's safety checker. prompts: unsafe ones; if empty, some without people.
    """

    detector: str | None = None
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """A description for the page."""
        if self.detector is None:
            return "CLIP, by words"
        return f"{self.detector}: {', '.join(self.labels)}" if self.labels else f"the safety checker of {self.detector}"

    def load(self, config: Config, unwanted: list[str]) -> detectors.Detector:
        device = config.model.device
        if self.detector is None:
            clip, _ = build_encoders(config.features.clip, config.features.encoder, device)
            return detectors.by_words(clip, unwanted, ["a photo of the face of a person"])
        try:
            if self.labels:
                return detectors.by_labels(self.detector, self.labels, device)
            return detectors.by_safety_checker(self.detector, device)
        except ValueError as error:
            raise FairDiffError(f"--detector: {error}") from None


def fair_method(name: str, path: Path, watch: Watch) -> Method:
    """Return the method that audits a saved LoRA and measures the unsafe rates of the model without it too."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        require_stable_diffusion(model)
        return _watched(config, plan, model, import_lora(model, [path], [1.0]), folder, watch, base=True)

    return Method(name, ("drift", name, watch, _key_of(path)), begin)


def method(cell: Cell, fair: Path, watch: Watch) -> Method:
    """Return the method that tunes and audits the model of a cell. The tuned LoRA is saved in the cell's folder."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        require_stable_diffusion(model)
        pictures = _pictures(config, plan, model, cell.pictures)
        lora = import_lora(model, [fair], [1.0]) if cell.arm in ("fair then tuned", "replay") else None
        if cell.arm == "replay":
            texts = [(p.text, p.text) for p in _plain(plan)[:REPLAYED]]
            pictures = pictures + drift.generated(model, texts, EACH, *_sampler(config))
        lora = lora or Lora(model, ["unet"], RANK, RANK, torch.Generator().manual_seed(cell.tuning.seed))
        drift.tune(model, lora, pictures, cell.tuning)
        with atomic_path(folder / "adapter") as temporary:
            temporary.mkdir()
            lora.save(temporary)
        if cell.arm == "merged":
            model = build_model(config)  # without the tuned LoRA
            lora = import_lora(model, [folder / "adapter", fair], [1.0, 1.0])
        return _watched(config, plan, model, lora, folder, watch, base=False)

    return Method(cell.name, ("drift", cell.name, cell.tuning.seed, watch, _key_of(fair)), begin)


def _key_of(path: Path) -> str:
    file = file_of(path, LORA_FILE)
    if not file.is_file():
        raise FairDiffError(f"{file}: no such file, allowed: the folder or the file of a LoRA")
    return fingerprint.of_files([file])


def _sampler(config: Config) -> tuple[float, int, int]:
    return config.sampler.guidance, config.sampler.audit_steps, config.seed


def _plain(plan: Plan) -> list:
    return [prompt for prompt in dict.fromkeys(plan.train) if prompt.people and not prompt.names]


def _pictures(config: Config, plan: Plan, model: DiffusionModel, kind: str) -> drift.Pictures:
    """Generate benign images (prompts without people) or skewed ones.

    Skewed images show people of the last class of the first attribute, captioned without it.
    """
    if kind == "benign":
        texts = [(p.text, p.text) for p in dict.fromkeys(plan.train) if not p.people][:12]
    else:
        name, attribute = next(iter(config.attributes.items()))
        if not attribute.phrases:
            raise FairDiffError(f"attributes.{name}.phrases: found none, allowed for skewed pictures: words for every class")
        phrase = attribute.phrases[attribute.classes[-1]]
        texts = [(with_phrase(p, phrase, "").text, p.text) for p in _plain(plan)[:12]]
    if not texts:
        raise FairDiffError(f"prompts.train: found no prompt for {kind} pictures, allowed: prompts.without_people above 0")
    return drift.generated(model, texts, EACH, *_sampler(config))


def _watched(
    config: Config, plan: Plan, model: DiffusionModel, lora: Lora, folder: Path, watch: Watch, *, base: bool
) -> Generators:
    """Write the unsafe rates for the unsafe prompts and for prompts of people to unsafe.json, and return the generators.

    base: whether the model without the adapter is measured too.
    """
    unwanted = list(watch.prompts) or [p.text for p in plan.without_people][:UNSAFE]
    detect = watch.load(config, unwanted)
    at = partial(build_generators, config, model, lora)
    asked = {"asked for": unwanted, "people": [p.text for p in plan.audit[:UNSAFE]]}
    rates = {}
    for name in ("before", "after") if base else ("after",):
        generate = at(config.sampler.guidance)[name]
        rates[name] = {
            kind: detectors.unsafe_rates(generate, model.latent_shape, detect, prompts, EACH)
            for kind, prompts in asked.items()
        }
    write_json(folder / "unsafe.json", rates)
    return at


def cells(args: argparse.Namespace) -> list[Cell]:
    """Return the cells of the grid."""
    return [
        Cell(arm, pictures, drift.Tuning(steps, rate, batch, args.seed))
        for pictures in sorted(set(args.pictures))
        for rate in args.rates
        for batch in args.batches
        for steps in sorted(set(args.steps))
        for arm in ARMS
    ]


def arm_of(where: Path, attribute: str, model: str = "after") -> dict:
    """Return the numbers of a finished audit for the page: the bias of each prompt, and the semantics."""
    audit = read_audit(where / "audit.json")
    semantics = audit["models"]["after"]["dino"] if model == "after" else {"mean": 1.0, "ci95": None}
    return {"bias": prompt_biases(audit, model, attribute), "semantics": semantics}


def measure(args: argparse.Namespace) -> dict | None:
    """Audit the cells and return the numbers of all arms, None if this process has only a part of the cells."""
    split, every = "test" if args.test else "validation", cells(args)
    settings = [f"audit.split={split}", *args.set]
    watch = Watch(args.detector, tuple(args.unsafe_labels), read_lines(args.unsafe_prompts))
    methods = {"fair": fair_method("fair", args.fair, watch)} | {c.name: method(c, args.fair, watch) for c in every}
    if args.fair_after:
        methods["benign then fair"] = fair_method("benign then fair", args.fair_after, watch)
    # files beside a cell's audit depend on the settings and the fair LoRA, so the folder is named by them
    kept = {
        name: args.folder / fingerprint.of_values(settings, args.seed, *one.key[-2:])[:8] / one.place
        for name, one in methods.items()
    }
    start, step = args.part
    chosen = list(methods.items())[start::step]
    places = {name: audited(settings, one, kept[name].parent) for name, one in track(chosen, "cells")}
    if step > 1:
        return None
    audit = read_audit(places["fair"] / "audit.json")
    attribute = targeted(audit)[0]
    arms = {"base": arm_of(places["fair"], attribute, "before")}
    arms |= {name: arm_of(where, attribute) for name, where in places.items()}
    for name in methods:
        rates = json.loads((kept[name] / "unsafe.json").read_text(encoding="utf-8"))
        arms[name]["unsafe"] = rates["after"]
        if name == "fair":
            arms["base"]["unsafe"] = rates["before"]
    for cell in every:
        arms[cell.name]["tuning"] = {"arm": cell.arm, "pictures": cell.pictures} | asdict(cell.tuning)
    about = {"split": split, "settings": settings, "images": audit["images_per_prompt"], "prompts": audit["prompts"]}
    return {"attribute": attribute, "seed": args.seed, "detector": watch.said, "arms": arms} | about


def read_lines(file: Path | None) -> tuple[str, ...]:
    """Return the prompts of a file, one per line. FairDiffError if there are none."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FairDiffError(f"--unsafe-prompts: {file}: cannot be read ({error})") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise FairDiffError(f"--unsafe-prompts: {file}: found no prompt, allowed: one a line")
    return found


def check(args: argparse.Namespace) -> None:
    """Raise FairDiffError for impossible arguments."""
    if args.fair is None:
        raise FairDiffError("ADAPTER: found none, allowed: the folder or the file of a fair LoRA, or --render")
    if args.unsafe_labels and args.detector is None:
        raise FairDiffError("--unsafe-labels: found without --detector, allowed: beside the classifier that has them")
    whole = (("--steps", args.steps, 0), ("--batches", args.batches, 1), ("--seed", [args.seed], 0))
    for option, values, least in whole:
        if wrong := [value for value in values if value < least]:
            raise FairDiffError(f"{option}: found {wrong[0]}, allowed: {least} or more")
    if wrong := [rate for rate in args.rates if not 0 < rate < 1]:
        raise FairDiffError(f"--rates: found {wrong[0]:g}, allowed: above 0, below 1")


def in_parts(argv: list[str], jobs: int) -> None:
    """Distribute the cells over `jobs` processes: process i takes every jobs-th cell. FairDiffError if one fails."""
    parts = [[sys.executable, __file__, *argv, "--jobs", "1", "--part", str(i), str(jobs)] for i in range(jobs)]
    running = [subprocess.Popen(part) for part in parts]
    if any([process.wait() for process in running]):
        raise FairDiffError("--jobs: a part ended with an error, see above; the same command goes on")


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fair", nargs="?", type=Path, metavar="ADAPTER", help="the folder or file of a fair LoRA")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--pictures", choices=KINDS, nargs="+", default=KINDS, help="for the tuning; default: both")
    parser.add_argument("--fair-after", type=Path, metavar="ADAPTER", help="trained on from a benign LoRA")
    parser.add_argument("--detector", metavar="PATH", help="a classifier, or a pipeline's folder with a safety checker")
    parser.add_argument("--unsafe-labels", nargs="+", default=[], metavar="LABEL", help="of the classifier")
    parser.add_argument("--unsafe-prompts", type=Path, metavar="FILE", help="one a line; default: some without people")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    parser.add_argument("--seed", type=int, default=0, help="of the tuning")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    add_study(parser, "drift")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="cells at a time")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth cell from I on")
    args = parser.parse_args(argv)

    def measured(kept: Path) -> bool:
        check(args)
        if args.jobs > 1:
            in_parts(sys.argv[1:] if argv is None else argv, args.jobs)
        found = measure(args)
        if found is not None:
            write_json(kept, found)
        return found is not None

    conclude(args, "drift", measured, lambda found: page(found, "python scripts/drift.py"))


if __name__ == "__main__":
    main()
