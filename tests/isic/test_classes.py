"""Scores of multiclass tasks, held against scikit-learn."""
import json
import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    roc_auc_score,
    top_k_accuracy_score,
)

from timm_arl.isic.classes import CLASS_SCORES
from timm_arl.isic.metrics import auc_table, compare, score_split
from timm_arl.isic.report import classes_cells, confusion_cells
from timm_arl.isic.task import ISIC2017, TASKS, Task

TASK = TASKS['isic2018']
COUNT = len(TASK.labels)


def sample(images=400, seed=0, classes=COUNT):
    """Classes, and probabilities that add up to 1."""
    rng = np.random.default_rng(seed)
    true = np.concatenate([np.arange(classes), rng.choice(classes, images - classes, p=np.arange(1, classes + 1)
                                                          / np.arange(1, classes + 1).sum())])
    logits = rng.normal(size=(images, COUNT)) + 1.5 * (true[:, None] == np.arange(COUNT))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return true, (true[:, None] == np.arange(COUNT)).astype(np.float32), probabilities


def test_figures_are_those_of_scikit_learn():
    true, truth, probabilities = sample()
    scores = score_split(truth, probabilities, task=TASK)
    called = probabilities.argmax(1)
    assert scores['balanced_accuracy'] == pytest.approx(balanced_accuracy_score(true, called))
    assert scores['mean_auc'] == pytest.approx(roc_auc_score(true, probabilities, average='macro', multi_class='ovr'))
    assert scores['top1'] == pytest.approx(top_k_accuracy_score(true, probabilities, k=1))
    each = [brier_score_loss(t, p) for t, p in zip(truth.T, probabilities.T)]
    assert scores['brier'] == pytest.approx(sum(each))
    assert [scores[label]['brier'] for label in TASK.labels] == pytest.approx(each)
    assert scores['confusion_matrix'] == {
        'labels': list(TASK.labels), 'counts': confusion_matrix(true, called).tolist()}
    for name in CLASS_SCORES:
        low, high = scores[f'{name}_ci95']
        assert low < scores[name] < high and high - low < 0.25
    json.dumps(scores, allow_nan=False)


def test_intervals_are_those_of_resampled_scores():
    true, truth, probabilities = sample(300, 1)
    called, rng, values = probabilities.argmax(1), np.random.default_rng(5), []
    for _ in range(1000):
        rows = rng.integers(300, size=300)
        if len(set(true[rows])) == COUNT:
            values.append((balanced_accuracy_score(true[rows], called[rows]), (true == called)[rows].mean()))
    scores = score_split(truth, probabilities, task=TASK)
    for name, found in zip(('balanced_accuracy', 'top1'), np.transpose(values)):
        assert scores[f'{name}_ci95'] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.012)


def test_a_class_that_the_network_does_not_know_counts_as_missed():
    task = Task('t', TASK.labels, 'multiclass', 'UNK')
    true, truth, probabilities = sample(100, 2)
    truth[:20] = 0
    true[:20] = COUNT
    scores = score_split(truth, probabilities, task=task)
    assert scores['balanced_accuracy'] == pytest.approx(balanced_accuracy_score(true, probabilities.argmax(1)))
    matrix = scores['confusion_matrix']
    assert matrix['labels'][-1] == 'UNK' and sum(matrix['counts'][-1]) == 20
    assert not any(row[-1] for row in matrix['counts'])


def test_a_class_without_images_is_left_out_and_warns_nobody():
    true, truth, probabilities = sample(60, 3, COUNT - 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scores = score_split(truth, probabilities, task=TASK)
    found = [(probabilities.argmax(1) == k)[true == k].mean() for k in range(COUNT - 2)]
    assert scores['balanced_accuracy'] == pytest.approx(np.mean(found))
    assert scores['mean_auc'] is None and scores['VASC']['auc'] is None


def test_many_rare_classes_have_no_interval_of_all_together():
    labels = tuple(f'c{k}' for k in range(300))
    truth = np.eye(300, dtype=np.float32)[np.repeat(np.arange(300), 5)]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(300), 1500)
    task = Task('t', labels, 'multiclass')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scores = score_split(truth, probabilities, 100, task=task)
    assert scores['mean_auc'] == pytest.approx(roc_auc_score(truth, probabilities, average='macro'))
    assert scores['mean_auc_ci95'] is None and scores['balanced_accuracy_ci95'] is None
    assert all(scores[label]['auc_ci95'] for label in labels)
    json.dumps(scores, allow_nan=False)


def test_so_few_images_have_no_interval():
    _, truth, probabilities = sample(images=16)
    scores = score_split(truth, probabilities, task=TASK, groups=[str(k % 4) for k in range(16)])
    assert all(scores[name] is not None and scores[f'{name}_ci95'] is None for name in CLASS_SCORES)


def test_lesions_are_resampled_together():
    _, truth, probabilities = sample(90, 4)
    again = np.repeat(np.arange(90), 3)
    once = score_split(truth, probabilities, task=TASK)
    thrice = score_split(truth[again], probabilities[again], task=TASK, groups=[f'{k:03d}' for k in again])
    for name in CLASS_SCORES:
        assert thrice[f'{name}_ci95'] == pytest.approx(once[f'{name}_ci95'])


def test_two_networks():
    true, truth, first = sample(300, 5)
    second = (first + truth) / 2
    result = compare(truth, first, second, task=TASK)
    difference = result['balanced_accuracy']
    expected = [balanced_accuracy_score(true, p.argmax(1)) for p in (second, first)]
    assert difference['difference'] == pytest.approx(expected[0] - expected[1])
    assert 0 < difference['difference_ci95'][0] < difference['difference'] < difference['difference_ci95'][1]
    assert all(result[label]['p_value'] < 0.05 for label in ('NV', 'VASC'))


@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_net_benefit_by_hand(threshold):
    _, truth, probabilities = sample(200, 6)
    scores = score_split(truth, probabilities, operating_points={'chosen': [threshold] * COUNT}, task=TASK)
    point, = scores['NV']['operating_points']
    has, called = truth[:, 1] == 1, probabilities[:, 1] > threshold
    odds = threshold / (1 - threshold)
    assert point['net_benefit'] == pytest.approx(((has & called).sum() - odds * (~has & called).sum()) / 200)
    assert point['net_benefit_of_all'] == pytest.approx(has.mean() - odds * (~has).mean())
    assert score_split(truth, probabilities, task=TASK, operating_points={'all': [1.] * COUNT})[
        'NV']['operating_points'][0]['net_benefit'] is None


def test_tables():
    true, truth, probabilities = sample()
    scores = score_split(truth, probabilities, task=TASK)
    assert f'top-1 accuracy: test {scores["top1"]:.3f} [' in auc_table({'test': scores}, TASK)
    assert classes_cells(scores)[1][0][1].startswith(f'{scores["balanced_accuracy"]:.3f} [')
    head, rows = confusion_cells(scores)
    assert head[1] == 'called MEL' and [row[0] for row in rows] == list(TASK.labels)
    assert np.mean([float(row[-1]) for row in rows]) == pytest.approx(scores['balanced_accuracy'], abs=1e-3)


def test_isic_2017_keeps_its_keys():
    _, truth, probabilities = sample()
    scores = score_split(truth[:, :2], probabilities[:, :2], task=ISIC2017)
    assert set(scores) == {*ISIC2017.labels, 'mean_auc', 'mean_auc_ci95'}
    assert not {'brier', 'net_benefit'} & scores['melanoma'].keys()
