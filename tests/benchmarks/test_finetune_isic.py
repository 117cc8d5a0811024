"""The training program, run as its users run it."""
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import timm_arl  # noqa: F401  registers the models

LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no']
SMALL = ['--img-size', '64', '--batch-size', '16', '--workers', '1', '--crops', 'center']
OUTPUTS = {'config.json', 'model.safetensors', 'summary.csv', 'metrics.json', 'run.json', 'last',
           'predictions_validation.csv', 'predictions_test.csv', 'tensorboard', 'looks.csv'}


def command(repo, *args, launch=()):
    return [*(launch or [sys.executable]), str(repo / 'benchmarks' / 'finetune_isic.py'), *map(str, args)]


def run(repo, *args, launch=(), **kwargs):
    return subprocess.run(command(repo, *args, launch=launch), capture_output=True, text=True, timeout=280, **kwargs)


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(repo, isic_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'out'
    args = ['--data', isic_sample, *SMALL, '--epochs', 3, '--seed', 7, '--mixup', 0.2, '--ema', 0.9,
            '--gradient-accumulation-steps', 2]
    done = run(repo, *args, '--output-dir', out,
               launch=[*LAUNCH, '--num_processes', '1'])
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
    assert record['arguments']['recipe'] == 'modern' and record['arguments']['mixup'] == 0.2
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
    assert tuple(data_config['input_size']) == (3, 64, 64)
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
        command(repo, *args, '--output-dir', out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    bar = b''
    while not re.search(rb'epoch 2/3: +[1-9]', bar):  # its progress bar: gradients are gathered, averages half made
        some = os.read(process.stderr.fileno(), 4096)
        assert some, bar[-2000:]
        bar += some
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
    assert epochs == 1
    assert done.returncode == 0 and f'Resuming after epoch {epochs} of 3' in done.stdout, done.stderr
    assert {p.name for p in out.iterdir()} == OUTPUTS
    for name in ('summary.csv', 'predictions_test.csv', 'metrics.json'):
        assert (out / name).read_text() == (finished[0] / name).read_text(), name
    ours, reference = (safetensors.torch.load_file(folder / 'model.safetensors') for folder in (out, finished[0]))
    assert all(torch.equal(ours[k], reference[k]) for k in reference)


def test_a_full_disk_leaves_the_epoch_before(finished, repo, tmp_path):
    def full():  # room for the network's 32 MB, not for the optimizer's 64: a disk that fills up in a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 2 ** 20, 40 * 2 ** 20))

    out = tmp_path / 'out'
    shutil.copytree(finished[0], out)
    for name in ('metrics.json', 'predictions_test.csv', 'predictions_validation.csv', 'looks.csv'):
        (out / name).unlink()
    progress = json.loads((out / 'last' / 'progress.json').read_text())
    record = json.loads((out / 'run.json').read_text())
    record['arguments']['epochs'] = 4  # so that an epoch is left to do
    (out / 'run.json').write_text(json.dumps(record))
    done = run(repo, '--output-dir', out, '--resume', preexec_fn=full)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'What epoch 4 left could not be written' in done.stderr and 'epoch 3 is there, whole' in done.stderr
    assert json.loads((out / 'last' / 'progress.json').read_text()) == progress
    assert not (out / 'last.saving').exists()
    done = run(repo, '--output-dir', out, '--resume')
    assert done.returncode == 0 and 'Resuming after epoch 3 of 4' in done.stdout, done.stderr


def test_resume_of_a_finished_run_looks_at_nothing_again(finished, call):
    before = (finished[0] / 'metrics.json').stat().st_mtime_ns
    done = call('finetune_isic', '--output-dir', finished[0], '--resume')
    assert done.returncode == 0 and 'is finished' in done.stdout
    assert (finished[0] / 'metrics.json').stat().st_mtime_ns == before
    done = call('finetune_isic', '--output-dir', finished[0], '--resume', '--seed', 8)
    assert done.returncode == 2 and 'has --seed 7, not 8' in done.stderr


def test_two_processes_are_one(repo, isic_sample, tmp_path):
    """Two processes at half the batch see the same images as one, once each; with frozen norms they learn the same."""
    results = []
    for processes, batch_size, launch in (
            (2, 7, [*LAUNCH, '--multi_gpu', '--num_processes', '2']), (1, 14, [*LAUNCH, '--num_processes', '1'])):
        out = tmp_path / str(processes)
        done = run(repo, '--data', isic_sample, *SMALL[:2], '--batch-size', batch_size, '--workers', 0, '--epochs', 2,
                   '--freeze-bn', '--optimizer', 'momentum', '--lr', 0.01, '--tracker', 'none', '--output-dir', out,
                   launch=launch)
        assert done.returncode == 0, done.stderr
        assert f'{processes} process(es)' in done.stdout and done.stdout.count('Output folder') == 1
        predictions = read_csv(out / 'predictions_test.csv')
        assert len({p['image_id'] for p in predictions}) == len(predictions) == 48
        results.append((json.loads((out / 'metrics.json').read_text()), read_csv(out / 'summary.csv'),
                        safetensors.torch.load_file(out / 'model.safetensors')))
    (metrics, summary, weights), (expected_metrics, expected_summary, expected) = results
    for ours, theirs in zip(summary, expected_summary):
        assert float(ours['train_loss']) == pytest.approx(float(theirs['train_loss']), rel=1e-4)
    assert metrics['test']['mean_auc'] == pytest.approx(expected_metrics['test']['mean_auc'], abs=5e-3)
    start = timm.create_model('arl_cnn14', num_classes=2).state_dict()
    for key in expected:
        assert torch.allclose(weights[key], expected[key], atol=2e-5, rtol=1e-3), key
    assert not torch.allclose(expected['layer4.0.conv2.weight'], start['layer4.0.conv2.weight'], atol=1e-4)


def test_folds_and_seeds(repo, isic_sample, tmp_path):
    from timm_arl.isic.dataset import load_splits
    out = tmp_path / 'cv'
    ids = list(load_splits(isic_sample)['train']['image_id'])
    (tmp_path / 'twins.csv').write_text('image_id_a,image_id_b\n' + f'{ids[0]},{ids[50]}\n{ids[50]},{ids[90]}\n')
    args = ['--data', isic_sample, *SMALL[:4], '--workers', 0, '--crops', 'center', '--epochs', 1, '--tracker', 'none',
            '--folds', 2, '--duplicates', tmp_path / 'twins.csv', '--output-dir', out]
    done = run(repo, *args)
    assert done.returncode == 0, done.stderr
    parts = [[p['image_id'] for p in read_csv(out / f'fold-{k}' / 'predictions_validation.csv')] for k in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(ids) and not (out / 'fold-0' / 'predictions_test.csv').exists()
    assert len({ids[0] in parts[0], ids[50] in parts[0], ids[90] in parts[0]}) == 1  # twins of twins stay together
    labels = {p['image_id']: p for p in load_splits(isic_sample)['train'].select_columns(
        ['image_id', 'melanoma']).to_list()}
    assert abs(sum(labels[i]['melanoma'] for i in parts[0]) - 16) <= 2  # stratified
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['cross_validation']['melanoma']['images'] == 96
    assert metrics['runs']['validation_mean_auc']['runs'] == 2
    done = run(repo, '--resume', '--output-dir', out / 'fold-1')  # which would else train on all images
    assert done.returncode == 2 and 'is fold-1 of a cross-validation: resume that as a whole' in done.stderr
    before = (out / 'fold-0' / 'model.safetensors').stat().st_mtime_ns
    (out / 'metrics.json').unlink()
    (out / 'fold-1' / 'metrics.json').unlink()  # as if killed before its end
    done = run(repo, '--resume', '--output-dir', out)
    assert done.returncode == 0, done.stderr
    assert (out / 'fold-0' / 'model.safetensors').stat().st_mtime_ns == before
    assert json.loads((out / 'metrics.json').read_text()) == metrics


def test_folds_do_not_start_from_what_saw_the_held_out_images(finished, call, isic_sample, tmp_path):
    args = ['--data', isic_sample, *SMALL, '--folds', 2, '--output-dir', tmp_path / 'cv']
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


def test_streaming_by_two_processes_and_a_softmax(repo, isic_sample, tmp_path):
    out = tmp_path / 'out'
    done = run(repo, '--data', isic_sample, *SMALL[:2], '--batch-size', 8, '--workers', 0, '--crops', 'center',
               '--epochs', 2, '--streaming', '--head', 'softmax', '--tracker', 'none', '--output-dir', out,
               launch=[*LAUNCH, '--multi_gpu', '--num_processes', '2'])
    assert done.returncode == 0 and '96 train' in done.stdout, done.stderr
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.num_classes == 3
    assert model.pretrained_cfg['label_names'] == ['nevus', 'melanoma', 'seborrheic_keratosis']
    values = [[float(p[label]) for label in ('melanoma', 'seborrheic_keratosis')]
              for p in read_csv(out / 'predictions_test.csv')]
    assert len(values) == 48 and all(sum(pair) < 1 for pair in values)
    done = subprocess.run(
        [sys.executable, repo / 'benchmarks' / 'evaluate_isic.py', '--data', isic_sample, '--checkpoint', out,
         '--output-dir', tmp_path / 'r', '--workers', '0'], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr  # the crops are those of the run
    assert json.loads((tmp_path / 'r' / 'metrics.json').read_text())['test']['mean_auc'] == pytest.approx(
        json.loads((out / 'metrics.json').read_text())['test']['mean_auc'], abs=1e-9)


def test_a_teacher_is_followed(finished, repo, isic_sample, tmp_path):
    """A student that hears nothing but the teacher comes nearer to it than one that hears nothing but the labels."""
    args = ['--data', isic_sample, *SMALL, '--epochs', 2, '--model', 'resnet14', '--tracker', 'none']
    taught = run(repo, *args, '--teacher', finished[0], '--distill-weight', 1, '--output-dir', tmp_path / 'taught')
    assert taught.returncode == 0 and 'probabilities and pooled features' in taught.stdout, taught.stderr
    alone = run(repo, *args, '--output-dir', tmp_path / 'alone')
    assert alone.returncode == 0, alone.stderr
    teacher, *students = (
        np.array([[float(p['melanoma']), float(p['seborrheic_keratosis'])] for p in read_csv(
            folder / 'predictions_validation.csv')])
        for folder in (finished[0], tmp_path / 'taught', tmp_path / 'alone'))
    distances = [np.abs(student - teacher).mean() for student in students]
    assert distances[0] < distances[1]
    model = timm.create_model(f'local-dir:{tmp_path / "taught"}', pretrained=True)  # a plain network, no projection
    assert not [name for name, _ in model.named_parameters() if 'projection' in name] and model.num_classes == 2


def test_recipes_and_their_flags(repo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(repo / 'benchmarks')
    from timm_arl.training import options
    parser = options.build_parser('About.\n\nMore.')
    paper = options.parse_args(parser, ['--recipe', 'paper'])
    # as printed: SGD, batch 32, 0.01 from scratch and 1e-4 fine-tuning, halved every 30 epochs, at most 100 epochs
    assert (paper.optimizer, paper.batch_size, paper.lr) == ('momentum', 32, 0.01)
    assert options.parse_args(parser, ['--recipe', 'paper', '--pretrained']).lr == 1e-4
    assert (paper.schedule, paper.decay_epochs, paper.decay_rate, paper.epochs) == ('step', 30, 0.5, 100)
    assert (paper.augmentation, paper.crops, paper.ema, paper.mixup) == ('paper', 'paper', 0, 0)
    assert options.parse_args(parser, ['--recipe', 'paper', '--epochs', '7']).epochs == 7
    (tmp_path / 'mine.yaml').write_text((repo / 'timm_arl' / 'training' / 'recipes' / 'paper.yaml').read_text().replace(
        'lr: 0.01', 'lr: 0.02').replace('epochs: 100', 'epochs: 3\ngrey-world: true'))
    mine = options.parse_args(parser, ['--recipe', str(tmp_path / 'mine.yaml'), '--no-grey-world'])
    assert (mine.epochs, mine.lr, mine.grey_world) == (3, 0.02, False)


@pytest.mark.parametrize('content, message', [
    ('epocs: 3', 'sets epocs: 3, but a recipe sets one value each of img-size,'),
    ('data: x', 'sets data: x, but a recipe sets'), ('epochs: [1, 2]', 'sets epochs'),
    ('from-scratch: 3', 'below from-scratch and from-weights'), ('epochs: 3', 'nor a flag sets --batch-size'),
    ('grey-world: maybe', 'must be true or false'), ('- 3', 'must hold lines of the form'), ('a: [', 'cannot be read'),
    ('epochs: many', "recipe r.yaml: argument --epochs: invalid int value: 'many'"),
    ('schedule: cos', "recipe r.yaml: argument --schedule: invalid choice: 'cos'")])
def test_bad_recipes(call, tmp_path, content, message):
    (tmp_path / 'r.yaml').write_text(content)
    done = call('finetune_isic', '--recipe', 'r.yaml', cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_preview(call, isic_sample, tmp_path):
    done = call('finetune_isic', '--data', isic_sample, '--img-size', 64, '--preview', 'sheet.png', '--grey-world',
                cwd=tmp_path)
    assert done.returncode == 0 and 'sheet.png' in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['sheet.png']
    with Image.open(tmp_path / 'sheet.png') as picture:
        assert picture.width > 8 * 64 and picture.height > 3 * 64


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
    (['--recipe', 'moden'], 'No recipe moden: choose modern, paper, or a YAML file'),
    (['--tracker', 'wandbb'], 'Accelerate finds no tracker wandbb'),
    (['--init-checkpoint', ''], '--init-checkpoint is empty: give it a value, or leave it out'),
    (['--model', ''], '--model is empty'),
    (['--sync-bn'], '--sync-bn works on CUDA devices, not on cpu'),
    (['--teacher', 'nowhere'], 'No folder nowhere, and no model of that name'),
    (['--mask-weight', '1', '--augmentation', 'paper'], '--augmentation paper changes no masks'),
    (['--resume'], '--resume needs --output-dir'),
    (['--epochs', '0'], '0 is not between 1 and inf'),
    (['--folds', '1'], '1 is not between 2 and inf'),
    (['--resume', '--output-dir', 'typo'], 'no run to resume in typo'),
    (['--model', 'vit_tiny_patch16_224', '--img-size', '96'], 'does not take images of 96 px'),
])
def test_bad_arguments_get_one_sentence_and_leave_nothing(call, tmp_path, args, message):
    done = call('finetune_isic', *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_program_itself_is_one_sentence(repo, tmp_path):
    done = run(repo, '--data', 'no/such/folder', cwd=tmp_path)
    assert done.returncode == 2 and 'No folder no/such/folder' in done.stderr and 'Traceback' not in done.stderr


def test_divergence_is_named_and_keeps_nothing(repo, isic_sample, tmp_path):
    done = run(repo, '--data', isic_sample, *SMALL[:2], '--batch-size', 96, '--epochs', 2, '--lr', 1e30,
               '--output-dir', tmp_path / 'out')
    assert done.returncode == 2 and 'lower --lr' in done.stderr and 'Traceback' not in done.stderr
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'run.json', 'tensorboard'}


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
    assert f'2 of 96 train images cannot be read: {bad[0]}, {bad[1]} ({bad[0]}: ' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = run(repo, *args, '--skip-bad-images')
    assert done.returncode == 0 and f'Leaving out 2 of 96 train images that cannot be read: {bad[0]}' in done.stdout
    assert '94 train' in done.stdout


def test_a_run_does_not_go_on_with_other_images(finished, call, isic_sample, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(finished[0], out)
    (out / 'metrics.json').unlink()
    (out / 'run.json').write_text((out / 'run.json').read_text().replace(json.dumps(isic_sample), '"demo"'))
    done = call('finetune_isic', '--output-dir', out, '--resume')
    assert done.returncode == 2 and 'had other training images than demo has now' in done.stderr
