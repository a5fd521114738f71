"""The bias of class shares: one formula for training, the audit and the statistics of the embedded model."""

from functools import cache

import numpy as np

pairs = cache(np.triu_indices)


def bias(shares) -> np.ndarray:
    """Return 2 / (K (K - 1)) sum_{i<j} |p_i - p_j| over the last axis [..., K] (Shen et al., ICLR 2024, section 5).

    It is the mean absolute gap between the shares of two classes; 0 is parity, 2/K is one class only.
    """
    shares = np.asarray(shares, float)
    i, j = pairs(shares.shape[-1], 1)
    return np.abs(shares[..., i] - shares[..., j]).mean(-1)
