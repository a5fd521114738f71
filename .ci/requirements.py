"""What .ci/run asks of pyproject.toml and pip; the standard library only, and for `core` a Python that has pip.

requirements.py report FILE       name==version of each package of a `pip install --report`, without this project
requirements.py core FILE         those of them that this project needs without its extras
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


def core(file: str) -> list[str]:
    """By what each package of the report requires, so that pip need not resolve a second time."""
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    about = {canonicalize_name(i["metadata"]["name"]): i["metadata"] for i in json.loads(Path(file).read_text())["install"]}
    seen, left = set(), [("fairdiff", "")]
    while left:
        seen.add(one := left.pop())
        name, extra = one
        for requirement in map(Requirement, about[name].get("requires_dist", [])):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                left += {(needed, more) for more in ("", *requirement.extras)} - seen
    return sorted(f"{name}=={about[name]['version']}" for name in {name for name, _ in seen} - {"fairdiff"})


def unbounded(extra: str) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    every = project["dependencies"] + project["optional-dependencies"][extra]
    return [re.sub(r",?<[^,]+", "", requirement) for requirement in every]


def lowest(extra: str) -> list[str]:
    return [requirement.replace(">=", "==") for requirement in unbounded(extra)]


if __name__ == "__main__":
    print("\n".join({"report": report, "core": core, "unbounded": unbounded, "lowest": lowest}[sys.argv[1]](sys.argv[2])))
