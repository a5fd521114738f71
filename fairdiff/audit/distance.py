"""The chi-squared distance of shares to their target: unbiased estimates, their exact moments, intervals by inversion.

D^2(p) = sum_k (p_k - t_k)^2 / t_k. It is an f-divergence, so it never grows when classes are merged (Csiszar 1967), and a
joint table is never nearer to its target than its marginals. For two classes at parity D = |p_1 - p_2|. The estimate from n
faces x_1..x_n of one prompt is X = mean over u != v of g(x_u).g(x_v), with g_k(x) = ((M e_x)_k - t_k) / sqrt(t_k). With M = 1
it is unbiased for D^2 of the judged shares. M = C^-T corrects for the error of a judge with confusion matrix C (`judge`).
X depends on g only through G = g g^T.

Shapes: P prompts, K classes, B assumed confusion matrices. counts_PK: faces of each class (fractions allowed). n_P: number of
faces, two or more. target_PK: target shares without zeros. gram_PKK: the matrix G of each prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincc, gammaincinv, ndtr, ndtri

from fairdiff.audit.judge import Judge

# Interpolation nodes for polynomials up to degree 6 on [0, 1]; the matrix maps values at the nodes to coefficients.
NODES = 0.5 - np.cos(np.pi * (np.arange(7) + 0.5) / 7) / 2
TO_POWERS = np.linalg.inv(np.vander(NODES, increasing=True))


def squared_distance(shares, target) -> np.ndarray:
    """Return D^2 [...] of true shares [..., K]."""
    target = np.asarray(target, float)
    return ((np.asarray(shares, float) - target) ** 2 / target).sum(-1)


def gram(target_PK, judge: Judge | None = None) -> np.ndarray:
    """Return G [P, K, K], G_jl = sum_k (M_kj - t_k)(M_kl - t_k) / t_k; without a judge M = 1, for uncorrected shares."""
    target = np.asarray(target_PK, float)
    mend = np.eye(target.shape[-1]) if judge is None else judge.mend
    g = (mend.T - target[..., None, :]) / np.sqrt(target)[..., None, :]
    return g @ np.swapaxes(g, -1, -2)


def unbiased_squared_distance(counts_PK, gram_PKK) -> np.ndarray:
    """Return X [P], the unbiased estimate of D^2. It may be negative, and is NaN for n < 2.

    With M = 1, X = sum_k [(f_k - t_k)^2 - f_k (1 - f_k) / (n - 1)] / t_k, where f are the observed shares.
    """
    counts = np.asarray(counts_PK, float)
    n = counts.sum(-1)
    total = np.einsum("...j,...jk,...k->...", counts, gram_PKK, counts)
    own = (counts * np.diagonal(gram_PKK, axis1=-2, axis2=-1)).sum(-1)
    return (total - own) / np.where(n > 1, n * (n - 1), np.nan)


def moments(q, gram_PKK, n_P) -> np.ndarray:
    """Return the exact mean, variance and third cumulant [..., 3] of X from n faces with judged shares q [..., K].

    They follow from Hoeffding's decomposition X - m = L + Q with L = 2/n sum_u l(x_u) and
    Q = sum_{u != v} H(x_u, x_v) / (n (n - 1)), where m = q'Gq, l = Gq - m, H = G - Gq 1' - 1 (Gq)' + m.
    """
    q, n = np.asarray(q, float), np.asarray(n_P, float)
    Gq = (gram_PKK @ q[..., None])[..., 0]
    m = (q * Gq).sum(-1)
    line = Gq - m[..., None]
    H = gram_PKK - Gq[..., :, None] - Gq[..., None, :] + m[..., None, None]
    Hq = H * q[..., None, :]
    HH = Hq @ Hq
    square = np.diagonal(HH, axis1=-2, axis2=-1)  # q_j E[H(j, x)^2]
    cube = (H**3 @ q[..., None])[..., 0]
    cycle = (HH * np.swapaxes(Hq, -1, -2)).sum((-1, -2))  # E[H(x, y) H(y, z) H(z, x)]
    pairs = n * (n - 1)
    variance = 4 / n * (q * line**2).sum(-1) + 2 / pairs * square.sum(-1)
    third = 8 / n**2 * ((q * line**3).sum(-1) + 3 * (q * line * (Hq @ line[..., None])[..., 0]).sum(-1))
    third += 24 / (n * pairs) * (square * line).sum(-1) + 4 / pairs**2 * ((q * cube).sum(-1) + 2 * (n - 2) * cycle)
    return np.stack([m, variance, third], -1)


def upper_tail(x: float, mean: float, variance: float, third: float) -> float:
    """Return P(X >= x) of the shifted gamma distribution (Pearson's type III) with these cumulants."""
    sd = np.sqrt(max(variance, 1e-18))
    z, skew = (x - mean) / sd, third / sd**3
    if abs(skew) < 1e-3:
        return float(ndtr(-z))
    shape = 4 / skew**2
    at = max(shape + 2 * z / skew, 0.0)
    return float(gammaincc(shape, at) if skew > 0 else gammainc(shape, at))


def quantile(level: float, mean: float, variance: float, third: float) -> float:
    """Return the x with P(X <= x) = level, for the same distribution as `upper_tail`."""
    sd = np.sqrt(max(variance, 1e-18))
    skew = third / sd**3
    if abs(skew) < 1e-3:
        return float(mean + sd * ndtri(level))
    shape = 4 / skew**2
    return float(mean + sd * skew / 2 * (gammaincinv(shape, level if skew > 0 else 1 - level) - shape))


def shrunken_shares(counts_PK, target_PK, judge: Judge | None = None) -> np.ndarray:
    """Return empirical-Bayes true shares [P, K]: deviations from the targets, shrunk towards the mean of all prompts."""
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    n = counts.sum(-1, keepdims=True)
    mend = np.eye(counts.shape[1]) if judge is None else judge.mend
    judged = target if judge is None else target @ judge.rates
    shares = (counts + judged) / (n + 1)  # one pseudo-face on target, so that no share is exactly 0 or 1
    deviation = shares @ mend.T - target
    centre = deviation.mean(0)
    spread = ((deviation - centre) ** 2 / target).sum() / max(len(counts) - 1, 1)
    noise = ((shares @ (mend**2).T - (shares @ mend.T) ** 2) / target / n).sum(-1).mean()
    keep = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    p = np.maximum(target + centre + keep * (deviation - centre), 1e-9)
    return p / p.sum(-1, keepdims=True)


def extreme_shares(target_PK, squared: float) -> np.ndarray:
    """Return the shares [P, K] at this squared distance under which X varies most.

    All prompts have this distance and deviate towards their rarest class. 4/n E[l^2] = 4/n (sum_k d_k^2 p_k / t_k^2 - D^4)
    grows with sum_k d_k^3 / t_k^2, which is largest there. It is concave in D^2, so it is largest for equal distances.
    The shares stop at the rarest class alone if its distance is smaller than `squared`.
    """
    target = np.asarray(target_PK, float)
    step = np.eye(target.shape[1])[target.argmin(1)] - target
    size = np.sqrt(squared / squared_distance(target + step, target))
    return target + np.minimum(size, 1)[:, None] * step


def of_mean(moments_P3: np.ndarray) -> np.ndarray:
    """Return the cumulants [..., 3] of the mean over prompts of independent X, from their cumulants [..., P, 3]."""
    return moments_P3.sum(-2) / moments_P3.shape[-2] ** np.arange(1, 4)


def mean_moments(p_PK, target_PK, n_P, judge: Judge | None = None, images: bool = True) -> np.ndarray:
    """Return the cumulants [..., 3] of the mean of X over prompts with true shares p_PK [..., P, K].

    The true confusion matrix of a judge is unknown. It is drawn from its posterior given the labelled faces, while X is
    computed with the estimate (Cousins & Highland 1992). Its error is the same for every prompt, so it does not average out.
    images=False: return the contribution of the judge alone.
    """
    if judge is None:
        return of_mean(moments(p_PK, gram(target_PK), n_P))
    P, K = np.shape(target_PK)
    second = np.swapaxes(p_PK, -1, -2)[..., None, :, :] / np.asarray(target_PK).T[:, None] @ p_PK[..., None, :, :] / P
    means = second.reshape(*second.shape[:-3], -1) @ judge.products.T - 1  # mean D^2 of M C_b^T p - t [..., B]
    mean, spread = means.mean(-1), means.var(-1)
    third = ((means - mean[..., None]) ** 3).mean(-1)
    if not images:
        return np.stack([mean, spread, third], -1)
    centre = of_mean(moments(p_PK @ judge.draws.mean(0), gram(target_PK, judge), n_P))
    # A confusion matrix with a larger mean also gives a larger 4/n E[l^2], about 4/n (mean) times the noise of one face.
    noise = np.sqrt(moments(np.asarray(target_PK) @ judge.rates, gram(target_PK, judge), n_P)[..., 1])
    slope = 4 * (noise * np.sqrt((n_P - 1) / (2 * n_P * (K - 1)))).sum() / P**2
    variance = centre[..., 1] + slope * np.maximum(mean - centre[..., 0], 0) + spread
    return np.stack([mean, variance, centre[..., 2] + third + 3 * slope * spread], -1)


@dataclass(frozen=True)
class Confidence:
    """Confidence limits of the mean squared distance, given the observed mean x of X.

    The functions theta (mean squared distance) and cumulants (of the mean of X) describe hypothetical shares along a path.
    It starts on target at u = 0 and ends with a single class in every prompt at u = 2.
    """

    x: float
    theta: Callable[[float], float]
    cumulants: Callable[[float], np.ndarray]

    def point(self) -> float:
        """Return the squared distance at which the mean of X is x, 0 if x is below the mean of X on target."""

        def excess(u: float) -> float:
            return float(self.cumulants(u)[0]) - self.x

        if excess(0.0) >= 0:
            return 0.0
        return self.theta(2.0) if excess(2.0) <= 0 else self.theta(brentq(excess, 0, 2, xtol=1e-7))

    def end(self, level: float) -> float:
        """Return the squared distance at which P(X >= x) = level; .025 and .975 give the ends of a 95 % interval.

        For upper ends, an x below the .16 quantile of X on target is replaced by that quantile, so that an estimate that is
        low by chance excludes nothing (power-constrained limits: Cowan, Cranmer, Gross & Vitells 2011).
        """
        x = max(self.x, quantile(0.16, *self.cumulants(0.0))) if level > 0.5 else self.x
        if level > 0.5 and x >= self.cumulants(2.0)[0] - 1e-9:
            return self.theta(2.0)  # all faces are of one class, so x is the largest possible value

        def excess(u: float) -> float:
            return upper_tail(x, *self.cumulants(u)) - level

        if excess(0.0) >= 0:
            return 0.0
        last = 2 - 1e-6  # at 2 itself the variance of X may be 0, and rounding errors would determine the tail
        return self.theta(2.0) if excess(last) <= 0 else self.theta(brentq(excess, 0, last, xtol=1e-5))


def confidence(counts_PK, target_PK, judge: Judge | None = None, images: bool = True) -> Confidence:
    """Return the confidence limits of the mean squared distance of these prompts with new noise. Every prompt's path leads
    from its target to its shrunken shares (u = 1), and from there to one class (u = 2)."""
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    n = counts.sum(-1)
    shares = shrunken_shares(counts, target, judge)
    corner = np.eye(target.shape[1])[((shares - target) / target).argmax(1)]
    lines = ((target, shares), (shares, corner))
    at_nodes = [mean_moments(a + NODES[:, None, None] * (b - a), target, n, judge, images) for a, b in lines]
    powers = [TO_POWERS @ values for values in at_nodes]  # the cumulants are polynomials in u of degrees 2, 4 and 6

    def place(u: float) -> tuple[int, float]:
        return (0, u) if u <= 1 else (1, u - 1)

    def theta(u: float) -> float:
        part, step = place(u)
        a, b = lines[part]
        return float(squared_distance(a + step * (b - a), target).mean())

    def cumulants(u: float) -> np.ndarray:
        part, step = place(u)
        return step ** np.arange(7) @ powers[part]

    return Confidence(float(unbiased_squared_distance(counts, gram(target, judge)).mean()), theta, cumulants)
