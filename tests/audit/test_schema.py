"""audit.schema.json accepts audits of all kinds and rejects damaged ones."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from json_schema import closed, faults
from tiny import whole_audit

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.read import whole
from fairdiff.audit.schema import schema
from fairdiff.errors import FairDiffError

FILE = Path(__file__).resolve().parent.parent.parent / "docs" / "reference" / "audit.schema.json"
PUBLISHED = json.loads(FILE.read_text("utf-8"))


def small(models=("before",), faces=1.0, confusion=None, prompts=3) -> dict:
    """Return an audit without any optional parts."""
    rng, rows = np.random.default_rng(1), []
    for model in models:
        for prompt in range(prompts):
            for image in range(6):
                found = bool(rng.random() < faces)
                p = rng.random() if found else np.nan
                rows.append({
                    "model": model, "family": "custom", "people": True, "names": "", "prompt_index": prompt, "subject": "s",
                    "prompt": f"a {prompt}", "image_index": image, "seed": 1, "found": found,
                    "faces": -1, "p.x.a": p, "p.x.b": 1 - p,
                    "clip_t": np.nan, "clip_i": np.nan, "dino": np.nan, "between": np.nan, "model_hash": "h",
                    "judge_hash": "j",
                })  # fmt: skip
    known = {} if confusion is None else {"x": np.array(confusion)}
    return compute_metrics(pd.DataFrame(rows), MetricSpec({"x": ("a", "b")}, {"path": "j"}, confusion=known))


@pytest.fixture(scope="module")
def audits() -> dict[str, dict]:
    return {
        "everything": whole_audit(),
        "one model, no encoder": small(),
        "no face at all": small(faces=0.0),
        "two models, half the faces": small(("before", "after"), 0.5),
        "a judge whose error cannot be undone": small(confusion=[[11, 9], [9, 11]]),
        "enough prompts": small(prompts=36, confusion=[[95, 5], [5, 95]]),
    }


def test_the_published_file_is_what_the_code_says():
    assert schema() == PUBLISHED, "python scripts/reference.py"


def test_every_audit_is_as_published_and_has_no_key_beside(audits):
    strict = closed(PUBLISHED)
    for name, audit in audits.items():
        assert not faults(json.loads(json.dumps(audit)), strict, strict), name
    assert audits["a judge whose error cannot be undone"]["models"]["before"]["attributes"]["x"]["corrected"]["refused"]


def places(value, *path):
    """Yield every path of a nested value; of a list only the first item."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else []):
        yield from places(item, *path, key)


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_what_our_own_reader_refuses_is_a_fault_of_the_schema_too(audits):
    audit, refused = audits["two models, half the faces"], 0
    for path in list(places(audit)):
        holder, key = at(audit, path[:-1]), path[-1]
        kept = holder[key]
        holder[key] = 3 if isinstance(kept, dict) else {"no": "such"}
        try:
            whole(audit, Path("x"))
        except FairDiffError:
            refused += 1
            assert faults(audit, PUBLISHED, PUBLISHED), path
        holder[key] = kept
    assert refused > 50 and not faults(audit, PUBLISHED, PUBLISHED)
