"""The training program, run as its users run it."""
import csv
import json
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from sklearn.metrics import roc_auc_score

import timm_arl  # noqa: F401  registers the models

LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no']
SMALL = ['--img-size', '64', '--batch-size', '16', '--workers', '1']
OUTPUTS = {'config.json', 'model.safetensors', 'summary.csv', 'metrics.json', 'run.json', 'last',
           'predictions_validation.csv', 'predictions_test.csv'}


def command(repo, *args, launch=()):
    return [*(launch or [sys.executable]), str(repo / 'benchmarks' / 'finetune_isic.py'), *map(str, args)]


def run(repo, *args, launch=(), cwd=None):
    return subprocess.run(command(repo, *args, launch=launch), capture_output=True, text=True, timeout=280, cwd=cwd)


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(repo, isic_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'out'
    args = ['--data', isic_sample, *SMALL, '--epochs', 3, '--seed', 7]
    done = run(repo, *args, '--output-dir', out, launch=[*LAUNCH, '--num_processes', '1'])
    assert done.returncode == 0, done.stderr
    return out, done.stdout, args


def test_outputs(finished):
    out, stdout, _ = finished
    assert {p.name for p in out.iterdir()} == OUTPUTS
    summary = read_csv(out / 'summary.csv')
    assert [row['epoch'] for row in summary] == ['1', '2', '3']
    assert {'train_loss', 'validation_loss', 'validation_auc_melanoma', 'validation_auc_seborrheic_keratosis',
            'validation_mean_auc', 'lr', *(f'layer{n}.0.alpha' for n in (1, 2, 3, 4))} <= set(summary[0])
    assert summary[0]['layer3.0.alpha'] != summary[2]['layer3.0.alpha']
    record = json.loads((out / 'run.json').read_text())
    assert record['arguments']['seed'] == 7 and record['versions']['timm'] == timm.__version__
    assert f'In {out}' in stdout and 'test ' in stdout


def test_metrics_follow_from_the_predictions(finished, isic_sample):
    from timm_arl.isic.dataset import load_splits
    out, stdout, _ = finished
    metrics = json.loads((out / 'metrics.json').read_text())
    best = max(float(row['validation_mean_auc']) for row in read_csv(out / 'summary.csv'))
    assert metrics['validation']['mean_auc'] == pytest.approx(best, abs=1e-6)
    for split, content in load_splits(isic_sample).items():
        if split == 'train':
            continue
        predictions = read_csv(out / f'predictions_{split}.csv')
        assert [p['image_id'] for p in predictions] == list(content['image_id'])
        for label in ('melanoma', 'seborrheic_keratosis'):
            values, truth = np.array([float(p[label]) for p in predictions]), np.array(list(content[label]))
            scores = metrics[split][label]
            assert scores['auc'] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
            assert scores['accuracy'] == pytest.approx(((values > 0.5) == truth).mean())
            assert scores['auc_ci95'][0] <= scores['auc'] <= scores['auc_ci95'][1]
            assert f'{scores["auc"]:.3f}' in stdout


def test_output_is_a_model_repo_of_timm(finished, isic_sample):
    from timm_arl.isic.dataset import load_splits
    from timm_arl.isic.transforms import restore_aspect
    out, _, _ = finished
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == ['melanoma', 'seborrheic_keratosis'] and model.num_classes == 2
    data_config = timm.data.resolve_model_data_config(model)
    assert data_config['input_size'] == (3, 64, 64)
    # timm's own preprocessing of the saved config gives the probabilities of the file
    transform = timm.data.create_transform(**data_config)
    test = load_splits(isic_sample)['test'].cast_column('image', datasets.Image())
    images = torch.stack([transform(restore_aspect(r['image'], r['aspect_ratio'])) for r in test.select(range(8))])
    predictions = read_csv(out / 'predictions_test.csv')[:8]
    expected = torch.tensor([[float(p['melanoma']), float(p['seborrheic_keratosis'])] for p in predictions])
    with torch.inference_mode():
        assert torch.allclose(model(images).sigmoid(), expected, atol=1e-3)


def test_killed_and_resumed_is_as_undisturbed(finished, repo, tmp_path):
    out, args = tmp_path / 'killed', finished[2]
    process = subprocess.Popen(
        command(repo, *args, '--output-dir', out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 250
    while not (out / 'last' / 'progress.json').exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / 'metrics.json').exists()
    epochs = len(json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    # as after a kill in the middle of the next epoch's saving, too
    (out / 'last').rename(out / 'last.previous')
    (out / 'last.saving').mkdir(exist_ok=True)
    (out / 'model.safetensors').write_bytes(b'half')

    refused = run(repo, *args, '--output-dir', out)
    assert refused.returncode == 2 and 'already holds a run' in refused.stderr
    refused = run(repo, '--output-dir', out, '--resume', launch=[*LAUNCH, '--mixed_precision', 'bf16'])
    assert 'resume it in the same way' in refused.stderr
    done = run(repo, '--output-dir', out, '--resume')  # the arguments are remembered
    assert done.returncode == 0 and f'Resuming after epoch {epochs} of 3' in done.stdout, done.stderr
    assert {p.name for p in out.iterdir()} == OUTPUTS
    for name in ('summary.csv', 'predictions_test.csv', 'metrics.json'):
        assert (out / name).read_text() == (finished[0] / name).read_text(), name
    ours, reference = (safetensors.torch.load_file(folder / 'model.safetensors') for folder in (out, finished[0]))
    assert all(torch.equal(ours[k], reference[k]) for k in reference)


def test_resume_of_a_finished_run_looks_at_nothing_again(finished, repo):
    before = (finished[0] / 'metrics.json').stat().st_mtime_ns
    done = run(repo, '--output-dir', finished[0], '--resume')
    assert done.returncode == 0 and 'is finished' in done.stdout
    assert (finished[0] / 'metrics.json').stat().st_mtime_ns == before
    done = run(repo, '--output-dir', finished[0], '--resume', '--seed', 8)
    assert done.returncode == 2 and 'has --seed 7, not 8' in done.stderr


def test_two_processes_share_the_images(repo, isic_sample, tmp_path):
    done = run(repo, '--data', isic_sample, '--img-size', 64, '--batch-size', 7, '--workers', 0, '--epochs', 1,
               '--output-dir', tmp_path / 'out', launch=[*LAUNCH, '--multi_gpu', '--num_processes', '2'])
    assert done.returncode == 0, done.stderr
    assert '2 process(es)' in done.stdout and done.stdout.count('Output folder') == 1
    predictions = read_csv(tmp_path / 'out' / 'predictions_test.csv')
    assert len({p['image_id'] for p in predictions}) == len(predictions) == 48


def test_init_checkpoint_and_other_timm_models(finished, repo, isic_sample, tmp_path):
    torch.manual_seed(0)
    resnet = timm.create_model('resnet14', num_classes=1000)
    safetensors.torch.save_file(resnet.state_dict(), tmp_path / 'resnet14.safetensors')
    done = run(repo, '--data', isic_sample, *SMALL, '--epochs', 1, '--model', 'arl_cnn14_mixed', '--lr', 1e-9,
               '--init-checkpoint', tmp_path / 'resnet14.safetensors', '--output-dir', tmp_path / 'out')
    assert done.returncode == 0 and 'but new fc.weight and fc.bias' in done.stdout, done.stderr
    weights = safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')
    assert torch.allclose(weights['layer4.0.conv2.weight'], resnet.layer4[0].conv2.weight, atol=1e-6)


@pytest.mark.parametrize('args, message', [
    (['--model', 'arl_cnn15'], 'Unknown model arl_cnn15: did you mean'),
    (['--model', 'arl_cnn14', '--pretrained'], 'No pretrained weights exist for arl_cnn14'),
    (['--data', 'no/such/folder'], 'No folder no/such/folder'),
    (['--init-checkpoint', 'nowhere'], 'No weights at nowhere'),
    (['--pretrained', '--init-checkpoint', 'x'], 'not allowed with argument --pretrained'),
    (['--resume'], '--resume needs --output-dir'),
    (['--epochs', '0'], '0 is not between 1 and inf'),
    (['--resume', '--output-dir', 'typo'], 'no run to resume in typo'),
    (['--model', 'vit_tiny_patch16_224', '--img-size', '96'], 'does not take images of 96 px'),
])
def test_bad_arguments_get_one_sentence_and_leave_nothing(repo, tmp_path, args, message):
    done = run(repo, *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and 'Traceback' not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_named_and_keeps_nothing(repo, isic_sample, tmp_path):
    done = run(repo, '--data', isic_sample, *SMALL[:2], '--batch-size', 96, '--epochs', 2, '--lr', 1e30,
               '--output-dir', tmp_path / 'out')
    assert done.returncode == 2 and 'lower --lr' in done.stderr and 'Traceback' not in done.stderr
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'run.json'}


def test_bad_images_stop_the_run_unless_skipped(repo, isic_sample, tmp_path):
    splits = datasets.load_dataset(isic_sample)
    for name, split in splits.items():
        split = split.cast_column('image', datasets.Image(decode=False)).remove_columns('mask')
        content = split.to_list()
        if name == 'train':
            for row in (3, 17):
                content[row]['image']['bytes'] = content[row]['image']['bytes'][:500]
            bad = [content[row]['image_id'] for row in (3, 17)]
        (tmp_path / 'd').mkdir(exist_ok=True)
        features = split.features
        datasets.Dataset.from_list(content, features=features).cast_column('image', datasets.Image()).to_parquet(
            tmp_path / 'd' / f'{name}-00000-of-00001.parquet')
    args = ['--data', tmp_path / 'd', *SMALL, '--epochs', 1, '--output-dir', tmp_path / 'out']
    done = run(repo, *args)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert f'2 of 96 train images do not decode: {bad[0]}, {bad[1]}' in done.stderr and not (tmp_path / 'out').exists()
    done = run(repo, *args, '--skip-bad-images')
    assert done.returncode == 0 and f'Leaving out 2 of 96 train images that do not decode: {bad[0]}' in done.stdout
    assert '94 train' in done.stdout
