"""Commands end without a traceback and with the right exit code, however they are ended."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import whole_audit

from fairdiff import start
from fairdiff.cli.ending import ending
from fairdiff.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import compare  # noqa: E402

# Ctrl-C in the middle of the imports: when torch is asked for, after which they would go on
IMPORTING = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "scripts/audit.py"])
@pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process there")
def test_ctrl_c_during_imports(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTING, script]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")


def test_the_commands_are_those_of_the_installation():
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("train", "audit", "view", "compare"):
        assert f'fairdiff-{name} = "fairdiff.start:{name}"' in text and hasattr(start, name)


@contextmanager
def unread(monkeypatch):
    """Standard output is a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield


@pytest.mark.parametrize("length", [1, 100_000])  # noticed at the end, or at once
def test_output_that_nobody_reads_ends_a_command_quietly(length, monkeypatch, capsys):
    with unread(monkeypatch):
        with pytest.raises(SystemExit) as stop, ending():
            print("x" * length)
        sys.stdout.flush()  # as Python does at exit
    assert stop.value.code == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"], [], ["-m", "seed=0,1"]], ids=" ".join)
@pytest.mark.parametrize("length", [1, 100_000])
def test_so_it_does_a_job(arguments, length, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with unread(monkeypatch), pytest.raises(SystemExit) as stop:
        main(lambda config, folder: print("x" * length))()
    assert stop.value.code == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name,does", [("config", "Trains an adapter"), ("measure", "Audits a model")])
def test_help_begins_with_what_the_command_does(name, does, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        main(lambda config, folder: None, name)()
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(does)


def test_a_mistake_keeps_its_code_when_nobody_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "steps=0"])
    with unread(monkeypatch), pytest.raises(SystemExit) as stop:
        main(lambda config, folder: None)()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: steps: found 0")


def test_a_table_that_nobody_reads(monkeypatch, tmp_path, capsys):
    (tmp_path / "audit.json").write_text(json.dumps(whole_audit()))
    with unread(monkeypatch), pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path)])
    assert stop.value.code == 1 and capsys.readouterr().err == ""


def test_another_pipe_that_breaks_is_no_end_in_silence():
    with pytest.raises(BrokenPipeError), ending():
        raise BrokenPipeError


def test_without_any_output_a_command_does_its_work(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    done = []
    with ending():
        print("x")
        done.append(sys.stdout.isatty())
    sys.stdout.close()
    assert done == [False]


def test_ctrl_c_in_a_script(capsys):
    with pytest.raises(SystemExit) as stop, ending():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
