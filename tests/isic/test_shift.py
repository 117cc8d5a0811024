"""What is kept of validation images, and how others differ from them."""
import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from timm_arl.isic.dataset import DataError
from timm_arl.isic.shift import (
    STATISTICS,
    calibration_doubts,
    calibration_drift,
    chosen,
    home_of,
    home_record,
    image_statistics,
    standard_difference,
)
from timm_arl.isic.task import ISIC2017, LABELS, calibrate


def images(*colours, size=(90, 60)):
    cells = []
    for colour in colours:
        with io.BytesIO() as file:
            Image.new('RGB', size, colour).save(file, 'PNG')
            cells.append({'bytes': file.getvalue(), 'path': None})
    return datasets.Dataset.from_dict({'image': cells})


def test_size_brightness_and_colour():
    found = image_statistics(images((255, 0, 0), (0, 0, 0)))
    assert found['images'] == 2 and found['shorter_side']['mean'] == 60
    assert found['red']['mean'] == 0.5 and found['red']['sd'] == 0.5 and found['blue']['mean'] == 0
    assert found['brightness']['mean'] == pytest.approx(0.299 / 2)
    assert all(sum(found[name]['counts']) == 2 for name in STATISTICS)
    assert standard_difference(found['red'], {'mean': 0.25, 'sd': 0.125}) == 2
    assert standard_difference(found['red'], {'mean': 0.25, 'sd': 0}) is None


def test_a_large_set_is_looked_at_in_part_and_end_bins_take_what_is_outside():
    many = images(*[(0, 0, 0)] * 3, size=(20, 20)).select([k % 3 for k in range(1500)])
    found = image_statistics(many)
    assert found['images'] == 1000 and found['shorter_side']['counts'][0] == 1000


def test_expected_and_observed_positives():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.6, 4000)
    truth = (rng.uniform(size=4000) < p / 2).astype(np.float32)  # half of what is promised
    found = calibration_drift(truth, p, (2., -1.))['as_given']
    low, high = found['ratio_ci95']
    assert 1.7 < low < found['ratio'] < high < 2.3 and found['expected'] == pytest.approx(p.sum())
    assert found['ece'] == pytest.approx(p.mean() - truth.mean(), abs=0.02)
    hot = calibration_drift(truth, p, (2., -1.))['calibrated']
    assert hot['expected'] == pytest.approx(calibrate(p, 2., -1.).sum())
    assert hot['brier'] == pytest.approx(np.mean((calibrate(p, 2., -1.) - truth) ** 2))
    twice = calibration_drift(truth.repeat(4), p.repeat(4), None, np.arange(4000).repeat(4).astype(str))
    assert twice['calibrated'] is None  # copies of an image tell no more than the image
    assert np.allclose(twice['as_given']['ratio_ci95'], found['ratio_ci95'], atol=0.02)
    none = calibration_drift(np.zeros(5), np.full(5, 0.5), None)['as_given']
    assert none['ratio'] is None and none['ratio_ci95'] is None and none['expected'] == 2.5


def test_a_record_is_read_again_and_published_weights_have_a_part(tmp_path):
    truth = np.array([[0, 1], [1, 0], [0, 0], [1, 1]], np.float32)
    p = np.array([[0.2, 0.9], [0.6, 0.3], [0.3, 0.1], [0.7, 0.8]])
    record = home_record(images(*[(k, k, k) for k in range(4)]), truth, p, ISIC2017, {'crops': 'center'})
    (tmp_path / 'home.json').write_text(json.dumps(record))
    found = home_of(tmp_path, {'thresholds': {'official': {}}})
    assert 0.3 < found['thresholds']['youden on validation']['melanoma'] < 0.6
    assert found['labels']['melanoma']['positives'] == 2 and sum(found['labels']['melanoma']['counts']) == 4
    for name in ('temperatures', 'biases'):
        assert found[name] == chosen(truth, p)[name] and set(found[name]) == set(LABELS)
    published = {'thresholds': {'official': {'melanoma': 0.5}, 'youden on validation': {'melanoma': 0.2}}}
    assert home_of(tmp_path / 'none', published) == {'thresholds': {'youden on validation': {'melanoma': 0.2}}}
    assert 'official' in published['thresholds'] and home_of(tmp_path / 'none', {}) == {}


def test_home_resamples_its_patients():
    rng, again = np.random.default_rng(0), np.repeat(np.arange(30), 4)
    truth = (rng.random((30, 2)) < 0.4).astype(np.float32)
    p = np.clip(truth * 0.4 + rng.random((30, 2)) * 0.6, 0.01, 0.99)
    some = images(*[(k, k, k) for k in range(4)])
    once = home_record(some, truth, p, ISIC2017, {})['labels']['melanoma']['as_given']['ratio_ci95']
    found = home_record(some, truth[again], p[again], ISIC2017, {}, [f'p{k:02d}' for k in again])
    assert found['labels']['melanoma']['as_given']['ratio_ci95'] == pytest.approx(once)


@pytest.mark.parametrize('content', ['{', '[]', '{"thresholds": {}}'])
def test_a_damaged_record(tmp_path, content):
    (tmp_path / 'home.json').write_text(content)
    with pytest.raises(DataError, match='home.json is damaged .* delete it'):
        home_of(tmp_path, {})


def test_no_ratio_from_a_handful_of_positives():
    """Four of 60, or one patient's 20: an interval of their bootstrap would be far too narrow."""
    p, patients = np.full(60, 0.2), [f'p{k // 20}' for k in range(60)]
    for positives, groups, expected in ((4, None, None), (5, None, tuple), (20, patients, None), (20, None, tuple)):
        found = calibration_drift((np.arange(60) < positives).astype(float), p, None, groups)['as_given']
        assert found['ratio'] == pytest.approx(12 / positives)
        assert type(found['ratio_ci95']) is (expected or type(None))


def test_a_calibration_that_its_images_do_not_determine_is_told():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, (60, 2))
    truth = (rng.uniform(size=(60, 2)) < p).astype(float)
    assert calibration_doubts(truth, p, chosen(truth, p)) == {}
    rare, split = truth.copy(), p.copy()
    rare[:, 0] = np.arange(60) == 0
    split[:, 1] = np.where(truth[:, 1] == 1, 0.8, 0.2)  # told apart by every threshold between
    assert list(calibration_doubts(rare, split, chosen(rare, split)).values()) == [
        'Do not use the calibration of melanoma: 1 validation images have it and 59 do not, but 5 of each are '
        'needed.',
        'Do not use the calibration of seborrheic_keratosis: all validation images with it have higher probabilities '
        'than those without.']
    kept = home_record(images('brown'), rare, split, ISIC2017, {})['doubts']
    assert len(kept) == 2 and kept[0].startswith('Do not use the calibration of melanoma: ')
    wrong = np.stack([1 - p[:, 0], p[:, 1]], 1)  # an AUC below 0.5
    assert list(calibration_doubts(truth, wrong, chosen(truth, wrong)).values()) == [
        'Do not use the calibration of melanoma: its temperature is at the end of its range, 20.']
    patients = [f'p{k // 15}' for k in range(60)]
    assert len(calibration_doubts(truth, p, chosen(truth, p), patients)) == len(LABELS)
