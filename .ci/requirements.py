"""What .ci/run asks of pyproject.toml and pip; standard library only.

requirements.py report FILE       name==version of each package of a `pip install --report`, without this project
requirements.py unbounded EXTRA   the requirements with those of an extra, one a line, without upper bounds
requirements.py lowest EXTRA      the same, each at its lower bound: python -m venv lowest && lowest/bin/pip install $(...)
"""

import json
import re
import sys
import tomllib
from pathlib import Path


def report(file: str) -> list[str]:
    found = [item["metadata"] for item in json.loads(Path(file).read_text())["install"]]
    return sorted(f"{m['name'].lower()}=={m['version']}" for m in found if m["name"] != "fairdiff")


def unbounded(extra: str) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    every = project["dependencies"] + project["optional-dependencies"][extra]
    return [re.sub(r",?<[^,]+", "", requirement) for requirement in every]


def lowest(extra: str) -> list[str]:
    return [requirement.replace(">=", "==") for requirement in unbounded(extra)]


if __name__ == "__main__":
    print("\n".join({"report": report, "unbounded": unbounded, "lowest": lowest}[sys.argv[1]](sys.argv[2])))
