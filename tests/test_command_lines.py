"""Command lines: those of the README are valid, and a run of a sweep has the same folder as the run alone."""

import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.table import Table
from tiny import composed

from fairdiff import run
from fairdiff.cli.main import main
from fairdiff.errors import FairDiffError
from fairdiff.training.tracking import make_console

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"train.py": "config", "scripts/audit.py": "measure"}
LINES = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
COMMANDS = [line for line in LINES if re.match(r"python (train|scripts/audit)\.py\b", line)]


def folders(name: str, overrides: list[str], monkeypatch) -> list[str]:
    """Return the folders of the runs of one command line."""
    found = []
    monkeypatch.setattr(sys, "argv", ["x.py", *overrides])
    main(lambda config, folder: found.append(folder.relative_to(folder.cwd()).as_posix()), name)()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, script, *overrides = shlex.split(re.sub(r"<[\w ]+>", "x", command), comments=True)
    assert folders(NAMES[script], overrides, monkeypatch)


@pytest.mark.slow
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


RANK_2 = "outputs/gender/adapter.rank-2-1a721c/seed0"


def test_a_folder_is_named_by_what_is_set(monkeypatch, tmp_path):
    assert lands("adapter.rank=2", monkeypatch=monkeypatch, tmp_path=tmp_path) == RANK_2


@pytest.mark.parametrize(
    "other",
    [
        "audit=full", "audit.seed=1", "audit.prompts=null", "judge@audit.judge=open_clip", "~judge@audit.judge",
        "micro_batch=2", "memory_gb=12", "cache=null", "model.device=cuda", "resume=false", "hydra.sweep.dir=x",
    ],
)  # fmt: skip
def test_what_leaves_the_training_as_it_is_has_its_folder(other, monkeypatch, tmp_path):
    """So another audit, or another memory setting, does not train again."""
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    assert lands(other, "adapter.rank=2", **here) == RANK_2
    assert lands(other, **here) == "outputs/gender/default/seed0"


@pytest.mark.slow
def test_what_changes_the_training_has_its_own_folder_in_any_order(monkeypatch, tmp_path):
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    found = {
        lands(*o.split(), **here) for o in ("", "model.padding=longest", "adapter.rank=2", "judge=hf", "loss.face=null")
    }
    assert len(found) == 5
    assert lands("adapter.rank=2", "loss.face=null", **here) == lands("loss.face=null", "adapter.rank=2", **here)
    long = [f"prompts.negative={'x' * 90}", "adapter.rank=2"]
    assert lands(*long, **here) == lands(*reversed(long), **here) and len(lands(*long, **here)) < 120


@pytest.mark.parametrize(
    "overrides,same",
    [
        ([], True),  # the rate is constant
        (["model=sd15", "adapter=lora_text", "judge.path=x"], True),
        (["optimizer.schedule=constant", "validation.every=2"], False),  # the last step is a validation
        (["optimizer.schedule=linear"], False),  # of a falling rate each step depends on how many there are
        (["adapter=lora_text"], False),
    ],
)
def test_more_steps_go_on_in_the_same_folder_where_they_can(overrides, same, monkeypatch, tmp_path):
    here = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    found = {lands(*overrides, f"steps={steps}", **here) for steps in (4, 8)}
    assert (found == {lands(*overrides, **here)}) == same and len(found) == (1 if same else 2)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_terminal_takes_what_is_printed(encoding, tmp_path, monkeypatch):
    """Printing the table once ended a whole run with a traceback."""
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
    """Every accent is invalid in a C locale without Python's UTF-8 mode."""
    stray = "prompts.template='une {} à côté'".encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr(sys, "argv", ["train.py", stray, f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as exit_info:
        main(lambda config, folder: None)()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1 and "PYTHONUTF8=1" in said
@pytest.mark.slow
@pytest.mark.parametrize("key", ["prompts.negative", "model.path", "prompts.train"])
def test_values_that_look_alike_in_a_folders_name_have_their_own(key, monkeypatch, tmp_path):
    values = ["a b", "a/b", "a-b", "a  b", "A b", "a b/", "a_b", "'a b'x"]
    quoted = [f'{key}="{value}"' for value in values]
    assert len({lands(one, monkeypatch=monkeypatch, tmp_path=tmp_path).casefold() for one in quoted}) == len(values)


def given(name: str, arguments: list[str], monkeypatch) -> list[tuple]:
    """Return (configuration, folder below the working directory) of each run of a command line."""
    found = []
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    main(lambda config, folder: found.append((config, folder.relative_to(folder.cwd()).as_posix())), name)()
    return found


def refused(arguments: list[str], monkeypatch, capsys) -> str:
    """Return the only line of output of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        given("config", arguments, monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


SAVED = [
    [],
    ["experiment=multi_concept", "~prompts.families.occupation", "target.gender.female=.3", "target.gender.male=.7"],
    ["attribute=[race]", "adapter=soft_tokens", "target.file=labour", "validation.every=5", "loss.image=0.1"],
    ["model=sd15", "judge.path={gender: a, race: b}", "prompts.negative='ü \\${x} \"'", "loss=paper", "seed=3"],
    ["resume=false", "cache=null", "adapter.learning_rate=1e-7", "prompts.template='\"{}\"'"],
]


@pytest.mark.parametrize("option", ["rerun", "--config-path"])
@pytest.mark.parametrize("overrides", SAVED, ids=" ".join)
def test_a_saved_configuration_runs_again_as_it_was(overrides, option, tmp_path, monkeypatch):
    """The run has its own folder, and is resumed if the command is repeated."""
    monkeypatch.chdir(tmp_path)
    config = composed(*overrides)
    run.begin(tmp_path / "old", asdict(config), "a")
    ((again, folder),) = given("config", [f"{option}=old"], monkeypatch)
    assert again == replace(config, resume=True)
    assert re.fullmatch(rf"outputs/rerun/old-\w{{6}}/default/seed{config.seed}", folder)


def test_further_overrides_stand_on_top_of_a_saved_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed("adapter.rank=3", "seed=2")
    run.begin(tmp_path / "old", asdict(config), "a")
    ((again, folder),) = given(
        "config", ["rerun=old", "adapter.rank=2", "seed=5", "+prompts.families.styled=1"], monkeypatch
    )
    assert (again.adapter.rank, again.seed, again.prompts.families) == (2, 5, {"occupation": 1, "styled": 1})
    assert re.fullmatch(r"outputs/rerun/old-\w{6}/\+prompts.families.styled-1,adapter.rank-2-\w{6}/seed5", folder)
    ((again, folder),) = given("config", ["rerun=old", "resume=false", "hydra.run.dir=here"], monkeypatch)
    assert (again, folder) == (replace(config, resume=False), "here")
    swept = given("config", ["-m", "rerun=old", "seed=0,1"], monkeypatch)
    assert [again.seed for again, _ in swept] == [0, 1] and {again.adapter.rank for again, _ in swept} == {3}
    ((again, folder),) = given("measure", ["rerun=old"], monkeypatch)
    assert again == config and re.fullmatch(r"outputs/audit/rerun/old-\w{6}/default", folder)


def test_a_saved_configuration_is_one_of_values_and_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.begin(tmp_path / "old", asdict(composed("adapter.rank=3")), "a")
    for group in ("adapter=lora_text", "attribute=[race]", "+experiment=race", "judge@audit.judge=hf"):
        assert "is a group, a saved configuration takes single values" in refused(
            ["rerun=old", group], monkeypatch, capsys
        )
    assert "foo: there is no such key" in refused(["rerun=old", "++foo=1"], monkeypatch, capsys)
    file = tmp_path / "old" / "config.yaml"
    whole = file.read_text()
    for text, says in (
        (whole + "adapter: {}\n", "found duplicate key adapter"),
        (whole.replace("  rank: 3", "  alpha: 3"), "adapter.alpha: there is no such key; in its place: adapter.rank"),
        (whole.replace("  rank: 3", "  rank: many"), "adapter.rank: Value 'many'"),
        (whole.replace("steps: 120\n", ""), "steps: no value given"),
        ("steps: [1\n", "line 2"),
        ("- 1\n", "found a list"),
    ):  # fmt: skip
        assert text != whole
        file.write_text(text)
        assert says in refused(["rerun=old"], monkeypatch, capsys), says


def test_a_saved_configuration_in_ones_own_folder_is_not_read_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.begin(tmp_path / "old", asdict(composed("steps=7")), "a")
    line = refused(["--config-dir", "old"], monkeypatch, capsys)
    assert "--config-dir: old/config.yaml is not read" in line and "rerun=old" in line
    file = tmp_path / "old" / "config.yaml"
    quiet = "{override hydra/job_logging: none}, {override hydra/hydra_logging: none}"
    file.write_text(f"defaults: [_self_, {quiet}]\nsteps: 7\n")  # a configuration of Hydra's own
    assert "--config-path: its configuration has no schema" in refused(
        ["--config-path", str(tmp_path / "old")], monkeypatch, capsys
    )


@pytest.mark.slow
def test_a_sweep_runs_what_it_can_and_names_the_rest_at_the_end(tmp_path, monkeypatch, capsys):
    """Some values do not compose, some are invalid, and some runs fail."""
    monkeypatch.chdir(tmp_path)
    done = []

    def task(config, folder):
        if config.seed == 3:
            raise FairDiffError("three is too many")
        done.append((config.steps, config.seed))

    monkeypatch.setattr(sys, "argv", ["x.py", "-m", "steps=5,many", "seed=0,-1,3,1"])
    with pytest.raises(SystemExit) as stop:
        main(task)()
    assert stop.value.code == 2 and done == [(5, 0), (5, 1)]
    said = capsys.readouterr().err
    listed = said.split("error: these runs of the sweep failed:\n")[1].splitlines()
    assert "Traceback" not in said and len(listed) == 6
    assert sum("steps: found many, allowed: a whole number" in line for line in listed) == 4
    assert any(line.strip().startswith("steps=5 seed=-1: seed: found -1") for line in listed)
    assert any(line.strip() == "steps=5 seed=3: three is too many" for line in listed)
    monkeypatch.setattr(sys, "argv", ["x.py", "-m", "seed=0,1"])
    main(task)()  # nothing of it is left
    assert capsys.readouterr().err == ""


IN_PROCESSES = """
from fairdiff.cli.main import main
from fairdiff.errors import FairDiffError

def task(config, folder):
    if config.seed == 1:
        raise FairDiffError("steps: no")
    (folder / "done").touch()

if __name__ == "__main__":
    main(task)()
"""


@pytest.mark.slow
def test_a_failed_run_in_a_process_of_a_launcher_is_a_failed_sweep(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "sweep.py").write_text(IN_PROCESSES)
    command = [sys.executable, "sweep.py", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1,2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 2 and "error: seed=1: steps: no" in found.stderr, found.stderr
    assert sorted(p.parent.name for p in tmp_path.rglob("done")) == ["seed0", "seed2"]


def test_a_sweep_of_audits_ends_with_the_command_that_compares_them(tmp_path, monkeypatch, capsys):
    def job(config, folder):
        if config.seed < 2:  # the third run has no audit
            (folder / "audits" / "some").mkdir(parents=True, exist_ok=True)
            (folder / "audits" / "some" / "audit.json").write_text("{}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", "-m", "seed=0,1,2"])
    main(job)()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "side by side: fairdiff-compare outputs/gender/default/seed0 outputs/gender/default/seed1"
    monkeypatch.setattr(sys, "argv", ["x.py", "-m", "seed=0,2"])
    main(job)()
    assert "side by side" not in capsys.readouterr().out  # of one there is nothing to compare
