"""How sure a score is, and whether two networks differ: bootstrap over images, and DeLong's test for AUCs.

Images of one patient or lesion are alike: where groups are known, they are resampled as a whole.
"""
import re
from typing import Any, Dict, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.stats import norm, rankdata

__all__ = [
    'LEAST_GROUPS', 'RESAMPLES', 'delong_covariance', 'delong_interval', 'delong_test', 'group_counts',
    'groups_suffice', 'percentile_interval', 'resampled_indices', 'resampled_times', 'unit_of', 'with_interval',
]

RESAMPLES = 1000
LEAST_DEFINED = 0.25  # of the resamples, for an interval
LEAST_GROUPS = 5  # or images, with and without a label, for an interval; percentiles of fewer are too narrow


def resampled_indices(images: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap samples of image numbers, with replacement, shape (resamples, images).

    The same arguments give the same samples, so that networks are compared on the same ones.
    """
    return np.random.default_rng(seed).integers(images, size=(resamples, images))


def resampled_times(
        images: int,
        resamples: int = RESAMPLES,
        seed: int = 0,
        groups: Optional[Sequence[Any]] = None,
) -> np.ndarray:
    """How often each image is in each bootstrap sample, int32 (resamples, images).

    Args:
        images: Number of images.
        resamples, seed: Of resampled_indices, whose samples they are.
        groups: Patient or lesion of each image; a sample then has all images of a group or none, and as many groups as
            there are. None: each image is drawn by itself.
    """
    count, numbers = (images, None) if groups is None else _numbered(groups)
    rng = np.random.default_rng(seed)  # drawn one by one, the samples of resampled_indices take less memory
    times = np.stack([np.bincount(rng.integers(count, size=count), minlength=count).astype(np.int32)
                      for _ in range(resamples)])
    return times if numbers is None else times[:, numbers]


def _numbered(groups: Sequence[Any]) -> Tuple[int, np.ndarray]:
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return len(names), numbers


def group_counts(truth: np.ndarray, groups: Optional[Sequence[Any]]) -> Tuple[int, int]:
    """How many groups (None: images) have a positive image, and how many a negative one."""
    names, positive = np.arange(len(truth)) if groups is None else np.asarray(groups), np.asarray(truth) == 1
    return len(np.unique(names[positive])), len(np.unique(names[~positive]))


def groups_suffice(truth: np.ndarray, groups: Optional[Sequence[Any]]) -> bool:
    """Whether LEAST_GROUPS groups, or images where there are no groups, have each class: an AUC gets an interval."""
    return min(group_counts(truth, groups)) >= LEAST_GROUPS


def unit_of(column: str) -> str:
    """What intervals are over: 'patients', 'lesions', 'groups of COLUMN', or 'images' for no column, ''."""
    name = re.sub(r'[\W_]+', '', column.lower()).removesuffix('id')
    return {'': 'images', 'patient': 'patients', 'lesion': 'lesions'}.get(name, f'groups of {column}')


def percentile_interval(distribution: np.ndarray) -> Tuple[float, float]:
    """The central 95 % of a bootstrap distribution, NaNs left out."""
    low, high = np.nanpercentile(distribution, [2.5, 97.5])
    return float(low), float(high)


def with_interval(name: str, value: Any, distribution: np.ndarray, equal: bool = False) -> Dict[str, Any]:
    """A score and the 95 % interval of its bootstrap distribution; None for both where the score is undefined.

    The interval is None, too, where most resamples lack a class that the score needs (with many rare classes, few have
    images of all), and where all resamples agree, as on an AUC of 1: it would have no width. `equal` says that this is
    so because the score is the difference of equal predictions.
    """
    if not np.isfinite(value):
        return {name: None, f'{name}_ci95': None}
    defined = np.isfinite(distribution).mean() >= LEAST_DEFINED and (
        np.nanmax(distribution) - np.nanmin(distribution) > 1e-12 or equal)
    return {name: float(value), f'{name}_ci95': percentile_interval(distribution) if defined else None}


def delong_covariance(
        truth: np.ndarray,
        probabilities: np.ndarray,
        groups: Optional[Sequence[Any]] = None,
) -> Tuple[np.ndarray, np.ndarray]:
    """AUCs of networks on the same images, and their covariance.

    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), with the mid-ranks of Sun and Xu, IEEE SPL 21 (2014); for
    groups, Obuchowski, Biometrics 53 (1997).

    Args:
        truth: 0 or 1, shape (N,), each at least twice.
        probabilities: Scores of M networks, shape (M, N).
        groups: Patient or lesion of each image, N of them; None: images are independent.

    Returns:
        AUCs, shape (M,), and their covariance matrix, shape (M, M).

    Raises:
        ValueError: Fewer than two images, or groups with images, of a class.
    """
    positive = np.asarray(truth) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise ValueError(f'DeLong needs two images of each class, but there are {m} positive and {n} negative ones.')
    ranks = rankdata(probabilities, axis=-1)
    # share of the other class that each image outranks
    of_positives = (ranks[:, positive] - rankdata(probabilities[:, positive], axis=-1)) / n
    of_negatives = 1 - (ranks[:, ~positive] - rankdata(probabilities[:, ~positive], axis=-1)) / m
    values = of_positives.mean(-1)
    if groups is None:
        covariance = np.atleast_2d(np.cov(of_positives)) / m + np.atleast_2d(np.cov(of_negatives)) / n
        return values, covariance
    count, numbers = _numbered(groups)
    sums, spreads = [], []
    for which, shares, size in ((positive, of_positives, m), (~positive, of_negatives, n)):
        having = len(np.unique(numbers[which]))
        if having < 2:
            raise ValueError('Two groups with images of each class are needed.')
        sums.append(np.stack([np.bincount(numbers[which], share, count) for share in shares - values[:, None]]) / size)
        spreads.append(having / (having - 1) * sums[-1] @ sums[-1].T)
    both = count / (count - 1) * sums[0] @ sums[1].T
    return values, spreads[0] + spreads[1] + both + both.T


def delong_interval(
        truth: np.ndarray,
        probabilities: np.ndarray,
        groups: Optional[Sequence[Any]] = None,
) -> Tuple[float, float]:
    """95 % interval of one AUC from DeLong's variance, cut at 0 and 1.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,).
        groups: Of delong_covariance.
    """
    value, variance = delong_covariance(truth, np.asarray(probabilities)[None], groups)
    half = norm.ppf(0.975) * np.sqrt(variance[0, 0])
    return max(float(value[0] - half), 0.), min(float(value[0] + half), 1.)


def delong_test(
        truth: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        groups: Optional[Sequence[Any]] = None,
) -> Tuple[float, float]:
    """DeLong's paired test of equal AUCs.

    Args:
        truth: 0 or 1, shape (N,).
        first, second: Scores of two networks on the same images, shape (N,).
        groups: Of delong_covariance.

    Returns:
        z of the second minus the first, and the two-sided p-value (0 and 1 where the ranks agree throughout).
    """
    values, covariance = delong_covariance(truth, np.stack([first, second]), groups)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = values[1] - values[0]
    if variance <= 1e-14 * (covariance[0, 0] + covariance[1, 1]):  # none, but for rounding
        if abs(difference) > 1e-12:
            return float(np.sign(difference) * np.inf), 0.
        return 0., 1.
    z = difference / np.sqrt(variance)
    return float(z), float(2 * norm.sf(abs(z)))
