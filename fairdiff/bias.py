"""The bias of shares: the one formula for training, audit and the statistics of the embedded model."""

from functools import cache

import numpy as np

pairs = cache(np.triu_indices)


def bias(shares) -> np.ndarray:
    """2 / (K (K - 1)) sum_{i<j} |p_i - p_j| over the last axis [..., K] (Shen et al., ICLR 2024, section 5).

    The mean absolute gap between the shares of all pairs of classes; 0 is parity, 2/K one class alone.
    """
    shares = np.asarray(shares, float)
    i, j = pairs(shares.shape[-1], 1)
    return np.abs(shares[..., i] - shares[..., j]).mean(-1)
