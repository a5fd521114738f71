"""The layer between Hydra and the mains: it turns a configuration into dataclasses, and every error into one line."""

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
    """Plain dataclasses from the composed configuration, "~/" expanded; runs every __post_init__."""
    if not is_dataclass(OmegaConf.get_type(cfg)):
        raise FairDiffError("--config-path: its configuration has no schema, allowed: `defaults: [schema, ...]`")
    _refuse_unknown(cfg)
    _expand_home(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise FairDiffError(f"{missing[0]}: no value given")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(node: DictConfig, *path: str) -> None:
    """FairDiffError for a key that is in no schema: with a plus Hydra takes any, and nothing would read it."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in fields(schema)} if is_dataclass(schema) else {*node}
    for name in node:
        key = ".".join([*path, str(name)])
        if name not in known and key != "hydra.env":  # which Hydra's own schema lacks
            raise FairDiffError(f"{key}: there is no such key{like(key)}")
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if OmegaConf.is_dict(node[name]):
            _refuse_unknown(node[name], *path, str(name))


def _expand_home(node: DictConfig | ListConfig) -> None:
    """Values that begin with "~/", which are paths under whatever key, with the home folder in its place."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_config(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            node[key] = os.path.expanduser(value)


def check_hydra(cfg: DictConfig, adapter: str) -> None:
    """FairDiffError for what Hydra's own part of the configuration lets pass, and for keys of another type of adapter."""
    _refuse_unknown(cfg, "hydra")
    _refuse_other_keys(OmegaConf.to_container(cfg.overrides.task, resolve=False), adapter)
    if GlobalHydra.instance().is_initialized():  # not in every launcher's processes
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
    """FairDiffError for a key of `adapter` that nothing would read, though the run's folder would be named by it.

    Files may set keys of both types: which one runs is chosen after some of them.
    """
    others = {f"adapter.{key}": kind for kind, keys in OWN_KEYS.items() if kind != adapter for key in keys}
    for override in overrides:
        if kind := others.get(key := key_of(override)):
            raise FairDiffError(f"{key}: found with adapter.type={adapter}, which has none; allowed: with {kind}")


def main(task: Callable[[Config, Path], None], name: str = "config", several: bool = False) -> Callable[[], None]:
    """A Hydra main of conf/<name>.yaml: task(config, run_dir). What the user can mend ends as one line, exit code 2.

    A sweep goes on after a run that fails so; its last lines name those runs, and the command that compares its
    audits. several: whether the task shares its work among the processes that a launcher started.
    """
    failed: list[str] = []  # runs of a sweep
    audited: list[str] = []  # folders of those that have an audit, as far as they ran in this process
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
            if swept:  # else nobody knows which of a sweep's runs this is
                print(f"run {here.job.num}: {' '.join(overrides) or 'defaults'}", flush=True)
            config = to_config(cfg)
            check_hydra(here, config.adapter.type)
            try:
                task(config, Path(here.runtime.output_dir))
            finally:
                if swept and next(Path(here.runtime.output_dir).glob("audits/*/audit.json"), None):
                    audited.append(os.path.relpath(here.runtime.output_dir))
        except Exception as error:  # before Hydra adds lines of its own
            line = told(error)
            if not swept:
                fail(line)
            give_up(line, overrides)
            if os.getpid() != parent:  # a launcher's own process, whose `failed` nobody reads; the sweep ends with it
                raise FairDiffError(failed[-1]) from error

    def run() -> None:
        failed.clear()
        audited.clear()
        codes.clear()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of a printed traceback
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
                sys.exit(min(codes))  # 3 where no run failed by itself

    return run


@contextmanager
def _leaving_out(give_up: Callable[[Exception, Sequence[str]], None]) -> Iterator[None]:
    """In a sweep, runs that do not compose are given up before the others begin. Hydra would begin none."""
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
    """The message for the user; re-raises bugs, and exits if the output pipe is closed."""
    text = str(error)
    if isinstance(error, BrokenPipeError) and reader_is_gone("\n"):
        sys.exit(1)
    if isinstance(error, OverrideParseException):
        return quoting(error)
    if isinstance(error, YAMLError | UnicodeDecodeError) or text.startswith("Invalid loaded object type"):
        if found := of_file(error):
            return found
    if isinstance(error, ValueError) and "Config group override" in text:  # Hydra's, of loss=null
        return FairDiffError(f"{one_line(error)}; a group is chosen, not set: null is for its keys")
    if found := no_memory(error):
        return found
    if not isinstance(error, FairDiffError | HydraException | OmegaConfBaseException | OSError):
        raise error
    return error


def no_memory(error: Exception) -> FairDiffError | None:
    """What to tell the user where the memory of the device or of the machine was too small, None for another error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        less = "memory_gb=<what the device has>, or less of it, or a smaller micro_batch, which change no result, take less"
        return FairDiffError(f"out of memory: {one_line(error)}; {less}")
    return None


def code_of(error: Exception) -> int:
    """3 of an audit whose result is not within `audit.fail_above`, else 2."""
    return 3 if isinstance(error, NotWithinMargin) else 2


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with code 2, or 3 where the result and not the command is at fault."""
    print(f"{'error: ' if code_of(error) == 2 else ''}{one_line(error)}", file=sys.stderr)
    sys.exit(code_of(error))
