"""The command line before and after Hydra reads it: refused arguments, run folders, and `rerun=<run folder>`."""

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

EXPERIMENT = "${hydra:runtime.choices.experiment}"  # in the folders of conf
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # how many processes MPICH, Open MPI, MVAPICH started
LAUNCHERS = "torchrun or accelerate launch"
# Overrides that do not change the training; `experiment` and `seed` have folders of their own.
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
    """The folder of a training, from the overrides that change it, in any order: readable words and a hash of them all.

    constant_rate: more steps then go on with the same training.
    """
    left_out = (*ELSEWHERE, "steps") if constant_rate else ELSEWHERE
    ends = tuple(f"{k}{end}" for k in left_out for end in "=./")
    kept = sorted(o for o in overrides if not f"{o.lstrip('+~')}=".startswith(ends))  # ~key has no =
    return _words(",".join(kept)) if kept else "default"


def _words(text: str) -> str:
    words = re.sub(r"[^\w.,+-]+", "-", text)[:80].strip("-,.")  # no "=": Hydra would have it quoted in a path
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def more_steps(schedule: str, validation_every: int | None) -> bool:
    """Whether a run may continue with more steps: the learning rate of a step must not depend on their number."""
    return schedule == "constant" and validation_every is None


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("more_steps", more_steps, replace=True)


def prepare(name: str, several: bool = False) -> str:
    """The name of the configuration to compose: `name`, or "rerun" where a saved one runs again.

    several: whether the command can share its work among processes. What Hydra does not know is taken out of sys.argv.
    FairDiffError for what nobody would read or act upon.
    """
    for word in sys.argv[1:]:
        if re.search("[\ud800-\udfff]", word):  # Python's stand-ins for stray bytes
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
    sys.argv = [*rest, "--config-path", CONF] if args.config_path is not None else rest  # of two the last is taken
    return "rerun"


def _with_home(text: str) -> str:
    """An argument with "~/" expanded where a value begins: shells leave it, Hydra cannot read it."""
    return re.sub(r"(?<=[=:,\[ '\"])~(?=/)", lambda _: os.path.expanduser("~"), text)


def _refuse_processes(several: bool) -> None:
    """FairDiffError where a launcher started several processes, or was to, that do not know of each other."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not several:
        raise FairDiffError(f"WORLD_SIZE: found {size}, allowed: 1, this command is one process")
    for key in MPI:
        if size == "1" and os.environ.get(key, "1") != "1":
            raise FairDiffError(f"{key}: found {os.environ[key]}, allowed: 1, or {LAUNCHERS}")
    # what `accelerate launch --num_processes 2` leaves on a CPU, where it starts one process all the same
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
    """FairDiffError for a group that is chosen twice. Of a key the last value is taken, as everywhere in Hydra."""
    for key, count in Counter(map(key_of, overrides)).items():
        if count > 1 and _is_group(key):
            found = " and ".join(o for o in overrides if key_of(o) == key)
            raise FairDiffError(f"{key}: found {found}, allowed: one of them")


def _refuse_saved_in_own_folder(folder: str | None, name: str) -> None:
    """FairDiffError for a --config-dir without a name or with a whole configuration in it, which nothing would read."""
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
    """The run folder of rerun=... or --config-path, None if there is none."""
    for override in args.overrides:
        if override.startswith("rerun="):
            given = override.removeprefix("rerun=")
            if not given.strip():
                raise FairDiffError("rerun: found an empty path, allowed: a run folder")
            return Path(given)
    file = Path(args.config_path or "", "config.yaml")
    if args.config_path is not None and file.exists() and "defaults" not in _read(file):
        return file.parent
    return None  # Hydra's own: a folder with another primary configuration


def _refuse_groups(overrides: list[str]) -> None:
    """FairDiffError for a group: a saved configuration is one of values, and no longer knows what they came from."""
    for override in overrides:
        key = key_of(override).lstrip("~")
        if _is_group(key):
            raise FairDiffError(
                f"{key}: is a group, a saved configuration takes single values on top, such as adapter.rank=8; allowed: "
                "the group's values, or the command that made the run"
            )


def _read(file: Path) -> dict[str, Any]:
    """A configuration file as it stands; FairDiffError if it is none."""
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
    """From here on the configuration "rerun" is what lies in a run folder; it lands in a folder of its own."""
    file = folder / "config.yaml"
    if not file.exists():
        raise FairDiffError(f"rerun: {folder}: found no config.yaml in it, allowed: a run folder")
    values = _literal(_read(file))
    values.pop("resume", None)  # of that command: a run that begins anew must go on when repeated
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
    """A configuration of conf, or one that a command has put beside them."""
    file = Path(CONF, f"{name}.yaml")
    return OmegaConf.load(file) if file.exists() else ConfigStore.instance().load(f"{name}.yaml").node


def _literal(tree: Any) -> Any:
    """The same, with `${` as it stands: what is saved has been resolved."""
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_literal(value) for value in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _without_entries(node: DictConfig) -> DictConfig:
    """A schema whose mappings are empty: merged with them, entries that a run had removed would come back."""
    for key in node:
        if OmegaConf.is_missing(node, key) or not OmegaConf.is_dict(node[key]):
            continue
        if OmegaConf.get_type(node, key) is dict:
            node[key] = {}
        else:
            _without_entries(node[key])
    return node


def of_file(error: Exception) -> FairDiffError | None:
    """Which file an error in reading the configuration is about: of --config-dir or conf, None if it is about neither."""
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
    """What to write for an override that Hydra cannot read: the same in quotation marks, if that helps."""
    key, equals, value = error.override.partition("=")
    if not equals:
        return FairDiffError(f"{key}: found no =, allowed: {key}=<value>")
    value = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and '\\"'), value)  # backslashes count before a mark only
    try:
        OverridesParser.create().parse_override(instead := f'{key}="{value}"')
    except HydraException:  # of the key
        return FairDiffError(f"{key}: there is no such key{like(key.lstrip('+~'))}")
    return FairDiffError(f"{error.override}: cannot be read without quotation marks; write {shlex.quote(instead)}")
