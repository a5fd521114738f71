"""Certain prompts: at most one audit in twenty has a wrong call; exact ranges, missing faces, judges with errors."""

import itertools

import numpy as np
import pytest

from fairdiff.audit.certain import (
    certain_prompts,
    distance_range,
    images_for_within,
    mended_box,
    share_box,
    simultaneous_intervals,
)
from fairdiff.audit.distance import squared_distance
from fairdiff.audit.judge import judge_of
from fairdiff.audit.verdict import filled

AUDITS = 300


def truth(shares, target):
    return np.sqrt(squared_distance(shares, target))


def held(shares, target, n, rng, missing=0.0, worst=None, judge=None):
    """Return the share of audits in which the intervals of all prompts contain their true distances."""
    found = truth(shares, target)
    judged = shares if judge is None else shares @ judge.rates
    wins = 0
    for _ in range(AUDITS):
        counts = rng.multinomial(n, judged)
        lost = np.zeros(len(shares), int)
        if missing:  # the detector misses faces of one class
            gone = rng.binomial(counts[:, worst], missing)
            counts[:, worst] -= gone
            lost = gone
        ends = simultaneous_intervals(counts, lost, np.broadcast_to(target, shares.shape), judge)
        wins += bool(((ends[:, 0] <= found + 1e-9) & (found <= ends[:, 1] + 1e-9)).all())
    return wins / AUDITS


@pytest.mark.parametrize("P,n,K,skew", [(12, 24, 2, 0.0), (44, 60, 2, 3.0), (24, 60, 4, 1.0), (12, 160, 8, 2.0)])
def test_all_prompts_are_held_at_once_in_95_of_100_audits(P, n, K, skew):
    rng = np.random.default_rng(P)
    weights = np.exp(skew * rng.normal(size=(P, K)))
    shares = weights / weights.sum(1, keepdims=True)
    assert held(shares, np.full(K, 1 / K), n, rng) >= 0.95


def test_faces_that_vanish_from_one_class_are_held_too():
    shares = np.tile([[0.5, 0.5], [0.8, 0.2], [0.95, 0.05]], (4, 1))
    assert held(shares, np.array([0.5, 0.5]), 60, np.random.default_rng(1), missing=0.4, worst=1) >= 0.95


@pytest.mark.parametrize(
    "confusion",
    [[[88, 12], [20, 80]], [[100, 0], [2, 98]], (np.eye(4) * 160 + 10).tolist()],
    ids=["errs", "zero cell", "four classes"],
)
def test_the_judges_error_is_held_when_its_matrix_was_counted(confusion):
    """Each audit counts the confusion matrix again, on the same number of labelled faces."""
    rng, counts = np.random.default_rng(2), np.array(confusion)
    C, K = (counts + 0.1) / (counts + 0.1).sum(1, keepdims=True), len(counts)
    weights = np.exp(rng.normal(size=(6, K)))
    shares, target = weights / weights.sum(1, keepdims=True), np.full((6, K), 1 / K)
    found, wins = truth(shares, target), 0
    for _ in range(40):
        judge = judge_of([rng.multinomial(int(row.sum()), c) for row, c in zip(counts, C, strict=True)])
        ends = simultaneous_intervals(rng.multinomial(60, shares @ C), np.zeros(6), target, judge)
        wins += bool(((ends[:, 0] <= found) & (found <= ends[:, 1])).all())
    assert wins / 40 >= 0.95


@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_range_is_that_of_a_brute_search(K):
    """The least D is exact. The greatest D is exact for two classes, and for more an upper bound within 20 %."""
    rng = np.random.default_rng(K)
    for _ in range(20):
        target, centre = rng.dirichlet(np.full(K, 3.0)), rng.dirichlet(np.full(K, 2.0))
        low, high = np.maximum(centre - rng.random(K) * 0.2, 0), np.minimum(centre + rng.random(K) * 0.2, 1)
        least, most = distance_range(low, high, target)
        points = [centre, *(low + rng.random((20_000, K)) * (high - low))]
        points = np.array(points)
        points[:, -1] = 1 - points[:, :-1].sum(1)
        points = points[(points[:, -1] >= low[-1] - 1e-12) & (points[:, -1] <= high[-1] + 1e-12)]
        corners = []
        for free in range(K):  # a convex function is greatest at a corner, where all classes but one are at an end
            for ends in itertools.product(*(((low[k], high[k]) if k != free else (0,)) for k in range(K))):
                corner = np.array(ends, float)
                corner[free] = 1 - corner.sum()
                if low[free] - 1e-12 <= corner[free] <= high[free] + 1e-12:
                    corners.append(corner)
        exact = truth(np.array(corners), target).max()
        assert least <= truth(points, target).min() + 1e-9 and least >= truth(points, target).min() - 0.05
        assert exact <= most + 1e-9 and most <= exact * (1 + 1e-9 if K == 2 else 1.2)


def test_no_box_no_range():
    assert distance_range(np.array([0.6, 0.7]), np.array([0.8, 0.9]), np.array([0.5, 0.5])) == (np.inf, -np.inf)


def test_the_box_is_exact_at_its_ends():
    """By Clopper and Pearson, 0 of n has the upper end 1 - (error / 2)^(1/n); those of two classes are complements."""
    low, high = share_box([[0, 20], [7, 13]], [0, 0], 0.01)
    assert low[0, 0] == 0 and high[0, 0] == pytest.approx(1 - 0.005 ** (1 / 20)) and high[0, 1] == 1
    assert low[:, 0] == pytest.approx(1 - high[:, 1])
    wider = share_box([[7, 13]], [10], 0.01)
    assert wider[0][0, 0] < low[1, 0] and wider[1][0, 0] > high[1, 0]
    assert share_box([[0, 0]], [0], 0.01)[1].tolist() == [[1, 1]]


def test_mended_shares_stand_for_a_linear_programme():
    rng = np.random.default_rng(5)
    low, high = np.array([0.1, 0.2, 0.05]), np.array([0.5, 0.6, 0.4])
    mend = rng.normal(size=(7, 3, 3))
    least, most = mended_box(low, high, mend)
    q = low + rng.random((200_000, 3)) * (high - low)
    q[:, 2] = 1 - q[:, :2].sum(1)
    q = q[(q[:, 2] >= low[2]) & (q[:, 2] <= high[2])]
    found = np.einsum("bkj,nj->bkn", mend, q)
    assert (found.min(-1) >= least - 1e-9).all() and (found.max(-1) <= most + 1e-9).all()
    assert np.abs(found.min(-1) - least).max() < 0.05 and np.abs(found.max(-1) - most).max() < 0.05


def test_states_and_what_they_rest_on():
    counts, target = [[160, 0], [80, 80], [30, 10], [0, 0]], np.full((4, 2), 0.5)
    items, summary = certain_prompts(counts, [0, 0, 120, 160], target, 0.1, None)
    assert [item["state"] for item in items] == ["off", "open", "open", "open"]
    assert items[2]["value"] == pytest.approx(0.5) and np.isnan(items[3]["value"])
    assert items[3]["ci95_all"] == (0, pytest.approx(1))
    n = summary["images_for_within"]
    assert summary == {"off": 1, "open": 3, "within": 0, "corrected": False, "reason": None, "images_for_within": n}
    for images, state in ((n + n % 2, "within"), (n - 2 - n % 2, "open")):
        four = np.full((4, 2), images // 2)
        assert {item["state"] for item in certain_prompts(four, [0] * 4, target, 0.1, None)[0]} == {state}
    assert n == images_for_within(4, (0.5, 0.5), 0.1) and n > images_for_within(4, (0.5, 0.5), 0.2)


def test_a_judge_that_errs_is_undone_and_one_that_cannot_be_leaves_all_open():
    counts, target = [[108, 52]] * 3, np.full((3, 2), 0.5)  # a gap of .35, or .58 before a judge of accuracy .8
    raw, summary = certain_prompts(counts, [0] * 3, target, 0.2, None)
    mended, told = certain_prompts(counts, [0] * 3, target, 0.2, judge_of([[16000, 4000], [4000, 16000]]))
    assert raw[0]["state"] == "open" and mended[0]["state"] == "off" and told["corrected"] and not summary["corrected"]
    assert mended[0]["value"] == pytest.approx(raw[0]["value"] / 0.6)
    items, refused = certain_prompts(counts, [0] * 3, target, 0.01, judge_of([[53, 47], [47, 53]]))
    assert {item["state"] for item in items} == {"open"} and "hardly tells" in refused["reason"]
    assert items[0]["value"] == raw[0]["value"] and not refused["corrected"]


def test_a_target_of_zero_has_no_distance():
    items, summary = certain_prompts([[10, 0]], [0], [[1.0, 0.0]], 0.1, None)
    assert items[0]["state"] == "open" and np.isnan(items[0]["value"]) and "target share 0" in summary["reason"]


def test_missing_faces_are_at_least_as_bad_as_the_verdict_takes_them():
    counts, missing, target = np.array([[30, 20], [10, 5]]), np.array([10, 25]), np.full((2, 2), 0.5)
    ends = simultaneous_intervals(counts, missing, target, None)
    for worst in (True, False):
        whole = filled(counts, missing, target, None, worst)
        seen = truth(whole / whole.sum(1, keepdims=True), target)
        assert (ends[:, 0] <= seen).all() and (seen <= ends[:, 1]).all()
