"""Check the command line before Hydra reads it, name run folders, and implement `rerun=<run folder>`."""

import hashlib
import os
import re
import shlex
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from fairdiff.cli.messages import CONF, like, one_line
from fairdiff.errors import FairDiffError

EXPERIMENT = "${hydra:runtime.choices.experiment}"  # part of the run folders in conf
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # process counts set by MPICH, Open MPI, MVAPICH
LAUNCHERS = "torchrun or accelerate launch"
# Overrides that do not change the training; `experiment` and `seed` are folders of their own in the path.
ELSEWHERE = (
    "audit",
    "export",
    "hub",
    "judge@audit.judge",
    "resume",
    "cache",
    "plan",
    "tracker",
    "tracker_options",
    "micro_batch",
    "memory_gb",
    "model.device",
    "experiment",
    "seed",
    "hydra",
)


def run_name(overrides: list[str], constant_rate: bool = False) -> str:
    """Return the folder name of a training: the overrides that change it, in any order, as readable words and a hash.

    constant_rate: whether more steps continue the same training, so `steps` is left out.
    """
    left_out = (*ELSEWHERE, "steps") if constant_rate else ELSEWHERE
    ends = tuple(f"{k}{end}" for k in left_out for end in "=./")
    kept = sorted(o for o in overrides if not f"{o.lstrip('+~')}=".startswith(ends))  # the added = is for ~key
    return _words(",".join(kept)) if kept else "default"


def _words(text: str) -> str:
    words = re.sub(r"[^\w.,+-]+", "-", text)[:80].strip("-,.")  # no "=": Hydra requires quotation marks for it in a path
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def more_steps(schedule: str, validation_every: int | None) -> bool:
    """Return whether more steps continue the same training: a step's learning rate must not depend on their number."""
    return schedule == "constant" and validation_every is None


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("more_steps", more_steps, replace=True)


def prepare(name: str, several: bool = False) -> str:
    """Check sys.argv and return the name of the configuration to compose: `name`, or "rerun" to run a saved one again.

    several: whether the command can share its work among processes. Arguments that Hydra does not know are removed from
    sys.argv. Raises FairDiffError for arguments that would have no effect.
    """
    for word in sys.argv[1:]:
        if re.search("[\ud800-\udfff]", word):  # Python's surrogates for bytes that are not text
            raise FairDiffError(f"{word!a}: is not text in {sys.getfilesystemencoding()}; PYTHONUTF8=1 reads UTF-8")
    sys.argv = [_with_home(text) for text in sys.argv]
    _refuse_processes(several)
    args = get_args_parser().parse_args()
    if args.multirun and os.environ.get("WORLD_SIZE", "1") != "1":
        raise FairDiffError(f"--multirun: found {os.environ['WORLD_SIZE']} processes, allowed: 1, or one run of them all")
    if args.experimental_rerun is not None:
        raise FairDiffError("--experimental-rerun: reads a pickle, which can run any code; allowed: rerun=<run folder>")
    refuse_twice(args.overrides)
    _refuse_saved_in_own_folder(args.config_dir, name)
    folder = _saved_folder(args)
    if folder is None:
        return name
    if args.config_name is not None:
        raise FairDiffError(f"rerun: found with --config-name {args.config_name}, allowed: one of them")
    _refuse_groups(args.overrides)
    _store_saved(folder, name)
    rest = [argument for argument in sys.argv if not argument.startswith("rerun=")]
    sys.argv = [*rest, "--config-path", CONF] if args.config_path is not None else rest  # the last --config-path counts
    return "rerun"


def _with_home(text: str) -> str:
    """Expand "~/" at the beginning of values in an argument: shells do not, and Hydra cannot parse it."""
    return re.sub(r"(?<=[=:,\[ '\"])~(?=/)", lambda _: os.path.expanduser("~"), text)


def _refuse_processes(several: bool) -> None:
    """Raise FairDiffError if a launcher started processes that cannot work together, or one instead of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not several:
        raise FairDiffError(f"WORLD_SIZE: found {size}, allowed: 1, this command is one process")
    for key in MPI:
        if size == "1" and os.environ.get(key, "1") != "1":
            raise FairDiffError(f"{key}: found {os.environ[key]}, allowed: 1, or {LAUNCHERS}")
    # `accelerate launch --num_processes 2` sets these on a CPU, but starts one process only
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise FairDiffError(
            "accelerate launch: has started one process, as it does without GPUs, allowed: --num_processes 1, or torchrun "
            "--nproc-per-node=<number>"
        )


def key_of(override: str) -> str:
    return override.split("=")[0].lstrip("+")


def _is_group(key: str) -> bool:
    return "@" in key or Path(CONF, key).is_dir()


def refuse_twice(overrides: list[str]) -> None:
    """Raise FairDiffError for a group that is chosen twice. For a key the last value counts, as in Hydra."""
    for key, count in Counter(map(key_of, overrides)).items():
        if count > 1 and _is_group(key):
            found = " and ".join(o for o in overrides if key_of(o) == key)
            raise FairDiffError(f"{key}: found {found}, allowed: one of them")


def _refuse_saved_in_own_folder(folder: str | None, name: str) -> None:
    """Raise FairDiffError for an empty --config-dir, or one with a whole configuration, which Hydra would not read."""
    if folder is None:
        return
    if not folder.strip():
        raise FairDiffError("--config-dir: found an empty path, allowed: a folder")
    for file in (Path(folder, f"{n}.yaml") for n in dict.fromkeys(("config", name))):
        if file.exists():
            raise FairDiffError(
                f"--config-dir: {file} is not read, only groups in folders such as {folder}/experiment are; allowed: "
                f"rerun={folder} if it is the saved configuration of a run"
            )


def _saved_folder(args: Namespace) -> Path | None:
    """Return the run folder given by rerun=... or --config-path, None if there is none."""
    for override in args.overrides:
        if override.startswith("rerun="):
            given = override.removeprefix("rerun=")
            if not given.strip():
                raise FairDiffError("rerun: found an empty path, allowed: a run folder")
            return Path(given)
    file = Path(args.config_path or "", "config.yaml")
    if args.config_path is not None and file.exists() and "defaults" not in _read(file):
        return file.parent
    return None  # a --config-path with another primary configuration is left to Hydra


def _refuse_groups(overrides: list[str]) -> None:
    """Raise FairDiffError for a group: a saved configuration has values only and does not record the groups."""
    for override in overrides:
        key = key_of(override).lstrip("~")
        if _is_group(key):
            raise FairDiffError(
                f"{key}: is a group, a saved configuration takes single values on top, such as adapter.rank=8; allowed: "
                "the group's values, or the command that made the run"
            )


def _read(file: Path) -> dict[str, Any]:
    """Read a configuration file without resolving interpolations. FairDiffError if it is not one."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except MarkedYAMLError as error:
        raise _at_line(file, error) from error
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise FairDiffError(f"{file}: cannot be read as a configuration: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise FairDiffError(f"{file}: found a list, allowed: keys with their values")
    return found


def _store_saved(folder: Path, name: str) -> None:
    """Store the configuration saved in a run folder as "rerun". Its run gets a folder of its own."""
    file = folder / "config.yaml"
    if not file.exists():
        raise FairDiffError(f"rerun: {folder}: found no config.yaml in it, allowed: a run folder")
    values = _literal(_read(file))
    values.pop("resume", None)  # set for the old command only: a repeated rerun must resume
    try:
        saved = OmegaConf.merge(_without_entries(ConfigStore.instance().load("schema.yaml").node), values)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        what = f"there is no such key{like(key)}" if "not in" in str(error) else one_line(error)
        raise FairDiffError(f"{file}: {key}: {what}") from error
    places = OmegaConf.merge(*(_primary(n).hydra for n in dict.fromkeys(("config", name))))
    label = _words(folder.as_posix())
    places = OmegaConf.create(OmegaConf.to_yaml(places).replace(EXPERIMENT, f"rerun/{label}"))
    quiet = [{f"override hydra/{kind}_logging": "none"} for kind in ("job", "hydra")]
    ConfigStore.instance().store("saved", saved)
    ConfigStore.instance().store("rerun", {"defaults": ["saved", "_self_", *quiet], "hydra": places})


def _primary(name: str) -> DictConfig:
    """Return a configuration from conf, or one that a command has registered."""
    file = Path(CONF, f"{name}.yaml")
    return OmegaConf.load(file) if file.exists() else ConfigStore.instance().load(f"{name}.yaml").node


def _literal(tree: Any) -> Any:
    """Return the tree with `${` escaped, because a saved configuration is already resolved."""
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_literal(value) for value in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _without_entries(node: DictConfig) -> DictConfig:
    """Return a schema whose mappings are empty. Otherwise merging would bring back entries that a run had removed."""
    for key in node:
        if OmegaConf.is_missing(node, key) or not OmegaConf.is_dict(node[key]):
            continue
        if OmegaConf.get_type(node, key) is dict:
            node[key] = {}
        else:
            _without_entries(node[key])
    return node


def of_file(error: Exception) -> FairDiffError | None:
    """Return an error that names the file of --config-dir or conf that cannot be read, None if it is in neither."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return _at_line(error.problem_mark.name, error)
    own = get_args_parser().parse_args().config_dir
    for file in [file for folder in (own, CONF) if folder for file in sorted(Path(folder).glob("*/*.yaml"))]:
        try:
            _read(file)
        except FairDiffError as found:
            if type(found.__cause__) is type(error):
                return found
    return None


def _at_line(file: Path | str, error: MarkedYAMLError) -> FairDiffError:
    return FairDiffError(f"{file}, line {error.problem_mark.line + 1}: {error.problem}")


def quoting(error: OverrideParseException) -> FairDiffError:
    """Return an error for an override that Hydra cannot parse. It proposes quotation marks if they help."""
    key, equals, value = error.override.partition("=")
    if not equals:
        return FairDiffError(f"{key}: found no =, allowed: {key}=<value>")
    value = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and '\\"'), value)  # only before a mark is a backslash an escape
    try:
        OverridesParser.create().parse_override(instead := f'{key}="{value}"')
    except HydraException:  # the key is wrong
        return FairDiffError(f"{key}: there is no such key{like(key.lstrip('+~'))}")
    return FairDiffError(f"{error.override}: cannot be read without quotation marks; write {shlex.quote(instead)}")
