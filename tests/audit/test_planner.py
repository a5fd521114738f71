"""The planner: audits of a fair generator have the power that it computes."""

import numpy as np
import pytest

from fairdiff.audit import suite
from fairdiff.audit.judge import judge_of
from fairdiff.audit.planner import images_needed, power
from fairdiff.audit.verdict import decide


def test_a_fair_generator_is_found_on_target_as_often_as_planned():
    rng, hits = np.random.default_rng(0), 0
    images = images_needed(12, [0.5, 0.5], 0.1)
    for women in rng.binomial(images, 0.5, (100, 12)):
        counts = np.stack([women, images - women], 1)
        hits += decide(counts, np.zeros(12), np.full((12, 2), 0.5), 0.1, None, 0)["verdict_these"] == "within"
    assert 0.7 <= hits / 100 <= 0.9


@pytest.mark.parametrize("P,K", [(12, 4), (37, 2), (37, 4)])
def test_the_verdict_that_is_shown_is_given_as_often_as_planned(P, K, monkeypatch):
    """From 36 prompts on, the page shows the verdict on prompts like these. Its power was once .69 instead of .80."""
    monkeypatch.setattr(suite, "DRAWS", 2000)  # a fifth of the draws of an audit
    rng, target, hits = np.random.default_rng(1), np.full((P, K), 1 / K), 0
    shown = "verdict" if P >= suite.ENOUGH else "verdict_these"
    for counts in rng.multinomial(images_needed(P, target[0], 0.1), target[0], (200, P)):
        hits += decide(counts, np.zeros(P), target, 0.1, None, 0)[shown] == "within"
    assert 0.74 <= hits / 200 <= 0.9


def test_more_prompts_and_a_wider_margin_take_fewer_images_and_more_classes_more():
    uniform = {K: np.full(K, 1 / K) for K in (2, 8)}
    assert images_needed(100, uniform[2], 0.1) < images_needed(36, uniform[2], 0.1) < images_needed(36, uniform[8], 0.1)
    assert images_needed(36, uniform[2], 0.2) < images_needed(36, uniform[2], 0.1)
    assert power(36, images_needed(36, uniform[2], 0.1), uniform[2], 0.1) >= 0.8


def test_with_too_few_labelled_faces_no_number_of_images_is_enough():
    few, many = (judge_of(np.array([[0.9, 0.1], [0.1, 0.9]]) * n) for n in (100, 10_000))
    assert images_needed(36, [0.5, 0.5], 0.1, few) is None
    assert images_needed(36, [0.5, 0.5], 0.1, many) > images_needed(36, [0.5, 0.5], 0.1)
