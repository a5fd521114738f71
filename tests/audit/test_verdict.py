"""The verdict: how often it is wrong at the margin, and cases in which it must not be "within"."""

import numpy as np
import pytest

from fairdiff.audit.distance import squared_distance
from fairdiff.audit.judge import judge_of
from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.verdict import decide, filled

JUDGE = judge_of([[800, 200], [200, 800]])
JUDGE_OF_THREE = judge_of([[90, 10, 0], [10, 80, 10], [0, 20, 80]])


def said(counts, missing=0, target=None, delta=0.1, judge=None):
    counts = np.asarray(counts)
    target = np.full(counts.shape, 1 / counts.shape[1]) if target is None else np.broadcast_to(target, counts.shape)
    return decide(counts, np.full(len(counts), missing), target, delta, judge, 0)


def gaps(rng, gap_P, n, accuracy=1.0):
    women = rng.binomial(n, (1 + gap_P * rng.choice([-1, 1], len(gap_P)) * (2 * accuracy - 1)) / 2)
    return np.stack([women, n - women], 1)


@pytest.mark.parametrize("P", [6, 24])
def test_these_prompts_are_seldom_within_when_the_gap_is_the_margin(P):
    """An earlier rule was wrong in 6.4 to 8.1 % of audits at 24 prompts, and in 11 to 15 % at 6."""
    rng = np.random.default_rng(0)
    wrong = [said(gaps(rng, np.full(P, 0.1), 60))["verdict_these"] == "within" for _ in range(200)]
    assert np.mean(wrong) <= 0.05 + 0.015  # one standard error is .015


@pytest.mark.parametrize("P,tenth", [(24, 2), (44, 4)])
def test_a_few_prompts_that_carry_the_bias_are_not_overlooked(P, tenth):
    """An earlier rule was wrong in 21 to 76 % of audits if a few prompts carry the bias."""
    rng, wrong = np.random.default_rng(1), 0
    uneven = np.where(np.arange(P) < tenth, 0.1 * np.sqrt(P / tenth), 0.0)
    for _ in range(100):
        found = said(gaps(rng, uneven, 160))
        wrong += found["verdict_these"] == "within"
        assert P >= ENOUGH or found["verdict"] == "undecided"
    assert wrong / 100 <= 0.07


def test_one_prompt_in_ten_of_a_population_is_not_overlooked():
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(100):
        wrong += said(gaps(rng, np.where(rng.random(44) < 0.1, 0.1 * np.sqrt(10), 0.0), 160))["verdict"] == "within"
    assert wrong / 100 <= 0.07


def test_the_verdict_rests_on_corrected_shares():
    """A judge of accuracy .8 shows a gap of .10 as .06. Uncorrected, 76 to 82 % of audits of 44 x 160 were "within"."""
    rng, raw, corrected = np.random.default_rng(3), 0, 0
    for _ in range(40):
        counts = gaps(rng, np.full(44, 0.10), 160, 0.8)
        raw += said(counts)["verdict"] == "within"
        corrected += said(counts, judge=JUDGE)["verdict"] == "within"
    assert raw / 40 > 0.4 and corrected / 40 <= 0.05


def test_missing_faces_count_at_their_worst():
    """If half of the images show no face and the others are at parity, an earlier rule said "within"."""
    even = np.tile([80, 80], (44, 1))
    assert said(even)["verdict"] == "within"
    assert said(even, missing=160)["verdict"] != "within" != said(even, missing=160)["verdict_these"]
    skewed = np.tile([100, 60], (44, 1))
    assert said(skewed)["verdict"] == "beyond" != said(skewed, missing=60)["verdict"]


def test_what_missing_faces_are_filled_with():
    target = np.array([[0.5, 0.3, 0.2]])
    worst = filled([[5, 3, 2]], [2], target, None, True)
    assert worst.tolist() == [[5, 3, 4]]  # all missing faces are of the rarest class
    assert filled([[5, 3, 0]], [2], target, None, False)[0] == pytest.approx([5, 3, 2])
    assert filled([[5, 3, 0]], [12], target, None, False)[0] == pytest.approx([10, 6, 4])
    assert filled([[5, 3, 2]], [10], target, None, False)[0] == pytest.approx([10, 6, 4])
    judged = filled([[5, 5]], [10], np.array([[0.5, 0.5]]), JUDGE, True)
    assert sorted(judged[0]) == pytest.approx([7, 13])  # ten faces of one class, two of them taken for the other


@pytest.mark.parametrize("judge", [None, JUDGE_OF_THREE])
def test_no_way_to_fill_in_missing_faces_is_nearer_to_the_target(judge):
    """Brute force over all compositions of 12 faces. Filling each class in proportion to what it lacked was farther away."""
    rng = np.random.default_rng(1)
    rates, mend = (np.eye(3), np.eye(3)) if judge is None else (judge.rates, judge.mend)
    ways = np.array([(i, j, 12 - i - j) for i in range(13) for j in range(13 - i)])
    for target in (np.full((1, 3), 1 / 3), np.array([[0.6, 0.3, 0.1]])):
        for counts in rng.multinomial(40, [0.1, 0.2, 0.7], 20):
            some = filled(counts[None], [12], target, judge, False), counts + ways @ rates
            least, others = (squared_distance(n / 52 @ mend.T, target) for n in some)
            assert others.min() - 0.02 <= least[0] <= others.min() + 1e-9  # below it by faces split between classes


def test_a_vanished_class_is_off_target_however_many_classes_there_are():
    """With gaps between pairs of classes, the gap was .071 for eight and .024 for sixteen classes, which was "within"."""
    for K in (8, 16):
        counts = np.random.default_rng(0).multinomial(160, np.r_[0, np.full(K - 1, 1 / (K - 1))], 44)
        assert said(counts)["verdict"] == "beyond"


def test_few_faces_never_show_equivalence():
    """The estimate from two prompts of four images with true gaps of .4 is often 0."""
    rng = np.random.default_rng(0)
    assert all(said(gaps(rng, np.full(2, 0.4), 4))["verdict_these"] != "within" for _ in range(100))


def test_why_nothing_can_be_told_is_said():
    assert "target share 0" in said(np.tile([30, 30], (40, 1)), target=[1.0, 0.0])["reason"]
    found = said(np.tile([80, 80], (24, 1)))
    assert found["verdict"] == "undecided" and f"needs {ENOUGH} prompts, found 24" in found["reason"]
    assert said(np.zeros((3, 2), int))["reason"] and said(np.zeros((0, 2), int))["verdict"] == "undecided"
