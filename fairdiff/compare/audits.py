"""Find the audits to compare, with their settings and seeds."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from fairdiff.audit.read import read_audit
from fairdiff.audit.records import load_records
from fairdiff.errors import FairDiffError
from fairdiff.run import NO_RESULT, saved_settings

SEED = re.compile(r"(^|/)seed(\d+)(?=/|$)")
_AUDIT = re.compile(r"(^|/)audits/[^/]+$")  # where a run folder has its audits


@dataclass(frozen=True)
class Audited:
    """A finished audit. name: its run's folder below what all have in common, its own where a run has several here.

    settings: {"sampler.guidance": 5.0, ...} of its run but for seeds and what changes no result; {} where no config.yaml
    says them. seed: of the training, None where there was none or nothing says it.
    """

    name: str
    folder: Path
    audit: dict
    settings: dict
    seed: int | None

    @property
    def audit_seed(self) -> int:
        return self.audit["provenance"]["seed"]

    @property
    def last(self) -> str:
        """The model that the audit is about: "after" if it was audited."""
        return "after" if "after" in self.audit["models"] else "before"

    @cached_property
    def rows(self) -> pd.DataFrame | None:
        """Records of that model on prompts of people that name no class, by prompt and image; None without records."""
        path = self.folder / "records.parquet"
        if not path.exists():
            return None
        rows = load_records(path)
        rows = rows[(rows.model == self.last) & rows.people & (rows.names == "")]
        return rows.set_index(["prompt", "image_index"]).sort_index()


def find_audits(folders: Iterable[str | Path]) -> list[Audited]:
    """The audits at or below `folders`, each once, in the order of their names.

    Raises FairDiffError for a folder without any and for a file that is no audit of this version.
    """
    found = {}
    for folder in folders:
        paths = sorted(Path(folder).rglob("audit.json"))
        if not paths:
            raise FairDiffError(f"{folder}: found no finished run (audit.json) in it or below")
        for path in paths:
            found[path.parent.resolve().as_posix()] = read_audit(path)
    runs = {name: _AUDIT.sub("", name) for name in found}
    common = os.path.commonpath(runs.values()) if len({*runs.values()}) > 1 else Path(next(iter(runs.values()))).parent
    count = Counter(runs.values())
    return [
        _audited(os.path.relpath(run if count[run] == 1 else place, common), Path(place), found[place])
        for place, run in sorted(runs.items())
    ]


def _audited(name: str, folder: Path, audit: dict) -> Audited:
    run = Path(_AUDIT.sub("", folder.as_posix()))
    every = saved_settings(run)
    ignored = (*NO_RESULT, "seed")
    settings = {key: value for key, value in every.items() if key not in ignored and key.split(".")[0] not in ignored}
    seed = None
    if "after" in audit["models"]:
        trained = every.get("seed") if (run / "adapter").exists() else None
        named = SEED.findall(str(every.get("adapter.path") or run.as_posix()))
        seed = trained if isinstance(trained, int) else int(named[-1][1]) if named else None
    return Audited(name, folder, audit, settings, seed)
