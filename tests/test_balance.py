"""Laws of the automatic balance: the requested shares, an unchanged size, bounded factors, a state that goes on."""

import pytest

from fairdiff.objective.balance import LEAST, MEMORY, Balance, shares_of

REQUESTED = {"align": 0.6, "image": 0.3, "face": 0.1}


def balanced(factors, norms):
    return {k: factors[k] * norms[k] for k in norms}


def test_steady_norms_are_brought_to_their_shares_without_changing_the_sum():
    balance, norms = Balance(REQUESTED), {"align": 0.02, "image": 7.0, "face": 0.5}
    for _ in range(3):
        scaled = balanced(balance.factors(norms), norms)
        assert shares_of(scaled) == pytest.approx(REQUESTED)
        assert sum(scaled.values()) == pytest.approx(sum(norms.values()))


def test_shares_that_are_already_right_change_nothing():
    assert Balance(REQUESTED).factors({"align": 6.0, "image": 3.0, "face": 1.0}) == pytest.approx(
        dict.fromkeys(REQUESTED, 1.0)
    )


def test_a_term_that_wakes_up_is_not_blown_up():
    """LoRA starts as the frozen model, so its image term has no gradient at first."""
    balance = Balance(REQUESTED)
    for _ in range(50):
        assert balanced(balance.factors({"align": 1.0, "image": 0.0, "face": 1.0}), {"image": 0.0})["image"] == 0
    norms = {"align": 1.0, "image": 4.0, "face": 1.0}
    scaled = balanced(balance.factors(norms), norms)
    assert 0 < scaled["image"] < REQUESTED["image"] * 2.5 / (1 - MEMORY)


@pytest.mark.parametrize("rounding", [0.0, 1e-12, 1e-7])
def test_rounding_is_not_brought_to_a_share(rounding):
    """The gradient of an image that equals its reference image is rounding error, with an arbitrary direction."""
    norms = {"align": 1.0, "image": rounding, "face": 0.5}
    scaled = balanced(Balance(REQUESTED).factors(norms), norms)
    assert shares_of(scaled)["image"] < 1e-3
    assert scaled["align"] / scaled["face"] == pytest.approx(REQUESTED["align"] / REQUESTED["face"])


def test_a_small_scale_is_not_taken_for_rounding():
    norms = {"align": 1.0, "image": 2 * LEAST, "face": 0.5}
    assert shares_of(balanced(Balance(REQUESTED).factors(norms), norms)) == pytest.approx(REQUESTED)


def test_a_restored_balance_goes_on_where_it_stopped():
    first, second = Balance(REQUESTED), Balance(REQUESTED)
    norms = [{"align": 1.0 + i, "image": 5.0 / (1 + i), "face": 0.3} for i in range(4)]
    for n in norms[:2]:
        first.factors(n)
    second.load_state_dict(first.state_dict())
    assert [first.factors(n) for n in norms[2:]] == [second.factors(n) for n in norms[2:]]
