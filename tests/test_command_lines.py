"""Command lines: those of the README are understood, and a sweep puts each run where the same run lands by itself."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fairdiff.cli import main

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"train.py": "config", "scripts/audit.py": "measure"}
LINES = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
COMMANDS = [line for line in LINES if re.match(r"python (train|scripts/audit)\.py\b", line)]


def folders(name: str, overrides: list[str], monkeypatch) -> list[str]:
    """Where the runs of one command line land."""
    found = []
    monkeypatch.setattr(sys, "argv", ["x.py", *overrides])
    main(lambda config, folder: found.append(folder.relative_to(folder.cwd()).as_posix()), name)()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, script, *overrides = shlex.split(re.sub(r"<[\w ]+>", "x", command), comments=True)
    assert folders(NAMES[script], overrides, monkeypatch)


@pytest.mark.parametrize(
    "name,seed,first",
    [
        ("config", "seed", "outputs/gender/adapter.rank=2/seed0"),
        ("measure", "audit.seed", "outputs/audit/gender/adapter.rank=2,audit.seed=0/seed0"),
    ],
)
def test_a_sweep_lands_where_its_runs_would(name, seed, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = folders(name, ["-m", "experiment=gender,race", f"{seed}=0,1", "adapter.rank=2"], monkeypatch)
    alone = [
        folders(name, [f"experiment={experiment}", f"{seed}={n}", "adapter.rank=2"], monkeypatch)[0]
        for experiment in ("gender", "race")
        for n in (0, 1)
    ]
    assert swept == alone and len(set(swept)) == 4
    assert swept[0] == first
