"""Which score chooses the epoch that a run keeps: mean_auc, balanced_accuracy, or auc:LABEL."""
from typing import Any, Mapping, Optional, Sequence

from .task import DataError, Task, label_words

__all__ = ['check_selection', 'kept_epoch', 'kept_row', 'selection_column', 'selection_words']


def check_selection(select: str, task: Task) -> str:
    """The score as the task names it, whose labels may be written in other case.

    Raises:
        DataError: Such a score.
    """
    scores = ['mean_auc', *['balanced_accuracy'] * (task.kind == 'multiclass'), *(f'auc:{x}' for x in task.labels)]
    found = [score for score in scores if score == select] or [
        score for score in scores if score.lower() == select.lower()]
    if len(found) != 1:
        raise DataError(f'--select {select} is no score of the task {task.name}: choose {", ".join(scores)}.')
    return found[0]


def selection_column(select: str) -> str:
    """The column of summary.csv that has the score."""
    return 'validation_' + select.replace('auc:', 'auc_', 1)


def kept_epoch(summary: Sequence[Mapping[str, Any]], keep: str, column: str) -> int:
    """Row of the epoch that is kept: 'best', the highest by a column (the first of equals), or 'last'."""
    return len(summary) - 1 if keep == 'last' else max(range(len(summary)), key=lambda k: float(summary[k][column]))


def kept_row(summary: Sequence[Mapping[str, str]], keep: str, select: Optional[str]) -> Mapping[str, str]:
    """The row of summary.csv whose network was kept."""
    return summary[kept_epoch(summary, keep, selection_column(select or 'mean_auc'))]


def selection_words(select: str) -> str:
    """The score as a reader knows it: 'mean AUC', 'AUC of melanoma'."""
    kind, _, label = select.partition(':')
    return f'AUC of {label_words(label)}' if label else label_words(kind).replace('auc', 'AUC')
