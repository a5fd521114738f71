"""Write docs/reference/configuration.md from the schemas, their docstrings and the files in conf, and audit.schema.json.

python scripts/reference.py
"""

import re
from dataclasses import fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fairdiff import config as schemas
from fairdiff.audit.schema import schema
from fairdiff.cli.main import CONF
from fairdiff.files import flat, write_json, write_text

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGE, AUDIT_SCHEMA = REFERENCE / "configuration.md", REFERENCE / "audit.schema.json"
HEAD = """# Configuration

Written by `python scripts/reference.py` from the schemas in `fairdiff/config` and the files in `conf`; do not edit.

A command takes two kinds of settings. A **group** chooses a file: `adapter=soft_tokens`. A **key** sets one value:
`loss.image=.2`. A key wins over every file. Among files a later one wins: detector, judge, loss, audit, adapter, model,
experiment. An unknown key, a wrong type or an impossible value ends the command with one line and exit code 2.

`--cfg job` prints the composed settings and runs nothing. `config.yaml` in the run folder holds them as they ran.
Formats of target and prompt files: [Files](files.md).
"""
GROUPS = """
## Groups

`attribute` takes a list in brackets, and its order is kept. `judge@audit.judge` chooses the audit's attribute classifier
from the files of `judge`. Choices in **bold** are the defaults of `python train.py`.
"""
KEYS = """
## Keys

`default` is the value that `python train.py` runs with. `model=sd15` is the value there, where it differs.
"""
PLAIN = {"str": "text", "None": "null", "bool": "true or false", "Any": "any"}
LONGEST = 60  # characters of a value in the table


def composed(*overrides: str) -> Any:
    """Compose the configuration of a command line, with Hydra's section and without checks."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def about_file(path: Path) -> str:
    """Return the comment at the head of a file in conf, or the values that it sets if it has none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    if lines[0].startswith("# "):
        return lines[0][2:]
    content = yaml.safe_load("\n".join(lines))
    return "; ".join(f"`{key}: {shown(value)}`" for key, value in flat(content).items())


def group_rows(chosen: dict[str, Any]) -> list[str]:
    """Return the table of all choices of all groups, one per row."""
    rows = ["", "| choice | what it is |", "|---|---|"]
    for file in sorted(Path(CONF).glob("*/*.yaml")):
        used = chosen.get(file.parent.name)
        default = file.stem in (used if isinstance(used, list) else [used])
        choice = f"`{file.parent.name}={file.stem}`"
        rows.append(f"| {f'**{choice}**' if default else choice} | {escaped(about_file(file))} |")
    return rows


def meanings(schema: type) -> tuple[str, dict[str, str]]:
    """Split a schema's docstring into its introduction and the texts of its keys.

    "key, key: text" at the start of a line or sentence begins the text of these keys.
    """
    names = "|".join(f.name for f in fields(schema))
    parts = re.split(rf"(?:^|(?<=\n)|(?<=\. ))((?:{names})(?:, (?:{names}))*): ", getdoc(schema))
    texts = [" ".join(part.split()) for part in parts]
    found = {name: text for keys, text in zip(texts[1::2], texts[2::2], strict=True) for name in keys.split(", ")}
    return texts[0], found


def key_rows(schema: type, prefix: str, default: Any, photographs: Any) -> list[str]:
    """Return the table of one schema's keys, without nested schemas, which have tables of their own."""
    about, found = meanings(schema)
    rows = ["", escaped(about), ""] if about else [""]
    rows += ["| key | type | default | `model=sd15` | meaning |", "|---|---|---|---|---|"]
    for f in fields(schema):
        if is_dataclass(f.type) or f.name == "attributes":
            continue
        here, there = (OmegaConf.select(some, f"{prefix}{f.name}") for some in (default, photographs))
        other = cell(there) if here != there else ""
        cells = [f"`{prefix}{f.name}`", kind(f.type), cell(here), other, escaped(found.get(f.name, ""))]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def kind(type_: Any) -> str:
    """Return a field's type in words."""
    text = type_.__name__ if type(type_) is type else str(type_).replace("typing.", "")
    return " or ".join(PLAIN.get(name, name) for name in text.split(" | "))


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1e9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def cell(value: Any) -> str:
    """Return a value for the table, or a reference to `conf` if it is long."""
    return f"`{shown(value)}`" if len(shown(value)) <= LONGEST else "see `conf`"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Return the whole page."""
    default, photographs = composed(), composed("model=sd15")
    lines = [HEAD, GROUPS.strip(), *group_rows(default.hydra.runtime.choices), KEYS]
    tables = [("The run", schemas.Config, "")]
    for f in fields(schemas.Config):
        if f.name == "attributes":
            tables.append(("`attributes.<name>`, as for gender", schemas.AttributeConfig, "attributes.gender."))
        elif is_dataclass(f.type):
            tables.append((f"`{f.name}`", f.type, f"{f.name}."))
    tables.append(("`audit.judge`", schemas.JudgeConfig, "audit.judge."))
    for title, kind, prefix in tables:
        lines += [f"### {title}", *key_rows(kind, prefix, default, photographs), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
    write_json(AUDIT_SCHEMA, schema())
    print(PAGE, AUDIT_SCHEMA, sep="\n")
