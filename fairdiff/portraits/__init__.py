"""The paths of the embedded Portraits model and its judges. docs/portraits.md is the model card."""

from pathlib import Path

from fairdiff.errors import FairDiffError

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("model", "judge", "audit_judge", "clip", "encoder", "identity")


def weights(part: str) -> Path:
    """The folder of one part of the embedded model; raises FairDiffError if this installation lacks it."""
    if part not in PARTS:
        raise ValueError(f"found {part}, allowed: {', '.join(PARTS)}")
    folder = WEIGHTS / part
    if not folder.is_dir():
        raise FairDiffError(f"{folder}: the embedded weights are missing; install the package anew or rebuild them")
    return folder
