"""The program that averages the weights of runs, and stores them in half precision."""
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from test_finetune_isic import SMALL, read_csv

from timm_arl.factory import create_trained, save_network
from timm_arl.hub import stage
from timm_arl.predictor import Predictor
from timm_arl.training.distillation import Teacher

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('no_pictures')]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('start') / 'start.safetensors'
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64])
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp('trained')


@pytest.fixture
def runs(call, few, start, trained, tmp_path):
    """Two runs, trained once, in copies for each test."""
    for seed in (0, 1):
        out = trained / f'seed-{seed}'
        if not out.exists():
            done = call('finetune_isic', '--data', few, *SMALL, '--init-checkpoint', start, '--epochs', 2, '--keep',
                        'last', '--lr', 0.01, '--ema', 0, '--seed', seed, '--skip-test', '--output-dir', out)
            assert done.returncode == 0, done.stderr
        shutil.copytree(out, tmp_path / out.name)
    return [tmp_path / 'seed-0', tmp_path / 'seed-1']


def average(call, few, runs, out, *args):
    return call('average_runs', '--runs', *runs, '--data', few, '--workers', 0, '--cpu-threads', 1, '--output-dir', out,
                *args)


def load(folder):
    return safetensors.torch.load_file(folder / 'model.safetensors')


def copy_of(run, folder, averaged=None, **changes):
    """A run with other arguments."""
    shutil.copytree(run, folder)
    record = json.loads((folder / 'run.json').read_text())
    record['arguments'].update(changes)
    (folder / 'run.json').write_text(json.dumps({**record, **({'averaged': averaged} if averaged else {})}))
    return folder


def test_a_run_that_skips_the_test_split(runs):
    for run in runs:
        assert not {'looks.csv', 'predictions_test.csv'} & {path.name for path in run.iterdir()}
        assert json.loads((run / 'metrics.json').read_text()).keys() == {'validation'}


def test_average(call, few, runs, tmp_path):
    done = average(call, few, runs, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert '2 runs averaged' in done.stdout and f'{runs[1]}: validation mean AUC' in done.stdout
    first, second, mean = (load(folder) for folder in (*runs, tmp_path / 'out'))
    assert mean.keys() == first.keys()
    statistics = [name for name in mean if name.endswith(('running_mean', 'running_var'))]
    for name, tensor in mean.items():
        between = (first[name] + second[name]) / 2
        if name in statistics:  # measured again
            assert not torch.allclose(tensor, between, rtol=1e-3, atol=0), name
        elif not name.endswith('num_batches_tracked'):
            assert torch.allclose(tensor, between), name
            assert 'alpha' in name or not torch.equal(first[name], second[name]), name
    done = average(call, few, runs, tmp_path / 'larger', '--img-size', 96)
    assert done.returncode == 0, done.stderr
    larger = load(tmp_path / 'larger')  # the statistics are those of images as in training
    assert all(torch.equal(mean[name], larger[name]) for name in mean)

    # it is a run like others: it loads, what it predicts is what was scored, and it can be staged
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert metrics.keys() == {'validation'} and not (tmp_path / 'out' / 'looks.csv').exists()
    evaluated = call('evaluate_isic', '--data', few, '--checkpoint', tmp_path / 'out', '--split', 'validation',
                     '--workers', 0, '--output-dir', tmp_path / 'R')
    assert evaluated.returncode == 0, evaluated.stderr
    ours, theirs = (np.array([float(row['melanoma']) for row in read_csv(folder / 'predictions_validation.csv')])
                    for folder in (tmp_path / 'out', tmp_path / 'R'))
    assert np.allclose(ours, theirs, atol=1e-5)
    card = (stage(tmp_path / 'out', tmp_path / 'staged') / 'README.md').read_text()
    assert 'average of 2 trainings' in card and 'run seed-1' in card and 'epoch 2 and 2 was kept' in card
    assert 'measured again' in card and 'lesion masks | learned' in card


def test_frozen_statistics_and_looks_of_the_runs_stay(call, few, runs, tmp_path):
    frozen = [copy_of(run, tmp_path / f'frozen-{k}', freeze_bn=True) for k, run in enumerate(runs)]
    row = 'time,checkpoint,mean_auc,command,commit\n1,x,0.5,finetune_isic.py,c\n'
    (frozen[1] / 'looks.csv').write_text(row)
    done = average(call, few, frozen, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    first, second, mean = (load(folder)['bn1.running_var'] for folder in (*frozen, tmp_path / 'out'))
    assert torch.allclose(mean, (first + second) / 2)
    assert [look['checkpoint'] for look in read_csv(tmp_path / 'out' / 'looks.csv')] == ['x']
    card = (stage(tmp_path / 'out', tmp_path / 'staged') / 'README.md').read_text()
    assert 'measured again' not in card and 'was looked at once' in card


def test_runs_of_versions_with_fewer_arguments(call, few, runs, tmp_path):
    record = json.loads((runs[0] / 'run.json').read_text())
    for name in ('aspect', 'skip_test'):
        del record['arguments'][name]
    (runs[0] / 'run.json').write_text(json.dumps(record))
    done = average(call, few, runs[:1], tmp_path / 'out')
    assert done.returncode == 0, done.stderr


def test_half_precision_of_one_run(call, few, runs, tmp_path):
    done = average(call, few, runs[:1], tmp_path / 'out', '--half')
    assert done.returncode == 0, done.stderr
    small, before = load(tmp_path / 'out'), load(runs[0])
    for name, tensor in small.items():
        expected = before[name].half() if before[name].ndim > 1 else before[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    ours, theirs = (np.array([float(row['melanoma']) for row in read_csv(folder / 'predictions_validation.csv')])
                    for folder in (tmp_path / 'out', runs[0]))
    assert np.allclose(ours, theirs, atol=2e-3)
    assert (tmp_path / 'out' / 'summary.csv').read_text() == (runs[0] / 'summary.csv').read_text()
    staged = stage(tmp_path / 'out', tmp_path / 'staged')
    assert load(staged)['fc.weight'].dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in create_trained(staged).parameters())
    assert 'half precision' in (staged / 'README.md').read_text()


def test_images_of_another_size_from_now_on(call, few, runs, tmp_path):
    done = average(call, few, runs[:1], tmp_path / 'out', '--img-size', 96)
    assert done.returncode == 0, done.stderr
    assert create_trained(tmp_path / 'out').pretrained_cfg['input_size'] == (3, 96, 96)
    done = call('evaluate_isic', '--data', few, '--checkpoint', runs[0], '--split', 'validation', '--workers', 0,
                '--img-size', 96, '--output-dir', tmp_path / 'R')
    assert done.returncode == 0, done.stderr
    at_64, at_96, expected = (
        np.array([float(row['melanoma']) for row in read_csv(folder / 'predictions_validation.csv')])
        for folder in (runs[0], tmp_path / 'out', tmp_path / 'R'))
    assert np.allclose(at_96, expected, atol=1e-5) and not np.allclose(at_96, at_64, atol=1e-3)
    # thresholds are of images of that size, and the card says both
    home = json.loads((tmp_path / 'out' / 'home.json').read_text())
    assert home['shown']['img_size'] == 96
    predictor = Predictor(tmp_path / 'out')
    assert predictor.img_size == 96 and 'youden on validation' in predictor.thresholds and predictor.temperatures
    staged = stage(tmp_path / 'out', tmp_path / 'staged')
    assert '| image size | 96 px; trained at 64 px |' in (staged / 'README.md').read_text()
    assert 'trained at' not in (stage(runs[0], tmp_path / 'usual') / 'README.md').read_text()
    # as a teacher it is shown what it was trained on
    for folder in (tmp_path / 'out', staged):
        assert Teacher(str(folder), timm.data.resolve_model_data_config(predictor.network)).img_size == 64


def test_evaluations_at_another_size_leave_no_thresholds_behind(call, few, runs, tmp_path):
    (runs[0] / 'home.json').unlink()
    for size, kept in ((96, False), (64, True)):
        done = call('evaluate_isic', '--data', few, '--checkpoint', runs[0], '--split', 'validation', '--workers', 0,
                    '--img-size', size, '--output-dir', tmp_path / str(size))
        assert done.returncode == 0 and (runs[0] / 'home.json').exists() == kept, done.stderr


def test_a_size_that_the_network_does_not_take_is_refused(call, few, runs, tmp_path):
    vit = tmp_path / 'vit'
    shutil.copytree(runs[0], vit)
    save_network(timm.create_model('vit_tiny_patch16_224', num_classes=2), vit, ['melanoma', 'seborrheic_keratosis'])
    done = average(call, few, [vit], tmp_path / 'out', '--img-size', 96)
    assert done.returncode == 2 and 'does not take images of 96 px (--img-size)' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = call('evaluate_isic', '--data', few, '--checkpoint', vit, '--img-size', 96, '--output-dir', tmp_path / 'R')
    assert done.returncode == 2 and 'does not take images of 96 px (--img-size)' in done.stderr


def test_bad_input_is_refused(call, few, isic_sample, runs, tmp_path):
    def refusal(folders, *args, data=few, out=tmp_path / 'out'):
        done = average(call, data, folders, out, *args)
        assert done.returncode == 2 and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()
        return done.stderr

    assert 'exists already: choose another --output-dir' in refusal(runs, out=runs[0])
    assert 'is no run of finetune_isic.py' in refusal([tmp_path])
    assert 'names a folder twice' in refusal([runs[0], runs[0]])
    assert 'other training images than' in refusal(runs, data=isic_sample)
    assert 'is an average already' in refusal([copy_of(runs[0], tmp_path / 'average', averaged=[{}])])
    assert 'is fold-0 of a cross-validation' in refusal([copy_of(runs[0], tmp_path / 'fold', fold='fold-0')])
    damaged = copy_of(runs[0], tmp_path / 'damaged')
    (damaged / 'summary.csv').write_text('')
    assert 'summary.csv is damaged' in refusal([damaged])
    (runs[1] / 'metrics.json').unlink()
    assert f'go on with --resume --output-dir {runs[1]}' in refusal(runs)
    for key, value, message in (
            ('lr', 0.5, 'other arguments than .*lr 0.5, not 0.01'), ('model_kwargs', {}, 'model_kwargs'),
            ('init_checkpoint', None, 'init_checkpoint None'), ('train_ids', 'x', 'pass --splits .*seed-0/splits.csv')):
        other = copy_of(runs[0], tmp_path / f'other-{key}', **{key: value})
        assert re.search(message, refusal([runs[0], other]))


def test_networks_from_random_weights_are_refused(call, few, runs, tmp_path):
    runs = [copy_of(run, tmp_path / f'random-{k}', init_checkpoint=None) for k, run in enumerate(runs)]
    done = average(call, few, runs, tmp_path / 'out')
    assert done.returncode == 2 and 'started from random weights' in done.stderr
