"""A run folder survives an interruption at any of its writes; one line names a damaged file."""

import io
import json
import os
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from full_disk import full_disk
from rich.console import Console
from safetensors.torch import load_file
from tiny import composed

from fairdiff import run
from fairdiff.diffusion.adapters import LORA_FILE, Lora
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError
from fairdiff.files import write_text
from fairdiff.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

report = runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]


class Cut(BaseException):
    """An exception that stands for a kill: no code catches it."""


def cut_at(name: str, call: int, monkeypatch) -> None:
    """Make a function of `os` raise `Cut` at one of its calls."""
    calls, real = iter(range(call)), getattr(os, name)

    def cut(*args):
        if next(calls, None) is None:
            raise Cut
        return real(*args)

    monkeypatch.setattr(os, name, cut)


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_run_that_was_cut_off_while_it_began_begins_again(name, call, resume, tmp_path, monkeypatch):
    settings = asdict(composed(f"resume={resume}"))
    with monkeypatch.context() as patch:
        cut_at(name, call, patch)
        try:
            run.begin(tmp_path, settings, "a")
        except Cut:
            pass
    run.begin(tmp_path, settings, "a")
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "config.yaml"}
    assert run.read_state(tmp_path)["training"] == "a"


def test_what_a_killed_run_left_is_removed_when_it_goes_on(tmp_path):
    settings = asdict(composed())
    run.begin(tmp_path, settings, "a")
    name = ".a-nurse-1.0123456789abcdef.tmp.npz"
    left = [tmp_path / part / name for part in ("", "checkpoints", "audits/x", "audits/x/records/before")]
    mine = [left[-1].with_name("a-nurse-1.npz"), tmp_path / "another" / "seed1" / "checkpoints" / name]
    for path in (*left, *mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run.begin(tmp_path, settings, "a")
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def adapter_of(tiny_folder, value: float) -> Lora:
    adapter = Lora(load_model(tiny_folder), ["unet"], 2, 2, None)
    for parameter in adapter.parameters():
        parameter.data.fill_(value)
    return adapter


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_full_disk_leaves_the_adapter_as_it_was(room, tiny_folder, tmp_path, monkeypatch):
    run.save_adapter(tmp_path, adapter_of(tiny_folder, 1.0), {"steps": 1})
    other = adapter_of(tiny_folder, 2.0)
    with full_disk(room), pytest.raises(FairDiffError, match="adapter: cannot be written .*File too large"):
        run.save_adapter(tmp_path, other, {"steps": 2})
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        f"adapter/{LORA_FILE}", "adapter/adapter.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text()) == {"steps": 1}
    assert all((t == 1).all() for t in load_file(tmp_path / "adapter" / LORA_FILE).values())
    run.save_adapter(tmp_path, other, {"steps": 2})
    assert all((t == 2).all() for t in load_file(tmp_path / "adapter" / LORA_FILE).values())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"schema": "other/1"}', b"\xff", b"[" * 99999], ids=range(7))
def test_a_damaged_audit_is_named_with_what_makes_it_again(content, tmp_path):
    audit = SimpleNamespace(name="test-3x6-00000000")
    where = run.audit_folder(tmp_path, audit)
    write_text(where / "request.json", "{}")
    if content is not None:
        (where / "audit.json").write_bytes(content)
    with pytest.raises(FairDiffError) as caught:
        run.conclude(tmp_path, audit, Console(file=io.StringIO()))
    said = str(caught.value)
    assert said.startswith(f"{where / 'audit.json'}: ") and "\n" not in said
    assert f"scripts/report.py {where} writes it again" in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"spec": []}', b"[" * 99999], ids=range(6))
def test_a_damaged_request_is_named_with_what_makes_it_anew(content, tmp_path, capsys):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        report([str(tmp_path)])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1
    assert "request.json: cannot be read as the request" in said and "repeat the run's command" in said


def test_damaged_metrics_are_one_line_of_the_report(tmp_path, capsys):
    (tmp_path / "audits" / "x").mkdir(parents=True)
    (tmp_path / "audits" / "x" / "request.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(SystemExit) as exit_info:
        report([str(tmp_path)])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1 and "metrics.jsonl, line 2: is no row" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "audit"])
def test_a_cache_that_cannot_be_written_is_known_before_anything_is_generated(command, tmp_path, monkeypatch, capsys):
    from fairdiff.jobs import audit_command

    (tmp_path / "file").write_text("x")
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["x.py", f"cache={tmp_path / 'file'}/cache", f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit) as exit_info:
        (train.task if command == "train" else audit_command)()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: cache: {tmp_path / 'file'}/cache/") and "allowed: a folder that can be, or null" in said
    assert not list(folder.iterdir())


def test_fewer_steps_than_are_done_are_refused_before_the_run_is_touched(tmp_path):
    settings = asdict(composed("steps=9"))
    run.begin(tmp_path, settings, "a")
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save(tmp_path / "checkpoints", 9, "a", {})
    said = (tmp_path / "config.yaml").read_text()
    with pytest.raises(FairDiffError, match=f"^steps: found 5, but {tmp_path} already holds 9; allowed: 9 or more$"):
        run.begin(tmp_path, settings | {"steps": 5}, "a")
    assert (tmp_path / "config.yaml").read_text() == said
    run.begin(tmp_path, settings | {"steps": 12}, "a")
    assert "steps: 12" in (tmp_path / "config.yaml").read_text()
