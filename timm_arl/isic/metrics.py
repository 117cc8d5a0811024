"""Scores of each label, as the official scorer of ISIC 2017 counts them, and metrics.json."""
from typing import Any, Dict, Optional, Sequence

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import auc as area_under
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, roc_curve

from .classes import CLASS_SCORES, class_scores, mean_recalls
from .intervals import RESAMPLES, delong_test, group_counts, groups_suffice, resampled_times, with_interval
from .task import ISIC2017, OFFICIAL_THRESHOLD, Task, label_words

__all__ = [
    'OFFICIAL_THRESHOLD', 'auc', 'auc_above_sensitivity', 'auc_table', 'compare', 'interval_text', 'net_benefit',
    'operating_point', 'resampled_auc', 'score_split', 'score_task', 'threshold_for_sensitivity', 'youden_threshold',
]


BLOCK = 10 ** 6  # numbers that are worked on at once


def auc(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Area under the ROC curve along the last axis, by the ranks of the positives (Mann-Whitney), ties counting half.

    Args:
        truth: 0 or 1, shape (..., N).
        probabilities: Any score that grows with the probability, shape (..., N).

    Returns:
        Shape (...), NaN where only one class is present.
    """
    positive = np.asarray(truth) == 1
    positives, negatives = positive.sum(-1), (~positive).sum(-1)
    rank_sum = np.where(positive, rankdata(probabilities, axis=-1), 0).sum(-1)
    with np.errstate(invalid='ignore'):
        return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def resampled_auc(truth: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The AUC of each bootstrap sample.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,).
        times: How often each image is in each sample, of resampled_times, shape (R, N).

    Returns:
        Shape (R,), NaN where only one class is present. scikit-learn's roc_auc_score takes one sample at a time, which
        is too slow for a bootstrap.
    """
    order = np.argsort(probabilities)
    scores, positive = probabilities[order], truth[order] == 1
    firsts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))  # of the images with one probability
    found = []
    for some in np.array_split(times, -(-times.size // BLOCK) or 1):  # all at once would take gigabytes of memory
        positives, negatives = (np.add.reduceat(some[:, order] * which, firsts, axis=1, dtype=np.int64)
                                for which in (positive, ~positive))
        twice_outranked = 2 * np.cumsum(negatives, axis=1) - negatives  # ties count half
        with np.errstate(invalid='ignore'):
            found.append((positives * twice_outranked).sum(1) / 2 / (positives.sum(1) * negatives.sum(1)))
    return np.concatenate(found)


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


def net_benefit(positives: int, negatives: int, true: int, false: int, threshold: float) -> Optional[float]:
    """What decisions at a threshold are worth, in rightly called images of an image: (TP - FP t / (1 - t)) / N.

    Vickers and Elkin, Medical Decision Making 26 (2006): the threshold t says that a missed image is as bad as
    (1 - t) / t false alarms. To call nothing is worth 0.

    Args:
        positives, negatives: How many images have the label and how many do not.
        true, false: How many of them are called; all of them for what it is worth to call every image.
        threshold: t; None is returned for 1, where a false alarm is infinitely bad.
    """
    return (true - false * threshold / (1 - threshold)) / (positives + negatives) if threshold < 1 else None


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
    """Halfway between the lowest score that counts as positive (at most 1) and the next lower score, or 0.

    scikit-learn calls a score positive from its threshold on, the official scorer strictly above.
    """
    lower = np.unique(np.asarray(probabilities, np.float64))
    lower = lower[lower < lowest_positive]
    middle = (min(float(lowest_positive), 1.) + (float(lower[-1]) if len(lower) else 0.)) / 2  # infinite: no positive
    return middle if middle < lowest_positive else max(float(np.nextafter(lowest_positive, -1)), 0.)  # neighbours


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
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
        unit: str = 'groups',
) -> Dict[str, Any]:
    """Scores of all labels, as metrics.json keeps them for one split.

    Intervals are 95 % percentile bootstrap intervals over images or, where they are known, groups; the same resamples
    serve all scores. Resamples in which a score is undefined are left out; where three quarters are, there is no
    interval. Nor has an AUC one where fewer than LEAST_GROUPS groups (images, where there are none) have, or lack, the
    label, the balanced accuracy where fewer have a class, and any score where all resamples agree.

    Args:
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        probabilities: In [0, 1], shape (N, labels).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        operating_points: By name, a threshold for each label, chosen elsewhere.
        task: Whose labels they are.
        groups: N names of patients or lesions, which are resampled as a whole; None: images are.
        unit: What they are: 'patients' for one.

    Returns:
        A dict of scores for each label (score_task's, auc_ci95, and a list operating_points), mean_auc and
        mean_auc_ci95. Of a multiclass task also those of class_scores. With groups also intervals_over, the unit, and
        groups, their number, and for each label positive_groups and negative_groups: how many have such an image. But
        for ISIC 2017, each label has brier too, and each of its thresholds net_benefit and net_benefit_of_all, which
        calls every image.
    """
    times = resampled_times(len(truth), resamples, seed, groups)
    scores: Dict[str, Any] = {}
    values, distributions = [], []
    for k, (label, t, p) in enumerate(zip(task.labels, truth.T, probabilities.T)):
        values.append(auc(t, p))
        distributions.append(resampled_auc(t, p, times) if groups_suffice(t, groups) else np.full(len(times), np.nan))
        own = scores[label] = {
            **with_interval('auc', values[-1], distributions[-1]), **score_task(t, p), 'operating_points': [
                {'name': name, **operating_point(t, p, thresholds[k])}
                for name, thresholds in (operating_points or {}).items()]}
        if groups is not None:
            own['positive_groups'], own['negative_groups'] = group_counts(t, groups)
        if task.name != ISIC2017.name:  # whose scores are those of its official scorer
            own['brier'] = float(brier_score_loss(t, p, pos_label=1))
            for point in (own, *own['operating_points']):
                point.update(_net_benefits(t, p, point['threshold']))
    return {
        **scores, **with_interval('mean_auc', np.mean(values), np.mean(distributions, axis=0)),
        **(class_scores(truth, probabilities, times, task, groups) if task.kind == 'multiclass' else {}),
        **({} if groups is None else {'intervals_over': unit, 'groups': len(set(groups))})}


def _net_benefits(truth: np.ndarray, probabilities: np.ndarray, threshold: float) -> Dict[str, Optional[float]]:
    called, positives = np.asarray(probabilities, np.float64) > threshold, int(np.sum(truth))
    counts = positives, len(truth) - positives
    return {'net_benefit': net_benefit(*counts, int(truth[called].sum()), int((1 - truth)[called].sum()), threshold),
            'net_benefit_of_all': net_benefit(*counts, *counts, threshold)}


def compare(
        truth: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        resamples: int = RESAMPLES,
        seed: int = 0,
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """The AUC of the second network minus that of the first, paired on the same images.

    Args:
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        first, second: Probabilities, shape (N, labels).
        resamples: Number of bootstrap resamples, the same for both networks.
        seed: Seed of the resampling.
        task: Whose labels they are.
        groups: N names of patients or lesions, which are resampled as a whole; None: images are.

    Returns:
        For each label, for mean_auc and, of a multiclass task, for balanced_accuracy: difference and difference_ci95
        (bootstrap); for the labels also DeLong's z and p_value. None where a score is undefined: z and p_value with
        fewer than LEAST_GROUPS groups, or images, of a class, and where a difference has no variance.
    """
    times = resampled_times(len(truth), resamples, seed, groups)
    result: Dict[str, Any] = {}
    values, distributions = [], []
    for label, t, a, b in zip(task.labels, truth.T, first.T, second.T):
        values.append(auc(t, b) - auc(t, a))
        enough = groups_suffice(t, groups)
        distributions.append(resampled_auc(t, b, times) - resampled_auc(t, a, times) if enough else
                             np.full(len(times), np.nan))
        z, p_value = delong_test(t, a, b, groups) if enough else (None, None)
        if z is not None and not np.isfinite(z):
            z = p_value = None
        result[label] = {
            **with_interval('difference', values[-1], distributions[-1], np.array_equal(a, b)),
            'z': z, 'p_value': p_value}
    result['mean_auc'] = with_interval(
        'difference', np.mean(values), np.mean(distributions, axis=0), np.array_equal(first, second))
    if task.kind == 'multiclass':
        value, distribution = (np.subtract(*pair) for pair in zip(
            *(mean_recalls(truth, p, times, task, groups) for p in (second, first))))
        result['balanced_accuracy'] = with_interval('difference', value, distribution, np.array_equal(first, second))
    return result


def interval_text(value: Optional[float], interval: Optional[Sequence[float]], sign: str = '') -> str:
    """A score and its interval, as tables show them.

    Args:
        value: Score; None where it is undefined.
        interval: Its two ends, or None.
        sign: '+' for a difference, which shows its sign.
    """
    if value is None:
        return 'undefined'
    return f'{value:{sign}.3f}' + (f' [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]' if interval else '')


def auc_table(metrics: Dict[str, Dict[str, Any]], task: Task = ISIC2017) -> str:
    """AUCs with their intervals as text: a heading, then a line for each split of metrics.json; then, of a multiclass
    task, a line for each score of all its labels at once."""
    width = max(12, *(len(split) + 1 for split in metrics))
    lines = [' ' * width + ''.join(f'{label_words(label):24}' for label in task.labels) + 'mean']
    for split, scores in metrics.items():
        texts = [interval_text(scores[label]['auc'], scores[label]['auc_ci95']) for label in task.labels]
        texts.append(interval_text(scores['mean_auc'], scores['mean_auc_ci95']))
        lines.append(f'{split:{width}}' + ''.join(f'{text:24}' for text in texts).rstrip())
    for name, words in CLASS_SCORES.items() if task.kind == 'multiclass' else ():
        lines.append(f'{words}: ' + ', '.join(
            f'{split} {interval_text(scores[name], scores[f"{name}_ci95"])}' for split, scores in metrics.items()))
    return '\n'.join(lines)
