"""scripts/signed_gaps.py on records with known regression line and residuals."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from signed_gaps import main, records_of, residuals, signed_gaps  # noqa: E402


def records(before: list[int], after: list[int]) -> pd.DataFrame:
    """Return records of twenty images per prompt with the given number of pairs of women; both halves are equal."""
    rows = []
    for model, women in (("before", before), ("after", after)):
        for prompt, count in enumerate(women):
            for image in range(20):
                p = 0.9 if image // 2 < count else 0.2
                rows.append([model, True, "", True, f"{prompt:02}", image, p, 1 - p])
    names = ["model", "people", "names", "found", "prompt", "image_index", "p.gender.female", "p.gender.male"]
    return pd.DataFrame(rows, columns=names).sample(frac=1, random_state=0)


def test_slope_and_residuals_are_those_of_a_known_line():
    before, (after, even, odd) = signed_gaps(records([0, 2, 5, 8, 10], [4, 4, 5, 6, 6]), "gender")
    assert before.tolist() == pytest.approx([-1, -0.6, 0, 0.6, 1])
    assert after.tolist() == pytest.approx([-0.2, -0.2, 0, 0.2, 0.2]) == even.tolist() == odd.tolist()
    slope, rest = residuals(before, after)
    assert slope == pytest.approx((0.2 + 0.12 + 0.12 + 0.2) / (1 + 0.36 + 0.36 + 1))
    assert rest.tolist() == pytest.approx((after - slope * before).tolist()) and rest @ before == pytest.approx(0)
    assert np.abs(rest).max() > 0.02


@pytest.mark.parametrize("attribute,found", [("race", "has 3 classes"), ("gneder", "has 0 classes")])
def test_an_attribute_without_two_classes_is_named_with_those_that_have_them(attribute, found):
    three = records([1], [1]).assign(**{f"p.race.{k}": 1 / 3 for k in "abc"})
    with pytest.raises(ValueError, match=f"--attribute {attribute}: {found}; allowed, with two: gender$"):
        signed_gaps(three, attribute)


def test_a_runs_only_audit_is_found_and_of_several_one_is_chosen(tmp_path, capsys):
    for run, before in (("a", [0, 2, 5, 8, 10]), ("b", [1, 2, 5, 7, 10])):
        (tmp_path / run / "audits" / "test-5x20-0").mkdir(parents=True)
        records(before, [4, 4, 5, 6, 7]).to_parquet(tmp_path / run / "audits" / "test-5x20-0" / "records.parquet")
    main([str(tmp_path / "a"), str(tmp_path / "b" / "audits" / "test-5x20-0")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'a'}: slope 0.") and said[0].endswith("5 occupations") and len(said) == 2 + 3
    with pytest.raises(ValueError, match="found 0 audits, allowed: a run with one"):
        records_of(tmp_path)
    shutil.copytree(tmp_path / "a" / "audits" / "test-5x20-0", tmp_path / "a" / "audits" / "test-5x20-1")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a")])
    assert "found 2 audits" in (said := capsys.readouterr().err) and "test-5x20-0" in said and said.count("\n") == 1
