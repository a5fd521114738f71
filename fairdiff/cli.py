"""What stands between Hydra and the mains: composed configuration -> dataclasses, and every error as one line.

With config.py the only module of the package that imports hydra or omegaconf.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairdiff.config import Config
from fairdiff.errors import FairDiffError

CONF = str(Path(__file__).resolve().parent.parent / "conf")


def _run_name(overrides: str) -> str:
    """A folder name of all overrides that change the result: readable while short, else a hash."""
    name = re.sub(r"[^\w.,=+-]+", "-", overrides).strip("-,") or "default"
    return name if len(name) <= 96 else hashlib.sha256(overrides.encode()).hexdigest()[:16]


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
ConfigStore.instance().store(name="schema", node=Config)


def to_config(cfg: DictConfig) -> Config:
    """Plain dataclasses from the composed configuration; runs every __post_init__."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise FairDiffError(f"{missing[0]}: no value given")
    return OmegaConf.to_object(cfg)


def main(task: Callable[[Config, Path], None], name: str = "config") -> Callable[[], None]:
    """A Hydra main of conf/<name>.yaml: task(config, run_dir). What the user can mend ends as one line, exit code 2."""

    @wraps(task)
    def job(cfg: DictConfig) -> None:
        try:
            task(to_config(cfg), Path(HydraConfig.get().runtime.output_dir))
        except (FairDiffError, OSError) as error:  # before Hydra adds lines of its own
            fail(error)

    def run() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of a printed traceback
        try:
            hydra.main(config_path=CONF, config_name=name, version_base="1.3")(job)()
        except (FairDiffError, HydraException, OmegaConfBaseException, OSError) as error:
            fail(error)

    return run


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def one_line(error: Exception) -> str:
    """The message of an error and of what caused it, on one line without Hydra's own advice."""
    texts = [str(error)]
    cause = error.__cause__
    if cause is not None and not isinstance(error, FairDiffError) and str(cause) not in texts[0]:
        texts.append(str(cause))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = ("Set the environment", "object_type=", "reference_type=", "To append", "provider=", "Config search path")
    keep = [s for s in lines if s and not s.startswith(noise)]
    if group := re.search(r"Could not load '(\w+)/", keep[0] if keep else ""):  # Hydra lists no options for lists
        keep.append("allowed: " + ", ".join(sorted(p.stem for p in Path(CONF, group[1]).glob("*.yaml"))))
    return "; ".join(keep)
