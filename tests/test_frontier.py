"""The frontier: quotas and thresholds are compared with brute force, curves with real mixtures of images."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from fairdiff.bias import bias
from fairdiff.errors import FairDiffError
from fairdiff.studies import curves
from fairdiff.studies.error_rates import CONSTRAINTS, fair_thresholds, judged, rates, roc
from fairdiff.studies.postprocess import most_kept, quota, true_shares


@pytest.mark.parametrize("counts", [(7, 3), (9, 0), (0, 0), (5, 2, 4), (1, 6, 2, 3)])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.34, 1.0])
def test_a_quota_keeps_as_many_as_any_choice_that_it_allows(counts, tolerance):
    target = np.full(len(counts), 1 / len(counts)) if len(counts) != 3 else np.array([0.5, 0.3, 0.2])
    most = 0
    for kept in product(*(range(m + 1) for m in counts)):
        n = sum(kept)
        if n and all(abs(k - t * n) <= tolerance * n + 1e-9 for k, t in zip(kept, target, strict=True)):
            most = max(most, n)
    kept = quota(counts, target, tolerance)
    assert kept.sum() == most and (kept <= counts).all() and (kept >= 0).all()
    assert most_kept(counts, target, tolerance) >= most - 1e-6
    if most:
        assert np.abs(kept / most - target).max() <= tolerance + 1e-9


def test_a_quota_without_a_constraint_keeps_all_and_one_without_a_class_none():
    assert quota((7, 3), (0.5, 0.5), 1.0).tolist() == [7, 3] and quota((7, 0), (0.5, 0.5), 0.1).tolist() == [0, 0]


def test_what_a_judge_has_chosen_is_as_fair_as_its_errors_let_it_be():
    """If the judge finds parity, the true shares of images with known classes follow from Bayes' rule."""
    C, p, rng = np.array([[0.9, 0.1], [0.25, 0.75]]), np.array([0.2, 0.8]), np.random.default_rng(0)
    true = rng.choice(2, size=400_000, p=p)
    said = (rng.random(len(true)) < C[true, 1]).astype(int)
    counts = np.bincount(said)
    kept = quota(counts // 100, (0.5, 0.5), 0.0)
    chosen = np.concatenate([true[said == k][: kept[k] * 100] for k in (0, 1)])
    assert kept[0] == kept[1]
    assert true_shares(kept, counts / counts.sum(), C)[0] == pytest.approx((chosen == 0).mean(), abs=5e-3)
    assert true_shares([3, 3], [0.3, 0.7], np.eye(2)).tolist() == pytest.approx([0.5, 0.5])


def records(women: dict[str, list[int]], dino: dict[str, float], images: int = 20) -> pd.DataFrame:
    """Return records with the given number of women among the images of each prompt and model."""
    rows = []
    for model, counts in women.items():
        for prompt, count in enumerate(counts):
            for image in range(images):
                p = 0.9 if image < count else 0.2
                seen = np.nan if model == "before" else dino[model]
                rows.append([model, True, "", image != 19, f"{prompt:02}", image, p, 1 - p, seen])
    names = ["model", "people", "names", "found", "prompt", "image_index", "p.gender.female", "p.gender.male", "dino"]
    return pd.DataFrame(rows, columns=names).sample(frac=1, random_state=0)


def outcomes() -> list[curves.Outcome]:
    table = records({"before": [0, 2, 17], "after": [9, 5, 10]}, {"after": 0.8})
    found = [
        curves.outcome(m, curves.usual_rows(table, m), "gender", ("female", "male"), "dino") for m in ("before", "after")
    ]
    return found


def test_outcomes_are_counted_by_prompt_without_missing_faces():
    before, after = outcomes()
    assert before.bias_P.tolist() == pytest.approx([1, 15 / 19, 15 / 19])
    assert after.bias_P.tolist() == pytest.approx([1 / 19, 9 / 19, 1 / 19])
    assert before.semantics_P.tolist() == [1, 1, 1] and after.semantics_P.tolist() == pytest.approx([0.8] * 3)


def test_a_mixture_is_no_worse_than_the_line_between_its_ends():
    """The hull is attainable: randomly mixed images have at most the bias of the line."""
    rng, n = np.random.default_rng(0), 200_000
    for one, other in (((0.9, 0.1), (0.2, 0.8)), ((0.7, 0.3), (0.55, 0.45)), ((0.9, 0.1), (0.5, 0.5))):
        ends = [rng.choice(2, size=n, p=p) for p in (one, other)]
        for share in (0.25, 0.6):
            mixed = np.where(rng.random(n) < share, ends[1], ends[0])
            line = (1 - share) * bias(np.array(one)) + share * bias(np.array(other))
            assert bias(np.bincount(mixed) / n) <= line + 0.01


def test_the_least_bias_at_a_level_is_that_of_the_best_mixture_of_two_settings():
    rng = np.random.default_rng(1)
    x, y = rng.random((5, 4)), rng.random((5, 4))
    grid = np.linspace(0, 1, 2001)
    for level in (0.2, 0.5, 0.9):
        found = curves.least_bias(x, y, level)
        for d in range(5):
            best = np.inf
            for i, j in product(range(4), repeat=2):
                across, up = x[d, i] + grid * (x[d, j] - x[d, i]), y[d, i] + grid * (y[d, j] - y[d, i])
                best = min(best, up[across >= level - 1e-12].min(initial=np.inf))
            assert np.isnan(found[d]) if np.isinf(best) else found[d] == pytest.approx(best, abs=2e-3)
            reached = curves.most_semantics(x, y, found[d])[d]
            assert np.isnan(found[d]) or reached >= level - 1e-9  # the same frontier, read the other way


def test_corners_of_the_frontier_are_those_that_no_mixture_beats():
    x, y = np.array([0.5, 0.7, 0.8, 0.9, 1.0, 0.6]), np.array([0.2, 0.1, 0.5, 0.3, 0.9, 0.6])
    assert curves.hull(x, y) == [1, 3, 4]
    for i in range(len(x)):
        others = np.delete(np.arange(len(x)), i)
        beaten = curves.least_bias(x[None, others], y[None, others], x[i])[0] <= y[i]
        assert (i in (1, 3, 4)) != bool(beaten)


def test_equal_curves_differ_by_nothing_in_every_resample():
    both = outcomes()
    (x, y), (x2, y2) = curves.of_means(both, 0), curves.of_means(both[::-1], 0)
    assert x[0].tolist() == pytest.approx([1, 0.8]) and y[0, 0] == pytest.approx(both[0].bias_P.mean())
    assert len(x) == 10_001 and np.allclose(curves.least_bias(x, y, 0.9), curves.least_bias(x2, y2, 0.9))
    assert np.isnan(curves.most_semantics(x, y, 0.0)[0]) and curves.least_bias(x, y, 1.0)[0] == pytest.approx(y[0, 0])


def labelled(seed: int = 0) -> dict:
    """Return ROC curves of two small groups, one of which has noisier scores."""
    rng, groups = np.random.default_rng(seed), {}
    for name, noise, n in (("a", 0.2, 7), ("b", 0.7, 6)):
        label = np.array([0, 1] * n)[:n]
        groups[name] = (label + noise * rng.standard_normal(n), label)
    total = sum(len(label) for _, label in groups.values())
    return {name: roc(score, label, total) for name, (score, label) in groups.items()}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 1.0])
def test_thresholds_make_no_more_errors_than_any_pair_of_mixtures_on_a_grid(constraint, tolerance):
    groups = labelled()
    found = {name: rates(groups[name], w) for name, w in fair_thresholds(groups, constraint, tolerance).items()}
    for rate in CONSTRAINTS[constraint]:
        assert abs(found["a"][rate] - found["b"][rate]) <= tolerance + 1e-7
    total = sum(groups[name].mass * found[name]["errors"] for name in groups)
    points = {}
    for name, group in groups.items():  # every mixture of two thresholds in tenths
        T = len(group.thresholds)
        pairs = [(i, j, k / 10) for i in range(T) for j in range(i, T) for k in range(11)]
        weights = np.zeros((len(pairs), T))
        for row, (i, j, k) in enumerate(pairs):
            weights[row, i] += k
            weights[row, j] += 1 - k
        points[name] = {key: weights @ getattr(group, key) for key in ("tpr", "fpr", "positive", "errors")}
    allowed = np.ones((len(points["a"]["tpr"]), len(points["b"]["tpr"])), bool)
    for rate in CONSTRAINTS[constraint]:
        allowed &= np.abs(points["a"][rate][:, None] - points["b"][rate]) <= tolerance + 1e-9
    errors = groups["a"].mass * points["a"]["errors"][:, None] + groups["b"].mass * points["b"]["errors"]
    assert total <= errors[allowed].min() + 1e-7
    if tolerance == 1:  # no constraint: each group's own best threshold
        assert total == pytest.approx(sum(g.mass * g.errors.min() for g in groups.values()))


def test_random_thresholds_have_the_rates_that_were_promised():
    rng = np.random.default_rng(0)
    score, label = rng.random(60_000), rng.integers(0, 2, 60_000)
    group = roc((score[:20] + label[:20]) / 2, label[:20], 20)
    weights = np.full(len(group.thresholds), 1 / len(group.thresholds))
    said = judged((score + label) / 2, weights, group, rng)
    wanted = ((score + label) / 2 >= group.thresholds[:, None]).mean(0)
    assert said.mean() == pytest.approx(wanted.mean(), abs=0.01)


def test_a_group_without_both_labels_and_an_unknown_constraint_are_refused():
    with pytest.raises(FairDiffError, match="allowed: both 0 and 1 in a group"):
        roc(np.array([0.1, 0.2]), np.array([1, 1]), 2)
    with pytest.raises(FairDiffError, match="constraint: found nonsense, allowed: parity"):
        fair_thresholds(labelled(), "nonsense", 0.1)
