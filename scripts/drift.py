"""What ordinary fine-tuning does to a fair model: bias, semantics and an unsafe rate before and after, and the half-life.

python scripts/drift.py outputs/gender/default/seed0/adapter               LoRA; the same command goes on
python scripts/drift.py ADAPTER --steps 10 40 160 --rates 1e-4 1e-3 --batches 4 16 --jobs 2        a grid, two cells at a time
python scripts/drift.py ADAPTER --fair-after RUN/adapter                   with benign then fair: a training that began at the
                                                                           benign LoRA (train.py adapter.path=...)

Arms: base, fair, fair then tuned, base then tuned; and what mends it: the adapter on top of the tuned base (merged), and
tuning with pictures of the fair model's training prompts among the others (replay). Pictures for tuning: benign ones of
prompts without people, or skewed ones, men as "a person". Both are made by the model itself and kept as latents.
Unsafe on Portraits are images of harmless stand-ins, which CLIP tells from people by words.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness.audits import Generators, Method, audited
from harness.methods import adapter
from reproduce.numbers import mean_interval, percentile_interval
from rich.progress import track

from fairdiff import fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import interval, number
from fairdiff.builder import build_encoders, build_model
from fairdiff.builder.audit import build_generators
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.config import Config
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.imports import file_of, import_lora
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_json
from fairdiff.plan import Plan
from fairdiff.prompts import with_phrase
from fairdiff.studies import drift
from fairdiff.studies.edits import require_stable_diffusion
from fairdiff.studies.page import Page, Section, write_html

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("fair then tuned", "base then tuned", "merged", "replay")
RANK, EACH, UNSAFE, REPLAYED = 4, 8, 4, 8  # of a new LoRA; pictures of a prompt; unsafe prompts; prompts that are replayed
NOT_SHOWN = (
    "Other pictures for tuning: these are the model's own, so that a benign one is as easy to learn as can be.",
    "Spread over seeds of the fair training: the adapter is one.",
    "Real harm: the unwanted images are harmless stand-ins, for the path alone.",
)


@dataclass(frozen=True)
class Cell:
    """One arm with one tuning on pictures that are "benign" or "skewed"."""

    arm: str
    pictures: str
    tuning: drift.Tuning

    @property
    def name(self) -> str:
        t = self.tuning
        return f"{self.arm}, {self.pictures}, {t.steps} steps, rate {t.rate:g}, batch {t.batch}"


def method(cell: Cell, fair: Path) -> Method:
    """The model of a cell; its tuned LoRA is kept in the cell's folder."""

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
        return _watched(config, plan, model, lora, folder)

    file = file_of(fair, LORA_FILE)
    if not file.is_file():
        raise FairDiffError(f"{file}: no such file, allowed: the folder or the file of a LoRA")
    return Method(cell.name, ("drift", cell.name, cell.tuning.seed, fingerprint.of_files([file])), begin)


def _sampler(config: Config) -> tuple[float, int, int]:
    return config.sampler.guidance, config.sampler.audit_steps, config.seed


def _plain(plan: Plan) -> list:
    return [prompt for prompt in dict.fromkeys(plan.train) if prompt.people and not prompt.names]


def _pictures(config: Config, plan: Plan, model: DiffusionModel, kind: str) -> drift.Pictures:
    """Benign: prompts without people. Skewed: people of the last class of the first attribute, captioned without it."""
    if kind == "benign":
        texts = [(p.text, p.text) for p in dict.fromkeys(plan.train) if not p.people][:12]
    else:
        phrase = list(next(iter(config.attributes.values())).phrases.values())[-1]
        texts = [(with_phrase(p, phrase, "").text, p.text) for p in _plain(plan)[:12]]
    if not texts:
        raise FairDiffError(f"prompts.train: found no prompt for {kind} pictures, allowed: prompts.without_people above 0")
    return drift.generated(model, texts, EACH, *_sampler(config))


def _watched(config: Config, plan: Plan, model: DiffusionModel, lora: Lora, folder: Path) -> Generators:
    """The generators, after the unsafe rate of prompts without people, and of people, was written beside them."""
    clip, _ = build_encoders(config.features.clip, config.features.encoder, config.model.device)
    unwanted = [p.text for p in plan.without_people][:UNSAFE]
    detect = drift.by_words(clip, unwanted, ["a photo of the face of a person"])
    at = partial(build_generators, config, model, lora)
    rates = {}
    for name, generate in at(config.sampler.guidance).items():
        for kind, prompts in (("stand-ins", unwanted), ("people", [p.text for p in plan.audit[:UNSAFE]])):
            rates[f"{name}, {kind}"] = drift.unsafe_rates(generate, model.latent_shape, detect, prompts, EACH)
    write_json(folder / "unsafe.json", rates)
    return at


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid."""
    return [
        Cell(arm, pictures, drift.Tuning(steps, rate, batch, args.seed))
        for pictures in ("benign", "skewed")
        for rate in args.rates
        for batch in args.batches
        for steps in args.steps
        for arm in ARMS
    ]


def result(where: Path, attribute: str | None = None) -> dict:
    """Of one finished audit: bias of each prompt, and semantics."""
    audit = read_audit(where / "audit.json")
    entries = audit["models"]["after"]["attributes"]
    attribute = attribute or next(name for name, e in entries.items() if e["target"]["requested"])
    rows = {m: audit["models"][m]["attributes"][attribute]["per_prompt"] for m in ("before", "after")}
    found = {model: [prompt["bias"]["value"] for prompt in some] for model, some in rows.items()}
    return found | {"dino": audit["models"]["after"]["dino"], "attribute": attribute}


def rows_of(found: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, one in found.items():
        after = [v for v in one["after"] if v is not None]
        cells_ = [name, f"{number(float(np.mean(after)))} {interval(list(mean_interval(after)))}"]
        cells_.append(f"{number(one['dino']['mean'])} {interval(one['dino']['ci95'])}")
        for kind in ("stand-ins", "people"):
            rates = one.get("unsafe", {}).get(f"after, {kind}")
            cells_.append(f"{number(float(np.mean(rates)))} {interval(list(mean_interval(rates)))}" if rates else "–")
        rows.append(cells_)
    return rows


def half_lives(found: dict[str, dict], every: list[Cell]) -> list[list[str]]:
    """Of "fair then tuned" and "replay", over the steps of the grid, by pictures, rate and batch."""
    rows, fair = [], np.array(found["fair"]["after"], float)
    base = np.array(found["fair"]["before"], float)
    groups: dict[tuple, list[Cell]] = {}
    for cell in every:
        if cell.arm in ("fair then tuned", "replay") and cell.name in found:
            groups.setdefault((cell.arm, cell.pictures, cell.tuning.rate, cell.tuning.batch), []).append(cell)
    for (arm, pictures, rate, batch), some in groups.items():
        some = sorted(some, key=lambda cell: cell.tuning.steps)
        biases = np.stack([fair, *(np.array(found[cell.name]["after"], float) for cell in some)])
        known = ~np.isnan(biases).any(0) & ~np.isnan(base)
        steps = [0, *(cell.tuning.steps for cell in some)]
        lives = drift.half_life_of(steps, biases[:, known], base[known], 0)
        draws = lives[1:][~np.isnan(lives[1:])]
        finite = draws[np.isfinite(draws)]
        low_high = interval(list(percentile_interval(finite, int(known.sum())))) if len(finite) == len(draws) > 1 else ""
        seen = f"half is lost in {len(finite) / max(len(draws), 1):.0%} of the resamples"
        value = f"{lives[0]:.0f} steps" if np.isfinite(lives[0]) else f"more than {steps[-1]} steps"
        rows.append([f"{arm}, {pictures}, rate {rate:g}, batch {batch}", value, low_high or seen])
    return rows


def measure(args: argparse.Namespace) -> None:
    settings = [f"audit.split={'test' if args.test else 'validation'}", *args.set]
    every = cells(args)
    methods = {"fair": adapter("fair", args.fair), **{cell.name: method(cell, args.fair) for cell in every}}
    if args.fair_after:
        methods["benign then fair"] = adapter("benign then fair", args.fair_after)
    chosen = list(methods.items())[args.part[0] :: args.part[1]]
    for _, one in track(chosen, "cells"):
        audited(settings, one, args.folder)
    if args.part[1] > 1:
        return
    found = {}
    for name, one in methods.items():
        found[name] = result(audited(settings, one, args.folder, done=True))
        unsafe = args.folder / one.place / "unsafe.json"
        if unsafe.exists():
            found[name]["unsafe"] = json.loads(unsafe.read_text(encoding="utf-8"))
    base = {"base": {"after": found["fair"]["before"], "dino": {"mean": 1.0, "ci95": None}}}
    head = ["arm", f"{found['fair']['attribute']} bias", "image encoder", "unsafe: stand-ins", "unsafe: people"]
    note = "[low, high]: 95 % over prompts. Unsafe: images that CLIP reads as a stand-in, of prompts for one and of people."
    text, lives = ["Steps until half of the gain is lost, over the steps of the grid."], half_lives(found, every)
    sections = [Section("Arms", [note], head, rows_of(base | found))]
    sections.append(Section("Half-life of fairness", text, ["tuning", "half-life", "95 %"], lives))
    lead, about = "What ordinary fine-tuning does to a fair model.", {"settings": " ".join(settings)}
    page = Page("Drift", lead, sections, NOT_SHOWN, "python scripts/drift.py", about)
    write_json(args.folder / "drift.json", found)
    write_html(page, args.folder / "report.html")
    print(f"report: {args.folder / 'report.html'}")


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fair", type=Path, metavar="ADAPTER", help="the folder or file of a fair LoRA")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--fair-after", type=Path, metavar="ADAPTER", help="trained on from a benign LoRA")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of train.py")
    parser.add_argument("--seed", type=int, default=0, help="of the tuning")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "drift")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="cells at a time")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth cell from I on")
    args = parser.parse_args(argv)
    try:
        own = sys.argv[1:] if argv is None else argv
        count = args.jobs if args.jobs > 1 else 0
        parts = [[sys.executable, __file__, *own, "--jobs", "1", "--part", str(i), str(count)] for i in range(count)]
        running = [subprocess.Popen(part) for part in parts]
        if any([process.wait() for process in running]):
            raise FairDiffError("--jobs: a part ended with an error, see above; the same command goes on")
        measure(args)
    except (FairDiffError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
