"""External validation: a network of two labels on another clinic's data, by what it knows of home."""
import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from any_data import class_folders, ham10000, table
from pages import Page
from PIL import Image

from timm_arl.factory import save_network
from timm_arl.files import write_json
from timm_arl.isic.task import LABELS, calibrate

pytestmark = pytest.mark.usefixtures('no_pictures')

STATISTIC = {'mean': 40., 'sd': 4., 'median': 40.}
BOTH = ('--map', 'melanoma=MEL,mel', 'seborrheic_keratosis=BKL')


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def usual(data, checkpoint, out, *more):
    return ('--data', data, '--checkpoint', checkpoint, '--output-dir', out, '--workers', 0, '--crops', 'center', *more)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A run whose validation images chose thresholds and temperatures."""
    folder = tmp_path_factory.mktemp('checkpoint') / 'out'
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=2)
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)
    save_network(model.eval(), folder, LABELS, dict(
        timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)))
    write_json(folder / 'run.json', {'arguments': {'train_ids': '0', 'crops': 'center'}})
    drift = {'expected': 2., 'ratio': 1., 'ratio_ci95': [0.5, 2.], 'ece': 0.1, 'brier': 0.2}
    write_json(folder / 'home.json', {
        'thresholds': {'youden on validation': {'melanoma': 0.31, 'seborrheic_keratosis': 0.47}},
        'temperatures': {'melanoma': 2., 'seborrheic_keratosis': 0.5},
        'biases': {'melanoma': -1., 'seborrheic_keratosis': 0.5}, 'shown': {'crops': 'center', 'img_size': 64},
        'images': {'images': 12, 'shorter_side': {**STATISTIC, 'counts': [0] * 20 + [12] + [0] * 15}, **dict.fromkeys(
            ('brightness', 'red', 'green', 'blue'), {**STATISTIC, 'counts': [0] * 12 + [12] + [0] * 12})},
        'labels': {label: {'images': 12, 'positives': 2, 'counts': [12] + [0] * 19, 'as_given': drift,
                           'calibrated': drift} for label in LABELS}})
    return folder


@pytest.mark.slow
def test_images_that_are_also_at_home_are_left_out(call, checkpoint, tmp_path):
    data, home, pairs = ham10000(tmp_path / 'ham'), ham10000(tmp_path / 'home', 4), tmp_path / 'pairs.csv'
    for path in (home / 'HAM10000_images_part_1').iterdir():  # as another collection has them
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, quality=100, subsampling=0)
    check = 'timm_arl.isic.dataset.__main__', 'check', data, '--output', pairs, '--correlation', 0.99
    done = call(*check, '--against', home)
    assert done.returncode == 0 and f'pairs with images of {home}' in done.stdout, done.stderr
    found = {row['image_id_a'] for row in rows(pairs)}
    assert found >= {f'ISIC_{k:07d}' for k in range(4)} and len(found) < 42
    assert {row['split_b'] for row in rows(pairs)} == {'against train'}
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', *BOTH, '--drop-duplicates', pairs))
    assert done.returncode == 0 and f'twin in the data of the network: {len(found)} test images' in done.stdout
    assert not found & {row['image_id'] for row in rows(tmp_path / 'r' / 'predictions_test.csv')}
    assert call(*check).returncode == 0  # within one set: nothing is said of home
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r2', *BOTH, '--drop-duplicates', pairs))
    assert done.returncode == 2 and 'check OTHER --against HOME' in done.stderr and not (tmp_path / 'r2').exists()


@pytest.mark.slow
def test_another_clinic_by_what_home_chose(call, checkpoint, tmp_path):
    data, out = ham10000(tmp_path / 'ham'), tmp_path / 'r'
    done = call('evaluate_isic', *usual(data, checkpoint, out, *BOTH, '--report'))
    assert done.returncode == 0, done.stderr
    assert 'melanoma = mel; seborrheic_keratosis = bkl. Negative throughout: akiec, bcc, df, nv, vasc' in done.stdout
    assert 'are those of home' in done.stdout and 'no thresholds' not in done.stdout
    scores = json.loads((out / 'metrics.json').read_text())['test']
    predictions = rows(out / 'predictions_test.csv')
    truth = {row['image_id']: row['dx'] for row in rows(data / 'HAM10000_metadata')}
    assert len(predictions) == 42 and predictions[0]['group'].startswith('HAM_')
    assert 'brier' in scores['melanoma'] and 'net_benefit' in scores['melanoma']['operating_points'][0]
    assert (out / 'metrics.md').read_text().count('| melanoma') >= 3
    for label, word, threshold, temperature, bias in (
            ('melanoma', 'mel', 0.31, 2., -1.), (LABELS[1], 'bkl', 0.47, 0.5, 0.5)):
        positive = np.array([truth[row['image_id']] == word for row in predictions])
        p = np.array([float(row[label]) for row in predictions])
        assert scores[label]['positives'] == positive.sum() == 6
        [point] = scores[label]['operating_points']
        assert (point['name'], point['threshold']) == ('youden on home validation', threshold)
        assert point['sensitivity'] == pytest.approx((p > threshold)[positive].mean())
        calibration = scores[label]['calibration']
        assert (calibration['temperature'], calibration['bias']) == (temperature, bias)
        assert calibration['mean_calibrated'] == pytest.approx(calibrate(p, temperature, bias).mean())
        drift = scores['external']['drift'][label]
        assert drift['as_given']['expected'] == pytest.approx(p.sum())
        hot = calibrate(p, temperature, bias)
        assert drift['calibrated']['brier'] == pytest.approx(np.mean((hot - positive) ** 2))
    for folder in (out, checkpoint):
        assert '--map melanoma=MEL,mel' in rows(folder / 'looks.csv')[-1]['command']
    page = Page((out / 'report.html').read_text())
    assert 'nothing was chosen here' in page.text and 'images of home are not recorded' not in page.text
    assert ['melanoma', 'mel'] in page.tables['How the labels of these images were mapped']
    size = [row for row in page.tables['Size, brightness and colour'] if row[0] == 'shorter side, px'][0]
    assert size[1:] == ['32 ± 0', '40 ± 4', '-2.00']
    drift = page.tables['Expected and observed positives, here and at home']
    assert [row[1] for row in drift[1:5]] == ['6', '6', '2', '2']
    labels = [svg.get('aria-label', '') for svg in page.of('svg')]
    assert sum('that of home in' in label for label in labels) == 7


def test_a_label_that_is_not_mapped_is_not_scored(call, checkpoint, tmp_path):
    out = tmp_path / 'r'
    data = class_folders(tmp_path / 'own', classes=('MEL', 'NV'), splits=('train', 'val', 'test'))
    done = call('evaluate_isic', *usual(data, checkpoint, out, '--map', 'melanoma=MEL', '--split', 'validation'))
    assert done.returncode == 0, done.stderr
    assert 'Not scored, since --map does not name them: seborrheic_keratosis.' in done.stdout
    scores = json.loads((out / 'metrics.json').read_text())
    assert list(scores) == ['validation'] and LABELS[1] not in scores['validation']
    assert scores['validation']['mean_auc'] == scores['validation']['melanoma']['auc']
    assert set(rows(out / 'predictions_validation.csv')[0]) == {'image_id', *LABELS}
    assert len(rows(out / 'looks.csv')) == 1  # also of a split called validation


@pytest.mark.parametrize('columns', [('MEL', 'NV', 'BKL'), ('Melanoma',)])
def test_columns_of_0_and_1_are_the_labels_that_are_mapped(call, checkpoint, tmp_path, columns):
    data = table(tmp_path / 'c', 18, (1, 0, 0), ('image', *columns), lambda k: (
        int(k % 3 == 1), int(k % 3 == 2))[:len(columns) - 1])
    both = BOTH if len(columns) > 1 else ('--map', 'melanoma=melanoma')
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', *both))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']
    assert scores['melanoma']['positives'] == 6 and scores['melanoma']['images'] == 18
    assert scores['external']['map']['melanoma'] == [columns[0]]
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 's', '--map', 'melanoma=mole'))
    assert done.returncode == 2 and 'or columns of 0 and 1 with --labels' in done.stderr


def test_validation_images_that_choose_nothing_may_lack_a_class(call, checkpoint, tmp_path):
    data = table(tmp_path / 'c', 24, ('MEL', 'NV'), ('image', 'label', 'split'), lambda k: (
        'train' if k < 12 else 'validation',))
    data.write_text(data.read_text().replace('0.png,MEL', '0.png,DF').replace('2.png,MEL', '2.png,BKL'))
    head, *lines = data.read_text().splitlines()  # validation has no DF
    data.write_text('\n'.join([head, *(line for line in lines if 'DF,validation' not in line)]))
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', *BOTH, '--split', 'validation'))
    assert done.returncode == 0, done.stderr
    data.write_text(data.read_text().replace('BKL,validation', 'NV,validation'))  # nor one of the mapped labels
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', *BOTH, '--split', 'validation'))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'r' / 'metrics.json').read_text())['validation']
    assert scores['melanoma']['auc'] is not None and scores[LABELS[1]]['auc'] is None


def test_other_data_with_the_same_labels_need_no_map(call, checkpoint, tmp_path):
    data = table(tmp_path / 'c', 12, (0, 1), ('image', *LABELS), lambda k: (int(k % 4 == 0),), 'theirs.csv')
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', '--report'))
    assert done.returncode == 0 and 'seborrheic_keratosis = seborrheic_keratosis' in done.stdout, done.stderr
    scores = json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']
    assert scores['melanoma']['operating_points'][0]['threshold'] == 0.31 and 'external' in scores
    assert '<h1>out on theirs.csv, test</h1>' in (tmp_path / 'r' / 'report.html').read_text()
    # a card counts looks at the test split of home alone
    assert [rows(folder / 'looks.csv')[-1]['other_data'] for folder in (tmp_path / 'r', checkpoint)] == [str(data)] * 2
    copy = shutil.copytree(checkpoint, tmp_path / 'copy')
    shutil.copy(tmp_path / 'r' / 'predictions_test.csv', copy)  # the images that the run was tested on, elsewhere
    done = call('evaluate_isic', *usual(data, copy, tmp_path / 'h'))
    assert done.returncode == 0 and 'no thresholds and no calibration are chosen' in done.stdout, done.stderr
    assert not rows(copy / 'looks.csv')[-1]['other_data'] and len(rows(copy / 'looks.csv')) == len(
        rows(checkpoint / 'looks.csv')) + 1


def test_without_a_record_of_home_nothing_is_chosen(call, checkpoint, tmp_path):
    bare = tmp_path / 'bare'
    bare.mkdir()
    for name in ('config.json', 'model.safetensors'):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    data = table(tmp_path / 'c', 12, ('mel', 'naevus', 'bkl'))
    done = call('evaluate_isic', *usual(data, bare, tmp_path / 'r', *BOTH, '--report'))
    assert done.returncode == 0 and 'so decisions are at 0.5: score' in done.stdout, done.stderr
    scores = json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']
    assert scores['melanoma']['operating_points'] == [] and scores['melanoma']['calibration']['temperature'] is None
    assert 'images of home are not recorded' in (tmp_path / 'r' / 'report.html').read_text()


@pytest.mark.parametrize('entries, message', [
    (['mole=nv'], 'has no label mole, it knows melanoma, seborrheic_keratosis.'),
    (['melanoma=scar'], 'has no label scar, it has mel, naevus.'),
    (['melanoma=mel,mel'], '--map gives mel to melanoma twice: give it once.'),
    (['melanoma=mel,naevus'], 'so that there is no AUC: map other labels or take other images.'),
    (['melanoma'], '--map melanoma is not LABEL=WORD,WORD'),
])
def test_what_cannot_be_mapped(call, checkpoint, tmp_path, entries, message):
    data = table(tmp_path / 'c', 6, ('mel', 'naevus'))
    done = call('evaluate_isic', *usual(data, checkpoint, tmp_path / 'r', '--map', *entries))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('error:') == 1, done.stderr
    assert not (tmp_path / 'r').exists()
