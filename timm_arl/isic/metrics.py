"""Scores of the ISIC 2017 Part 3 task, with intervals."""
from typing import Any, Dict, Optional, Tuple

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix

from . import LABELS

__all__ = ['OFFICIAL_THRESHOLD', 'auc', 'auc_table', 'score_split', 'score_task']

OFFICIAL_THRESHOLD = 0.5  # the challenge's scorer calls an image positive strictly above it


def auc(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Area under the ROC curve along the last axis, by the ranks of the positives (Mann-Whitney), ties counting half.

    Args:
        truth: 0 or 1, shape (..., N).
        probabilities: Any score that grows with the probability, shape (..., N).

    Returns:
        Shape (...), NaN where only one class is present. scikit-learn's roc_auc_score takes one sample at a time, which
        is too slow for a bootstrap.
    """
    positive = np.asarray(truth) == 1
    positives, negatives = positive.sum(-1), (~positive).sum(-1)
    rank_sum = np.where(positive, rankdata(probabilities, axis=-1), 0).sum(-1)
    with np.errstate(invalid='ignore'):
        return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


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
        'auc': _none_if_nan(float(auc(truth, probabilities))),
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
    index = np.random.default_rng(seed).integers(len(truth), size=(resamples, len(truth)))
    each = [auc(truth[:, k], probabilities[:, k]) for k in range(len(LABELS))]
    resampled = [auc(truth[index, k], probabilities[index, k]) for k in range(len(LABELS))]
    value = [*each, np.mean(each)]
    intervals = [
        _percentile_interval(distribution) if np.isfinite(v) else None
        for v, distribution in zip(value, [*resampled, np.mean(resampled, axis=0)])
    ]

    scores: Dict[str, Any] = {}
    for k, label in enumerate(LABELS):
        task = score_task(truth[:, k], probabilities[:, k])
        scores[label] = {'auc': task.pop('auc'), 'auc_ci95': intervals[k], **task}
    scores['mean_auc'] = _none_if_nan(float(value[-1]))
    scores['mean_auc_ci95'] = intervals[-1]
    return scores


def auc_table(metrics: Dict[str, Dict[str, Any]]) -> str:
    """A line of AUCs with their intervals for each split of metrics.json, under a heading."""
    lines = ['            ' + ''.join(f'{label.replace("_", " "):24}' for label in LABELS) + 'mean']
    for split, scores in metrics.items():
        cells = [(scores[label]['auc'], scores[label]['auc_ci95']) for label in LABELS]
        cells.append((scores['mean_auc'], scores['mean_auc_ci95']))
        texts = ['undefined' if value is None else f'{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]' for value, ci in cells]
        lines.append(f'{split:12}' + ''.join(f'{text:24}' for text in texts).rstrip())
    return '\n'.join(lines)


def _percentile_interval(distribution: np.ndarray) -> Tuple[float, float]:
    low, high = np.nanpercentile(distribution, [2.5, 97.5])
    return float(low), float(high)


def _none_if_nan(value: float) -> Optional[float]:
    return float(value) if np.isfinite(value) else None
