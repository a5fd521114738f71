"""Records: a table with one row per image, from which all numbers of the audit are computed.

Columns: model, family, people, names (the class that the prompt names, "gender.female", or ""), prompt_index, subject,
prompt, image_index, seed, found, faces (how many the detector found; -1: it does not count them), x0, y0, x1, y1 (the
largest face, pixels), `p.<attribute>.<class>` (the judge's probabilities; NaN without a face), `wording.<attribute>.<j>`
(zero-shot judge only: class index by one wording alone; -1 without a face), clip_t (cosine image to prompt), clip_i
and dino (cosine to the "before" image of the same prompt and noise; NaN for "before" itself), between (mean cosine to the
other images of the same prompt and model in the image encoder), model_hash, judge_hash.
Each model and prompt has one file. It is written when all its images are measured, so an interrupted audit can continue.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_bytes

SCHEMA = 3  # raised when the same settings give other records than before (tests/test_schemas.py)
MODELS = ("before", "start", "after")  # frozen; with untrained adapter, if it changes images; with trained adapter
SUFFIXES = ("parquet", "npz", "png")  # files of one prompt; the parquet file marks it as complete
STRIP = 8  # images of each prompt that are kept as thumbnails
COLUMNS = (
    "model", "family", "people", "names", "prompt_index", "subject", "prompt", "image_index", "seed", "found", "faces",
    "clip_t", "clip_i", "dino", "between", "model_hash", "judge_hash",
)  # fmt: skip
ANEW = "remove report.html of that audit and repeat the run's command, which makes it anew"
_FINGERPRINT = b"fairdiff.fingerprint"


def fingerprint(**parts) -> str:
    """Return the SHA-256 of everything on which the rows of one file depend."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prompt_key(prompt: str) -> str:
    """Return a file name for a prompt: its last words and a hash, independent of its place in the list."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[-40:].strip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def probability_columns(attributes: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the names of the probability columns, in the order of the attributes and their classes."""
    return [f"p.{attribute}.{name}" for attribute, classes in attributes.items() for name in classes]


def wording_column(attribute: str, wording: int) -> str:
    """Return the name of the column with the classes by one wording of a zero-shot judge."""
    return f"wording.{attribute}.{wording}"


class RecordStore:
    """The folder `records/` of a run: for each model and prompt, a parquet file, the features and the image strip."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, model: str, prompt: str, suffix: str) -> Path:
        return self.folder / model / f"{prompt_key(prompt)}.{suffix}"

    def complete(self, model: str, prompt: str, print_: str) -> bool:
        """Return whether this prompt's rows, features and strip exist, have this fingerprint and can be read.

        A file that cannot be read is reported on stdout and removed, so that it is made again.
        """
        rows, features, strip = (self.path(model, prompt, suffix) for suffix in SUFFIXES)
        if not (rows.exists() and features.exists() and strip.exists()):
            return False
        path = rows
        try:
            if (pq.read_schema(rows).metadata or {}).get(_FINGERPRINT) != print_.encode():
                return False
            count = len(pd.read_parquet(rows))
            path = features
            if any(len(value) != count for value in self.read_features(model, prompt).values()):
                raise ValueError("a row for each image is missing")
            path = strip
            with Image.open(strip) as image:
                image.load()
        except Exception as error:  # each library raises other exceptions for a truncated file
            print(
                f"warning: {path}: cannot be read ({type(error).__name__}); its images are generated and measured anew"
            )
            path.unlink(missing_ok=True)
            return False
        return True

    def take(self, other: "RecordStore", model: str, prompt: str, print_: str) -> None:
        """Copy one prompt's files from another store if they are complete there; the parquet file is written last."""
        if not other.complete(model, prompt, print_):
            return
        try:
            files = {suffix: other.path(model, prompt, suffix).read_bytes() for suffix in reversed(SUFFIXES)}
        except OSError:  # another run has just removed it
            return
        for suffix, data in files.items():
            write_bytes(self.path(model, prompt, suffix), data)

    def write(self, model: str, prompt: str, rows: pd.DataFrame, print_: str) -> None:
        """Write one prompt's rows. Call it last, because the parquet file marks the prompt as complete."""
        table = pa.Table.from_pandas(rows, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _FINGERPRINT: print_.encode()})
        with atomic_path(self.path(model, prompt, "parquet")) as temporary:
            pq.write_table(table, temporary)

    def read(self, model: str, prompt: str) -> pd.DataFrame:
        return pd.read_parquet(self.path(model, prompt, "parquet"))

    def write_features(self, model: str, prompt: str, features: dict[str, np.ndarray]) -> None:
        """Write the features [n, D] of each encoder as fp16, which changes a cosine by less than 1e-3."""
        with atomic_path(self.path(model, prompt, "npz")) as temporary:
            np.savez(temporary, **{name: value.astype(np.float16) for name, value in features.items()})

    def read_features(self, model: str, prompt: str) -> dict[str, np.ndarray]:
        path = self.path(model, prompt, "npz")
        with path.open("rb") as file, np.load(file) as arrays:  # np.load(path) does not close a damaged file
            return {name: arrays[name].astype(np.float32) for name in arrays.files}


def load_records(path: Path) -> pd.DataFrame:
    """Return the table of a finished audit; FairDiffError if the file is missing or not a table of records."""
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise FairDiffError(f"{path}: no such records file; {ANEW}") from error
    except (pa.ArrowException, OSError) as error:
        raise FairDiffError(f"{path}: not a readable records table ({type(error).__name__}); {ANEW}") from error
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise FairDiffError(f"{path}: not a records table, it has no column {missing[0]}; {ANEW}")
    return table


def save_records(path: Path, records: pd.DataFrame) -> None:
    """Write the whole table atomically."""
    with atomic_path(path) as temporary:
        records.to_parquet(temporary, index=False)
