"""Whether a probability of 30 % means three in ten, and how scores differ between groups of patients."""
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.optimize import minimize_scalar

from .intervals import delong_interval
from .metrics import score_task
from .task import ISIC2017, OFFICIAL_THRESHOLD, Task, apply_temperature

__all__ = [
    'AGE_BANDS', 'apply_temperature', 'expected_calibration_error', 'fit_temperature', 'reliability', 'subgroup_table',
]

AGE_BANDS = ((0, 30), (30, 50), (50, 70), (70, 200))  # years; the upper end is not part of the band


def reliability(truth: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> List[Dict[str, float]]:
    """Mean probability and share of positives in bins of equal width; empty bins are left out.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: In [0, 1], shape (N,).
        bins: Number of bins between 0 and 1.

    Returns:
        A dict of images, probability and positives (shares) for each bin.
    """
    which = np.clip((np.asarray(probabilities) * bins).astype(int), 0, bins - 1)
    return [
        {'images': int((which == b).sum()), 'probability': float(probabilities[which == b].mean()),
         'positives': float(truth[which == b].mean())}
        for b in range(bins) if (which == b).any()
    ]


def expected_calibration_error(truth: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Mean distance between probability and share of positives, over the bins of reliability, weighted by images."""
    rows = reliability(truth, probabilities, bins)
    return sum(r['images'] * abs(r['probability'] - r['positives']) for r in rows) / len(truth)


def fit_temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature T that gives sigmoid(logit / T) the smallest cross-entropy, between 0.05 and 20.

    Guo et al., `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599

    Args:
        truth: 0 or 1, shape (N,), or (N, labels) for one temperature of all labels.
        probabilities: Same shape.
    """
    def cross_entropy(log_temperature: float) -> float:
        p = np.clip(apply_temperature(probabilities, float(np.exp(log_temperature))), 1e-12, 1 - 1e-12)
        return -float(np.mean(truth * np.log(p) + (1 - truth) * np.log1p(-p)))
    found = minimize_scalar(cross_entropy, bounds=(np.log(0.05), np.log(20)), method='bounded')
    return float(np.exp(found.x))


def subgroup_table(
        truth: np.ndarray,
        probabilities: np.ndarray,
        sex: Optional[Sequence[Optional[str]]] = None,
        age: Optional[Sequence[Optional[float]]] = None,
        thresholds: Optional[Sequence[float]] = None,
        task: Task = ISIC2017,
) -> List[Dict[str, Any]]:
    """Scores by sex and by age band; patients of unknown sex or age are groups too.

    Args:
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        probabilities: Shape (N, labels).
        sex: N words or codes, or None for unknown.
        age: N ages in years; None, or anything that is not a number, for unknown.
        thresholds: Operating point of each label; None: the official 0.5.
        task: Whose labels they are.

    Returns:
        A row for each group and label: group, label, score_task's scores, and auc_ci95 by DeLong (None with fewer than
        two images of a class, and for an AUC of 0 or 1, where DeLong's interval has no width). An empty list where
        neither sex nor age of any patient is known.
    """
    groups: List[Tuple[str, np.ndarray]] = []
    if sex is not None and any(s is not None for s in sex):
        words = np.array(['unknown' if s in (None, '') else str(s).lower() for s in sex])
        groups += [(f'sex {word}', words == word) for word in sorted(set(words))]
    if age is not None:
        years = np.array([_years(a) for a in age])
        if np.isfinite(years).any():
            groups += [(f'age {low} to {high - 1}' if high < 200 else f'age {low} and above',
                        (years >= low) & (years < high)) for low, high in AGE_BANDS]
            groups.append(('age unknown', np.isnan(years)))
    return [
        {'group': name, 'label': label, **score_task(t, p, threshold), 'auc_ci95': _interval(t, p)}
        for name, which in groups if which.any()
        for label, t, p, threshold in zip(
            task.labels, truth[which].T, probabilities[which].T, thresholds or [OFFICIAL_THRESHOLD] * len(task.labels))
    ]


def _years(age: Any) -> float:
    try:
        return float(age)
    except (TypeError, ValueError):  # None, or a word
        return np.nan


def _interval(truth: np.ndarray, probabilities: np.ndarray) -> Optional[Tuple[float, float]]:
    try:
        low, high = delong_interval(truth, probabilities)
    except ValueError:  # too few images of a class
        return None
    return (low, high) if high - low > 1e-9 else None
