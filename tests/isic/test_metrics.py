"""Scores, held against definitions and against the challenge's official scorer."""
import csv
import json
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from timm_arl.isic.intervals import resampled_indices, resampled_times
from timm_arl.isic.metrics import (
    auc,
    auc_above_sensitivity,
    auc_table,
    operating_point,
    resampled_auc,
    score_split,
    score_task,
    threshold_for_sensitivity,
    youden_threshold,
)
from timm_arl.isic.task import LABELS


def pairs_auc(truth, scores):
    """The probability that a positive outranks a negative, ties counting half."""
    positive, negative = scores[truth == 1], scores[truth == 0]
    return np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])


def test_figures_of_the_official_scorer(repo):
    """tests/golden: generated labels and predictions, ties and exact 0.5s among them, and its scores (5.8.0)."""
    folder = repo / 'tests' / 'golden'
    official = json.loads((folder / 'official_scores.json').read_text())
    tables = []
    for name in ('truth', 'predictions'):
        with open(folder / f'{name}.csv', newline='') as file:
            rows = {row['image_id']: row for row in csv.DictReader(file)}
        tables.append(rows)
    truth, predictions = (
        np.array([[float(rows[i][label]) for label in LABELS] for i in tables[0]])
        for rows in tables)
    scores = score_split(truth, predictions, resamples=10)
    assert scores['mean_auc'] == pytest.approx(official['mean_auc'], abs=1e-9)
    names = {'accuracy': 'accuracy', 'sensitivity': 'sensitivity', 'specificity': 'specificity', 'ppv': 'ppv',
             'npv': 'npv', 'auc': 'auc', 'auc_sens_80': 'auc_sens_80', 'ap': 'average_precision'}
    for label in LABELS:
        for theirs, ours in names.items():
            assert scores[label][ours] == pytest.approx(official[label][theirs], abs=1e-9), (label, ours)


def test_thresholds_reach_what_they_promise():
    rng = np.random.default_rng(5)
    truth = (rng.random(300) < 0.3).astype(int)
    probabilities = np.round(1 / (1 + np.exp(-rng.normal(size=300) - truth)), 2)  # with ties
    values = np.unique(np.concatenate([[0., 1.], probabilities]))
    points = [operating_point(truth, probabilities, t) for t in values]
    best = max(p['sensitivity'] + p['specificity'] for p in points)
    youden = operating_point(truth, probabilities, youden_threshold(truth, probabilities))
    assert youden['sensitivity'] + youden['specificity'] == pytest.approx(best)
    for wanted in (0.5, 0.8, 0.9, 1.0):
        point = operating_point(truth, probabilities, threshold_for_sensitivity(truth, probabilities, wanted))
        assert point['sensitivity'] >= wanted
        assert point['specificity'] == max(p['specificity'] for p in points if p['sensitivity'] >= wanted)


def test_auc_above_sensitivity_by_chance_and_at_best():
    truth = np.tile([0, 1], 5000)
    assert auc_above_sensitivity(truth, np.repeat(np.arange(5000), 2)) == pytest.approx((1 - 0.8 ** 2) / 2, abs=1e-3)
    assert auc_above_sensitivity(truth, truth) == 1
    assert auc_above_sensitivity(truth, np.zeros(10000)) == pytest.approx((1 - 0.8 ** 2) / 2)  # one straight line


def test_threshold_between_neighbouring_floats():
    low = np.float32(0.3)
    probabilities = np.array([low, np.nextafter(low, np.float32(1))])
    threshold = threshold_for_sensitivity(np.array([0, 1]), probabilities)
    point = operating_point(np.array([0, 1]), probabilities, threshold)
    assert (point['sensitivity'], point['specificity']) == (1, 1)


def test_constant_predictions():
    truth, probabilities = np.array([0, 1, 1]), np.full(3, 0.4)
    assert threshold_for_sensitivity(truth, probabilities) == pytest.approx(0.2)
    assert youden_threshold(np.array([0, 1]), np.array([0.8, 0.4])) == pytest.approx(0.9)  # better nothing than that
    assert score_task(truth, probabilities)['ppv'] is None and score_task(truth, probabilities)['auc'] == 0.5


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, 60), rng.integers(0, 9, 60) / 8  # with ties
    assert auc(truth, scores) == pytest.approx(pairs_auc(truth, scores), abs=1e-12)
    assert auc(truth, scores) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    both = auc(np.stack([truth, 1 - truth]), np.stack([scores, scores]))
    assert both == pytest.approx([pairs_auc(truth, scores), 1 - pairs_auc(truth, scores)], abs=1e-12)
    assert np.isnan(auc(np.ones(3), np.arange(3)))


def test_threshold_is_strictly_above_a_half():
    truth, probabilities = np.array([1, 1, 1, 0, 0]), np.array([0.5, 0.51, 0.9, 0.5, 0.6])
    scores = score_task(truth, probabilities)
    assert (scores['sensitivity'], scores['specificity'], scores['accuracy']) == (2 / 3, 1 / 2, 3 / 5)
    assert (scores['positives'], scores['images'], scores['threshold']) == (3, 5, 0.5)


def test_split_scores_and_intervals():
    rng = np.random.default_rng(1)
    truth = (rng.random((150, 2)) < 0.25).astype(np.float32)
    probabilities = np.clip(truth * 0.3 + rng.random((150, 2)) * 0.7, 0, 1)
    scores = score_split(truth, probabilities)
    assert set(scores) == {*LABELS, 'mean_auc', 'mean_auc_ci95'}
    for k, label in enumerate(LABELS):
        value, (low, high) = scores[label]['auc'], scores[label]['auc_ci95']
        assert value == pytest.approx(pairs_auc(truth[:, k], probabilities[:, k]), abs=1e-12)
        assert low < value < high and 0.02 < high - low < 0.4
    assert scores['mean_auc'] == pytest.approx((scores['melanoma']['auc'] + scores['seborrheic_keratosis']['auc']) / 2)
    assert scores['mean_auc_ci95'][1] - scores['mean_auc_ci95'][0] < min(
        np.diff(scores[label]['auc_ci95'])[0] for label in LABELS)
    assert score_split(truth, probabilities) == scores  # seeded


def test_interval_covers_the_standard_error_of_hanley_and_mcneil():
    rng = np.random.default_rng(2)
    truth = np.repeat([[1, 1], [0, 0]], [117, 483], axis=0)
    probabilities = 1 / (1 + np.exp(-(rng.normal(size=(600, 2)) + truth)))
    scores = score_split(truth, probabilities)
    a = scores['melanoma']['auc']
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 116 * (q1 - a * a) + 482 * (q2 - a * a)) / (117 * 483))
    assert np.diff(scores['melanoma']['auc_ci95'])[0] == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_many_images_take_little_memory_and_the_same_samples():
    rng = np.random.default_rng(0)
    truth, p = (rng.random(20000) < 0.1).astype(np.float32), rng.random(20000).round(5)
    times = resampled_times(20000, 200, 1)
    assert all((np.bincount(drawn, minlength=20000) == each).all()
               for drawn, each in zip(resampled_indices(20000, 200, 1), times))
    tracemalloc.start()
    found = resampled_auc(truth, p, times)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * times.nbytes  # ISIC 2024 has 60,000 test images, which took 4 GB
    expected = [roc_auc_score(truth, p, sample_weight=each) for each in times[[0, 57, 199]]]
    assert found[[0, 57, 199]] == pytest.approx(expected)


def test_one_class_is_undefined_and_not_a_number():
    truth = np.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    scores = score_split(truth, np.array([[0.1, 0.9], [0.2, 0.1], [0.7, 0.8], [0.1, 0.3]]))
    assert scores['melanoma']['auc'] is scores['melanoma']['auc_ci95'] is scores['melanoma']['sensitivity'] is None
    assert scores['mean_auc'] is scores['mean_auc_ci95'] is None
    assert auc_table({'test': scores}).splitlines()[1].split() == [
        'test', 'undefined', '1.000', 'undefined']  # of two images with it no interval
    assert scores['seborrheic_keratosis']['auc'] == 1.0 and scores['melanoma']['specificity'] == 3 / 4
