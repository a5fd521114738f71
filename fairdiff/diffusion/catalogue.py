"""The adapters that the paper's authors publish: what each does, and where it is hosted (catalogue.json in this folder).

Source: the README files of github.com/sail-sg/finetune-fair-diffusion at commit 300aa3b (MIT licence), which name the
archives, the folders in them and the links. All are for Stable Diffusion 1.5. None was downloaded here.
"""

import json
from functools import lru_cache
from pathlib import Path

from fairdiff.errors import FairDiffError

CONVERTED = Path("outputs", "released")  # the command of `how_to_get` writes each adapter to <name> in this folder


@lru_cache
def catalogue() -> dict[str, dict]:
    """Return the entries of catalogue.json by name, in the order of the file."""
    entries = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def converted(name: str) -> Path:
    """Return the folder of a converted published adapter. If it does not exist, FairDiffError says how to get it."""
    folder = CONVERTED / name
    if not folder.exists():
        raise FairDiffError(f"{folder}: not there yet; {how_to_get(name)}")
    return folder


def how_to_get(name: str) -> str:
    """Return a sentence that says where an adapter's archive is hosted and which command converts it."""
    entry = catalogue()[name]
    command = " ".join(["python scripts/export.py", *entry["files"], "--as diffusers --to", str(CONVERTED / name)])
    return f"its authors host {entry['archive']} at {entry['hosted']}; unzip it there, then: {command}"
