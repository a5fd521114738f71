"""The shares of a zero-shot judge depend on its words: the audit lists them, with the shares by each wording alone."""

import json
from dataclasses import replace

import pytest
from tiny_judges import save_open_clip
from tiny_world import TinyGenerator

from classifiers.zeroshot import load_zero_shot
from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.report import render_report

CLASSES = {"gender": ("female", "male"), "age": ("young", "middle", "old")}
WORDINGS = [
    {"female": ["a green pear"], "male": ["the blue sea"]},
    {"female": ["a woman"], "male": ["a man"]},
    {"female": ["one two three"], "male": ["zebra & <yak>"]},
]
MAPPING = {
    "gender": {c: [w[c][0] for w in WORDINGS] for c in CLASSES["gender"]},
    "age": {"young": ["a child", "a baby"], "middle": ["an adult"], "old": ["a grandparent"]},  # one wording
}


@pytest.fixture
def audited(plan, measurer, noise, tmp_path_factory):
    clip = tmp_path_factory.mktemp("clip")
    save_open_clip(clip)

    def audited(mapping, nobody=False, page=True):
        judge = load_zero_shot(str(clip), mapping, CLASSES)
        tiny = {"before": TinyGenerator(0.5, float(nobody)), "after": TinyGenerator(-0.5, float(nobody))}
        folder = tmp_path_factory.mktemp("audit")
        looking = replace(measurer, judge=judge)
        small = replace(plan, attributes=CLASSES, images_per_prompt=12)
        records = run_audit(small, tiny, looking, noise, folder, lambda n: None)
        about = {"path": "open_clip: tiny", "prompts": judge.config["prompts"], "wordings": judge.wordings}
        audit = compute_metrics(records, MetricSpec(CLASSES, about))
        audit = json.loads(json.dumps(audit, allow_nan=False))
        return audit, render_report(folder, audit, {}, []).read_text(encoding="utf-8") if page else "", records

    return audited


def test_the_share_by_a_wording_is_that_of_a_judge_with_this_wording_alone(audited):
    audit, page, records = audited(MAPPING)
    assert {c for c in records if c.startswith("wording")} == {f"wording.gender.{j}" for j in range(3)}
    assert (records.loc[~records.found, "wording.gender.0"] == -1).all()
    alone = [audited(MAPPING | {"gender": words}, page=False)[0] for words in WORDINGS]
    for model in ("before", "after"):
        found = audit["models"][model]["attributes"]["gender"]["wordings"]
        shares = [one["models"][model]["attributes"]["gender"]["shares"]["female"]["share"] for one in alone]
        assert [item["shares"]["female"] for item in found["each"]] == pytest.approx(shares)
        assert [item["prompts"] for item in found["each"]] == WORDINGS
        assert found["range"]["female"] == pytest.approx([min(shares), max(shares)])
        assert min(shares) < max(shares)  # else this test could not fail
        assert f"from {100 * min(shares):.1f}\u00a0% to {100 * max(shares):.1f}\u00a0% (female {model})" in page
        assert "wordings" not in audit["models"][model]["attributes"]["age"]
    assert "a green pear" in page and "a child; a baby" in page and "zebra &amp; &lt;yak&gt;" in page


def test_a_judge_with_one_wording_shows_its_words_and_no_spread(audited):
    audit, page, records = audited(MAPPING | {"gender": WORDINGS[1]})
    assert not [c for c in records if c.startswith("wording")]
    assert "a woman" in page and "a grandparent" in page and "With single wordings" not in page


def test_nobody_to_judge(audited):
    audit, page, _ = audited(MAPPING, nobody=True)
    assert audit["models"]["after"]["attributes"]["gender"]["wordings"]["range"]["male"] == [None, None]
    assert "a green pear" in page
