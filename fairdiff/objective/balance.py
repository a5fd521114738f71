"""Automatic balance: give each loss term a chosen share of the gradient, whatever its own scale.

Source: the loss balancer of Defossez et al., "High Fidelity Neural Audio Compression", 2022, section 3.4.
"""

MEMORY = 0.9  # decay of the moving average of a term's norm
LEAST = 1e-3  # a norm below this fraction of the sum may be rounding error, so it is not scaled up to its share


class Balance:
    """Compute factors f_k that give term k the share r_k of the gradient, from a moving average n_k of its norm.

    f_k = r_k S / max(n_k, LEAST S) with S = sum_j n_j. Where n_k >= LEAST S, f_k n_k = r_k S: each term has its requested
    share. The sum of the norms stays S, so the learning rate and gradient clipping keep their meaning. n_k is the
    exponential average of ||g_k|| including the current step, with the start-up bias divided out. So no term is scaled
    to more than 1 / (1 - MEMORY) times its share.

    LEAST is needed because LoRA starts as the frozen model. Each image then equals its reference image, and the gradient
    of the image term is rounding error (1e-7 of the sum in float32). Scaled up to its share, it would be a step in a
    random direction, which differs between processors.
    """

    def __init__(self, shares: dict[str, float]):
        self.shares = shares
        self.sums = dict.fromkeys(shares, 0.0)
        self.mass = 0.0

    def factors(self, norms: dict[str, float]) -> dict[str, float]:
        """Update the averages with one step's finite norms ||g_k|| and return f_k, all 0 while no term had a gradient."""
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
    """Return each norm divided by the sum of all norms, {} if all are 0."""
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total else {}
