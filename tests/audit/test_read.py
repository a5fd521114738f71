"""The reader of audit.json: tables can show what it accepts, and one line says what is wrong with any other file."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import whole_audit

from fairdiff.audit.read import read_audit, whole
from fairdiff.compare.audits import Audited
from fairdiff.compare.numbers import compared
from fairdiff.compare.table import comparison_table
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compare  # noqa: E402

OTHERS = {  # contents of audit.json that are no audit -> words of the error
    "of another tool": (
        '{"auditReportVersion": 2, "vulnerabilities": {}}',
        "found schema null, allowed: fairdiff.audit/7",
    ),
    "another version": ('{"schema": "fairdiff.audit/5"}', 'found schema "fairdiff.audit/5", allowed: fairdiff.audit/7'),
    "a list": ("[1]", "found a list, allowed: a mapping"),
    "cut short": ('{"schema": "fairdiff.aud', "is no JSON"),
    "empty": ("", "is no JSON"),
    "deeply nested": ("[" * 100_000, "too deeply nested"),
    "deeply nested inside": ('{"schema":' * 50_000, "too deeply nested"),
    "nothing in it": ('{"schema": "fairdiff.audit/7"}', "prompts: is missing"),
    "no text": (b"\xff\xfe\x00", "it is not UTF-8 text"),
}


TEXT = json.dumps(whole_audit())


@pytest.fixture
def audit() -> dict:
    return json.loads(TEXT)


def places(tree, at=()) -> Iterator[tuple]:
    """Yield every key of nested mappings, and of the first item of each list, as a path."""
    for key, value in (
        tree.items() if isinstance(tree, dict) else [(0, tree[0])] if isinstance(tree, list) and tree else []
    ):
        yield (*at, key)
        yield from places(value, (*at, key))


def said(main, arguments, capsys) -> str:
    """Return the only line of output of a script that ends with code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_audit_is_one_line(case, tmp_path, capsys):
    text, says = OTHERS[case]
    file = tmp_path / "audit.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = said(compare.main, [tmp_path], capsys)
    assert line.startswith(f"error: {file}: ") and says in line


def test_a_whole_audit_is_shown(audit, tmp_path, capsys):
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    assert read_audit(tmp_path / "audit.json") == audit
    compare.main([str(tmp_path)])
    assert "gender×race" in capsys.readouterr().out


def test_what_the_records_can_make_again_is_said(audit, tmp_path, capsys):
    (tmp_path / "audit.json").write_text(json.dumps(audit)[:-100])
    assert "scripts/report.py" not in said(compare.main, [tmp_path], capsys)
    (tmp_path / "request.json").write_text("{}")
    assert f"scripts/report.py {tmp_path} writes it again" in said(compare.main, [tmp_path], capsys)


@pytest.mark.slow
def test_whatever_is_damaged_the_reader_says_so_or_the_tables_can_do_without_it(audit):
    """Each key is removed and changed. So if a table uses a new key, the reader must check it.

    One attribute and one family are changed only, because the others are read in the same way.
    """
    unread = {"estimands", "guidance", "corrected", "missing_face_bounds", "start"}  # of models as before and after
    refused = set()
    for place in [place for place in places(audit) if not (unread | {"race", "sport"}) & {*place}]:
        part = audit
        for key in place[:-1]:
            part = part[key]
        before = part.copy()
        for change in ("x", {}, None, "left out"):
            if change == "left out":
                del part[place[-1]]
            else:
                part[place[-1]] = change
            try:
                found = whole(audit, Path("audit.json"))
            except FairDiffError as error:
                assert str(error).startswith("audit.json: ") and "\n" not in str(error)
                refused.add(place)
            else:
                comparison_table(compared([Audited("a", Path("a"), found, {}, None)]))
            part.clear()
            part.update(before) if isinstance(part, dict) else part.extend(before)
    assert ("models", "after", "attributes", "gender", "bias", "mean") in refused and len(refused) > 100
