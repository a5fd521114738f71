import json

import pytest

from fairdiff.files import atomic_path, write_json, write_text


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
