"""When two judges are at odds: swapped labels are found, doubt and noise are not taken for them."""

import numpy as np
import pytest

from classifiers.agreement import RISK, agreement


def judged(rng, faces: int, classes: int, confidence: float, naming=None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of two judges that are right as often as they say, each by itself; `naming` renames the second's."""
    true_F = rng.integers(classes, size=faces)
    pair = []
    for _ in range(2):
        wrong_F = (true_F + rng.integers(1, classes, size=faces)) % classes
        label_F = np.where(rng.random(faces) < confidence, true_F, wrong_F)
        probs_FK = np.full((faces, classes), (1 - confidence) / (classes - 1))
        probs_FK[np.arange(faces), label_F] = confidence
        pair.append(probs_FK)
    if naming is not None:
        pair[1] = pair[1][:, np.argsort(naming)]
    return pair[0], pair[1]


@pytest.mark.parametrize(
    ("classes", "naming", "confidence", "least"),
    [(2, [1, 0], 0.97, 1), (2, [1, 0], 0.85, 0.6), (4, [0, 2, 1, 3], 0.97, 0.7), (4, [1, 2, 3, 0], 0.95, 1)],
)
def test_swapped_labels_are_found_on_a_few_faces(classes, naming, confidence, least):
    rng = np.random.default_rng(0)
    results = [agreement(*judged(rng, 24, classes, confidence, naming)) for _ in range(300)]
    assert np.mean([r.at_odds for r in results]) >= least
    moved = {(i, j) for i, j in enumerate(naming) if i != j}
    assert all(r.renamed and set(r.renamed) <= moved for r in results if r.at_odds)


@pytest.mark.parametrize("classes", [2, 4, 7])
@pytest.mark.parametrize("confidence", [0.55, 0.7, 0.9, 0.99])
def test_judges_that_are_right_as_often_as_they_say_are_never_at_odds(classes, confidence):
    rng = np.random.default_rng(1)
    found = [agreement(*judged(rng, faces, classes, confidence)).at_odds for faces in (1, 8, 24) for _ in range(400)]
    assert np.mean(found) <= RISK / 10


@pytest.mark.parametrize("classes", [2, 4])
def test_a_sure_judge_that_knows_nothing_is_rarely_taken_for_swapped(classes):
    rng = np.random.default_rng(3)
    pairs = [(judged(rng, 24, classes, 0.97)[0], np.eye(classes)[rng.integers(classes, size=24)]) for _ in range(600)]
    assert np.mean([agreement(*pair).at_odds for pair in pairs]) <= 2 * RISK


def test_one_of_two_that_says_the_same_of_everybody_is_no_swap():
    rng = np.random.default_rng(2)
    first, _ = judged(rng, 24, 2, 0.95)
    always = np.tile([0.95, 0.05], (24, 1))
    result = agreement(first, always)
    assert not result.at_odds and result.share == (first.argmax(1) == 0).mean()


def test_too_few_faces_decide_nothing():
    sure, other = np.tile([1.0, 0.0], (24, 1)), np.tile([0.0, 1.0], (24, 1))
    assert [agreement(sure[:n], other[:n]).at_odds for n in (0, 1, 5, 6, 24)] == [False, False, False, True, True]
    assert np.isnan(agreement(sure[:0], other[:0]).share) and agreement(sure, other).share == 0
    assert agreement(sure, other).renamed == ((0, 1),)  # the other way round nobody was seen


def test_the_best_naming_says_what_the_second_calls_each_class():
    first = np.eye(3)[[0] * 10 + [1] * 10 + [2] * 4]
    second = np.eye(3)[[1] * 10 + [0] * 10 + [2] * 4]
    result = agreement(first, second)
    assert result.renamed == ((0, 1), (1, 0)) and result.at_odds
    assert result.share == pytest.approx(1 / 6) and result.best_share == 1
