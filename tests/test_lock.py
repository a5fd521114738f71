"""One process at a time works in a run folder, and the remains of a dead process do not block the next one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fairdiff.errors import FairDiffError
from fairdiff.lock import NAME, locked

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (the entry script is no package)

HOLD = """
import sys
from pathlib import Path
from fairdiff.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds tmp_path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=environment, **pipes, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_works_there(holder, tmp_path):
    with pytest.raises(FairDiffError) as caught, locked(tmp_path):
        pass
    said = str(caught.value)
    assert (
        f"process {holder.pid} on {socket.gethostname()}, since 20" in said and "choose another hydra.run.dir" in said
    )
    holder.communicate("")
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_command_in_a_folder_that_is_held_ends_before_it_does_anything(holder, tmp_path, monkeypatch, capsys):
    """Another seed on one hydra.run.dir."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "model.path=./no/such/model", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        train.task()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"process {holder.pid}" in line
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has none")
def test_what_a_killed_process_leaves_behind_keeps_nobody_out(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / NAME).read_text()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"host": 1', "\x00"])
def test_a_lock_that_says_nothing_is_still_one(text, tmp_path):
    with locked(tmp_path):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(FairDiffError, match="another process works in it"), locked(tmp_path):
            pass
    with locked(tmp_path):  # and an old file of that kind is none
        pass


def test_one_that_waits_with_a_removed_file_open_does_not_hold_the_folder(tmp_path, monkeypatch):
    """Between opening and locking, the holder ends and removes its file, and a third process starts."""
    first = locked(tmp_path)
    first.__enter__()
    opened, third = os.open, locked(tmp_path)

    def slow(*arguments):
        file = opened(*arguments)
        monkeypatch.undo()
        first.__exit__(None, None, None)
        third.__enter__()
        return file

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(FairDiffError, match="works in it"), locked(tmp_path):
        pass
    third.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_an_error_lets_go(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "run"):
        assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'file' / 'run'}: cannot be locked (Not a directory")


def test_a_folder_that_is_not_there_yet_is_made_and_held(tmp_path, capsys):
    with locked(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / NAME).exists()
    assert "cannot be locked" not in capsys.readouterr().out
