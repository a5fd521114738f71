"""What stands between Hydra and the mains: composed configuration -> dataclasses, and every error as one line.

With config.py the only module of the package that imports hydra or omegaconf.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import get_origin

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairdiff.config import AttributeConfig, Config
from fairdiff.errors import FairDiffError

_TOP = Path(__file__).resolve().parent.parent / "conf"  # in a clone; in a wheel it lies in the package
CONF = str(_TOP if _TOP.is_dir() else Path(__file__).resolve().parent / "conf")
OWN_ATTRIBUTE = (
    "; an attribute of one's own is a file like conf/attribute/gender.yaml in a folder `attribute` of one's own folder, "
    "asked for with --config-dir <that folder> 'attribute=[<its name>]'"
)


# Overrides that do not change the training; `experiment` and `seed` have folders of their own.
ELSEWHERE = ("audit", "judge@audit.judge", "resume", "cache", "micro_batch", "model.device", "experiment", "seed", "hydra")


def _run_name(overrides: list[str], constant_rate: bool = False) -> str:
    """The folder of a training, from the overrides that change it, in any order: readable while short, else a hash.

    constant_rate: more steps then go on with the same training.
    """
    left_out = (*ELSEWHERE, "steps") if constant_rate else ELSEWHERE
    kept = sorted(o for o in overrides if not any(o.lstrip("+~").startswith((f"{k}=", f"{k}.", f"{k}/")) for k in left_out))
    name = re.sub(r"[^\w.,=+-]+", "-", ",".join(kept)).strip("-,") or "default"
    return name if len(name) <= 96 else hashlib.sha256(name.encode()).hexdigest()[:16]


def _more_steps(schedule: str, validation_every: int | None) -> bool:
    """Whether more steps go on with the same training: the rate of a step must not depend on how many there are."""
    return schedule == "constant" and validation_every is None


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("more_steps", _more_steps, replace=True)
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
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:  # else nobody knows which of a sweep's runs this is
            print(f"run {hydra_config.job.num}: {' '.join(hydra_config.overrides.task) or 'defaults'}", flush=True)
        try:
            task(to_config(cfg), Path(hydra_config.runtime.output_dir))
        except (FairDiffError, OSError) as error:  # before Hydra adds lines of its own
            fail(error)
        except torch.OutOfMemoryError as error:
            less = "global_batch or micro_batch"
            fail(FairDiffError(f"{one_line(error)}; it takes less with a smaller {less}"))

    def run() -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # of torchrun and accelerate: each would write the same folder
            fail(FairDiffError(f"WORLD_SIZE: found {os.environ['WORLD_SIZE']}, allowed: 1, a run is one process"))
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of a printed traceback
        try:
            hydra.main(config_path=CONF, config_name=name, version_base="1.3")(job)()
        except (FairDiffError, HydraException, OmegaConfBaseException, OSError) as error:
            fail(error)
        except ValueError as error:
            if "Config group override" not in str(error):  # Hydra's, of loss=null
                raise
            fail(FairDiffError(f"{one_line(error)}; a group is chosen, not set: null is for its keys"))
        except KeyboardInterrupt:
            over = " without resume=false" if "resume=false" in [o.lower() for o in sys.argv] else ""
            print(f"interrupted; the same command{over} goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)

    return run


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _like(key: str) -> str:
    """"; allowed: ..." for a key that is unknown: what stands in its place, the alike first."""
    *path, last = key.split(".")
    if path[:1] == ["target"]:
        return "; allowed: target.<attribute>.<class> of the attributes in attribute=[...], file"
    if path[:1] == ["attributes"]:
        known = [f.name for f in fields(AttributeConfig)]
        close = [] if last in known else get_close_matches(last, known, 3, 0.6)
        return f"; allowed: {', '.join('.'.join([*path, name]) for name in close)}" if close else OWN_ATTRIBUTE
    here: type = Config
    for i, name in enumerate([*path, last]):
        kinds = {f.name: f.type for f in fields(here)} if is_dataclass(here) else {}
        if get_origin(kinds.get(name)) is dict:  # new keys of a mapping are Hydra's to append
            rest = [*path, last][i + 1 :] or ["<key>"]
            return f"; a new one is written with a plus, as in +{'.'.join([*path[:i], name, *rest])}=<value>"
        parent, here = here, kinds.get(name, type(None))
    names = [f.name for f in fields(parent)] if is_dataclass(parent) else []
    close = get_close_matches(last, names, 3, 0.6) or names
    return f"; allowed: {', '.join('.'.join([*path, name]) for name in close)}" if names else ""


def one_line(error: Exception) -> str:
    """The message of an error and of what caused it, on one line without Hydra's own advice."""
    texts = [str(error)]
    cause = error.__cause__
    if cause is not None and not isinstance(error, FairDiffError) and str(cause) not in texts[0]:
        texts.append(str(cause))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = ("Set the environment", "object_type=", "reference_type=", "To append", "provider=", "Config search path")
    keep = [s for s in lines if s and not s.startswith(noise)]
    if key := re.search(r"Could not override '([\w.]+)'", keep[0] if keep else ""):
        return f"{key[1]}: there is no such key{_like(key[1])}"
    if "not a subclass of AttributeConfig" in "".join(keep):
        return keep[0].split(";")[0] + OWN_ATTRIBUTE
    if kind := re.search(r"not a subclass of (\w+)Config", "".join(keep)):
        keep.append(f"a file of conf is chosen with a slash, as in audit/{kind[1].lower()}=hf")
    if group := re.search(r"Could not load '(\w+)/", keep[0] if keep else ""):  # Hydra lists no options for lists
        keep.append("allowed: " + ", ".join(sorted(p.stem for p in Path(CONF, group[1]).glob("*.yaml"))))
    return "; ".join(keep)
