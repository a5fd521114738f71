"""Existing images to audit, from any source: which file in a folder shows which prompt.

A manifest is a CSV with the columns `prompt` and `image` (a file, relative to the folder). Further columns, none of them
needed: `model` ("before", "start" or "after": of one folder with pictures before and after), `pair` (a key: the pictures of
one prompt and key belong together before and after), `family`, `subject`, `people`, `names` (as `fairdiff.prompts.Prompt`).
Without a manifest each sub-folder is named by its prompt. Nothing here is generated, and no model is needed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classifiers.pictures import SUFFIXES, About, inspect, read_picture
from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, read_table
from fairdiff.prompts import Prompt, near_miss

MANIFEST = "manifest.csv"
COLUMNS = ("prompt", "image", "model", "pair", "family", "subject", "people", "names")
MODELS = ("before", "start", "after")
AT_ONCE = 2**24  # pixels that are looked at together: 64 pictures of 512 × 512


@dataclass(frozen=True)
class Entry:
    """One picture as it was given. name: of the file below its folder, without suffix; "" for `pair` where there is none."""

    file: Path
    name: str
    model: str
    prompt: Prompt
    pair: str


@dataclass(frozen=True)
class Given:
    """The pictures that can be read. files: (model, prompt) -> number -> file; equal numbers of two models are a pair.

    about: size and hash of each file. unreadable: (file, reason). left_out: prompts without a readable picture of every
    model. pairing: by what pictures before and after belong together, "" for a single model.
    """

    prompts: tuple[Prompt, ...]
    files: dict[tuple[str, str], dict[int, Path]]
    about: dict[Path, About]
    unreadable: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    pairing: str

    @property
    def models(self) -> list[str]:
        return [model for model in MODELS if any(key[0] == model for key in self.files)]

    @property
    def copies(self) -> list[tuple[Path, Path]]:
        """Pairs of equal files of one prompt and model."""
        found = []
        for files in self.files.values():
            first: dict[str, Path] = {}
            for file in files.values():
                same = first.setdefault(self.about[file].digest, file)
                found += [(same, file)] if same != file else []
        return found

    def batches(self, at_once: int) -> dict[tuple[str, str], list[list[int]]]:
        """(model, prompt) -> numbers of pictures of one size that are looked at together, `at_once` or fewer."""
        return {key: self._batches(numbers, at_once) for key, numbers in self.files.items()}

    def _batches(self, numbers: dict[int, Path], at_once: int) -> list[list[int]]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, file in sorted(numbers.items()):
            by_size.setdefault(self.about[file].size, []).append(number)
        found = []
        for (height, width), some in by_size.items():
            most = max(1, min(at_once, AT_ONCE // (height * width)))
            found += [some[start : start + most] for start in range(0, len(some), most)]
        return found

    def digests(self, model: str) -> list[tuple[str, int, str]]:
        """All that the pictures of a model depend on: prompt, number, SHA-256 of the file."""
        keys = [key for key in self.files if key[0] == model]
        return [(text, n, self.about[file].digest) for _, text in keys for n, file in self.files[_, text].items()]

    def read(self, model: str, prompt: str, numbers: Sequence[int]) -> Tensor:
        """Pictures of one size as image_BCHW in [0, 1]."""
        images = []
        for number in numbers:
            file = self.files[model, prompt][number]
            try:
                images.append(read_picture(file))
            except ValueError as error:
                raise FairDiffError(f"images: {file}: could be read a moment ago, and now cannot: {error}") from error
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def read_pictures(images: str | list[str], manifest: str | None) -> Given:
    """Find and read through the pictures of one folder, or of two: [before, after].

    FairDiffError for a folder or manifest that cannot be read, a picture or pair that occurs twice, and where no prompt
    has a readable picture of every model. A picture that cannot be read is only named.
    """
    folders = [Path(folder) for folder in ([images] if isinstance(images, str) else images)]
    models = ["before"] if len(folders) == 1 else ["before", "after"]
    entries = [
        entry
        for folder, model in zip(folders, models, strict=True)
        for entry in _entries(folder, manifest, model, alone=len(folders) == 1)
    ]
    _refuse_twice(entries)
    numbered, pairing = _numbered(entries)
    about, unreadable = _inspected(entries)
    files: dict[tuple[str, str], dict[int, Path]] = {}
    for entry, number in zip(entries, numbered, strict=True):
        if entry.file in about:
            files.setdefault((entry.model, entry.prompt.text), {})[number] = entry.file
    named = {entry.model for entry in entries}
    prompts = {entry.prompt.text: entry.prompt for entry in entries}
    whole = {text: prompt for text, prompt in prompts.items() if all((model, text) in files for model in named)}
    if not any(prompt.people and not prompt.names for prompt in whole.values()):
        some = "; ".join(f"{name}: {reason}" for name, reason in unreadable[:3])
        raise FairDiffError(
            f"images: {folders[0]}: no prompt of people has a picture that can be read"
            + (" both before and after" if len(named) > 1 else "")
            + (f" ({some})" if some else "")
        )
    files = {key: numbers for key, numbers in files.items() if key[1] in whole}
    left_out = tuple(text for text in prompts if text not in whole)
    return Given(tuple(whole.values()), files, about, unreadable, left_out, pairing)


def _entries(folder: Path, manifest: str | None, model: str, alone: bool) -> list[Entry]:
    if not folder.is_dir():
        raise FairDiffError(f"images: {folder}: no such folder")
    file = Path(manifest) if manifest else folder / MANIFEST
    if manifest or file.exists():
        return _of_manifest(folder, file, "manifest" if manifest else "images", model if alone else None, model)
    found = []
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        prompt = Prompt(below.name, "custom", below.name)
        files = [path for path in sorted(below.rglob("*")) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
        found += [Entry(path, _name(path, folder), model, prompt, "") for path in files]
    if not found:
        raise FairDiffError(
            f"images: {folder}: found no {MANIFEST} and no sub-folder with pictures, allowed: a sub-folder for each prompt "
            "that is named by it, or manifest=<a CSV with the columns prompt and image>"
        )
    return found


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _of_manifest(folder: Path, file: Path, key: str, default: str | None, model: str) -> list[Entry]:
    """default: the model of rows where the manifest may name another, None where the folder says it."""
    where = f"{key}: {file}"
    columns, rows = read_table(read_given(file, where), where)
    if missing := [name for name in ("prompt", "image") if name not in columns]:
        raise FairDiffError(f"{where}: needs a column {missing[0]}, found {', '.join(columns) or 'none'}")
    for column in columns:
        if almost := near_miss(column, COLUMNS):
            raise FairDiffError(f"{where}: found the column {column}, allowed: {almost}, or a name less like it")
    if "model" in columns and default is None:
        raise FairDiffError(f"{where}: found a column model beside two folders, allowed: one of them")
    if not rows:
        raise FairDiffError(f"{where}: holds no pictures")
    prompts: dict[str, Prompt] = {}
    found = []
    for number, cells in rows:
        place = f"{where}, line {number}"
        for column in [c for c in ("prompt", "image", "pair", "model") if c in columns]:
            if not cells[column]:
                raise FairDiffError(f"{place}: the cell {column} is empty")
        of = cells.get("model", model)
        if of not in MODELS:
            raise FairDiffError(f"{place}: model: found {of}, allowed: {', '.join(MODELS)}")
        prompt = _prompt(cells, place)
        if prompts.setdefault(prompt.text, prompt) != prompt:
            raise FairDiffError(f"{place}: the prompt {prompt.text!r} stands with another family or the like above")
        name = cells["image"].rpartition(".")[0] or cells["image"]
        found.append(Entry(folder / cells["image"], name, of, prompt, cells.get("pair", "")))
    if "before" not in {entry.model for entry in found}:
        raise FairDiffError(f"{where}: found no picture of the model before, allowed: before alone, or beside others")
    return found


def _prompt(cells: dict[str, str], place: str) -> Prompt:
    text, people = cells["prompt"], (cells.get("people") or "yes").lower()
    if people not in ("yes", "no"):
        raise FairDiffError(f"{place}: people: found {cells['people']}, allowed: yes, no")
    subject, family = cells.get("subject") or text, cells.get("family") or "custom"
    return Prompt(text, family, subject, people == "yes", names=cells.get("names", ""))


def _refuse_twice(entries: list[Entry]) -> None:
    """FairDiffError for a picture that would be counted twice."""
    files = Counter((entry.model, entry.file) for entry in entries)
    if twice := [file for (_, file), times in files.items() if times > 1]:
        raise FairDiffError(f"images: {twice[0]} occurs twice, allowed: once, or a picture would be counted twice")
    keys = Counter((entry.model, entry.prompt.text, entry.pair) for entry in entries if entry.pair)
    if twice := [key for key, times in keys.items() if times > 1]:
        model, text, pair = twice[0]
        raise FairDiffError(f"images: the pair {pair} of {text!r} occurs twice {model}, allowed: once")


def _numbered(entries: list[Entry]) -> tuple[list[int], str]:
    """The number of each picture within its prompt, equal for those that belong together, and by what they do."""
    names: dict[str, set[str]] = {}
    for entry in entries:
        names.setdefault(entry.model, set()).add(entry.name)
    by = "order"
    if all(entry.pair for entry in entries):
        by = "pair"
    elif len(names) > 1 and set.intersection(*names.values()):
        by = "file name"
    numbers: dict[str, dict[object, int]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for entry in entries:
        place = entry.model, entry.prompt.text
        key = {"pair": entry.pair, "file name": entry.name, "order": counts[place]}[by]
        counts[place] += 1
        known = numbers.setdefault(entry.prompt.text, {})
        found.append(known.setdefault(key, len(known)))
    return found, by if len(names) > 1 else ""


def _inspected(entries: list[Entry]) -> tuple[dict[Path, About], tuple[tuple[str, str], ...]]:
    about, unreadable = {}, []
    for file in dict.fromkeys(entry.file for entry in entries):
        try:
            about[file] = inspect(file)
        except ValueError as error:
            unreadable.append((str(file), str(error)))
    return about, tuple(unreadable)
