"""The paper's released adapters: what each does, and where to find it (catalogue.json beside this file).

Source: the README files of github.com/sail-sg/finetune-fair-diffusion at commit 300aa3b (MIT licence), which name the
archives, the folders in them and the links. All are for Stable Diffusion 1.5. None was downloaded here.
"""

import json
from functools import lru_cache
from pathlib import Path

from fairdiff.errors import FairDiffError

CONVERTED = Path("outputs", "released")  # <name>: where `how_to_get` has them put


@lru_cache
def catalogue() -> dict[str, dict]:
    """Name -> what catalogue.json says of that adapter, in its order."""
    entries = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def converted(name: str) -> Path:
    """The folder of a published adapter after its conversion; FairDiffError, which says how to get it, if it is not there."""
    folder = CONVERTED / name
    if not folder.exists():
        raise FairDiffError(f"{folder}: not there yet; {how_to_get(name)}")
    return folder


def how_to_get(name: str) -> str:
    """A sentence with the address of an adapter's archive and the command that converts its file."""
    entry = catalogue()[name]
    command = " ".join(["python scripts/export.py", *entry["files"], "--as diffusers --to", str(CONVERTED / name)])
    return f"its authors host {entry['archive']} at {entry['hosted']}; unzip it there, then: {command}"
