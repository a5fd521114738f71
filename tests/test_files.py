import json

import pytest

from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, flat, read_table, write_json, write_text


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
    assert flat({"loss": {"image": 0.4, "face": None}, "steps": 3}) == {"loss.image": 0.4, "loss.face": None, "steps": 3}
