"""Wrap the main functions in Hydra: turn the composed configuration into dataclasses, and every error into one line."""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fairdiff.cli.command_line import key_of, of_file, prepare, quoting
from fairdiff.cli.ending import ending, reader_is_gone
from fairdiff.cli.messages import CONF, like, one_line
from fairdiff.config import Config
from fairdiff.config.training import OWN_KEYS
from fairdiff.errors import FairDiffError, NotWithinMargin

ConfigStore.instance().store(name="schema", node=Config)


def to_config(cfg: DictConfig) -> Config:
    """Convert the composed configuration to dataclasses, with "~/" expanded; every __post_init__ runs."""
    if not is_dataclass(OmegaConf.get_type(cfg)):
        raise FairDiffError("--config-path: its configuration has no schema, allowed: `defaults: [schema, ...]`")
    _refuse_unknown(cfg)
    _expand_home(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise FairDiffError(f"{missing[0]}: no value given")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(node: DictConfig, *path: str) -> None:
    """Raise FairDiffError for a key that is in no schema: with a plus Hydra accepts any, and it would have no effect."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in fields(schema)} if is_dataclass(schema) else {*node}
    for name in node:
        key = ".".join([*path, str(name)])
        if name not in known and key != "hydra.env":  # Hydra's schema lacks it
            raise FairDiffError(f"{key}: there is no such key{like(key)}")
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if OmegaConf.is_dict(node[name]):
            _refuse_unknown(node[name], *path, str(name))


def _expand_home(node: DictConfig | ListConfig) -> None:
    """Replace "~/" at the beginning of values by the home folder; such values are always paths."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_config(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            node[key] = os.path.expanduser(value)


def check_hydra(cfg: DictConfig, adapter: str) -> None:
    """Raise FairDiffError for errors in the `hydra` section that Hydra accepts, and for keys of another adapter type."""
    _refuse_unknown(cfg, "hydra")
    _refuse_other_keys(OmegaConf.to_container(cfg.overrides.task, resolve=False), adapter)
    if GlobalHydra.instance().is_initialized():  # it is not in the processes of some launchers
        loader = GlobalHydra.instance().config_loader()
        overrides = [o for kind in ("hydra", "task") for o in OmegaConf.to_container(cfg.overrides, resolve=False)[kind]]
        files = loader.compute_defaults_list(cfg.job.config_name, overrides, RunMode.RUN).defaults
        for (file, _), count in Counter((file.config_path, file.package) for file in files).items():
            if count > 1:
                raise FairDiffError(f"{file.replace('/', ': found ')} {count} times, allowed: once")
    key = "sweep" if cfg.mode == RunMode.MULTIRUN else "run"
    if not str(cfg[key].dir).strip():
        raise FairDiffError(f"hydra.{key}.dir: found an empty path, allowed: a folder")


def _refuse_other_keys(overrides: Sequence[str], adapter: str) -> None:
    """Raise FairDiffError for overrides of `adapter` that belong to another type: they would only change the folder name.

    Files may set keys of both types, because the type can be chosen after them.
    """
    others = {f"adapter.{key}": kind for kind, keys in OWN_KEYS.items() if kind != adapter for key in keys}
    for override in overrides:
        if kind := others.get(key := key_of(override)):
            raise FairDiffError(f"{key}: found with adapter.type={adapter}, which has none; allowed: with {kind}")


def main(task: Callable[[Config, Path], None], name: str = "config", several: bool = False) -> Callable[[], None]:
    """Return a Hydra main for conf/<name>.yaml: task(config, run_dir). A user's error ends it with one line and code 2.

    A sweep continues after such an error; its last lines name the failed runs and the command that compares its audits.
    several: whether the task shares its work among the processes that a launcher started.
    """
    failed: list[str] = []  # runs of a sweep
    audited: list[str] = []  # folders of runs that have an audit, if they ran in this process
    codes: set[int] = set()
    parent = os.getpid()

    def give_up(error: Exception, overrides: Sequence[str]) -> None:
        failed.append(f"{' '.join(overrides) or 'defaults'}: {one_line(error)}")
        codes.add(code_of(error))
        print(f"error: {failed[-1]}", file=sys.stderr, flush=True)

    @wraps(task)
    def job(cfg: DictConfig) -> None:
        here = HydraConfig.get()
        swept = here.mode == RunMode.MULTIRUN
        overrides = OmegaConf.to_container(here.overrides.task, resolve=False)
        try:
            if swept:  # shows which run of the sweep the next lines are about
                print(f"run {here.job.num}: {' '.join(overrides) or 'defaults'}", flush=True)
            config = to_config(cfg)
            check_hydra(here, config.adapter.type)
            try:
                task(config, Path(here.runtime.output_dir))
            finally:
                if swept and next(Path(here.runtime.output_dir).glob("audits/*/audit.json"), None):
                    audited.append(os.path.relpath(here.runtime.output_dir))
        except Exception as error:  # caught here because Hydra would print lines of its own
            line = told(error)
            if not swept:
                fail(line)
            give_up(line, overrides)
            if os.getpid() != parent:  # in a launcher's process `failed` is lost, so the sweep must end
                raise FairDiffError(failed[-1]) from error

    def run() -> None:
        failed.clear()
        audited.clear()
        codes.clear()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
        over = " without resume=false" if "resume=false" in [o.lower() for o in sys.argv] else ""
        with ending(f"interrupted; the same command{over} goes on from the last checkpoint"):
            try:
                with _leaving_out(give_up):
                    hydra.main(config_path=CONF, config_name=prepare(name, several), version_base="1.3")(job)()
            except Exception as error:
                fail(told(error))
            finally:
                if failed:
                    print("error: these runs of the sweep failed:", *failed, sep="\n  ", file=sys.stderr)
            if len(audited) > 1:
                print(f"side by side: {shlex.join(['fairdiff-compare', *audited])}", flush=True)
            if failed:
                sys.exit(min(codes))  # 3 if all failed by `audit.fail_above`

    return run


@contextmanager
def _leaving_out(give_up: Callable[[Exception, Sequence[str]], None]) -> Iterator[None]:
    """Give up runs of a sweep whose overrides do not compose, before the others start. Hydra would start none."""
    compose = Sweeper.validate_batch_is_legal

    def check(sweeper: Sweeper, batch: list[Sequence[str]]) -> None:
        for overrides in list(batch):
            try:
                compose(sweeper, [overrides])
            except Exception as error:
                give_up(told(error), overrides)
                batch.remove(overrides)

    Sweeper.validate_batch_is_legal = check
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = compose


def told(error: Exception) -> Exception:
    """Return the error to show to the user. Raise it again if it is a bug, and exit if the output's reader has gone."""
    text = str(error)
    if isinstance(error, BrokenPipeError) and reader_is_gone("\n"):
        sys.exit(1)
    if isinstance(error, OverrideParseException):
        return quoting(error)
    if isinstance(error, YAMLError | UnicodeDecodeError) or text.startswith("Invalid loaded object type"):
        if found := of_file(error):
            return found
    if isinstance(error, ValueError) and "Config group override" in text:  # Hydra's error for loss=null
        return FairDiffError(f"{one_line(error)}; a group is chosen, not set: null is for its keys")
    if found := no_memory(error):
        return found
    if not isinstance(error, FairDiffError | HydraException | OmegaConfBaseException | OSError):
        raise error
    return error


def no_memory(error: Exception) -> FairDiffError | None:
    """Return the error to show to the user if the memory was too small, None for another error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        less = "memory_gb=<what the device has>, or less of it, or a smaller micro_batch, which change no result, take less"
        return FairDiffError(f"out of memory: {one_line(error)}; {less}")
    return None


def code_of(error: Exception) -> int:
    """Return the exit code: 3 for an audit whose result is not within `audit.fail_above`, else 2."""
    return 3 if isinstance(error, NotWithinMargin) else 2


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with the error's `code_of`."""
    print(f"{'error: ' if code_of(error) == 2 else ''}{one_line(error)}", file=sys.stderr)
    sys.exit(code_of(error))
