"""Compose settings given by a program, with the groups, keys, checks and run folders of the command line."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write

from fairdiff.cli.command_line import key_of, refuse_twice
from fairdiff.cli.main import check_hydra, to_config, told
from fairdiff.cli.messages import CONF, one_line
from fairdiff.config import Config
from fairdiff.errors import FairDiffError

Settings = Iterable[str] | Mapping[str, object]
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)


def choices(group: str) -> list[str]:
    """Return the choices of a group: the names of its files in conf."""
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


def overrides_of(settings: Settings) -> list[str]:
    """Return settings as overrides: {"adapter": "soft_tokens", "audit": {"prompts": 3}} gives two."""
    if isinstance(settings, str):
        raise FairDiffError(f"settings: found the text {settings!r}, allowed: a list of overrides, or a dict")
    if isinstance(settings, Mapping):
        return [f"{key}={_value(value)}" for key, value in _leaves(settings)]
    return list(settings)


def with_defaults(settings: Settings, defaults: list[str]) -> list[str]:
    """Return the settings as overrides, after the defaults whose key they do not set."""
    own = overrides_of(settings)
    return [o for o in defaults if key_of(o) not in map(key_of, own)] + own


def composed(overrides: list[str]) -> tuple[Config, Path]:
    """Return the configuration of train.py with these overrides, and the run folder that the command would use.

    Raises FairDiffError for overrides that the command line would refuse.
    """
    refuse_twice(overrides)
    here = HydraConfig.instance()
    kept = here.cfg
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", overrides=overrides, return_hydra_config=True)
            here.set_config(cfg)
            folder = Path(cfg.hydra.run.dir)
            hydra = cfg.hydra
            with read_write(cfg), open_dict(cfg):
                del cfg["hydra"]
            config = to_config(cfg)
            check_hydra(hydra, config.adapter.type)
            return config, folder
    except FairDiffError:
        raise
    except Exception as error:
        raise FairDiffError(one_line(told(error))) from error
    finally:
        here.cfg = kept  # the caller may be a Hydra application


def saved(path: Path, overrides: list[str]) -> Config:
    """Return the configuration in a run's config.yaml with overrides. FairDiffError for a file of another version."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        return to_config(cfg)
    except FairDiffError:
        raise
    except Exception as error:
        raise FairDiffError(f"{path}: is no configuration of this version: {one_line(told(error))}") from error


def _leaves(tree: Mapping[str, object], *path: str) -> Iterable[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *path, name)
        else:
            yield ".".join([*path, name]), value


def _value(value: object) -> str:
    """Return a value in Hydra's grammar. Plain words get no quotation marks, so folder names equal the command line's."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    text = str(value)
    if isinstance(value, int | float) or _PLAIN.fullmatch(text):
        return text
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and '\\"'), text) + '"'
