"""Intervals and paired tests, held against the definition in DeLong's paper, resampling and simulation."""
import json

import numpy as np
import pytest
from scipy.stats import norm

from timm_arl.isic.intervals import delong_covariance, delong_interval, delong_test
from timm_arl.isic.metrics import auc, compare
from timm_arl.isic.task import LABELS


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
