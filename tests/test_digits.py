"""The committed digits from before and after the code was split into packages are equal (scripts/digits.py)."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from digits import RUNS, differences  # noqa: E402

FOLDER = ROOT / "docs" / "measurements" / "digits"


def test_the_same_commands_give_the_same_digits_before_and_after_the_move():
    before, after = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["machine"] == after["machine"] and set(before["runs"]) == set(RUNS)
    assert differences(before, after) == []


def test_a_changed_weight_or_number_is_found():
    one = {"runs": {"a": {"adapter": "x", "audit": "0.5 0.25"}}}
    assert differences(one, one) == []
    assert differences(one, {"runs": {"a": {"adapter": "y", "audit": "0.5 0.25"}}}) == ["a: other adapter weights"]
    assert differences(one, {"runs": {"a": {"adapter": "x", "audit": "0.5 0.26"}}})[0].startswith("a: 1 numbers")
    assert differences(one, {"runs": {}}) == ["a: only in one of the files"]
