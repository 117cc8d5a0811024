"""How sure a score is, and whether two networks differ: bootstrap over images, and DeLong's test for AUCs."""
from typing import Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.stats import norm, rankdata

__all__ = [
    'RESAMPLES', 'delong_covariance', 'delong_interval', 'delong_test', 'percentile_interval', 'resampled_indices',
]

RESAMPLES = 1000


def resampled_indices(images: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap samples of image numbers, with replacement, shape (resamples, images).

    The same arguments give the same samples, so that networks are compared on the same ones.
    """
    return np.random.default_rng(seed).integers(images, size=(resamples, images))


def percentile_interval(distribution: np.ndarray, level: float = 0.95) -> Tuple[float, float]:
    """The central part of a bootstrap distribution, NaNs left out."""
    low, high = np.nanpercentile(distribution, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def delong_covariance(truth: np.ndarray, probabilities: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """AUCs of networks on the same images, and their covariance.

    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), with the mid-ranks of Sun and Xu, IEEE SPL 21 (2014).

    Args:
        truth: 0 or 1, shape (N,), each at least twice.
        probabilities: Scores of M networks, shape (M, N).

    Returns:
        AUCs, shape (M,), and their covariance matrix, shape (M, M).

    Raises:
        ValueError: Fewer than two images of a class.
    """
    positive = np.asarray(truth) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise ValueError(f'DeLong needs two images of each class, but there are {m} positive and {n} negative ones.')
    ranks = rankdata(probabilities, axis=-1)
    # share of the other class that each image outranks
    of_positives = (ranks[:, positive] - rankdata(probabilities[:, positive], axis=-1)) / n
    of_negatives = 1 - (ranks[:, ~positive] - rankdata(probabilities[:, ~positive], axis=-1)) / m
    covariance = np.atleast_2d(np.cov(of_positives)) / m + np.atleast_2d(np.cov(of_negatives)) / n
    return of_positives.mean(-1), covariance


def delong_interval(truth: np.ndarray, probabilities: np.ndarray, level: float = 0.95) -> Tuple[float, float]:
    """Interval of one AUC from DeLong's variance, cut at 0 and 1.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,).
        level: Share of repetitions that the interval should cover.
    """
    value, variance = delong_covariance(truth, np.asarray(probabilities)[None])
    half = norm.ppf(0.5 + level / 2) * np.sqrt(variance[0, 0])
    return max(float(value[0] - half), 0.), min(float(value[0] + half), 1.)


def delong_test(truth: np.ndarray, first: np.ndarray, second: np.ndarray) -> Tuple[float, float]:
    """DeLong's paired test of equal AUCs.

    Args:
        truth: 0 or 1, shape (N,).
        first, second: Scores of two networks on the same images, shape (N,).

    Returns:
        z of the second minus the first, and the two-sided p-value (0 and 1 where the ranks agree throughout).
    """
    values, covariance = delong_covariance(truth, np.stack([first, second]))
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = values[1] - values[0]
    if variance <= 1e-16:
        if abs(difference) > 1e-12:
            return float(np.sign(difference) * np.inf), 0.
        return 0., 1.
    z = difference / np.sqrt(variance)
    return float(z), float(2 * norm.sf(abs(z)))
