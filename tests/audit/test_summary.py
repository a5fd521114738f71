"""The Markdown summary: the verdicts of audit.json in words, escaped for any class, prompt or reason."""

import json

import pytest
from tiny import whole_audit

from fairdiff.audit.estimand import verdict_of
from fairdiff.audit.summary import not_within, plain, summary


@pytest.fixture(scope="module")
def text() -> str:
    return json.dumps(whole_audit())


@pytest.fixture
def audit(text) -> dict:
    return json.loads(text)


def test_each_attribute_with_a_target_has_its_verdict_its_distance_and_its_margin(audit):
    text = summary(audit, {})
    target = audit["models"]["after"]["attributes"]["gender"]["target"]
    found = verdict_of(audit, target)
    assert f"- **gender: {found['tag']}.** D " in text and "race: no target was set" in text
    assert text.count("| before | start | after | noise floor |") == 1 and "of 50.0\u00a0%" in text
    assert "Labels are perceived presentation in pictures, never identity." in text
    assert not_within(audit)[0].startswith("gender is ") and len(not_within(audit)) == 1


def test_a_gate_lets_pass_only_what_is_within(audit):
    for model in audit["models"].values():
        model["attributes"]["gender"]["target"] |= {"verdict": "within", "verdict_these": "within"}
    assert not_within(audit) == []
    audit["models"]["after"]["attributes"]["gender"]["target"]["verdict_these"] = "undecided"
    assert len(not_within(audit)) == 1
    audit["models"]["after"]["attributes"]["gender"]["target"]["requested"] = False
    assert not_within(audit) == []


def test_what_was_never_measured_and_what_was_left_out_is_said(audit):
    for model in audit["models"].values():
        del model["attributes"]["gender"]["corrected"]
    audit["left_out"] = ["a | b", "<i>c</i>"]
    text = summary(audit, {"target": ["x"], "left out": ["2 of 9 pictures could not be read and are left out"]})
    assert "**not corrected:** this judge's errors were never measured for gender" in text
    assert "2 of 9 pictures could not be read" in text and "target" not in text.split("2 of 9")[0].split("\n")[-1]
    assert "a \\| b; &lt;i\\>c&lt;/i\\>" in text and "<i>" not in text


def test_text_of_any_kind_stays_text():
    assert plain("a_b\n*c* [d](e) `f` # g & <h>") == r"a\_b \*c\* \[d\](e) \`f\` \# g &amp; &lt;h\>"


def test_too_few_prompts_are_not_named_as_what_keeps_a_gate_shut(audit):
    """A gate uses the verdict on these prompts, which is undecided because the interval contains the margin."""
    target = audit["models"]["after"]["attributes"]["gender"]["target"]
    target |= {"verdict_these": "undecided", "reason": "cannot tell of prompts like these: needs 36 prompts, found 3"}
    why = verdict_of(audit, target)["why"]
    assert why.startswith("it takes more prompts or pictures") and why.endswith(f"; {target['reason']}")
    target["reason"] = "no prompt shows two faces"
    assert verdict_of(audit, target)["why"] == target["reason"]
