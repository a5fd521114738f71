"""scripts/two_judges.py: disagreement counted by hand, each number by both judges, and audits that cannot be compared."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.records import save_records
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import two_judges  # noqa: E402

CLASSES = {"gender": ("female", "male")}
PROMPTS, IMAGES = 5, 40
RNG = np.random.default_rng(0)
FEMALE = RNG.random((PROMPTS, IMAGES)) < 0.5
FOUND = RNG.random((PROMPTS, IMAGES)) < 0.9


def audit(folder: Path, female: np.ndarray, judge: str, model: str = "weights", confusion=None) -> Path:
    """Write an audit with these labels [P, I] at a probability of .9."""
    rows = []
    for prompt, image in np.ndindex(female.shape):
        found = bool(FOUND[prompt, image])
        share = (0.9 if female[prompt, image] else 0.1) if found else np.nan
        rows.append({
            "model": "before", "family": "occupation", "people": True, "names": "", "prompt_index": prompt,
            "subject": f"s{prompt}", "prompt": f"a {prompt}", "image_index": image, "seed": 1, "found": found, "faces": -1,
            "p.gender.female": share, "p.gender.male": 1 - share, "clip_t": 0.3, "clip_i": np.nan, "dino": np.nan,
            "between": 0.5, "model_hash": model, "judge_hash": judge,
        })  # fmt: skip
    folder.mkdir()
    records, counts = pd.DataFrame(rows), {} if confusion is None else {"gender": np.array(confusion)}
    spec = MetricSpec(CLASSES, {"path": judge}, {"gender": np.array([0.5, 0.5])}, counts)
    save_records(folder / "records.parquet", records)
    write_json(folder / "audit.json", compute_metrics(records, spec))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return audit(tmp_path_factory.mktemp("audits") / "one", FEMALE, "first")


def test_it_counts_disagreement_and_shows_both_judges_numbers(one, tmp_path, capsys):
    differ = np.random.default_rng(1).random(FEMALE.shape) < [[0.02], [0.1], [0.2], [0.3], [0.0]]
    other = audit(tmp_path / "other", FEMALE ^ differ, "second", confusion=[[180, 20], [20, 180]])
    two_judges.main([str(one), str(other)])
    said = capsys.readouterr().out
    rate = np.mean([differ[p][FOUND[p]].mean() for p in range(PROMPTS)])
    assert f"before, gender: they disagree on {rate:.3f} [" in said and f"of {FOUND.sum()} faces" in said
    assert "judges: first | second" in said and "at odds" not in said
    lines = {line.split("  ")[1].strip(): line for line in said.splitlines() if line.startswith("  ")}
    shares = [np.mean([f[p][FOUND[p]].mean() for p in range(PROMPTS)]) for f in (FEMALE, FEMALE ^ differ)]
    assert all(f"{share:.3f} [" in lines["share female"] for share in shares)
    assert "judge never measured" in lines["D corrected"].split("|")[0] and "[" in lines["D corrected"].split("|")[1]


def test_swapped_labels_are_named(one, tmp_path, capsys):
    two_judges.main([str(one), str(audit(tmp_path / "swapped", ~FEMALE, "second"))])
    assert "at odds: labels may be swapped (female as male, male as female)" in capsys.readouterr().out


def test_no_disagreement_seen_is_no_proof_of_none(one, tmp_path):
    rows = two_judges.paired(one, audit(tmp_path / "same", FEMALE, "second"))
    found = two_judges.disagreement(rows, "gender", CLASSES["gender"], 0)
    assert found["mean"] == 0 and 0 < found["ci95_these"][1] < 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"judge": "second", "model": "other weights"}, "its images are others .*, made by another model"),
        ({"judge": "first"}, "has the judge of"),
        ({"judge": "second", "female": FEMALE[:3]}, r"its images are others than those of .* \(120 of 200 in common\)"),
    ],
)
def test_audits_of_other_images_or_of_one_judge_are_refused(one, tmp_path, change, says):
    with pytest.raises(FairDiffError, match=says) as error:
        two_judges.report(one, audit(tmp_path / "other", **{"female": FEMALE} | change))
    assert "\n" not in str(error.value)
