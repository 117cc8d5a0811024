"""Scores of a multiclass task that need all its labels at once: the most probable label of an image is its class."""
from typing import Any, Dict, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from .intervals import LEAST_GROUPS, group_counts, with_interval
from .task import Task

__all__ = ['CLASS_SCORES', 'balanced_accuracy', 'class_scores', 'mean_recalls']

CLASS_SCORES = {  # in metrics.json, and in words
    'balanced_accuracy': 'balanced accuracy', 'top1': 'top-1 accuracy', 'brier': 'Brier score'}


def _classes(truth: np.ndarray, probabilities: np.ndarray, task: Task) -> Tuple[np.ndarray, np.ndarray]:
    """The true class of each image and the one that it is called; the rest of the task has the number after the last
    label, and no image is called so."""
    true = task.class_numbers(truth)
    return np.where(true < 0, len(task.labels), true), probabilities.argmax(1)


def balanced_accuracy(truth: np.ndarray, probabilities: np.ndarray, task: Task) -> float:
    """The mean over the classes of the share of their images that are called so; classes without images are left out.

    Args:
        truth: 0 or 1, shape (N, labels), one of them at most; the rest is a class too, none of which is found.
        probabilities: Shape (N, labels).
        task: A multiclass one.
    """
    true, called = _classes(truth, probabilities, task)
    return float(recall_score(true, called, labels=np.unique(true), average='macro', zero_division=0.))


def mean_recalls(
        truth: np.ndarray,
        probabilities: np.ndarray,
        times: np.ndarray,
        task: Task,
        groups: Optional[Sequence[str]] = None,
) -> Tuple[float, np.ndarray]:
    """balanced_accuracy, and that of each bootstrap sample; NaN for one that lacks a class.

    All are NaN where fewer than LEAST_GROUPS groups have a class: its share of the score could not be told.

    Args:
        truth, probabilities, task: Of balanced_accuracy.
        times: How often each image is in each sample, shape (R, N).
        groups: Patient or lesion of each image; None: each image is a group.
    """
    true, called = _classes(truth, probabilities, task)
    images = true[:, None] == np.unique(true)
    found = images & (true == called)[:, None]
    with np.errstate(invalid='ignore'):
        shares = (times @ found.astype(float)) / (times @ images.astype(float))
    rare = any(group_counts(of, groups)[0] < LEAST_GROUPS for of in images.T)
    return balanced_accuracy(truth, probabilities, task), np.full(len(times), np.nan) if rare else shares.mean(1)


def class_scores(
        truth: np.ndarray,
        probabilities: np.ndarray,
        times: np.ndarray,
        task: Task,
        groups: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Scores of one split.

    Args:
        truth, probabilities, task: Of balanced_accuracy.
        times: How often each image is in each bootstrap sample, shape (R, N).
        groups: Of mean_recalls.

    Returns:
        balanced_accuracy, top1 (the share of images that are called right) and brier (the squared distance of the
        probabilities from the truth, summed over the labels, mean over the images: 0 at best, 2 at worst), each with
        its _ci95; and confusion_matrix: labels, among them the rest if it has images, and counts, a row for each true
        class and a column for what it is called.
    """
    true, called = _classes(truth, probabilities, task)
    labels = [*task.labels, *[task.rest] * bool((true == len(task.labels)).any())]
    errors = np.square(probabilities.astype(np.float64) - truth).sum(1)
    drawn = times.sum(1)
    if len(true if groups is None else set(groups)) < LEAST_GROUPS:
        drawn = np.full(len(times), np.nan)  # no interval of so few
    return {
        **with_interval('balanced_accuracy', *mean_recalls(truth, probabilities, times, task, groups)),
        **with_interval('top1', accuracy_score(true, called), times @ (true == called).astype(float) / drawn),
        **with_interval('brier', errors.mean(), times @ errors / drawn),
        'confusion_matrix': {
            'labels': labels, 'counts': confusion_matrix(true, called, labels=range(len(labels))).tolist()}}
