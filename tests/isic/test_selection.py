"""The scores that may choose an epoch, and what they are called."""
import pytest

from timm_arl.isic.selection import check_selection, selection_column, selection_words
from timm_arl.isic.task import ISIC2017, TASKS, DataError


def test_scores_of_a_task():
    for task in TASKS.values():
        for select in (task.aim, 'mean_auc', *(f'auc:{label}' for label in task.labels)):
            assert check_selection(select, task) == check_selection(select.lower(), task) == select
    assert selection_column('mean_auc') == 'validation_mean_auc'  # of older runs too
    assert selection_column('auc:MEL') == 'validation_auc_MEL'
    assert [selection_words(s) for s in ('mean_auc', 'balanced_accuracy', 'auc:seborrheic_keratosis')] == [
        'mean AUC', 'balanced accuracy', 'AUC of seborrheic keratosis']


@pytest.mark.parametrize('select', ['balanced_accuracy', 'auc:nevus', 'auc', 'loss'])
def test_others_are_refused(select):
    with pytest.raises(DataError, match='choose mean_auc, auc:melanoma, auc:seborrheic_keratosis'):
        check_selection(select, ISIC2017)
