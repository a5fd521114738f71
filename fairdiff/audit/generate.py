"""Generate or read the images of an audit and measure them, with the same prompts and noise for every model.

The noise of image i of a prompt depends on (seed, prompt, i) alone. So images before and after form pairs, and neither the
batch size nor the order of the prompts changes an image. Models are audited prompt by prompt; several processes work on
different prompts at a time. The records of a finished prompt are on disk. They are reused until something they depend on
changes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from classifiers.pictures import eight_bits
from fairdiff.audit.measure import Measured, Measurer, cosine, cosine_to_others, joined, measure
from fairdiff.audit.records import MODELS, STRIP, RecordStore, fingerprint, prompt_key, save_records, wording_column
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_text

# (prompt, noise_BCHW) -> image_BCHW in [0, 1]
Generate = Callable[[str, Tensor], Tensor]
# (prompt, seed, indices, latent shape) -> noise [len(indices), *shape]; for given images, their numbers only
Noise = Callable[[str, int, Iterable[int], tuple[int, ...]], Tensor]


class Prompt(Protocol):
    text: str
    family: str
    subject: str
    people: bool
    names: str


@dataclass(frozen=True)
class AuditPlan:
    """The plan of an audit: prompts, numbers of images, seed and storage.

    prompts: prompts that show people. named: prompts that name a class of people (`Prompt.names`, such as "gender.female").
    without_people: prompts without people, whose images must not change. hashes: SHA-256 of "before", "start", "after" and
    "judge" (detector and encoders included); a changed hash makes old records stale. thumbnail: largest width in pixels of
    the first images in the report. shared: folder in which runs share their records of "before", so that a sweep generates
    them once. world: the processes; the first one reads and writes all files. given: for images that are not generated,
    (model, prompt) -> batches of image numbers of one size. keep: whether the images are written too, in the layout of
    `fairdiff/pictures.py`. They are then rounded to 8 bits before they are measured, so that an audit of the files is equal.
    """

    prompts: Sequence[Prompt]
    without_people: Sequence[Prompt]
    attributes: dict[str, tuple[str, ...]]
    images_per_prompt: int
    few_images: int
    batch_size: int
    seed: int
    latent_shape: tuple[int, ...]
    hashes: dict[str, str]
    named: Sequence[Prompt] = ()
    thumbnail: int = 96
    shared: Path | None = None
    world: World = ALONE
    given: Mapping[tuple[str, str], Sequence[Sequence[int]]] | None = None
    keep: bool = False

    @property
    def every(self) -> list[Prompt]:
        """Return all prompts in the order of the records."""
        return [*self.prompts, *self.named, *self.without_people]

    def images_of(self, prompt: Prompt) -> int:
        """Return the number of images of one prompt, `few_images` if it names a class or is without people."""
        return self.images_per_prompt if prompt.people and not prompt.names else self.few_images

    @property
    def images_per_model(self) -> int:
        """Return how many images one model generates."""
        return sum(self.images_of(prompt) for prompt in self.every)

    def batches(self, model: str, prompt: Prompt) -> list[Sequence[int]]:
        """Return the image numbers of one prompt in batches, which are measured together."""
        if self.given is not None:
            return list(self.given[model, prompt.text])
        images = self.images_of(prompt)
        return [range(start, min(start + self.batch_size, images)) for start in range(0, images, self.batch_size)]

    def numbers(self, model: str, prompt: Prompt) -> list[int]:
        """Return the image numbers of one prompt in ascending order; a number has the same noise for all models."""
        return sorted(index for batch in self.batches(model, prompt) for index in batch)

    def count(self, models: Iterable[str]) -> int:
        """Return how many images these models have together."""
        return sum(len(self.numbers(model, prompt)) for model in models for prompt in self.every)


def run_audit(
    plan: AuditPlan,
    generators: dict[str, Generate],
    measurer: Measurer,
    noise: Noise,
    folder: Path,
    on_images: Callable[[int], None],
) -> pd.DataFrame:
    """Audit some models and return all records, also written to `folder`/records.parquet.

    `generators` has some of the keys "before", "start" and "after". The records of "before" must be in the same folder, from
    this call or an earlier one, because the other models are compared with it. `on_images(n)` is called whenever n images are
    finished or found finished. FairDiffError: no prompt, a prompt twice, a judge with other classes, images that are not
    finite or not in [0, 1].
    """
    _check(plan, generators, measurer)
    auditor = _Auditor(plan, measurer, noise, RecordStore(Path(folder) / "records"), on_images, Path(folder) / "images")
    for model in (m for m in MODELS if m in generators):
        auditor.audit(model, generators[model])
    records = None
    if plan.world.first:
        models = [m for m in MODELS if m == "before" or m in generators]
        records = auditor.collect(models, [prompt.text for prompt in plan.every])
        if plan.keep:
            auditor.write_manifest(models)
        save_records(Path(folder) / "records.parquet", records)
    return plan.world.of_first(records)


def _check(plan: AuditPlan, generators: dict[str, Generate], measurer: Measurer) -> None:
    if not plan.prompts:
        raise FairDiffError("audit: the list of prompts is empty")
    if not generators or not set(generators) <= set(MODELS):
        raise FairDiffError(f"audit: found models {sorted(generators)}, allowed: {', '.join(MODELS)}")
    texts = Counter(prompt.text for prompt in plan.every)
    twice = [text for text, times in texts.items() if times > 1]
    if twice:
        raise FairDiffError(f"audit: the prompt '{twice[0]}' occurs twice")
    for name, classes in plan.attributes.items():
        if name not in measurer.judge.attributes:
            raise FairDiffError(f"audit.judge: judges {', '.join(measurer.judge.attributes)}, requested {name}")
        found = tuple(measurer.judge.attributes[name])
        if found != tuple(classes):
            raise FairDiffError(f"audit.judge: the classes of {name} are {found}, requested {tuple(classes)}")


@dataclass(frozen=True)
class _Auditor:
    """The state of one call of `run_audit`, which all its prompts share."""

    plan: AuditPlan
    measurer: Measurer
    noise: Noise
    store: RecordStore
    on_images: Callable[[int], None]
    images: Path

    def fingerprint(self, model: str, prompt: Prompt) -> str:
        """Return the hash of everything on which the rows of this model and prompt depend, which always includes "before"."""
        plan, measurer = self.plan, self.measurer
        return fingerprint(
            model=model,
            prompt=prompt.text,
            family=prompt.family,
            subject=prompt.subject,
            people=prompt.people,
            names=prompt.names,
            images=plan.images_of(prompt) if plan.given is None else plan.numbers(model, prompt),
            seed=plan.seed,
            latent=list(plan.latent_shape),
            attributes=plan.attributes,
            crop=[measurer.crop_size, measurer.expand, measurer.aligned, measurer.refuse_several],
            strip=[STRIP, plan.thumbnail],
            hashes={name: plan.hashes[name] for name in {"judge", "before", model}},
            encoders=[measurer.clip is not None, measurer.encoder is not None],
            **({"kept": True} if plan.keep else {}),
        )

    def audit(self, model: str, generate: Generate) -> None:
        """Generate, measure and store the unfinished prompts of one model; each process works on one prompt at a time."""
        world, every = self.plan.world, self.plan.every
        to_do = (place for place, prompt in enumerate(every) if not self.done(model, prompt))
        while places := world.of_first(list(islice(to_do, world.size)) if world.first else None):
            mine = places[world.rank] if world.rank < len(places) else None
            found = world.gather(None if mine is None else self.measure(model, generate, every[mine]))
            for rank, place in enumerate(places if world.first else []):
                self.keep(model, every[place], *found[rank])
                if rank:  # our own are counted already
                    self.on_images(len(self.plan.numbers(model, every[place])))

    def shared(self, model: str) -> RecordStore | None:
        return RecordStore(self.plan.shared) if self.plan.shared and model == "before" else None

    def done(self, model: str, prompt: Prompt) -> bool:
        """Return whether a prompt has records, from this audit or from another one by way of the shared folder."""
        if model != "before" and not self.store.complete("before", prompt.text, self.fingerprint("before", prompt)):
            raise FairDiffError(f"audit: '{prompt.text}' has no records of the model before; audit it first")
        print_, shared = self.fingerprint(model, prompt), self.shared(model)
        if shared and not self.store.complete(model, prompt.text, print_):
            self.store.take(shared, model, prompt.text, print_)
        found = self.store.complete(model, prompt.text, print_)
        if self.plan.keep:
            found = found and all(path.exists() for path in self.kept(model, prompt).values())
        if found:
            self.on_images(len(self.plan.numbers(model, prompt)))
        return found

    def kept(self, model: str, prompt: Prompt) -> dict[int, Path]:
        """Return the path of each image of a prompt, by number, where it is written if images are kept."""
        folder = self.images / model / prompt_key(prompt.text)
        return {index: folder / f"{index:04d}.png" for index in self.plan.numbers(model, prompt)}

    def write_manifest(self, models: list[str]) -> None:
        """Write images/manifest.csv, which `fairdiff-audit images=...` reads."""
        rows = []
        for model, prompt in product(models, self.plan.every):
            about = [prompt.family, prompt.subject, "yes" if prompt.people else "no", prompt.names]
            for index, path in self.kept(model, prompt).items():
                rows.append([prompt.text, path.relative_to(self.images).as_posix(), model, index, *about])
        columns = ["prompt", "image", "model", "pair", "family", "subject", "people", "names"]
        write_text(self.images / "manifest.csv", pd.DataFrame(rows, columns=columns).to_csv(index=False))

    def keep(
        self, model: str, prompt: Prompt, measured: Measured, sheet: Image.Image, images: dict[int, np.ndarray]
    ) -> None:
        """Store the measurements of a prompt, and with `AuditPlan.keep` also its images."""
        for index, path in self.kept(model, prompt).items() if images else ():
            with atomic_path(path) as temporary:
                Image.fromarray(images[index]).save(temporary)
        before = {} if model == "before" else self.before(model, prompt)
        print_, shared = self.fingerprint(model, prompt), self.shared(model)
        with atomic_path(self.store.path(model, prompt.text, "png")) as temporary:
            sheet.save(temporary)
        self.store.write_features(model, prompt.text, measured.features)
        self.store.write(model, prompt.text, _rows(self.plan, model, prompt, measured, before), print_)
        if shared:
            shared.take(self.store, model, prompt.text, print_)

    def before(self, model: str, prompt: Prompt) -> dict[str, np.ndarray]:
        """Return the features of the "before" images with the same numbers as this model's, NaN where there is none."""
        rows = {index: row for row, index in enumerate(self.plan.numbers("before", prompt))}
        rows_B = np.array([rows.get(index, -1) for index in self.plan.numbers(model, prompt)])
        features = self.store.read_features("before", prompt.text)
        return {name: np.where(rows_B[:, None] < 0, np.nan, value[rows_B]) for name, value in features.items()}

    def measure(
        self, model: str, generate: Generate, prompt: Prompt
    ) -> tuple[Measured, Image.Image, dict[int, np.ndarray]]:
        """Return the measurements of all images of one prompt, the strip of the first images, and the images to keep."""
        plan, parts, places, shown = self.plan, [], [], {}
        numbers = plan.numbers(model, prompt)
        first = numbers[:STRIP]
        wanted = set(numbers if plan.keep else first)
        for indices in plan.batches(model, prompt):
            with torch.no_grad():
                image_BCHW = generate(prompt.text, self.noise(prompt.text, plan.seed, indices, plan.latent_shape))
            _check_pictures(image_BCHW, model, prompt.text)
            if plan.keep:
                image_BCHW = (image_BCHW.float().clamp(0, 1) * 255).round() / 255
            parts.append(measure(self.measurer, image_BCHW, prompt.text))
            shown |= {i: eight_bits(image) for i, image in zip(indices, image_BCHW, strict=True) if i in wanted}
            places.extend(indices)
            self.on_images(len(indices))
        sheet = strip([shown[i] for i in first], plan.thumbnail)
        return joined(parts).rows(np.argsort(places)), sheet, shown if plan.keep else {}

    def collect(self, models: list[str], prompts: list[str]) -> pd.DataFrame:
        """Return all rows in the order of models, prompts and images; `prompt_index` is the prompt's place in the plan."""
        tables = []
        for model in models:
            for index, prompt in enumerate(prompts):
                table = self.store.read(model, prompt)
                table.insert(4, "prompt_index", index)
                tables.append(table)
        return pd.concat(tables, ignore_index=True)


def _check_pictures(image_BCHW: Tensor, model: str, prompt: str) -> None:
    low, high = image_BCHW.amin().item(), image_BCHW.amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN; resizing filters overshoot a little
        raise FairDiffError(f"audit: the model {model} drew '{prompt}' with values {low} to {high}, allowed: 0 to 1")


def strip(image_list: list[np.ndarray], width: int) -> Image.Image:
    """Return the images (uint8 [H, W, 3]) side by side, each at most `width` pixels wide; an image of another shape than the
    first is padded to its frame."""
    tiles = [Image.fromarray(image) for image in image_list]
    w, h = tiles[0].size
    size = (min(w, width), max(1, round(h * min(w, width) / w)))
    sheet = Image.new("RGB", (size[0] * len(tiles), size[1]))
    for i, tile in enumerate(tiles):
        fit = tile.resize if tile.size == (w, h) else partial(ImageOps.pad, tile)
        sheet.paste(tile if tile.size == size else fit(size, Image.Resampling.LANCZOS), (i * size[0], 0))
    return sheet


def _rows(plan: AuditPlan, model: str, prompt: Prompt, measured: Measured, before: dict) -> pd.DataFrame:
    n = len(measured.found_B)
    missing = np.full(n, np.nan, np.float32)

    def similarity(encoder: str) -> np.ndarray:
        return cosine(measured.features[encoder], before[encoder]) if encoder in before else missing

    between = cosine_to_others(measured.features["encoder"]) if "encoder" in measured.features else missing
    columns = {
        "model": model,
        "family": prompt.family,
        "people": prompt.people,
        "names": prompt.names,
        "subject": prompt.subject,
        "prompt": prompt.text,
        "image_index": np.array(plan.numbers(model, prompt)),
        "seed": plan.seed,
        "found": measured.found_B,
        "faces": measured.faces_B,
        **{corner: measured.box_B4[:, i] for i, corner in enumerate(("x0", "y0", "x1", "y1"))},
        **{
            f"p.{name}.{label}": measured.probs[name][:, k]
            for name, classes in plan.attributes.items()
            for k, label in enumerate(classes)
        },
        **{
            wording_column(name, j): label_B
            for name, label_BW in measured.wordings.items()
            for j, label_B in enumerate(label_BW.T)
        },
        "clip_t": measured.clip_t_B,
        "clip_i": similarity("clip"),
        "dino": similarity("encoder"),
        "between": between,
        "model_hash": plan.hashes[model],
        "judge_hash": plan.hashes["judge"],
    }
    return pd.DataFrame(columns)
