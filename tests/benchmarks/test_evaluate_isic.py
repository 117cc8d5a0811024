"""The evaluation program on a checkpoint of known quality, on real images."""
import csv
import itertools
import json
import os
import pathlib
import shutil
import threading
import time

import datasets
import numpy as np
import pytest
import timm
import torch
from in_process import run_here
from pages import Page
from PIL import Image

import timm_arl  # noqa: F401  registers the models
from timm_arl.factory import save_network, tensors_sha256
from timm_arl.isic.calibration import calibrate, expected_calibration_error, fit_calibration
from timm_arl.isic.dataset import label_array, load_splits
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.metrics import auc, interval_text
from timm_arl.isic.task import LABELS
from timm_arl.training.evaluations import replacing_evaluation


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint') / 'out'
    torch.manual_seed(0)
    model = timm.create_model(
        'arl_cnn14', num_classes=len(LABELS), channels=[16, 32, 64, 128], alpha_init=2., zero_init_last=False)
    with torch.no_grad():  # statistics of images, or an untrained network answers the same to all of them
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.randn(8, 3, 64, 64))
    save_network(model.eval(), folder, LABELS, dict(
        timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)), channels=[16, 32, 64, 128])
    names = [name for name, _ in model.named_parameters() if name.endswith('.alpha')]
    columns = ['train_loss', 'validation_loss', *(f'validation_auc_{label}' for label in LABELS),
               'validation_mean_auc', *names]
    (folder / 'summary.csv').write_text(
        ','.join(['epoch', *columns]) + '\n' + ''.join(f'{e}{f",{e / 10}" * len(columns)}\n' for e in (1, 2)))
    (folder / 'run.json').write_text('{}')
    return folder


@pytest.fixture(scope='module')
def evaluated(isic_sample, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluation') / 'deep' / 'r'
    done = run_here('evaluate_isic', '--data', isic_sample, '--checkpoint', checkpoint, '--output-dir', out, '--report',
                    '--workers', 1)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_files(evaluated, checkpoint):
    out, stdout = evaluated
    assert 'calibration is for the mix of its validation images' in stdout
    assert {p.name for p in out.iterdir()} == {
        'metrics.json', 'evaluation.json', 'predictions_test.csv', 'predictions_validation.csv', 'roc_test.png',
        'roc_validation.png', 'metrics.md',
        'reliability_test.png', 'reliability_validation.png', 'curves.png', 'alphas.png', 'report.html', 'looks.csv'}
    page, scores = (out / 'metrics.md').read_text(), json.loads((out / 'metrics.json').read_text())
    for split in ('validation', 'test'):
        assert f'| melanoma | {scores[split]["melanoma"]["auc"]:.3f} [' in page
    for path in out.glob('*.png'):
        with Image.open(path) as picture:
            assert picture.width > 600 and len(np.unique(np.asarray(picture.convert('L')))) > 10
    assert str(out) in stdout and 'SYNTHETIC' not in stdout
    scores_page, page = page, Page((out / 'report.html').read_text())
    doubts = [doubt for label in LABELS for key, doubt in scores['test'][label].items() if key == 'calibration_doubt']
    assert doubts and all(doubt in text for doubt in doubts for text in (stdout, scores_page, page.text))
    assert 'Not a medical device' in page.text and 'SYNTHETIC' not in page.text
    assert ['img_size', '64'] in page.tables['Settings of this evaluation']
    assert "chosen on this data's validation images by this evaluation" in page.text  # its run is not known
    assert 'small copies of 256 px' in page.text and (out / 'report.html').stat().st_size < 2 ** 21
    # beside each image its map of the label, and the mask of a gate
    images = page.of('img')
    ids = {row['image_id'] for row in rows(out / 'predictions_test.csv')}
    assert 0 < len(images) <= 48 and len(images) % 3 == 0 and f'holds {len(images)} pictures' in page.text
    for picture, cam, mask in zip(*(images[k::3] for k in range(3))):
        assert any(f'image {image_id},' in picture['alt'] for image_id in ids)
        assert 'Class activation map of' in cam['alt'] and 'Attention mask of layer' in mask['alt']
    names = [row[0] for row in page.tables['The gate of each block: means over the images above'][1:]]
    assert names == ['layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']
    assert any(svg.get('aria-label', '').startswith('The alpha of every block over') for svg in page.of('svg'))
    for folder in (out, checkpoint):  # each look at the test split is recorded
        looks = rows(folder / 'looks.csv')
        assert len(looks) == 1 and 'evaluate_isic.py' in looks[0]['command'] and float(looks[0]['mean_auc']) > 0


def calibration_by(out, name, label, splits, prevalence=None):
    """That of a split's predictions, with what the validation images choose."""
    probabilities, truth = {}, {}
    for split in {'validation', name}:
        probabilities[split] = np.array([float(r[label]) for r in rows(out / f'predictions_{split}.csv')])
        truth[split] = np.array(splits[split][label])
    temperature, bias = fit_calibration(truth['validation'], probabilities['validation'], prevalence)
    calibrated = calibrate(probabilities[name], temperature, bias)
    return pytest.approx({
        'temperature': temperature, 'bias': bias, 'mean_calibrated': calibrated.mean(),
        'ece': expected_calibration_error(truth[name], probabilities[name]),
        'ece_calibrated': expected_calibration_error(truth[name], calibrated)}, abs=1e-4)


@pytest.mark.slow
def test_figures_follow_from_the_predictions(evaluated, isic_sample):
    out, _ = evaluated
    metrics = json.loads((out / 'metrics.json').read_text())
    splits = load_splits(isic_sample)
    for name in ('validation', 'test'):
        truth = label_array(splits[name])
        table = rows(out / f'predictions_{name}.csv')
        assert [r['image_id'] for r in table] == list(splits[name]['image_id'])
        for k, label in enumerate(LABELS):
            p, scores = np.array([float(r[label]) for r in table]), metrics[name][label]
            assert scores['auc'] == pytest.approx(float(auc(truth[:, k], p)), abs=1e-6)
            assert scores['threshold'] == 0.5
            for point in scores['operating_points']:
                positive = p > point['threshold']
                assert point['sensitivity'] == pytest.approx(positive[truth[:, k] == 1].mean())
                assert point['specificity'] == pytest.approx(1 - positive[truth[:, k] == 0].mean())
                # one threshold for both splits: validation chose it
                assert point['threshold'] in [q['threshold'] for q in metrics['validation'][label]['operating_points']]
            if name == 'validation':
                assert [q for q in scores['operating_points'] if '0.9' in q['name']][0]['sensitivity'] >= 0.9
            assert scores['calibration'] == calibration_by(out, name, label, splits)  # the run's images are not known
    assert metrics['validation']['subgroups'] and not metrics['test']['subgroups']  # the test split has no age and sex


@pytest.mark.slow
def test_alpha_zero_compared_on_the_same_images(evaluated, call, isic_sample, checkpoint, tmp_path):
    copy, data = tmp_path / 'copy', tmp_path / 'data'
    data.mkdir()
    for name, split in datasets.load_dataset(isic_sample).items():
        if name == 'train':  # of which fewer have a diagnosis
            split = split.select(np.flatnonzero(~np.array(split['melanoma'], bool) | (np.arange(len(split)) % 2 == 0)))
        split.to_parquet(data / f'{name}-00000-of-00001.parquet')
    shutil.copytree(checkpoint, copy)
    (copy / 'run.json').write_text(json.dumps({'arguments': {  # of a run on the same images
        'keep': 'best', 'train_ids': ids_digest(load_splits(str(data))['train']['image_id'])}}))
    config = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps({**config, 'thresholds': {'official': dict.fromkeys(LABELS, 0.5)}}))
    done = call('evaluate_isic', '--data', data, '--checkpoint', copy, '--output-dir', tmp_path / 'r', '--alpha-zero',
                '--report', '--crops', 'center', '--workers', 0, '--compare',
                evaluated[0] / 'predictions_test.csv')
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']
    assert json.loads((tmp_path / 'r' / 'evaluation.json').read_text())['alpha_zero'] is True
    splits = load_splits(str(data))  # calibration is for the mix of the training images
    for label in LABELS:
        share = np.mean(splits['train'][label])
        assert abs(share - np.mean(splits['validation'][label])) > 0.05
        assert metrics[label]['calibration'] == calibration_by(tmp_path / 'r', 'test', label, splits, share)
    before = json.loads((evaluated[0] / 'metrics.json').read_text())['test']
    pair = metrics['comparison']
    for label in LABELS:
        assert pair[label]['difference'] == pytest.approx(metrics[label]['auc'] - before[label]['auc'], abs=1e-6)
        assert 0 <= pair[label]['p_value'] <= 1
    assert 'alpha zero' in pair['second']
    page = Page((tmp_path / 'r' / 'report.html').read_text())
    assert 'The validation images chose the epoch that was kept, the thresholds and the calibration' in page.text
    assert 'The weights come with thresholds of their own' in page.text
    beside = page.tables['AUCs with 95 % intervals, and paired differences, test'][1:]
    for row, label in zip(beside, LABELS):
        texts = (interval_text(scores[label]['auc'], scores[label]['auc_ci95']) for scores in (metrics, before))
        assert row[1:3] == list(texts) and row[3].startswith(f'{pair[label]["difference"]:+.3f}')
    assert 'Every alpha is 0: the attention masks change nothing and are not shown.' in page.text
    assert 'by the other network' in page.text and not any('mask' in image['alt'] for image in page.of('img'))

    # with every alpha at 0 the network is timm's ResNet, so its file gives the same probabilities
    resnet = timm.create_model('resnet14', num_classes=len(LABELS), channels=[16, 32, 64, 128])
    import safetensors.torch
    state = safetensors.torch.load_file(checkpoint / 'model.safetensors')
    resnet.load_state_dict({k: v for k, v in state.items() if not k.endswith('.alpha')})
    save_network(resnet, tmp_path / 'resnet', data_config=dict(
        timm.data.resolve_model_data_config(resnet), input_size=(3, 64, 64)), channels=[16, 32, 64, 128])
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', tmp_path / 'resnet', '--output-dir',
                tmp_path / 's', '--crops', 'center', '--workers', 0, '--split', 'validation')
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.array([[float(r[label]) for label in LABELS] for r in rows(
        tmp_path / folder / 'predictions_validation.csv')]) for folder in ('r', 's'))
    assert np.allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_twins_are_left_out_and_the_summary_of_another_program_is_not_drawn(call, isic_sample, checkpoint, tmp_path):
    splits = load_splits(isic_sample)
    train, twin = splits['train']['image_id'][0], splits['validation']['image_id'][5]
    (tmp_path / 'twins.csv').write_text(f'image_id_a,image_id_b\n{train},{twin}\n')
    copy = tmp_path / 'copy'
    shutil.copytree(checkpoint, copy)
    (copy / 'summary.csv').write_text('epoch,train_loss,eval_loss\n0,1.0,1.0\n')  # as timm's train.py writes it
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', copy, '--output-dir', tmp_path / 'r',
                '--workers', 0, '--drop-duplicates', tmp_path / 'twins.csv', '--crops', 'center',
                '--split', 'validation')
    assert done.returncode == 0 and 'summary.csv is not from a run of finetune_isic.py' in done.stdout, done.stderr
    assert not (tmp_path / 'r' / 'curves.png').exists()
    ids = [r['image_id'] for r in rows(tmp_path / 'r' / 'predictions_validation.csv')]
    assert twin not in ids and len(ids) == len(splits['validation']) - 1


@pytest.mark.slow
def test_an_output_folder_holds_one_evaluation_and_no_run(call, isic_sample, checkpoint, tmp_path):
    copy, out = tmp_path / 'copy', tmp_path / 'r'
    shutil.copytree(checkpoint, copy)
    (copy / 'metrics.json').write_text('{"test": "scores of the run"}')
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    usual = ['--data', isic_sample, '--checkpoint', copy, '--crops', 'center', '--workers', 0]
    done = call('evaluate_isic', *usual, '--split', 'validation', '--output-dir', copy)
    assert done.returncode == 2 and 'holds a run or weights' in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    out.mkdir()
    for name in ('roc_test.png', 'report.html', 'report.md', 'notes.txt', 'looks.csv'):
        (out / name).write_text('earlier')
    done = call('evaluate_isic', *usual, '--split', 'validation', '--output-dir', out)
    assert done.returncode == 2 and 'holds a report.html that is not from an evaluation' in done.stderr, done.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
        ('roc_test.png', 'report.html', 'report.md', 'notes.txt', 'looks.csv'), 'earlier')
    (out / 'evaluation.json').write_text('{}')  # then they are
    (out / '.evaluation').mkdir()
    (out / '.evaluation' / 'curves.png').write_text('of one that was killed')
    done = call('evaluate_isic', *usual, '--split', 'validation', '--output-dir', out)
    assert done.returncode == 0, done.stderr
    assert 'r held an evaluation of other weights: it is replaced, and looks.csv goes on' in done.stdout
    assert {path.name for path in out.iterdir()} == {
        'metrics.json', 'evaluation.json', 'predictions_validation.csv', 'roc_validation.png', 'alphas.png',
        'reliability_validation.png', 'curves.png', 'notes.txt', 'looks.csv', 'metrics.md'}
    assert (out / 'looks.csv').read_text() == 'earlier'  # validation is no look at test


@pytest.mark.slow
def test_a_look_is_recorded_even_where_nothing_can_be_written_after_it(call, isic_sample, checkpoint, tmp_path):
    copy, out = tmp_path / 'copy', tmp_path / 'r'
    shutil.copytree(checkpoint, copy)
    (copy / 'looks.csv').write_text('time,of\nbefore,an earlier program,and more\n')
    (out / 'predictions_test.csv').mkdir(parents=True)  # which no file replaces
    for name in ('evaluation.json', 'metrics.json', 'predictions_validation.csv'):
        (out / name).write_text('earlier')
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', f'local-dir:{copy}', '--crops', 'center',
                '--workers', 0, '--output-dir', out)
    assert done.returncode == 2 and 'AUC' not in done.stdout
    assert len(rows(out / 'looks.csv')) == 1 and [row['time'] for row in rows(copy / 'looks.csv')][0] == 'before'
    assert len(rows(copy / 'looks.csv')) == 2
    assert not [path for path in out.iterdir() if path.name.startswith('.')]
    assert not (out / 'metrics.json').exists()  # no scores of one network beside the predictions of another


def die_at(moment):
    """Let this process die at its n-th renaming or removal of a file."""
    steps = itertools.count()
    for owner in {os, getattr(pathlib, '_NormalAccessor', os)}:  # Path of Python 3.10 has the functions from there
        for name in ('replace', 'unlink'):
            change = getattr(os, name)
            setattr(owner, name, staticmethod(
                lambda *args, change=change: os._exit(9) if next(steps) == moment else change(*args)))


def test_killed_at_any_moment_no_two_evaluations_are_mixed(monkeypatch, tmp_path):
    seen = set()
    for moment in range(16):
        out = tmp_path / str(moment)
        out.mkdir()
        for name in ('metrics.json', 'evaluation.json', 'predictions_test.csv', 'report.md'):
            (out / name).write_text('earlier')
        child = os.fork()
        if not child:
            die_at(moment)
            with replacing_evaluation(out) as new:
                for name in ('metrics.json', 'evaluation.json', 'predictions_test.csv', 'curves.png'):
                    (new / name).write_text('later')
            os._exit(0)
        os.waitpid(child, 0)
        files = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
        if 'metrics.json' in files:
            assert len(set(files.values())) == 1, files
        seen.add(files.get('metrics.json'))
    assert seen == {'earlier', 'later', None}


@pytest.mark.slow
def test_a_staged_folder_is_scored_as_it_was_made_and_stays_as_it_is(call, repo, isic_sample, tmp_path):
    folder = tmp_path / 's'
    assert call('timm_arl.hub.__main__', 'stage', 'arl_cnn14.isic2017', folder).returncode == 0
    results = json.loads((folder / 'results.json').read_text())
    results['run']['arguments'].update(crops='center', grey_world=True)
    (folder / 'results.json').write_text(json.dumps(results))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', folder, '--workers', 0, '--split', 'validation',
                '--output-dir', tmp_path / 'r')
    assert done.returncode == 0 and 'Images: crops center, aspect keep, grey-world True' in done.stdout, done.stderr
    record = json.loads((tmp_path / 'r' / 'evaluation.json').read_text())
    assert record['tensors_sha256'] == tensors_sha256(folder / 'model.safetensors') and record['crops'] == 'center'
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # what is compared is not replaced
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', folder, '--output-dir', tmp_path / 'r',
                '--compare', tmp_path / 'r' / 'predictions_validation.csv')
    assert done.returncode == 2 and 'would be replaced: choose another --output-dir' in done.stderr


@pytest.mark.parametrize('args, message', [
    (['--checkpoint', 'nowhere'], 'No folder nowhere, and no model of that name: pass the output folder'),
    (['--checkpoint', 'arl_cnn14.isic2018'], 'No weights arl_cnn14.isic2018: choose arl_cnn14.isic2017'),
    (['--checkpoint', 'CHECKPOINT/model.safetensors'], 'is a file: pass the folder that holds it'),
    (['--checkpoint', 'CHECKPOINT', '--output-dir', 'CHECKPOINT/model.safetensors/r'], 'model.safetensors is a file'),
    (['--checkpoint', ''], '--checkpoint is empty: give it a value'),
    (['--checkpoint', '.'], 'holds no config.json and no model.safetensors'),
    (['--checkpoint', 'CHECKPOINT', '--compare', 'no.csv'], '--compare: no.csv cannot be read'),
    (['--checkpoint', 'CHECKPOINT', '--drop-duplicates', 'no.csv'], 'no.csv cannot be read as a list of pairs'),
    (['--checkpoint', 'CHECKPOINT', '--data', 'no/such/folder'], 'No folder no/such/folder'),
])
def test_bad_arguments(call, isic_sample, checkpoint, tmp_path, args, message):
    args = [a.replace('CHECKPOINT', str(checkpoint)) for a in args]
    done = call('evaluate_isic', '--data', isic_sample, '--output-dir', 'r', *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_lesion_crop_without_masks_says_so(call, isic_sample, checkpoint, tmp_path):
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', checkpoint, '--output-dir', tmp_path / 'r',
                '--lesion-crop', '--compare', 'no.csv')
    assert done.returncode == 2 and done.stdout.count('have no masks') == 1
    assert 'The test images have no masks: --lesion-crop does not change them.' in done.stdout


def test_two_evaluations_of_one_folder_take_turns(tmp_path):
    written = []

    def write(name):
        with replacing_evaluation(tmp_path) as new:
            (new / 'metrics.json').write_text(name)
            time.sleep(0.2)
            (new / 'evaluation.json').write_text(name)
            written.append(name)
    threads = [threading.Thread(target=write, args=[name]) for name in 'ab']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == ['a', 'b']
    assert (tmp_path / 'metrics.json').read_text() == (tmp_path / 'evaluation.json').read_text() == written[-1]
