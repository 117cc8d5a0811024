"""The training program, run as its users run it."""
import csv
import json
import re
import resource
import shutil
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from forked import Forked
from PIL import Image
from sklearn.metrics import roc_auc_score

import timm_arl  # noqa: F401  registers the models
from timm_arl.isic.calibration import fit_calibration

LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no']
TINY = ['--model-kwargs', 'channels=[8,16,32,64]']  # a 64th of the weights
IMAGES = ['--img-size', '64', '--crops', 'center', '--tracker', 'none', '--workers', '0', '--cpu-threads', '1']
SMALL = [*IMAGES, '--batch-size', '16', *TINY]
OUTPUTS = {'config.json', 'model.safetensors', 'summary.csv', 'metrics.json', 'run.json', 'last',
           'predictions_validation.csv', 'predictions_test.csv', 'tensorboard', 'looks.csv', 'home.json'}


def launch(repo, processes, *args):
    command = [*LAUNCH, *['--multi_gpu'] * (processes > 1), '--num_processes', processes,
               repo / 'benchmarks' / 'finetune_isic.py', *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='session')
def finished(repo, few, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'out'
    args = ['--data', few, *SMALL, 'attention=channel', 'mask_scale=mean1', 'drop_path_rate=0.2', '--tracker',
            'tensorboard', '--workers', 1, '--batch-size', 8, '--patches-per-image', 3, '--epochs', 3, '--seed', 7,
            '--mixup', 0.2, '--ema', 0.9, '--gradient-accumulation-steps', 2]
    done = launch(repo, 1, *args, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, args


@pytest.fixture
def unfinished(finished, tmp_path):
    """The finished run as it was before its last scores."""
    out = tmp_path / 'out'
    shutil.copytree(finished[0], out)
    for name in ('metrics.json', 'predictions_test.csv', 'predictions_validation.csv', 'looks.csv'):
        (out / name).unlink()
    return out


@pytest.mark.slow
def test_outputs(finished):
    out, stdout, _ = finished
    assert {p.name for p in out.iterdir()} == OUTPUTS
    summary = read_csv(out / 'summary.csv')
    assert [row['epoch'] for row in summary] == ['1', '2', '3']
    assert {'train_loss', 'validation_loss', 'validation_auc_melanoma', 'validation_auc_seborrheic_keratosis',
            'validation_mean_auc', 'lr', *(f'layer{n}.0.alpha' for n in (1, 2, 3, 4))} <= set(summary[0])
    assert summary[0]['layer3.0.alpha'] != summary[2]['layer3.0.alpha']
    record = json.loads((out / 'run.json').read_text())
    assert record['arguments']['recipe'] == 'modern' and record['arguments']['mixup'] == 0.2
    assert record['arguments']['seed'] == 7 and record['versions']['timm'] == timm.__version__
    assert f'In {out}' in stdout and 'test ' in stdout


@pytest.mark.slow
def test_metrics_follow_from_the_predictions(finished, few):
    from timm_arl.isic.dataset import load_splits
    out, stdout, _ = finished
    metrics = json.loads((out / 'metrics.json').read_text())
    best = max(float(row['validation_mean_auc']) for row in read_csv(out / 'summary.csv'))
    assert metrics['validation']['mean_auc'] == pytest.approx(best, abs=1e-6)
    home, splits = json.loads((out / 'home.json').read_text()), load_splits(few)
    for label in ('melanoma', 'seborrheic_keratosis'):  # calibrated for the mix of the training images
        found = np.array([float(row[label]) for row in read_csv(out / 'predictions_validation.csv')])
        assert (home['temperatures'][label], home['biases'][label]) == pytest.approx(fit_calibration(
            np.array(splits['validation'][label]), found, np.mean(splits['train'][label])), abs=1e-3)
    for split, content in load_splits(few).items():
        if split == 'train':
            continue
        predictions = read_csv(out / f'predictions_{split}.csv')
        assert [p['image_id'] for p in predictions] == list(content['image_id'])
        for label in ('melanoma', 'seborrheic_keratosis'):
            values, truth = np.array([float(p[label]) for p in predictions]), np.array(list(content[label]))
            scores = metrics[split][label]
            assert scores['auc'] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
            assert scores['accuracy'] == pytest.approx(((values > 0.5) == truth).mean())
            assert truth.sum() == 4 and scores['auc_ci95'] is None  # which takes five
            assert f'{scores["auc"]:.3f}' in stdout


@pytest.mark.slow
def test_output_is_a_model_repo_of_timm(finished, few):
    from timm_arl.isic.dataset import load_splits
    from timm_arl.isic.transforms import restore_aspect
    out, _, _ = finished
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == ['melanoma', 'seborrheic_keratosis'] and model.num_classes == 2
    assert (model.attention, model.mask_scale, model.layer4[0].conv2.out_channels) == ('channel', 'mean1', 64)
    data_config = timm.data.resolve_model_data_config(model)
    assert tuple(data_config['input_size']) == (3, 64, 64)
    # timm's own preprocessing of the saved config gives the probabilities of the file
    transform = timm.data.create_transform(**data_config)
    test = load_splits(few)['test'].cast_column('image', datasets.Image())
    images = torch.stack([transform(restore_aspect(r['image'], r['aspect_ratio'])) for r in test.select(range(8))])
    predictions = read_csv(out / 'predictions_test.csv')[:8]
    expected = torch.tensor([[float(p['melanoma']), float(p['seborrheic_keratosis'])] for p in predictions])
    with torch.inference_mode():
        assert torch.allclose(model(images).sigmoid(), expected, atol=1e-3)


@pytest.mark.slow
def test_killed_and_resumed_is_as_undisturbed(finished, call, tmp_path, monkeypatch):
    out, args = tmp_path / 'killed', finished[2]
    program = Forked('finetune_isic', *args, '--output-dir', out)
    while not re.search('epoch 2/3: +[1-9]', program.stderr):  # its bar: gradients are gathered, averages half made
        assert program.returncode is None, program.stderr
        time.sleep(0.01)
    program.kill()
    assert not (out / 'metrics.json').exists()
    epochs = len(json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    # as after a kill in the middle of the next epoch's saving, too
    (out / 'last').rename(out / '.last.previous')
    (out / 'last.saving').mkdir(exist_ok=True)
    (out / 'model.safetensors').write_bytes(b'half')

    refused = call('finetune_isic', *args, '--output-dir', out)
    assert refused.returncode == 2 and 'already holds a run' in refused.stderr
    with monkeypatch.context() as environment:
        environment.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')  # as accelerate launch hands it on
        refused = call('finetune_isic', '--output-dir', out, '--resume')
    assert 'resume it in the same way' in refused.stderr
    done = call('finetune_isic', '--output-dir', out, '--resume', '--workers', 0)  # the others are remembered
    assert epochs in (1, 2)  # as fast as the signal arrives
    assert done.returncode == 0 and f'Resuming after epoch {epochs} of 3' in done.stdout, done.stderr
    assert {p.name for p in out.iterdir()} == OUTPUTS
    for name in ('summary.csv', 'predictions_test.csv', 'metrics.json'):
        assert (out / name).read_text() == (finished[0] / name).read_text(), name
    ours, reference = (safetensors.torch.load_file(folder / 'model.safetensors') for folder in (out, finished[0]))
    assert all(torch.equal(ours[k], reference[k]) for k in reference)


@pytest.mark.slow
def test_a_full_disk_leaves_the_epoch_before(unfinished, call):
    progress = json.loads((unfinished / 'last' / 'progress.json').read_text())
    record = json.loads((unfinished / 'run.json').read_text())
    record['arguments']['epochs'] = 4  # so that an epoch is left to do
    (unfinished / 'run.json').write_text(json.dumps(record))
    network, optimizer = (
        (unfinished / 'last' / name).stat().st_size for name in ('model.safetensors', 'optimizer.bin'))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((network + optimizer) // 2, limits[1]))  # the disk fills up in between
    try:
        done = call('finetune_isic', '--output-dir', unfinished, '--resume', '--workers', 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2, done.stderr
    assert 'Epoch 4 could not be saved to' in done.stderr and 'epoch 3 is intact' in done.stderr
    assert json.loads((unfinished / 'last' / 'progress.json').read_text()) == progress
    assert not (unfinished / 'last.saving').exists()
    done = call('finetune_isic', '--output-dir', unfinished, '--resume', '--workers', 0)
    assert done.returncode == 0 and 'Resuming after epoch 3 of 4' in done.stdout, done.stderr


@pytest.mark.slow
def test_a_damaged_state_is_named_and_the_kept_epoch_stays(unfinished, call):
    def damaged(path, content):
        intact = path.read_bytes()
        path.write_bytes(content(intact))
        done = call('finetune_isic', '--output-dir', unfinished, '--resume', '--workers', 0)
        path.write_bytes(intact)
        assert done.returncode == 2 and done.stderr.count('error:') == 1, done.stderr
        assert (unfinished / 'model.safetensors').read_bytes() == kept
        return done.stderr.rpartition('error: ')[2]

    last, kept = unfinished / 'last', (unfinished / 'model.safetensors').read_bytes()
    remedy = f'--init-checkpoint {unfinished} and another --output-dir.'
    for name in ('progress.json', 'model.safetensors', 'optimizer.bin', 'random_states_0.pkl', 'average.safetensors',
                 'kept/model.safetensors'):
        error = damaged(last / name, lambda content: content[:len(content) // 2])
        assert f'{last / name} is damaged' in error and error.rstrip().endswith(remedy) and error.count('\n') == 1
    for name in ('model.safetensors', 'average.safetensors'):
        other = safetensors.torch.save({'fc.weight': torch.zeros(2, 64)})
        error = damaged(last / name, lambda _: other)  # noqa: B023  called at once
        assert f"{last / name} is another network's" in error and remedy in error
    assert 'is damaged' in damaged(unfinished / 'run.json', lambda _: b'{"arguments": 3}')
    done = call('finetune_isic', '--output-dir', unfinished, '--resume', '--workers', 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_resume_of_a_finished_run_looks_at_nothing_again(finished, call):
    before = (finished[0] / 'metrics.json').stat().st_mtime_ns
    done = call('finetune_isic', '--output-dir', finished[0], '--resume')
    assert done.returncode == 0 and 'is finished' in done.stdout
    assert (finished[0] / 'metrics.json').stat().st_mtime_ns == before
    done = call('finetune_isic', '--output-dir', finished[0], '--resume', '--seed', 8)
    assert done.returncode == 2 and 'has --seed 7, not 8' in done.stderr


@pytest.mark.slow
def test_two_processes_are_one(repo, call, few, tmp_path):
    """Two processes at half the batch see the same images as one, once each; with frozen norms they learn the same."""
    results = []
    for processes, batch_size in ((2, 7), (1, 14)):
        out = tmp_path / str(processes)
        args = ['--data', few, *IMAGES, '--model', 'arl_cnn14', *TINY, '--batch-size', batch_size, '--epochs', 2,
                '--freeze-bn', '--optimizer', 'momentum', '--lr', 0.01, '--output-dir', out]
        done = call('finetune_isic', *args) if processes == 1 else launch(repo, processes, *args)
        assert done.returncode == 0, done.stderr
        assert f'{processes} process(es)' in done.stdout and done.stdout.count('Output folder') == 1
        predictions = read_csv(out / 'predictions_test.csv')
        assert len({p['image_id'] for p in predictions}) == len(predictions) == 12
        results.append((json.loads((out / 'metrics.json').read_text()), read_csv(out / 'summary.csv'),
                        safetensors.torch.load_file(out / 'model.safetensors')))
    (metrics, summary, weights), (expected_metrics, expected_summary, expected) = results
    for ours, theirs in zip(summary, expected_summary):
        assert float(ours['train_loss']) == pytest.approx(float(theirs['train_loss']), rel=1e-4)
    assert metrics['test']['mean_auc'] == pytest.approx(expected_metrics['test']['mean_auc'], abs=5e-3)
    start = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64]).state_dict()
    for key in expected:
        assert torch.allclose(weights[key], expected[key], atol=2e-5, rtol=1e-3), key
    assert not torch.allclose(expected['layer4.0.conv2.weight'], start['layer4.0.conv2.weight'], atol=1e-4)


@pytest.mark.slow
def test_folds_and_seeds(call, few, tmp_path):
    from timm_arl.isic.dataset import load_splits
    out = tmp_path / 'cv'
    ids = list(load_splits(few)['train']['image_id'])
    (tmp_path / 'twins.csv').write_text('image_id_a,image_id_b\n' + f'{ids[0]},{ids[15]}\n{ids[15]},{ids[30]}\n')
    args = ['--data', few, *SMALL, '--epochs', 1, '--folds', 2, '--duplicates', tmp_path / 'twins.csv',
            '--output-dir', out]
    done = call('finetune_isic', *args)
    assert done.returncode == 0, done.stderr
    parts = [[p['image_id'] for p in read_csv(out / f'fold-{k}' / 'predictions_validation.csv')] for k in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(ids) and not (out / 'fold-0' / 'predictions_test.csv').exists()
    assert len({ids[0] in parts[0], ids[15] in parts[0], ids[30] in parts[0]}) == 1  # twins of twins stay together
    labels = {p['image_id']: p for p in load_splits(few)['train'].select_columns(
        ['image_id', 'melanoma']).to_list()}
    assert abs(sum(labels[i]['melanoma'] for i in parts[0]) - 16 / 3) <= 2  # stratified
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['cross_validation']['melanoma']['images'] == 32
    assert metrics['runs']['validation_mean_auc']['runs'] == 2
    done = call('finetune_isic', '--resume', '--output-dir', out / 'fold-1')  # which would else train on all images
    assert done.returncode == 2 and 'is fold-1 of a cross-validation: resume that as a whole' in done.stderr
    before = (out / 'fold-0' / 'model.safetensors').stat().st_mtime_ns
    (out / 'metrics.json').unlink()
    (out / 'fold-1' / 'metrics.json').unlink()  # as if killed before its end
    done = call('finetune_isic', '--resume', '--output-dir', out, '--workers', 0)
    assert done.returncode == 0, done.stderr
    assert (out / 'fold-0' / 'model.safetensors').stat().st_mtime_ns == before
    assert json.loads((out / 'metrics.json').read_text()) == metrics
    (out / 'metrics.json').unlink()
    (tmp_path / 'twins.csv').write_text('image_id_a,image_id_b\n' + ''.join(f'{ids[0]},{i}\n' for i in ids[1:9]))
    done = call('finetune_isic', '--resume', '--output-dir', out, '--workers', 0)
    assert done.returncode == 2 and 'fold-0 was trained on other images than fold-0 has now' in done.stderr


@pytest.mark.slow
def test_a_list_of_duplicates_that_comes_later_does_not_change_the_folds(call, few, tmp_path):
    from timm_arl.isic.dataset import load_splits
    data, out = shutil.copytree(few, tmp_path / 'data'), tmp_path / 'cv'
    done = call('finetune_isic', '--data', data, *SMALL, '--epochs', 1, '--folds', 2, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    parts = [[row['image_id'] for row in read_csv(out / f'fold-{k}' / 'predictions_validation.csv')] for k in (0, 1)]
    ids = list(load_splits(few)['train']['image_id'])
    (data / 'duplicates.csv').write_text('image_id_a,image_id_b\n' + ''.join(f'{ids[0]},{i}\n' for i in ids[1:9]))
    for path in (out / 'metrics.json', out / 'fold-1' / 'metrics.json'):
        path.unlink()
    done = call('finetune_isic', '--resume', '--output-dir', out, '--workers', 0)
    assert done.returncode == 0, done.stderr
    assert parts == [
        [row['image_id'] for row in read_csv(out / f'fold-{k}' / 'predictions_validation.csv')] for k in (0, 1)]
    assert not list(out.rglob('.lock'))


@pytest.mark.slow
def test_folds_do_not_start_from_what_saw_the_held_out_images(finished, call, few, tmp_path):
    args = ['--data', few, *SMALL, 'attention=channel', 'mask_scale=mean1', '--folds', 2,
            '--output-dir', tmp_path / 'cv']
    (tmp_path / 'run.json').write_text('{"learning_rate": 1}')  # another program's is no reason to stop
    (tmp_path / 'other.safetensors').write_bytes((finished[0] / 'model.safetensors').read_bytes())
    done = call('finetune_isic', *args, '--init-checkpoint', tmp_path / 'other.safetensors', '--preview',
                tmp_path / 'sheet.png')
    assert done.returncode == 0, done.stderr
    (tmp_path / 'staged').mkdir()
    for name in ('config.json', 'model.safetensors'):
        shutil.copy(finished[0] / name, tmp_path / 'staged')
    for start in (['--teacher', tmp_path / 'staged'], ['--init-checkpoint', tmp_path / 'staged' / 'model.safetensors'],
                  ['--teacher', 'arl_cnn14.isic2017'], ['--teacher', finished[0]],
                  ['--init-checkpoint', finished[0] / 'model.safetensors'],
                  ['--init-checkpoint', finished[0] / 'last' / 'kept'], ['--teacher', f'local-dir:{finished[0]}']):
        done = call('finetune_isic', *args, *start)
        assert done.returncode == 2 and 'was trained on images that --folds would hold out' in done.stderr
    done = call('finetune_isic', *args, '--streaming')
    assert done.returncode == 2 and 'leave out --streaming' in done.stderr


@pytest.mark.slow
def test_streaming_by_two_processes_and_a_softmax(call, few, tmp_path):
    out = tmp_path / 'out'
    done = Forked('finetune_isic', '--data', few, *SMALL, '--batch-size', 8, '--epochs', 2, '--streaming', '--head',
                  'softmax', '--output-dir', out, processes=2).wait()
    assert done.returncode == 0 and '32 train' in done.stdout, done.stderr
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.num_classes == 3
    assert model.pretrained_cfg['label_names'] == ['nevus', 'melanoma', 'seborrheic_keratosis']
    values = [[float(p[label]) for label in ('melanoma', 'seborrheic_keratosis')]
              for p in read_csv(out / 'predictions_test.csv')]
    assert len(values) == 12 and all(sum(pair) < 1 for pair in values)
    done = call('evaluate_isic', '--data', few, '--checkpoint', out, '--output-dir', tmp_path / 'r', '--workers', 0)
    assert done.returncode == 0, done.stderr  # the crops are those of the run
    assert json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']['mean_auc'] == pytest.approx(
        json.loads((out / 'metrics.json').read_text())['test']['mean_auc'], abs=1e-9)


@pytest.mark.slow
def test_a_teacher_is_followed(finished, call, few, tmp_path):
    """A student that hears nothing but the teacher comes nearer to it than one that hears nothing but the labels."""
    args = ['--data', few, *SMALL, '--epochs', 6, '--lr', 0.01, '--ema', 0, '--keep', 'last', '--model', 'resnet14']
    taught = call('finetune_isic', *args, '--teacher', finished[0], '--distill-weight', 1,
                  '--output-dir', tmp_path / 'taught')
    assert taught.returncode == 0, taught.stderr
    assert f'{finished[0]}, shown images of 64 px: its probabilities and pooled features are learned' in taught.stdout
    alone = call('finetune_isic', *args, '--output-dir', tmp_path / 'alone')
    assert alone.returncode == 0, alone.stderr
    teacher, *students = (
        np.array([[float(p['melanoma']), float(p['seborrheic_keratosis'])] for p in read_csv(
            folder / 'predictions_validation.csv')])
        for folder in (finished[0], tmp_path / 'taught', tmp_path / 'alone'))
    distances = [np.abs(student - teacher).mean() for student in students]
    assert distances[0] < distances[1]
    model = timm.create_model(f'local-dir:{tmp_path / "taught"}', pretrained=True)  # a plain network, no projection
    assert not [name for name, _ in model.named_parameters() if 'projection' in name] and model.num_classes == 2


def test_preview(call, isic_sample, tmp_path):
    done = call('finetune_isic', '--data', isic_sample, '--img-size', 64, '--preview', 'sheet.png', '--grey-world',
                cwd=tmp_path)
    assert done.returncode == 0 and 'sheet.png' in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['sheet.png']
    with Image.open(tmp_path / 'sheet.png') as picture:
        assert picture.width > 8 * 64 and picture.height > 3 * 64


@pytest.mark.slow
def test_init_checkpoint_and_other_timm_models(call, few, tmp_path):
    torch.manual_seed(0)
    resnet = timm.create_model('resnet14', num_classes=1000, channels=[8, 16, 32, 64])
    safetensors.torch.save_file(resnet.state_dict(), tmp_path / 'resnet14.safetensors')
    done = call('finetune_isic', '--data', few, *SMALL, '--epochs', 1, '--model', 'arl_cnn14_mixed', '--lr', 1e-9,
                '--init-checkpoint', tmp_path / 'resnet14.safetensors', '--output-dir', tmp_path / 'out')
    assert done.returncode == 0 and 'but new fc.weight and fc.bias' in done.stdout, done.stderr
    weights = safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')
    assert torch.allclose(weights['layer4.0.conv2.weight'], resnet.layer4[0].conv2.weight, atol=1e-6)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(unfinished, call, few, isic_sample):
    record = (unfinished / 'run.json').read_text()
    (unfinished / 'run.json').write_text(record.replace(json.dumps(few), json.dumps(isic_sample)))
    done = call('finetune_isic', '--output-dir', unfinished, '--resume', '--workers', 0)
    assert done.returncode == 2 and f'had other training images than {isic_sample} has now' in done.stderr
