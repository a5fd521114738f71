"""Automatic balance: every loss term gets a chosen share of the gradient, whatever its scale.

Source of the idea: the loss balancer of Defossez et al., "High Fidelity Neural Audio Compression", 2022, section 3.4.
"""

MEMORY = 0.9  # of the moving average of a term's norm
LEAST = 1e-3  # of the sum of the norms: a smaller one may be rounding alone, and is not scaled up to a share


class Balance:
    """Factors f_k that give term k the share r_k of the gradient, on a moving average n_k of its norm.

    f_k = r_k S / max(n_k, LEAST S) with S = sum_j n_j, so that f_k n_k = r_k S where n_k is no rounding: the shares are
    the requested ones while the sum of the norms stays, and with it the meaning of the learning rate and of gradient
    clipping. n_k is the exponential average of ||g_k|| with its start-up bias divided out, the current step included,
    so no term is ever scaled to more than 1 / (1 - MEMORY) times its share.

    LoRA starts as the frozen model. Each image is then its own reference, and the gradient between the two is rounding
    (1e-7 of the sum in float32): brought to its share it would be a step in a random direction, another one on every
    processor.
    """

    def __init__(self, shares: dict[str, float]):
        self.shares = shares
        self.sums = dict.fromkeys(shares, 0.0)
        self.mass = 0.0

    def factors(self, norms: dict[str, float]) -> dict[str, float]:
        """Take in one step's norms ||g_k|| (finite) and return f_k; 0 for all while no term had a gradient."""
        self.mass = MEMORY * self.mass + (1 - MEMORY)
        self.sums = {k: MEMORY * self.sums[k] + (1 - MEMORY) * norms[k] for k in self.shares}
        average = {k: s / self.mass for k, s in self.sums.items()}
        total = sum(average.values())
        return {k: share * total / max(average[k], LEAST * total) if total else 0.0 for k, share in self.shares.items()}

    def state_dict(self) -> dict:
        return {"sums": self.sums, "mass": self.mass}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.mass = dict(state["sums"]), state["mass"]


def shares_of(norms: dict[str, float]) -> dict[str, float]:
    """Each norm divided by the sum of all, {} if all are 0."""
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total else {}
