import json
import os
import secrets
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import save_file

from fairdiff.errors import FairDiffError
from fairdiff.files import (
    A_DAY,
    append_line,
    atomic_path,
    flat,
    read_table,
    remove_leftovers,
    require_writable,
    write_bytes,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "audit.json"
    write_json(target, {"gender×race": 1})
    with pytest.raises(ValueError):
        write_json(target, {"bias": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half a fi")
        raise RuntimeError
    assert json.loads(target.read_text(encoding="utf-8")) == {"gender×race": 1}
    assert [p.name for p in target.parent.iterdir()] == ["audit.json"]


def test_replaces_and_keeps_the_suffix_for_writers(tmp_path):
    write_text(tmp_path / "a.npz", "old")
    with atomic_path(tmp_path / "a.npz") as temporary:
        assert temporary.suffix == ".npz" and temporary.parent == tmp_path
        temporary.write_text("new")
    assert (tmp_path / "a.npz").read_text() == "new"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Two containers or machines that share a disk may have the same process id."""
    target = tmp_path / "a.npz"
    with atomic_path(target) as one, atomic_path(target) as other:
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_path(tmp_path / "adapter") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "adapter") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["adapter", "adapter/new"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="where Linux says which file a number is")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_has_its_name_has_been_synchronised_before_and_the_name_after(kind, tmp_path, monkeypatch):
    """So a power failure leaves the old or the new content, never a name without content."""
    order, fsync, replace = [], os.fsync, os.replace

    def path_of(handle: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path)

    def named(path: Path) -> str:
        return "".join("T" if ".tmp" in part else f"/{part}" for part in path.parts) or "."

    monkeypatch.setattr(os, "fsync", lambda handle: order.append(named(path_of(handle))) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    with atomic_path(tmp_path / "new" / "a.pt") as temporary:
        if kind == "folder":
            temporary.mkdir()
            (temporary / "weights").write_text("x")
        else:
            temporary.write_text("x")
    content = ["/newT"] if kind == "file" else ["/newT/weights", "/newT"]
    assert order == [".", *content, "rename", "/new"]
    append_line(tmp_path / "metrics.jsonl", "{}")
    assert order[-1] == "/metrics.jsonl"


def test_the_former_file_goes_on_with_another_name(tmp_path):
    for text in (b"one", b"two", b"three"):
        write_bytes(tmp_path / "a", text, tmp_path / "b")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "three", "b": "two"}


WRITERS = {
    "text": lambda path: write_text(path, "x" * 5000),
    "safetensors": lambda path: save_file({"x": torch.zeros(5000)}, path),
    "folder": lambda path: path.mkdir() or save_file({"x": torch.zeros(5000)}, path / "weights"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("room", [0, 1, 4096])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(writer, room, tmp_path):
    target = tmp_path / "a.pt"
    write_text(target, "old")
    with full_disk(room), pytest.raises(FairDiffError) as caught, atomic_path(target) as temporary:
        WRITERS[writer](temporary)
    said = str(caught.value)
    assert str(tmp_path) in said and "cannot be written" in said and "File too large" in said and "\n" not in said
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.pt": "old"}


def test_a_disk_that_is_only_found_full_when_it_synchronises(tmp_path, monkeypatch):
    """Network disks and disks with late allocation report it only then."""
    write_text(tmp_path / "a", "old")

    def full(handle):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FairDiffError, match=r"a: cannot be written \(No space left on device\); what is finished is kept"
    ):
        write_text(tmp_path / "a", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
def test_a_line_that_does_not_fit(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(FairDiffError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        append_line(tmp_path / "metrics.jsonl", "{}")


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "a.npz") as a, atomic_path(tmp_path / "b") as b:
        a.write_text("x")
        b.mkdir()
        (b / "weights").write_text("x")
        mine = [tmp_path / ".notes.tmp", tmp_path / ".a.tmp.npz", tmp_path / f"a.{secrets.token_hex(8)}.tmp"]
        for path in mine:
            path.write_text("mine")
        for path in (a, *mine):
            os.utime(path, (0, 0))
        remove_leftovers(tmp_path)
        assert not a.exists() and b.exists()  # somebody may be writing b
        a.write_text("x")
        remove_leftovers(tmp_path, 0)
        assert not a.exists() and not b.exists() and all(path.exists() for path in mine)
        a.write_text("x")
        b.mkdir()


def test_a_folder_that_takes_no_file_is_named_with_its_key(tmp_path):
    require_writable(tmp_path / "cache" / "originals", "cache")
    old = tmp_path / "cache" / "originals" / f".a.{secrets.token_hex(8)}.tmp.safetensors"
    old.write_text("x")
    os.utime(old, (old.stat().st_mtime - 2 * A_DAY,) * 2)
    require_writable(tmp_path / "cache" / "originals", "cache")
    assert not list((tmp_path / "cache" / "originals").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(FairDiffError, match=r"^cache: .*file/x cannot be written \(Not a directory\); allowed: .*null"):
        require_writable(tmp_path / "file" / "x", "cache")


@pytest.mark.skipif(os.name == "nt" or not os.geteuid(), reason="the superuser may write everywhere")
def test_a_folder_without_leave_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FairDiffError, match="^cache: .* cannot be written"):
        require_writable(tmp_path, "cache")
    with pytest.raises(FairDiffError, match="cannot be written"):
        write_text(tmp_path / "a", "x")


def test_a_table_keeps_commas_in_quotes_and_pads_short_rows():
    columns, rows = read_table('prompt,family\n"a nurse, smiling", work\na tree\n', "x.csv")
    assert columns == ["prompt", "family"]
    assert rows == [(2, {"prompt": "a nurse, smiling", "family": "work"}), (3, {"prompt": "a tree", "family": ""})]


@pytest.mark.parametrize(
    "text,says",
    [
        ('subject,family\nnurse,x\n"chef,x\nbaker,x\n', "is no CSV"),  # a mark left open, to the end
        ('subject,family\n"chef,x\nbaker",x\n', "line 3: a cell goes over several lines"),
        ("subject\na nurse, smiling\n", "line 2: found more cells than columns"),
        ('subject\n"a" nurse\n', "is no CSV"),
        ('subject\n"' + "x" * 200_000 + '"\n', "is no CSV"),  # over the csv module's own limit
    ],
)
def test_a_damaged_table_is_one_line_that_names_the_place(text, says):
    with pytest.raises(FairDiffError, match="^x.csv, line") as caught:
        read_table(text, "x.csv")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_nested_mapping_is_named_by_its_leaves():
    assert flat({"loss": {"image": 0.4, "face": None}, "steps": 3}) == {
        "loss.image": 0.4,
        "loss.face": None,
        "steps": 3,
    }
