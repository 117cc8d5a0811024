"""Scores of the ISIC 2017 Part 3 task, as the challenge's official scorer counts them, and metrics.json."""
from typing import Any, Dict, List, Optional, Sequence

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import auc as area_under
from sklearn.metrics import average_precision_score, confusion_matrix, roc_curve

from .intervals import RESAMPLES, delong_test, percentile_interval, resampled_indices
from .task import LABELS, label_words

__all__ = [
    'OFFICIAL_THRESHOLD', 'auc', 'auc_above_sensitivity', 'auc_table', 'compare', 'interval_text', 'operating_point',
    'score_split', 'score_task', 'threshold_for_sensitivity', 'youden_threshold',
]

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


def auc_above_sensitivity(truth: np.ndarray, probabilities: np.ndarray, sensitivity: float = 0.8) -> float:
    """Area under the part of the ROC curve with at least that sensitivity, as the official scorer's auc_sens_80.

    The area reaches down to a sensitivity of 0 and is not rescaled: at 0.8 it is 1 at best and 0.18 by chance.

    Args:
        truth: 0 or 1, shape (N,), both present.
        probabilities: Shape (N,).
        sensitivity: Between 0 and 1.
    """
    fpr, tpr, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    first = int(np.searchsorted(tpr, sensitivity))
    start = np.interp(sensitivity, tpr[first - 1:first + 1], fpr[first - 1:first + 1])
    return float(area_under(np.r_[start, fpr[first:]], np.r_[sensitivity, tpr[first:]]))


def operating_point(truth: np.ndarray, probabilities: np.ndarray, threshold: float) -> Dict[str, Any]:
    """Scores of one binary task at one threshold.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: In [0, 1], shape (N,).
        threshold: Positive means strictly greater, as in the official scorer.

    Returns:
        accuracy, sensitivity, specificity, ppv, npv and threshold. None where a score is undefined.
    """
    # float64: a float32 array would round the threshold to its own precision
    positive = np.asarray(probabilities, np.float64) > threshold
    (tn, fp), (fn, tp) = confusion_matrix(truth, positive, labels=[0, 1]).tolist()

    def share(part: int, rest: int) -> Optional[float]:
        return part / (part + rest) if part + rest else None

    return {
        'accuracy': share(tp + tn, fp + fn), 'sensitivity': share(tp, fn), 'specificity': share(tn, fp),
        'ppv': share(tp, fp), 'npv': share(tn, fn), 'threshold': float(threshold),
    }


def youden_threshold(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the largest sensitivity + specificity (Youden's index); positive means strictly greater.

    Args:
        truth: 0 or 1, shape (N,), both present.
        probabilities: Shape (N,).
    """
    fpr, tpr, thresholds = roc_curve(truth, probabilities, drop_intermediate=False)
    return _just_below(probabilities, thresholds[np.argmax(tpr - fpr)])


def threshold_for_sensitivity(truth: np.ndarray, probabilities: np.ndarray, sensitivity: float = 0.9) -> float:
    """The highest threshold with at least that sensitivity; positive means strictly greater.

    Args:
        truth: 0 or 1, shape (N,), both present.
        probabilities: Shape (N,).
        sensitivity: Between 0 and 1.
    """
    _, tpr, thresholds = roc_curve(truth, probabilities, drop_intermediate=False)
    return _just_below(probabilities, thresholds[np.argmax(tpr >= sensitivity)])


def _just_below(probabilities: np.ndarray, lowest_positive: float) -> float:
    """Half way between the lowest score that counts as positive, or 1, and the next lower one, or 0.

    scikit-learn calls a score positive from its threshold on, the official scorer strictly above.
    """
    lower = np.unique(np.asarray(probabilities, np.float64))
    lower = lower[lower < lowest_positive]
    lowest_positive = min(lowest_positive, 1.)  # infinite where nothing is positive
    return (float(lowest_positive) + (float(lower[-1]) if len(lower) else 0.)) / 2


def score_task(truth: np.ndarray, probabilities: np.ndarray, threshold: float = OFFICIAL_THRESHOLD) -> Dict[str, Any]:
    """Scores of one binary task: auc, average_precision, auc_sens_80, those of operating_point, positives and images.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: In [0, 1], shape (N,).
        threshold: Operating point; positive means strictly greater.

    Returns:
        The scores, None where one is undefined.
    """
    positives = int(np.sum(truth))
    both = 0 < positives < len(truth)
    return {
        'auc': float(auc(truth, probabilities)) if both else None,
        'average_precision': float(average_precision_score(truth, probabilities)) if both else None,
        'auc_sens_80': auc_above_sensitivity(truth, probabilities) if both else None,
        **operating_point(truth, probabilities, threshold),
        'positives': positives,
        'images': len(truth),
    }


def score_split(
        truth: np.ndarray,
        probabilities: np.ndarray,
        resamples: int = RESAMPLES,
        seed: int = 0,
        operating_points: Optional[Dict[str, Sequence[float]]] = None,
) -> Dict[str, Any]:
    """Scores of both tasks, as metrics.json keeps them for one split.

    AUC intervals are 95 % percentile bootstrap intervals over images, both tasks resampled together. Resamples that
    miss a class are left out.

    Args:
        truth: 0 or 1, shape (N, 2), columns in the order of LABELS.
        probabilities: In [0, 1], shape (N, 2).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        operating_points: By name, a threshold for each label, chosen elsewhere.

    Returns:
        A dict of scores for each label (score_task's, auc_ci95, and a list operating_points), mean_auc and
        mean_auc_ci95.
    """
    index = resampled_indices(len(truth), resamples, seed)
    each = [auc(truth[:, k], probabilities[:, k]) for k in range(len(LABELS))]
    resampled = [auc(truth[index, k], probabilities[index, k]) for k in range(len(LABELS))]
    value = [*each, np.mean(each)]
    intervals = [
        percentile_interval(distribution) if np.isfinite(v) else None
        for v, distribution in zip(value, [*resampled, np.mean(resampled, axis=0)])
    ]

    scores: Dict[str, Any] = {}
    for k, label in enumerate(LABELS):
        task = score_task(truth[:, k], probabilities[:, k])
        points = [
            {'name': name, **operating_point(truth[:, k], probabilities[:, k], thresholds[k])}
            for name, thresholds in (operating_points or {}).items()]
        scores[label] = {'auc': task.pop('auc'), 'auc_ci95': intervals[k], **task, 'operating_points': points}
    scores['mean_auc'] = float(value[-1]) if np.isfinite(value[-1]) else None
    scores['mean_auc_ci95'] = intervals[-1]
    return scores


def compare(
        truth: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        resamples: int = RESAMPLES,
        seed: int = 0,
) -> Dict[str, Any]:
    """The AUC of the second network minus that of the first, paired on the same images.

    Args:
        truth: 0 or 1, shape (N, 2), columns in the order of LABELS.
        first, second: Probabilities, shape (N, 2).
        resamples: Number of bootstrap resamples, the same for both networks.
        seed: Seed of the resampling.

    Returns:
        For each label, and for mean_auc: difference and difference_ci95 (bootstrap); for the labels also DeLong's z and
        p_value. None where one is undefined, as z and p_value are with fewer than two images of a class, and z alone
        where one network ranks all images as the other but for a difference without variance.
    """
    index = resampled_indices(len(truth), resamples, seed)
    result: Dict[str, Any] = {}
    differences: List[np.ndarray] = []
    for k, label in enumerate(LABELS):
        t, a, b = truth[:, k], first[:, k], second[:, k]
        z, p_value = delong_test(t, a, b) if 2 <= np.sum(t) <= len(t) - 2 else (None, None)
        differences.append(auc(t[index], b[index]) - auc(t[index], a[index]))
        result[label] = {
            **_difference(auc(t, b) - auc(t, a), differences[-1]),
            'z': z if z is not None and np.isfinite(z) else None, 'p_value': p_value}
    each = [result[label]['difference'] for label in LABELS]
    result['mean_auc'] = _difference(np.nan if None in each else np.mean(each), np.mean(differences, axis=0))
    return result


def _difference(value: Any, distribution: np.ndarray) -> Dict[str, Any]:
    if not np.isfinite(value):
        return {'difference': None, 'difference_ci95': None}
    return {'difference': float(value), 'difference_ci95': percentile_interval(distribution)}


def interval_text(value: Optional[float], interval: Optional[Sequence[float]], sign: str = '') -> str:
    """A score, or with the sign '+' a difference, and its interval, as tables show them.

    Args:
        value: Score; None for an undefined one.
        interval: Its ends, or None.
        sign: '' or '+'.
    """
    if value is None:
        return 'undefined'
    return f'{value:{sign}.3f}' + (f' [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]' if interval else '')


def auc_table(metrics: Dict[str, Dict[str, Any]]) -> str:
    """A line of AUCs with their intervals for each split of metrics.json, under a heading."""
    width = max(12, *(len(split) + 1 for split in metrics))
    lines = [' ' * width + ''.join(f'{label_words(label):24}' for label in LABELS) + 'mean']
    for split, scores in metrics.items():
        cells = [(scores[label]['auc'], scores[label]['auc_ci95']) for label in LABELS]
        cells.append((scores['mean_auc'], scores['mean_auc_ci95']))
        texts = [interval_text(value, ci) for value, ci in cells]
        lines.append(f'{split:{width}}' + ''.join(f'{text:24}' for text in texts).rstrip())
    return '\n'.join(lines)
