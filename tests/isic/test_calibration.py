"""Calibration and groups, held against numbers that are known by construction."""
import numpy as np
import pytest
from scipy.special import expit, logit

from timm_arl.isic.calibration import (
    calibrate,
    expected_calibration_error,
    fit_calibration,
    reliability,
    subgroup_table,
    subgroups,
)
from timm_arl.isic.intervals import delong_interval
from timm_arl.isic.task import TASKS, DataError, Task


def test_error_of_bins_by_hand():
    truth = np.array([0, 1, 1, 1])
    probabilities = np.array([0.11, 0.19, 0.9, 1.0])
    rows = reliability(truth, probabilities)
    assert [r['images'] for r in rows] == [2, 2]
    assert rows[0]['probability'] == pytest.approx(0.15) and rows[0]['positives'] == 0.5
    assert expected_calibration_error(truth, probabilities) == pytest.approx((2 * 0.35 + 2 * 0.05) / 4)


def test_temperature_and_bias_are_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1.5, 200_000)
    truth = (rng.random(logits.size) < expit(logits)).astype(float)
    for temperature, bias in ((0.4, 0.), (1., -2.), (3., 1.)):
        wrong = expit((logits - bias) * temperature)
        assert fit_calibration(truth, wrong) == pytest.approx((temperature, bias), rel=0.03, abs=0.03)
        calibrated = calibrate(wrong, temperature, bias)
        assert np.allclose(logit(calibrated), logits, atol=1e-6)
        assert expected_calibration_error(truth, calibrated) < 0.005
    assert expected_calibration_error(truth, expit(logits * 3)) > 0.05
    assert np.isfinite(calibrate(np.array([0., 1.]), 2., 20.)).all()


def test_calibration_for_another_prevalence():
    """Fitted where positives are frequent, it holds where they are as rare as it was told."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-2.5, 1.5, 400_000)
    truth = rng.random(logits.size) < expit(logits)
    often = np.flatnonzero(truth | (rng.random(logits.size) < 0.2))  # a fifth of the negatives
    assert truth.mean() < 0.16 and truth[often].mean() > 0.4
    told = expit(logits + 1)
    calibrated = calibrate(told, *fit_calibration(truth[often], told[often], truth.mean()))
    assert calibrated.mean() == pytest.approx(truth.mean(), rel=0.02)
    assert expected_calibration_error(truth, calibrated) < 0.005 < 0.1 < expected_calibration_error(
        truth, calibrate(told, *fit_calibration(truth[often], told[often])))


def test_calibration_of_labels_that_are_told_apart():
    """And of those that are told the wrong way round: the order is kept, and the numbers are finite."""
    truth = np.array([0., 0., 1., 1.])
    for p in (np.array([0., 0.1, 0.9, 1.]), np.array([1., 0.9, 0.1, 0.])):
        temperature, bias = fit_calibration(truth, p)
        assert 0.05 <= temperature <= 20 and abs(bias) <= 20
        assert fit_calibration(truth, p, 0.) == fit_calibration(truth, p, 1.) == (temperature, bias)


def test_groups():
    truth = np.array([[1, 0], [0, 1], [1, 0], [0, 0], [0, 0]])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.2], [0.1, 0.7], [0.6, 0.1]])
    rows = subgroup_table(truth, probabilities, subgroups({
        'sex': ['male', 'Male', None, 'female', 'female'], 'age_approximate': [29, 30, 70, float('nan'), None]}))
    table = {(r['group'], r['label']): r for r in rows}
    assert {g for g, _ in table} == {'sex male', 'sex female', 'sex unknown', 'age 0 to 29', 'age 30 to 49',
                                     'age 70 and above', 'age unknown'}
    assert table['sex male', 'melanoma']['auc'] == 1 and table['sex male', 'melanoma']['images'] == 2
    assert table['sex female', 'melanoma']['auc'] is None and table['sex female', 'melanoma']['specificity'] == 0.5
    assert table['age 70 and above', 'melanoma']['sensitivity'] == 0
    assert sum(table[g, 'melanoma']['images'] for g, label in table if g.startswith('age') and label == 'melanoma') == 5
    everything = [('all', np.ones(10, bool))]
    perfect, _ = subgroup_table(truth[[0, 3] * 5], probabilities[[0, 3] * 5], everything)
    assert perfect['auc'] == 1 and perfect['auc_ci95'] is None  # DeLong's has no width there
    for positives, known in ((4, False), (5, True)):  # from fewer, DeLong's interval is far too narrow
        t, p = np.arange(10)[:, None] < [positives, 5], np.random.default_rng(0).random((10, 2))
        assert (subgroup_table(t.astype(int), p, everything)[0]['auc_ci95'] is not None) == known
    assert subgroups({'sex': [None] * 5, 'age_approximate': [None] * 5}) == []
    assert table['sex female', 'melanoma']['auc_ci95'] is None
    coded = subgroups({'sex': [0, 1, 1, 0, None], 'age_approximate': ['unknown', '31', 'n/a', 30, None]})
    assert {name for name, _ in coded} == {'sex 0', 'sex 1', 'sex unknown', 'age 30 to 49', 'age unknown'}


def test_groups_have_the_interval_of_the_whole_where_they_are_the_whole():
    rng = np.random.default_rng(0)
    truth, probabilities = rng.integers(0, 2, (200, 2)), rng.random((200, 2))
    row, _ = subgroup_table(truth, probabilities, [('all', np.ones(200, bool))])
    assert row['auc_ci95'] == pytest.approx(delong_interval(truth[:, 0], probabilities[:, 0]))


def test_groups_of_exclusive_classes_call_the_most_probable_one():
    task = Task('mine', ('a', 'b', 'c'), 'multiclass')
    truth, probabilities = np.eye(3)[[0, 0, 1, 2]], np.array([[.4, .3, .3], [.3, .4, .3], [.2, .45, .35], [.3, .3, .4]])
    rows = subgroup_table(truth, probabilities, [('all', np.ones(4, bool))], task)
    assert [(row['label'], row['sensitivity'], row['threshold']) for row in rows] == [
        ('a', .5, None), ('b', 1., None), ('c', 1., None)]
    assert [row['specificity'] for row in rows] == pytest.approx([1, 2 / 3, 1])


def test_groups_of_long_numbers_are_not_one():
    assert [name for name, _ in subgroups({'site': [1000001., 1000002., 2.5]})] == [
        'site 1000001', 'site 1000002', 'site 2.5']
    dates = [20170101. + day for day in range(12)]
    bands = dict(subgroups({'date': dates}))
    assert len(bands) == 4 and all(which.sum() == 3 for which in bands.values())
    assert list(bands)[0] == 'date 20170101 to below 20170103.75'


def test_an_age_that_stands_for_none_is_not_known():
    parts = dict(subgroups({'age_approximate': [-1, 999, 40, None, '85+']}))
    assert {name: np.flatnonzero(which).tolist() for name, which in parts.items()} == {
        'age 30 to 49': [2], 'age 70 and above': [4], 'age unknown': [0, 1, 3]}


def test_groups_of_any_column():
    rng = np.random.default_rng(0)
    thickness = np.append(rng.random(99), np.nan)
    parts = dict(subgroups({
        'skin_type': ['I', 'II', None, 'ii', 'unknown'] * 20, 'thickness': list(thickness), 'mole': [True, False] * 50,
        'nothing': [None] * 100, 'age_approximate': [29., 30.] * 50}))
    assert [name for name in parts if name.startswith('skin')] == ['skin type i', 'skin type ii', 'skin type unknown']
    assert parts['skin type ii'].sum() == parts['skin type unknown'].sum() == 40
    bands = [name for name in parts if name.startswith('thickness')]
    assert len(bands) == 5 and bands[-1] == 'thickness unknown'
    assert sum(parts[name].sum() for name in bands) == 100
    assert all(24 <= parts[name].sum() <= 26 for name in bands[:-1])  # quartiles
    assert 'mole true' in parts and 'age 0 to 29' in parts and not any(name.startswith('nothing') for name in parts)
    of_moles = [('mole true', parts['mole true'])]
    row, = subgroup_table(np.ones((100, 1)), np.ones((100, 1)), of_moles, TASKS['isic2020'])
    assert (row['group'], row['label'], row['images'], row['positives']) == ('mole true', 'malignant', 50, 50)
    with pytest.raises(DataError, match='column image_id has 51 different entries'):
        subgroups({'image_id': [f'{k}' for k in range(51)]})
