"""The segmentation program, run as its users run it."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import safetensors.torch
import scipy.ndimage
import segmentation_models_pytorch as smp
import timm
import torch
from forked import Forked
from in_process import run_here
from PIL import Image, ImageDraw
from small_data import FEATURES

MASKED = datasets.Features({**FEATURES, 'aspect_ratio': datasets.Value('float32'), 'mask': datasets.Image()})
SMALL = ['--encoder', 'tu-test_efficientnet', '--encoder-weights', 'none', '--img-size', 64, '--batch-size', 8,
         '--workers', 0, '--cpu-threads', 1]
OUTPUTS = {'config.json', 'model.safetensors', 'summary.csv', 'metrics.json', 'run.json', 'last', 'data'}


def cell(picture, fmt):
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **({'quality': 92} if fmt == 'JPEG' else {}))
    return {'bytes': buffer.getvalue(), 'path': None}


def drawn(count, first, masks=True, seed=0):
    """Brown ellipses on pale skin, most of them away from the centre; each third image is a squashed copy."""
    made = []
    for i in range(count):
        rng = np.random.default_rng((seed, first, i))
        size, squashed = ((96, 72), (72, 96), (80, 80))[i % 3], i % 3 == 2
        mask = Image.new('L', size)
        x, y, a, b = *rng.uniform(0.25, 0.75, 2), *rng.uniform(0.1, 0.22, 2)
        ImageDraw.Draw(mask).ellipse([(x - a) * size[0], (y - b) * size[1], (x + a) * size[0], (y + b) * size[1]], 255)
        skin, lesion = np.array((222, 180, 155)) + rng.normal(0, 10, 3), np.array((110, 70, 50)) + rng.normal(0, 12, 3)
        pixels = np.where(np.asarray(mask)[..., None] > 127, lesion, skin) + rng.normal(0, 8, (*size[::-1], 3))
        made.append({
            'image': cell(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), 'JPEG'),
            'image_id': f'ISIC_{first + i:07d}', 'melanoma': float(i % 4 == 1),
            'seborrheic_keratosis': float(i % 4 == 3), 'aspect_ratio': 1.5 if squashed else size[0] / size[1],
            'mask': cell(mask, 'PNG') if masks else None})
    return made


def write(folder, train=40, known=True):
    (folder / 'data').mkdir(parents=True)
    for name, content in (('train', drawn(train, 0, known)), ('validation', drawn(15, 1000)),
                          ('test', drawn(9, 2000, masks=False))):
        datasets.Dataset.from_list(content, features=MASKED).to_parquet(
            folder / 'data' / f'{name}-00000-of-00001.parquet')
    (folder / 'duplicates.csv').write_text('image_id_a,image_id_b\nISIC_0000000,ISIC_0002000\n')
    (folder / 'prepare.json').write_text('{"table": "0", "groups": "case_no"}')  # as prepare --group-column keeps it
    return folder


@pytest.fixture(scope='session')
def ellipses(tmp_path_factory):
    return write(tmp_path_factory.mktemp('ellipses') / 'drawn')


def lesion(mask):
    return np.asarray(Image.open(io.BytesIO(mask['bytes'])).convert('L')) > 127


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.fixture(scope='session')
def finished(ellipses, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'out'
    args = ['--data', ellipses, *SMALL, '--epochs', 8, '--lr', 3e-3, '--seed', 3]
    done = run_here('segment_lesions', *args, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, args


@pytest.mark.slow
def test_masks_are_better_than_a_disc_and_the_scores_are_theirs(finished, ellipses):
    from timm_arl.isic.dataset import load_splits
    out, stdout, _ = finished
    assert {path.name for path in out.iterdir()} == OUTPUTS
    truth = [lesion(mask) for mask in load_splits(str(ellipses))['validation']['mask']]
    predicted = [lesion(mask) for mask in load_splits(str(out / 'data'))['validation']['mask']]
    assert [mask.shape for mask in predicted] == [mask.shape for mask in truth]  # those of the stored images

    def disc(shape, radius):
        y, x = (np.linspace(-1, 1, side) for side in shape)
        return y[:, None] ** 2 + x ** 2 < radius ** 2

    discs = [np.mean([dice(disc(mask.shape, radius), mask) for mask in truth]) for radius in np.arange(0.1, 1.5, 0.1)]
    scores = json.loads((out / 'metrics.json').read_text())
    for name, measure in (('dice', dice), ('iou', iou)):
        values = [measure(a, b) for a, b in zip(predicted, truth)]
        assert scores['validation'][name] == pytest.approx(np.mean(values), abs=0.02), name
        low, high = scores['validation'][f'{name}_ci95']
        assert low < scores['validation'][name] < high < low + 6 * np.std(values) / np.sqrt(len(values))
        assert f'{scores["validation"][name]:.3f} [{low:.3f}, {high:.3f}]' in stdout
    assert scores['validation']['dice'] > max(discs) + 0.1
    assert scores['validation']['images'] == 15 and set(scores['test']) == {'empty_masks'}  # it has no masks to compare
    with open(out / 'summary.csv', newline='') as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == 8 and scores['validation']['dice'] == pytest.approx(
        max(float(row['validation_dice']) for row in summary))
    # in test, too, where nobody told it: it has the lesions that were drawn
    drawn_test = [lesion(row['mask']) for row in drawn(9, 2000)]
    test = [lesion(mask) for mask in load_splits(str(out / 'data'))['test']['mask']]
    assert np.mean([dice(a, b) for a, b in zip(test, drawn_test)]) > max(discs) + 0.1


@pytest.mark.slow
def test_the_data_are_the_same_but_for_masks_and_are_cropped_by_them(finished, ellipses, call, tmp_path):
    from timm_arl.isic.dataset import load_splits
    before, after = load_splits(str(ellipses)), load_splits(str(finished[0] / 'data'))
    assert list(after) == list(before)
    for name in before:
        assert after[name].features == before[name].features
        for old, new in zip(before[name], after[name]):
            assert {**old, 'mask': None} == {**new, 'mask': None}  # image bytes too
            assert (old['mask'] == new['mask']) == (name == 'train')
    assert (finished[0] / 'data' / 'duplicates.csv').read_bytes() == (ellipses / 'duplicates.csv').read_bytes()
    # not the digests, by which prepare would take the folder for its own
    assert json.loads((finished[0] / 'data' / 'prepare.json').read_text()) == {'groups': 'case_no'}
    shutil.move(shutil.copytree(finished[0] / 'data', tmp_path / 'copy'), tmp_path / 'elsewhere')  # it needs no other
    done = call('finetune_isic', '--data', tmp_path / 'elsewhere', '--lesion-crop', '--model', 'resnet14', '--img-size',
                64, '--start-size', 64, '--model-kwargs', 'channels=[8,16,32,64]', '--epochs', 1, '--crops', 'center',
                '--tracker', 'none', '--workers', 0, '--cpu-threads', 1, '--output-dir', tmp_path / 'out')
    assert done.returncode == 0 and 'leaves them whole' not in done.stdout, done.stderr
    assert (tmp_path / 'out' / 'predictions_test.csv').is_file()


@pytest.mark.slow
def test_the_network_is_one_of_the_library(finished):
    from timm_arl.isic.dataset import load_splits
    out, _, _ = finished
    network = smp.from_pretrained(out).eval()
    assert type(network) is smp.DeepLabV3Plus
    row = drawn(1, 1000)[0]
    image = Image.open(io.BytesIO(row['image']['bytes'])).resize((96, 96), Image.Resampling.BILINEAR)
    config = timm.data.resolve_model_data_config(timm.create_model('test_efficientnet'))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(config['mean']).view(3, 1, 1)) / torch.tensor(config['std']).view(3, 1, 1)
    with torch.inference_mode():
        logits = network(pixels[None])
    found = np.asarray(Image.fromarray(logits[0, 0].numpy()).resize((96, 72), Image.Resampling.BILINEAR)) > 0
    stored = lesion(load_splits(str(out / 'data'))['validation'][0]['mask'])
    parts, count = scipy.ndimage.label(found)
    assert max(dice(parts == part, stored) for part in range(1, count + 1)) > 0.99


@pytest.mark.slow
def test_killed_and_resumed_is_as_undisturbed(finished, call, tmp_path):
    from timm_arl.isic.dataset import load_splits
    out, args = tmp_path / 'killed', finished[2]
    program = Forked('segment_lesions', *args, '--output-dir', out)
    while not re.search(r'epoch 3/8: +\d+%.* [1-9]/5', program.stderr):
        assert program.returncode is None, program.stderr
        time.sleep(0.01)
    program.kill()
    assert not (out / 'metrics.json').exists() and not (out / 'data').exists()
    epochs = len(json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    # as after a kill in the middle of the next epoch's saving, too, and of the writing of the data
    (out / 'last').rename(out / '.last.previous')
    (out / 'last.saving').mkdir(exist_ok=True)
    (out / '.data.new').mkdir()
    (out / '.data.new' / 'half').touch()
    (out / 'model.safetensors').write_bytes(b'half')

    refused = call('segment_lesions', *args, '--output-dir', out)
    assert refused.returncode == 2 and 'already holds a run' in refused.stderr
    refused = call('segment_lesions', '--output-dir', out, '--resume', '--seed', 4)
    assert refused.returncode == 2 and 'has --seed 3, not 4' in refused.stderr
    done = call('segment_lesions', '--output-dir', out, '--resume')  # the arguments are remembered
    assert done.returncode == 0 and f'Resuming after epoch {epochs} of 8' in done.stdout, done.stderr
    assert {path.name for path in out.iterdir()} == OUTPUTS
    for name in ('summary.csv', 'metrics.json'):
        assert (out / name).read_text() == (finished[0] / name).read_text(), name
    ours, reference = (safetensors.torch.load_file(folder / 'model.safetensors') for folder in (out, finished[0]))
    assert all(torch.equal(ours[k], reference[k]) for k in reference)
    masks = [list(load_splits(str(folder / 'data'))['test']['mask']) for folder in (out, finished[0])]
    assert masks[0] == masks[1]
    done = call('segment_lesions', '--output-dir', out, '--resume')
    assert done.returncode == 0 and 'This run is finished' in done.stdout


@pytest.mark.slow
def test_weights_reach_the_encoder_and_a_network_goes_on(call, ellipses, finished, tmp_path):
    torch.manual_seed(5)
    model = timm.create_model('test_efficientnet')
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'given.safetensors')
    args = ['--data', ellipses, *[arg for arg in SMALL if arg not in ('--encoder-weights', 'none')], '--lr', 1e-9,
            '--epochs', 1]
    done = call('segment_lesions', *args, '--encoder-weights', tmp_path / 'given.safetensors', '--output-dir',
                tmp_path / 'a')
    assert done.returncode == 0, done.stderr
    weights = safetensors.torch.load_file(tmp_path / 'a' / 'model.safetensors')
    parameters = {f'encoder.model.{name}': value for name, value in model.named_parameters()}
    shared = parameters.keys() & weights.keys()
    assert len(shared) == sum(1 for _ in timm.create_model('test_efficientnet', features_only=True).parameters())
    assert all(torch.allclose(weights[name], parameters[name], atol=1e-6) for name in shared)
    done = call('segment_lesions', *args, '--init-checkpoint', finished[0], '--output-dir', tmp_path / 'b')
    assert done.returncode == 0, done.stderr
    first, then = (json.loads((folder / 'metrics.json').read_text())['validation']['dice']
                   for folder in (finished[0], tmp_path / 'b'))
    assert then > first - 0.1


@pytest.mark.slow
def test_the_hub_out_of_reach(repo, ellipses, tmp_path):
    done = subprocess.run(
        [sys.executable, repo / 'benchmarks' / 'segment_lesions.py', '--data', ellipses, '--output-dir', 'out'],
        capture_output=True, text=True, timeout=280, cwd=tmp_path, env=dict(
            os.environ, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hf'), HF_HUB_CACHE=str(tmp_path / 'hf')))
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert '--encoder-weights hub: it is not in the cache and HF_HUB_OFFLINE is set; pass a .safetensors file' in (
        done.stderr)
    assert not (tmp_path / 'out').exists()


NEW = ['--data', 'demo', '--output-dir', 'out', '--encoder', 'tu-test_efficientnet']
RANDOM = [*NEW, '--encoder-weights', 'none']


@pytest.mark.parametrize('args, message', [
    (['--output-dir', 'out'], '--data is missing'),
    (['--data', 'demo'], '--output-dir is missing'),
    (['--resume'], '--resume needs --output-dir'),
    ([*NEW, '--encoder-weights', ''], '--encoder-weights is empty'),
    ([*RANDOM, '--data', 'no/such/folder'], 'No folder no/such/folder'),
    ([*NEW, '--encoder', 'resnet18'], 'resnet18 must be the name of a timm model with the prefix tu-: try tu-resnet18'),
    ([*NEW, '--encoder', 'tu-resnet19'], 'Unknown model resnet19: did you mean'),
    ([*NEW, '--encoder', 'tu-test_vit'], '--encoder tu-test_vit gives no feature maps that DeepLabV3+ can use'),
    ([*NEW, '--encoder-weights', 'nowhere.safetensors'], 'No weights at nowhere.safetensors: pass a .safetensors file'),
    ([*NEW, '--encoder-weights', 'other.safetensors'], 'other.safetensors does not fit EfficientNet: '),
    ([*NEW, '--init-checkpoint', 'other.safetensors'], 'other.safetensors does not fit DeepLabV3Plus: '),
    ([*NEW, '--init-checkpoint', 'damaged.safetensors'], 'damaged.safetensors is not a readable safetensors file'),
    ([*RANDOM, '--init-checkpoint', 'x'], 'not allowed with argument --encoder-weights'),
    ([*NEW, '--img-size', '100'], '--img-size must be a multiple of 16, not 100.'),
    ([*NEW, '--batch-size', '1'], 'must be at least 2, not 1'),
    ([*NEW, '--output-dir', 'taken'], 'taken already holds a folder data, perhaps a data set: choose another'),
    ([*NEW, '--output-dir', 'run'], 'run already holds a run: continue it with --resume'),
    ([*NEW, '--output-dir', 'other.safetensors'], 'Cannot make the output folder other.safetensors: '),
])
def test_bad_arguments_get_one_sentence_and_leave_nothing(call, tmp_path, args, message):
    safetensors.torch.save_file({'fc.weight': torch.zeros(2, 3)}, tmp_path / 'other.safetensors')
    (tmp_path / 'damaged.safetensors').write_bytes((tmp_path / 'other.safetensors').read_bytes()[:-4])
    (tmp_path / 'taken' / 'data').mkdir(parents=True)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').touch()
    before = sorted(tmp_path.rglob('*'))
    done = call('segment_lesions', *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('error:') == 1, done.stderr
    assert sorted(tmp_path.rglob('*')) == before


def test_masks_that_are_not_known(call, tmp_path):
    folder = write(tmp_path / 'd', train=4, known=False)
    done = call('segment_lesions', '--data', folder, *SMALL, '--output-dir', tmp_path / 'out')
    assert done.returncode == 2 and 'split train, has 0 lesion masks' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_specks_do_not_count(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / 'benchmarks')
    from segment_lesions import largest_part
    found = np.zeros((20, 30), bool)
    found[5:12, 8:20] = True
    found[0, 0] = found[18:20, 27:29] = True
    kept = largest_part(found)
    assert kept.sum() == 7 * 12 and kept[5:12, 8:20].all()
    assert not largest_part(np.zeros((20, 30), bool)).any()
