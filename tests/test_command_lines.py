"""Command lines: those of the README are understood, and a sweep puts each run where the same run lands by itself."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from rich.table import Table

from fairdiff.cli import main
from fairdiff.training.tracking import make_console

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
    "name,seed,first,different",
    [
        ("config", "seed", "outputs/gender/adapter.rank-2-1a721c/seed0", 4),
        ("measure", "audit.seed", "outputs/audit/gender/adapter.rank-2-1a721c", 2),  # each audit has a folder in it
    ],
)
def test_a_sweep_lands_where_its_runs_would(name, seed, first, different, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = folders(name, ["-m", "experiment=gender,race", f"{seed}=0,1", "adapter.rank=2"], monkeypatch)
    alone = [
        folders(name, [f"experiment={experiment}", f"{seed}={n}", "adapter.rank=2"], monkeypatch)[0]
        for experiment in ("gender", "race")
        for n in (0, 1)
    ]
    assert swept == alone and len(set(swept)) == different
    assert swept[0] == first


def lands(*overrides: str, monkeypatch, tmp_path) -> str:
    monkeypatch.chdir(tmp_path)
    return folders("config", list(overrides), monkeypatch)[0]


@pytest.mark.parametrize(
    "other",
    [
        "audit=full", "audit.seed=1", "audit.prompts=null", "judge@audit.judge=open_clip", "~judge@audit.judge",
        "micro_batch=2", "cache=null", "model.device=cuda", "resume=false", "hydra.sweep.dir=x",
    ],
)  # fmt: skip
def test_what_leaves_the_training_as_it_is_has_its_folder(other, monkeypatch, tmp_path):
    """So that another audit of it, or its memory, trains nothing again."""
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    folder = "outputs/gender/adapter.rank-2-1a721c/seed0"
    assert lands("adapter.rank=2", **here) == lands(other, "adapter.rank=2", **here) == folder
    assert lands(other, **here) == "outputs/gender/default/seed0"


def test_what_changes_the_training_has_its_own_folder_in_any_order(monkeypatch, tmp_path):
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    found = {lands(*o.split(), **here) for o in ("", "model.padding=longest", "adapter.rank=2", "judge=hf", "loss.face=null")}
    assert len(found) == 5
    assert lands("adapter.rank=2", "loss.face=null", **here) == lands("loss.face=null", "adapter.rank=2", **here)
    long = [f"prompts.negative={'x' * 90}", "adapter.rank=2"]
    assert lands(*long, **here) == lands(*reversed(long), **here) and len(lands(*long, **here)) < 120


@pytest.mark.parametrize(
    "overrides,same",
    [
        (["optimizer.schedule=constant"], True),
        (["model=sd15", "judge.path=x"], True),  # whose rate is constant
        (["optimizer.schedule=constant", "validation.every=2"], False),  # the last step is a validation
        ([], False),  # of a falling rate each step depends on how many there are
    ],
)
def test_more_steps_go_on_in_the_same_folder_where_they_can(overrides, same, monkeypatch, tmp_path):
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    found = {lands(*overrides, f"steps={steps}", **here) for steps in (4, 8)}
    assert (found == {lands(*overrides, **here)}) == same and len(found) == (1 if same else 2)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_terminal_takes_what_is_printed(encoding, tmp_path, monkeypatch):
    """A whole run ended in a traceback at its table."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    def show(config, folder):
        table = Table("gender×race")
        table.add_row("−.05 ± .01 → –, 3\u00a0% 看")
        make_console().print(table)
        print("report: 看/report.html")

    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    main(show)()
    out.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert "-.05" in said.replace("−", "-") and "report: \\u770b/report.html" in said


def test_an_argument_that_is_no_text_here_is_one_line(tmp_path, monkeypatch, capsys):
    """As every accent is in a C locale without Python's UTF-8 mode."""
    stray = "prompts.template='une {} à côté'".encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr(sys, "argv", ["train.py", stray, f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as exit_info:
        main(lambda config, folder: None)()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1 and "PYTHONUTF8=1" in said
