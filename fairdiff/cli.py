"""What stands between Hydra and the mains: composed configuration -> dataclasses, and every error as one line.

With config.py the only module of the package that imports hydra or omegaconf.
"""

import codecs
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
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairdiff.config import AttributeConfig, Config
from fairdiff.errors import FairDiffError

_TOP = Path(__file__).resolve().parent.parent / "conf"  # in a clone; in a wheel it lies in the package
CONF = str(_TOP if _TOP.is_dir() else Path(__file__).resolve().parent / "conf")
OWN_ATTRIBUTE = (
    "; an attribute of one's own is a file like conf/attribute/gender.yaml in a folder `attribute` of one's own folder, "
    "chosen with --config-dir <that folder> 'attribute=[<its name>]'"
)


_MICRO = "micro_batch, which sets decoding, replay and audit"
_LITERAL = "nothing, it is only measured, by scripts/bench.py"
# Old keys, and old choices of files (those with "="), and what takes their place; for one release
RENAMED = {
    "adapter.alpha": "adapter.rank, which alpha always equals",
    "audit.batch_size": _MICRO,
    "audit.judge=": "judge@audit.judge=net, hf or open_clip",
    "audit.judge.paths": "audit.judge.path={<attribute>: <path>}",
    "audit.unrelated_images": "audit.images_per_prompt, of which prompts without people have 16 or fewer",
    "audit.unrelated_prompts": "audit.without_people",
    "audit/judge": "judge@audit.judge=net, hf or open_clip",
    "checkpoint_every": "nothing, a checkpoint is written every 10 steps",
    "decode_batch": _MICRO,
    "detector=portraits": "detector=mtcnn",
    "experiment=debias": "experiment=gender",
    "features=": "model=sd15 for photographs, or features.clip, features.encoder, features.identity",
    "gradient=": "gradient.type=unit, reference or solver, and gradient.evaluations",
    "gradient.detach": _LITERAL,
    "gradient.last": _LITERAL,
    "gradient.type=autograd": _LITERAL,
    "gradient.type=truncated": _LITERAL,
    "judge.paths": "judge.path={<attribute>: <path>}",
    "judge=embedded": "judge=net",
    "loss.balance={": "loss.align, loss.image, loss.face, which are shares with loss.balance=true",
    "loss.balance.align": "loss.align, a share with loss.balance=true",
    "loss.balance.face": "loss.face, a share with loss.balance=true",
    "loss.balance.image": "loss.image, a share with loss.balance=true",
    "loss.draws": "nothing, there are 256 where transport is not exact",
    "optimizer=": "optimizer.schedule, optimizer.weight_decay, optimizer.ema of AdamW, the only one",
    "optimizer.max_grad_norm": "nothing, gradients are not clipped",
    "optimizer.warmup": "nothing, optimizer.schedule begins at the full rate",
    "prompts=": "prompts.families, or files as prompts.train, prompts.validation, prompts.test",
    "prompts.train_limit": "prompts.train, a file of fewer",
    "replay_batch": _MICRO,
    "sampler=": "model=portraits or sd15, or sampler.guidance, sampler.audit_steps and the like",
    "target.joint": "target.file, a YAML file that holds the same",
    "target.relaxation": "nothing, shares in between are written as target.<attribute> or in target.file",
    "validation.sampler_steps": "sampler.audit_steps",
}

# What a terminal shows where its encoding lacks a character
PLAIN = str.maketrans({"−": "-", "–": "-", "×": "x", "→": "->", "±": "+-", "≤": "<=", "\u00a0": " "})

# Overrides that do not change the training; `experiment` and `seed` have folders of their own.
ELSEWHERE = (
    "audit",
    "judge@audit.judge",
    "resume",
    "cache",
    "micro_batch",
    "model.device",
    "experiment",
    "seed",
    "hydra",
)


def _run_name(overrides: list[str], constant_rate: bool = False) -> str:
    """The folder of a training, from the overrides that change it, in any order: readable words and a hash of them all.

    constant_rate: more steps then go on with the same training.
    """
    left_out = (*ELSEWHERE, "steps") if constant_rate else ELSEWHERE
    ends = tuple(f"{k}{end}" for k in left_out for end in "=./")
    kept = sorted(o for o in overrides if not f"{o.lstrip('+~')}=".startswith(ends))  # ~key has no =
    if not kept:
        return "default"
    words = re.sub(r"[^\w.,+-]+", "-", ",".join(kept))[:80].strip("-,.")  # no "=": Hydra would have it quoted in a path
    return f"{words}-{hashlib.sha256(','.join(kept).encode()).hexdigest()[:6]}"


def _more_steps(schedule: str, validation_every: int | None) -> bool:
    """Whether more steps go on with the same training: the rate of a step must not depend on how many there are."""
    return schedule == "constant" and validation_every is None


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("more_steps", _more_steps, replace=True)
ConfigStore.instance().store(name="schema", node=Config)


def to_config(cfg: DictConfig) -> Config:
    """Plain dataclasses from the composed configuration, "~/" expanded; runs every __post_init__."""
    _expand_home(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise FairDiffError(f"{missing[0]}: no value given")
    config = OmegaConf.to_object(cfg)
    _refuse_unknown(config)
    return config


def _expand_home(node: DictConfig | ListConfig) -> None:
    """Values that begin with "~/", which are paths under whatever key, with the home folder in its place."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_config(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            node[key] = os.path.expanduser(value)


def _argument(text: str) -> str:
    """An argument of the command line with "~/" expanded where a value begins: shells leave it, Hydra cannot read it."""
    return re.sub(r"(?<=[=:,\[ '\"])~(?=/)", lambda _: os.path.expanduser("~"), text)


def _refuse_unknown(config: object, *path: str) -> None:
    """FairDiffError for a key that is in no schema: with a plus Hydra takes any, and nothing would read it."""
    known = {f.name for f in fields(config)}
    for name, value in vars(config).items():
        key = ".".join([*path, name])
        if name not in known:
            raise FairDiffError(f"{key}: there is no such key{_like(key)}")
        for below, item in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(item):
                _refuse_unknown(item, *path, name, *([below] if below else []))


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
        except (RuntimeError, MemoryError) as error:
            line = no_memory(error)
            if line is None:
                raise
            fail(line)

    def run() -> None:
        any_terminal()
        for word in sys.argv[1:]:
            if re.search("[\ud800-\udfff]", word):  # Python's stand-ins for stray bytes
                fail(FairDiffError(f"{word!a}: is not text in {sys.getfilesystemencoding()}; PYTHONUTF8=1 reads UTF-8"))
        if os.environ.get("WORLD_SIZE", "1") != "1":  # of torchrun and accelerate: each would write the same folder
            fail(FairDiffError(f"WORLD_SIZE: found {os.environ['WORLD_SIZE']}, allowed: 1, a run is one process"))
        sys.argv = [_argument(text) for text in sys.argv]
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


def _plainly(error: UnicodeEncodeError) -> tuple[str, int]:
    """What stands for characters that an encoding has not: "-" for a minus sign, an escape for an unknown one."""
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def any_terminal() -> None:
    """Let stdout take every text, in an encoding such as ASCII, Latin-1 or Windows-1252 too."""
    codecs.register_error("fairdiff.plainly", _plainly)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="fairdiff.plainly")


def no_memory(error: Exception) -> FairDiffError | None:
    """What to tell the user where the memory of the device or of the machine was too small, None for another error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        less = "it takes less with a smaller global_batch or micro_batch"
        return FairDiffError(f"out of memory: {one_line(error)}; {less}")
    return None


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _instead(override: str) -> str:
    """ "; in its place: ..." for an override of old, "" for any other."""
    for old, new in RENAMED.items():
        if f"{override}=".startswith(old if "=" in old else (f"{old}=", f"{old}.")):
            return f"; in its place: {new}"
    return ""


def _like(key: str) -> str:
    """ "; allowed: ..." for a key that is unknown: what stands in its place, the alike first."""
    if new := _instead(key):
        return new
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
    first = keep[0] if keep else ""
    if key := re.search(r"Could not override '([\w./]+)'", first):
        return f"{key[1]}: there is no such key{_like(key[1])}"
    olds = re.findall(r"Error merging override \+*(.+)", first)
    olds += ["=".join(found) for found in re.findall(r"Could not find '(\w+)/(\w+)'", first)]
    olds += [joint.join(found) for joint in "=." for found in re.findall(r"^([\w.]+): found (\w+),", first)]
    for old in olds:
        if new := _instead(old):
            return f"{old}: there is no such thing any more{new}"
    if "not a subclass of AttributeConfig" in "".join(keep):
        return keep[0].split(";")[0] + OWN_ATTRIBUTE
    if "Config. value" in "".join(keep):
        keep.append("its keys are set one by one")
    if group := re.search(r"Could not load '(\w+)/", first):  # Hydra lists no options for lists
        keep.append("allowed: " + ", ".join(sorted(p.stem for p in Path(CONF, group[1]).glob("*.yaml"))))
    return "; ".join(keep)
