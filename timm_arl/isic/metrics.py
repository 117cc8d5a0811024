"""Scores of the ISIC 2017 Part 3 task, with intervals."""
from typing import Any, Dict, Optional, Tuple

import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import confusion_matrix, roc_auc_score

from . import LABELS

__all__ = ['OFFICIAL_THRESHOLD', 'auc', 'score_split', 'score_task']

OFFICIAL_THRESHOLD = 0.5  # the challenge's scorer calls an image positive strictly above it


def auc(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve, NaN when only one class is present.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Any score that grows with the probability, shape (N,).
    """
    if truth.min() == truth.max():
        return float('nan')
    return float(roc_auc_score(truth, probabilities))


def score_task(truth: np.ndarray, probabilities: np.ndarray, threshold: float = OFFICIAL_THRESHOLD) -> Dict[str, Any]:
    """Scores of one binary task.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: In [0, 1], shape (N,).
        threshold: Operating point; positive means strictly greater, as in the official scorer.

    Returns:
        auc, accuracy, sensitivity, specificity, threshold, positives and images. None where a score is undefined.
    """
    (tn, fp), (fn, tp) = confusion_matrix(truth, probabilities > threshold, labels=[0, 1])
    return {
        'auc': _none_if_nan(auc(truth, probabilities)),
        'accuracy': float((tp + tn) / len(truth)),
        'sensitivity': float(tp / (tp + fn)) if tp + fn else None,
        'specificity': float(tn / (tn + fp)) if tn + fp else None,
        'threshold': float(threshold),
        'positives': int(tp + fn),
        'images': len(truth),
    }


def score_split(truth: np.ndarray, probabilities: np.ndarray, resamples: int = 1000, seed: int = 0) -> Dict[str, Any]:
    """Scores of both tasks, as metrics.json keeps them for one split.

    AUC intervals are 95 % percentile bootstrap intervals over images, both tasks resampled together. Resamples that
    miss a class are left out.

    Args:
        truth: 0 or 1, shape (N, 2), columns in the order of LABELS.
        probabilities: In [0, 1], shape (N, 2).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        A dict of scores for each label (score_task's, and auc_ci95), mean_auc and mean_auc_ci95.
    """
    def aucs(index: np.ndarray) -> np.ndarray:
        each = [auc(truth[index, k], probabilities[index, k]) for k in range(len(LABELS))]
        return np.array([*each, np.mean(each)])

    value = aucs(np.arange(len(truth)))
    resampled = bootstrap(
        (np.arange(len(truth)),), aucs, vectorized=False, n_resamples=resamples, method='percentile',
        rng=np.random.default_rng(seed)).bootstrap_distribution
    intervals = [_percentile_interval(row) if np.isfinite(v) else None for v, row in zip(value, resampled)]

    scores: Dict[str, Any] = {}
    for k, label in enumerate(LABELS):
        task = score_task(truth[:, k], probabilities[:, k])
        scores[label] = {'auc': task.pop('auc'), 'auc_ci95': intervals[k], **task}
    scores['mean_auc'] = _none_if_nan(value[-1])
    scores['mean_auc_ci95'] = intervals[-1]
    return scores


def _percentile_interval(distribution: np.ndarray) -> Tuple[float, float]:
    low, high = np.nanpercentile(distribution, [2.5, 97.5])
    return float(low), float(high)


def _none_if_nan(value: float) -> Optional[float]:
    return float(value) if np.isfinite(value) else None
