"""Intervals and paired tests, held against the definition in DeLong's paper, resampling and simulation."""
import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from timm_arl.isic.calibration import subgroup_table
from timm_arl.isic.intervals import delong_covariance, delong_interval, delong_test, unit_of
from timm_arl.isic.metrics import auc, compare, score_split
from timm_arl.isic.report import few_images
from timm_arl.isic.task import LABELS, TASKS


def structural_components(truth, scores):
    """V10 and V01 of DeLong et al. (1988), pair by pair."""
    positive, negative = scores[truth == 1], scores[truth == 0]
    psi = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    return psi.mean(1), psi.mean(0)


def sample(seed=0, images=80, ties=False):
    rng = np.random.default_rng(seed)
    truth = (rng.random(images) < 0.3).astype(int)
    first = truth + rng.normal(size=images)
    second = 0.5 * first + 0.7 * truth + rng.normal(size=images)
    scores = norm.cdf(np.stack([first, second]))
    return truth, np.round(scores, 1) if ties else scores


@pytest.mark.parametrize('ties', [False, True])
def test_covariance_is_that_of_the_paper(ties):
    truth, scores = sample(ties=ties)
    values, covariance = delong_covariance(truth, scores)
    v10, v01 = zip(*(structural_components(truth, s) for s in scores))
    expected = np.cov(v10) / (truth == 1).sum() + np.cov(v01) / (truth == 0).sum()
    assert np.allclose(covariance, expected, atol=1e-12)
    assert np.allclose(values, [auc(truth, s) for s in scores], atol=1e-12)


def test_interval_agrees_with_resampling():
    truth, (scores, _) = sample(3, 400)
    low, high = delong_interval(truth, scores)
    index = np.random.default_rng(0).integers(400, size=(2000, 400))
    assert np.allclose([low, high], np.percentile(auc(truth[index], scores[index]), [2.5, 97.5]), atol=0.012)
    assert delong_interval(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])) == (1., 1.)


def test_p_values_are_uniform_where_nothing_differs():
    p_values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        truth = np.repeat([1, 0], [40, 90])
        shared = truth + rng.normal(size=130)
        p_values.append(delong_test(truth, shared + rng.normal(size=130), shared + rng.normal(size=130))[1])
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09
    assert 0.43 < np.mean(p_values) < 0.57


def test_test_is_paired_and_antisymmetric():
    truth, (first, second) = sample(1, 300)
    z, p = delong_test(truth, first, second)
    assert delong_test(truth, second, first) == pytest.approx((-z, p))
    assert (auc(truth, second) > auc(truth, first)) == (z > 0)
    assert delong_test(truth, first, first) == (0., 1.)
    assert delong_test(truth, first, first ** 3) == (0., 1.)  # the same ranks
    # networks that differ in one pair of many have no certain difference
    truth, scores = np.repeat([1, 0], [400, 500_000]), np.arange(500_400) / 1e6
    scores[:400] += 0.2
    swapped = scores.copy()
    at = np.searchsorted(scores[400:], scores[0]) + 400
    swapped[0], swapped[at] = scores[at] - 1e-9, scores[0]
    assert delong_test(truth, scores, swapped)[1] > 0.1
    with pytest.raises(ValueError, match='two images of each class'):
        delong_test(np.array([1, 0, 0]), np.arange(3), np.arange(3))


def test_comparison_of_two_files():
    truth, scores = zip(*(sample(seed, 300) for seed in (4, 5)))
    truth = np.stack(truth, 1)
    first, second = (np.stack([s[i] for s in scores], 1) for i in (0, 1))
    result = compare(truth, first, second)
    for k, label in enumerate(LABELS):
        row = result[label]
        assert row['difference'] == pytest.approx(auc(truth[:, k], second[:, k]) - auc(truth[:, k], first[:, k]))
        low, high = row['difference_ci95']
        assert low < row['difference'] < high
        # the bootstrap's spread is that of DeLong's z
        assert (high - low) / (2 * 1.96) == pytest.approx(abs(row['difference'] / row['z']), rel=0.15)
    assert result['mean_auc']['difference'] == pytest.approx(
        (result['melanoma']['difference'] + result['seborrheic_keratosis']['difference']) / 2)
    assert compare(truth, first, first)['mean_auc'] == {'difference': 0., 'difference_ci95': (0., 0.)}


@pytest.mark.parametrize('positives', [0, 1])
def test_what_a_comparison_cannot_say(positives):
    truth = np.zeros((30, 2), int)
    truth[:positives, 0] = truth[:9, 1] = 1
    first, second = np.random.default_rng(0).random((2, 30, 2))
    result = json.loads(json.dumps(compare(truth, first, second), allow_nan=False))
    assert result['melanoma']['p_value'] is result['melanoma']['z'] is None
    assert (result['melanoma']['difference'] is None) == (result['mean_auc']['difference'] is None) == (not positives)
    assert 0 <= result['seborrheic_keratosis']['p_value'] <= 1
    # ranks that differ without any variance: z is infinite, which JSON does not know
    second[:, 1] = truth[:, 1]
    first[:, 1] = 1 - second[:, 1]
    assert compare(truth, first, second)['seborrheic_keratosis']['z'] is None


def test_images_of_one_lesion_are_no_new_evidence():
    """Each image three times, as one lesion, is as good as once; without groups the intervals are too short."""
    truth, (first, second) = sample(6, 90)
    truth, first, second = (np.stack([x, 1 - x], 1) for x in (truth, first, second))
    again, lesions = np.tile(np.arange(90), 3), np.tile([f'lesion{k:03d}' for k in range(90)], 3)
    once, thrice = score_split(truth, first), score_split(truth[again], first[again], groups=lesions, unit='lesions')
    assert (thrice['intervals_over'], thrice['groups']) == ('lesions', 90) and 'groups' not in once
    for label in LABELS:
        assert thrice[label]['auc_ci95'] == once[label]['auc_ci95']
    assert thrice['mean_auc_ci95'] == once['mean_auc_ci95']
    short = score_split(truth[again], first[again])['mean_auc_ci95']
    assert np.diff(short)[0] < 0.7 * np.diff(once['mean_auc_ci95'])[0]
    pair = compare(truth[again], first[again], second[again], groups=lesions)
    expected = compare(truth, first, second)
    for label in LABELS:
        assert pair[label]['difference_ci95'] == expected[label]['difference_ci95']
        assert pair[label]['p_value'] == pytest.approx(expected[label]['p_value'])
    rows = [subgroup_table(truth[again], first[again], [('all', np.ones(270, bool))], groups=lesions),
            subgroup_table(truth, first, [('all', np.ones(90, bool))])]
    assert rows[0][0]['auc_ci95'] == pytest.approx(rows[1][0]['auc_ci95'])


def test_groups_of_both_classes_have_the_spread_of_their_bootstrap():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(150), 4)
    truth = (rng.random(600) < 0.4).astype(int)
    scores = norm.cdf(truth + np.repeat(rng.normal(size=150), 4) + 0.6 * rng.normal(size=600))
    low, high = delong_interval(truth, scores, groups=patients)
    values = []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(patients == drawn) for drawn in rng.integers(150, size=150)])
        values.append(roc_auc_score(truth[rows], scores[rows]))
    assert np.allclose([low, high], np.percentile(values, [2.5, 97.5]), atol=0.012)
    assert np.allclose(delong_covariance(truth, scores[None], np.arange(600))[1],
                       delong_covariance(truth, scores[None])[1])  # each image by itself


def test_no_interval_from_fewer_than_five_groups():
    """Percentiles of images of one lesion alone would be a point."""
    truth, scores = sample(6, 60)
    for lesions_with_it, known in ((4, False), (5, True)):
        lesions = np.where(truth == 1, np.arange(60) % lesions_with_it, 100 + np.arange(60) % 30)
        both, p = np.stack([truth, np.arange(60) % 2], 1), np.stack([scores[0], scores[1]], 1)
        found = score_split(both, p, groups=lesions, unit='lesions')
        own = found['melanoma']
        assert (own['auc_ci95'] is not None) == (found['mean_auc_ci95'] is not None) == known
        assert (own['positive_groups'], own['negative_groups']) == (lesions_with_it, 26) and own['auc'] is not None
        assert found['seborrheic_keratosis']['auc_ci95'] is not None
        pair = compare(both, p, p[::-1], groups=lesions)['melanoma']
        assert (pair['difference_ci95'] is not None) == (pair['p_value'] is not None) == known
        row = subgroup_table(both, p, [('all', np.ones(60, bool))], groups=lesions)[0]
        assert (row['auc_ci95'] is not None) == known
    assert 'positive_groups' not in score_split(both, p)['melanoma']


def test_no_interval_from_fewer_than_five_images():
    """With two melanomas, 95 % intervals of a bootstrap hold the true AUC in 64 % of the cases."""
    scores = np.random.default_rng(0).random((60, 2))
    for melanomas, known in ((4, False), (5, True), (55, True), (56, False)):
        truth = np.stack([np.arange(60) < melanomas, np.arange(60) % 2], 1).astype(int)
        found = score_split(truth, scores)
        assert found['melanoma']['auc'] is not None
        assert (found['melanoma']['auc_ci95'] is not None) == (found['mean_auc_ci95'] is not None) == known
        assert found['seborrheic_keratosis']['auc_ci95'] is not None
        pair = compare(truth, scores, scores[::-1])['melanoma']
        assert (pair['difference_ci95'] is not None) == (pair['p_value'] is not None) == known
        few = ' '.join(few_images(found))
        assert ('no interval' in few) != known
    assert '4 images are without melanoma, and below 5 there is no interval' in few


def test_what_intervals_are_over():
    assert [unit_of(column) for column in ('', 'Patient_ID', 'lesion_id', 'case_no')] == [
        'images', 'patients', 'lesions', 'groups of case_no']


def test_no_interval_where_all_resamples_agree():
    """Labels that are told apart, and the same probability for all: the bootstrap would say that nothing is unsure."""
    truth = np.tile(np.arange(50) < 10, (len(LABELS), 1)).T.astype(float)
    apart, constant = truth * 0.5 + 0.2, np.full(truth.shape, 0.5)
    for probabilities, value in ((apart, 1), (constant, 0.5)):
        scores = score_split(truth, probabilities, 50)
        assert scores['mean_auc'] == scores[LABELS[0]]['auc'] == value
        assert scores['mean_auc_ci95'] is scores[LABELS[0]]['auc_ci95'] is None
    for other in (constant, apart * 0.9 + 0.05):  # one of another AUC, and one of the same
        different = compare(truth, other, apart, 50)[LABELS[0]]
        assert different['difference_ci95'] is None
    assert compare(truth, constant, apart, 50)[LABELS[0]]['p_value'] is None
    assert compare(truth, apart, apart, 50)[LABELS[0]]['difference_ci95'] == (0, 0)  # the same network


def test_balanced_accuracy_has_no_interval_where_a_class_is_rare():
    rng, task = np.random.default_rng(0), TASKS['ham10000']
    for rare, defined in ((4, False), (5, True)):
        classes = np.r_[np.zeros(rare, int), rng.permutation(np.arange(200) % 6 + 1)]
        truth, probabilities = np.eye(7)[classes], rng.dirichlet(np.ones(7), len(classes))
        assert (score_split(truth, probabilities, 50, task=task)['balanced_accuracy_ci95'] is not None) == defined
        different = compare(truth, probabilities, probabilities[::-1], 50, task=task)['balanced_accuracy']
        assert (different['difference_ci95'] is not None) == defined
