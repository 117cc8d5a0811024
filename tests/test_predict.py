"""The program that strangers run first: their files in, probabilities and pictures out, whatever the files are."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from predict_program import env, rows, run, values
from scipy.special import expit, logit

from timm_arl.export import export_onnx
from timm_arl.factory import Checkpoint, save_network
from timm_arl.files import write_json
from timm_arl.isic import LABELS
from timm_arl.isic.images import decode
from timm_arl.isic.transforms import restore_aspect
from timm_arl.predict import main
from timm_arl.predictor import Predictor, read_picture

CONFIG = json.loads((Checkpoint('arl_cnn14.isic2017').folder / 'config.json').read_text())


def test_ten_photographs(predict, photographs, tmp_path):
    done = predict('.', cwd=photographs, workers=2)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / 'out')
    assert [row['image'] for row in found] == [
        './a/lesion1.jpg', './a/lesion4.png', './a/lesion7.jpg', './b/c/lesion2.png', './b/c/lesion5.jpg',
        './lesion0.png', './lesion3.jpg', './lesion6.png']
    predictor = Predictor()
    for row in found:
        tensor, _ = predictor.prepare(read_picture(photographs / row['image']))
        p = predictor.probabilities(tensor)
        assert values([row])[0] == pytest.approx(p.tolist(), abs=1e-6)
        assert [row[f'{label}_decision'] for label in LABELS] == [str(int(x)) for x in predictor.decide(p).values()]
        assert row['error'] == ''
    assert sorted(os.listdir(tmp_path / 'out')) == ['predictions.csv', 'predictions.json']
    shown = re.search(r'^\./a/lesion1\.jpg: melanoma ([\d.]+) \((not )?above 0.330\), seborrheic', done.stdout, re.M)
    assert float(shown.group(1)) == pytest.approx(float(found[0]['melanoma']), abs=6e-4)
    assert 'Not a medical device' in done.stdout and re.search(r'8 images, [\d.]+ images/s', done.stdout)
    assert 'Thresholds: youden on validation' in done.stdout and done.stderr == ''


def test_thresholds_and_calibration(predict, photographs, tmp_path):
    def found(*args):
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        done = predict(photographs, *args)
        assert done.returncode == 0, done.stderr
        return rows(tmp_path / 'out'), done.stdout

    plain, _ = found('--threshold-name', 'sensitivity')
    raw = values(plain)
    for k, label in enumerate(LABELS):
        threshold = CONFIG['thresholds']['sensitivity 0.9 on validation'][label]
        assert [row[f'{label}_decision'] == '1' for row in plain] == list(raw[:, k] > threshold)
    assert any(len({row[f'{label}_decision'] for row in plain}) == 2 for label in LABELS)
    calibrated, stdout = found('--threshold-name', 'sensitivity', '--calibrated')
    temperatures, biases = ([CONFIG[name][label] for label in LABELS] for name in ('temperatures', 'biases'))
    assert np.allclose(values(calibrated), expit(logit(raw) / temperatures + biases), atol=1e-6)
    for a, b in zip(plain, calibrated):
        assert [a[f'{label}_decision'] for label in LABELS] == [b[f'{label}_decision'] for label in LABELS]
    threshold = CONFIG['thresholds']['sensitivity 0.9 on validation']['melanoma']
    shown = expit(logit(threshold) / temperatures[0] + biases[0])
    assert f'melanoma {shown:.3f}' in stdout.split('Thresholds:')[1]
    assert not np.allclose(values(found('--crops', 'center')[0]), raw, atol=1e-3)


def test_a_calibration_that_was_not_determined_is_doubted(predict, photographs, tiny, tmp_path):
    run = shutil.copytree(tiny, tmp_path / 'run')
    values = dict.fromkeys(LABELS, 1.)
    write_json(run / 'home.json', {'thresholds': {}, 'temperatures': values, 'biases': values, 'doubts': [
        'Do not use the calibration of melanoma: too few.']})
    for flags, times in (((), 0), (('--calibrated',), 1)):
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        done = predict(photographs / 'a', '--model', run, *flags)
        assert done.returncode == 0 and done.stderr.count('Do not use the calibration of melanoma: too few.') == times
        noted = json.loads((tmp_path / 'out' / 'predictions.json').read_text())['remarks']
        assert len([note for note in noted if 'too few' in note]) == times


def test_files_of_the_user_are_kept(predict, tiny, photographs, tmp_path):
    (tmp_path / 'out').mkdir()
    for name in ('images.jsonl', '.lock'):
        (tmp_path / 'out' / name).write_text('mine')
    assert predict(photographs / 'a', '--model', tiny).returncode == 0
    assert {path.name: path.read_text() for path in (tmp_path / 'out').iterdir() if 'predictions' not in path.name} == {
        'images.jsonl': 'mine', '.lock': 'mine'}


def test_json_lines_and_parquet(predict, photographs, tiny, tmp_path):
    done = predict(photographs / 'a', '--model', tiny, '--format', 'jsonl')
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'predictions.jsonl').read_text().splitlines()]
    assert done.returncode == 0 and len(lines) == 3 and isinstance(lines[0]['melanoma_decision'], bool)
    shutil.rmtree(tmp_path / 'out')
    assert predict(photographs / 'a', '--model', tiny, '--format', 'parquet').returncode == 0
    assert pyarrow.parquet.read_table(tmp_path / 'out' / 'predictions.parquet').to_pylist() == lines
    done = predict(photographs / 'a', '--model', tiny, '--format', 'parquet', '--resume')
    assert done.returncode == 0 and '3 of 3 images were done before' in done.stdout
    assert sorted(os.listdir(tmp_path / 'out')) == ['predictions.json', 'predictions.parquet']


def test_overlays(predict, photographs, tiny, tmp_path):
    for folder in ('x', 'y'):
        (tmp_path / folder).mkdir()
        shutil.copy(photographs / 'lesion3.jpg', tmp_path / folder / 'æ,1.jpg')
    Image.open(photographs / 'lesion0.png').resize((1800, 1500)).save(tmp_path / 'large.png')
    (tmp_path / 'x' / 'bad.jpg').touch()
    done = predict('x', 'y', 'large.png', '--model', tiny, '--overlays')
    assert done.returncode == 1
    assert sorted(os.listdir(tmp_path / 'out' / 'overlays')) == ['large.png', 'æ,1-2.png', 'æ,1.png']
    for name in ('æ,1.png', 'large.png'):
        picture = np.asarray(Image.open(tmp_path / 'out' / 'overlays' / name)).astype(int)
        thirds = np.array_split(picture[30:330], 3, axis=1)
        assert picture.shape[1] <= 3 * 1024 + 200 and picture.shape[2] == 3
        assert np.abs(thirds[1][:, :300] - thirds[2][:, :300]).mean() > 2  # a map for each label, not one twice
    assert {path.name for path in tmp_path.iterdir()} == {'x', 'y', 'out', 'large.png'}


@pytest.mark.parametrize('name', ['resnet14', 'arl_cnn50', 'resnet18', 'arl_tf_efficientnet_lite0'])
def test_networks_that_know_no_lesions_are_refused_before_any_download(predict, photographs, tmp_path, name):
    done = predict(photographs, '--model', name)
    assert done.returncode == 2 and f'The weights that {name} loads do not know skin lesions' in done.stderr
    own = 'or arl_tf_efficientnet_lite0.isic2017.'
    assert own in done.stderr and ('arl_cnn14.isic2017 or' in done.stderr) == (name not in own)


def test_what_is_refused(predict, photographs, tmp_path):
    def refused(words, *args, cwd=photographs):
        before = sorted(tmp_path.rglob('*'))
        done = predict(*args, cwd=cwd)
        assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
        assert done.stderr.count('error:') == 1 and 'Traceback' not in done.stderr
        assert [p for p in sorted(tmp_path.rglob('*')) if p not in before] == []

    (tmp_path / 'none').mkdir()
    refused('required: IMAGE', '--overlays')
    refused('No file or folder lesoin.jpg', 'lesoin.jpg')
    refused('none holds no images', 'none', cwd=tmp_path)
    refused(r'No file matches x\*\.jpg', 'x*.jpg')
    refused('no model of that name: did you mean', '.', '--model', 'arl_cnn15')
    refused('outputs of arl_cnn14.isic2018|No weights', '.', '--model', 'arl_cnn14.isic2018')
    refused('No file none.onnx', '.', '--onnx', 'none.onnx')
    refused("has 'official', 'youden on validation'|'youden on validation'", '.', '--threshold-name', 'best')
    refused('--device vulkan9 cannot be used: .*. --device cpu works on every machine', '.', '--device', 'vulkan9')
    refused('--device meta computes nothing', '.', '--device', 'meta')
    refused('must be at least 1', '.', '--batch-size', '0')
    refused('not allowed with', '.', '--onnx', 'a.onnx', '--model', 'arl_cnn14.isic2017')
    (tmp_path / 'out').mkdir()
    refused('is also the output folder', tmp_path / 'out', cwd=tmp_path)
    for flag in ('--model', '--onnx', '--threshold-name', '--device'):
        refused(f'{flag}: must not be empty', '.', flag, '')
    (tmp_path / 'out' / 'predictions.csv').write_text('precious')
    for resume in ((), ('--resume',)):
        refused('predictions.csv is not from a run', '.', *resume)
    assert (tmp_path / 'out' / 'predictions.csv').read_text() == 'precious'
    assert os.listdir(tmp_path / 'out') == ['predictions.csv']


@pytest.mark.parametrize('variables, words', [
    ({'TIMM_ARL_KERNELS': 'foo'}, "TIMM_ARL_KERNELS is 'foo': set it to auto, torch"),
    ({'TIMM_ARL_KERNELS': 'triton', 'CUDA_VISIBLE_DEVICES': ''}, 'TIMM_ARL_KERNELS asks for triton'),
    ({'WORLD_SIZE': '2', 'RANK': '0'}, 'The 2 processes .WORLD_SIZE. cannot be joined: .* Start them with torchrun')])
def test_what_the_environment_says_wrong_is_not_an_unreadable_image(
        predict, photographs, tiny, tmp_path, monkeypatch, variables, words):
    """Status 1 means that the run is complete."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = predict('.', '--model', tiny, cwd=photographs)
    assert done.returncode == 2 and re.search(words, done.stderr) and 'Traceback' not in done.stderr, done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('dimensions, error, words', [
    (4, NotImplementedError("The operator 'aten::x' is not implemented for this device."),
     "The device cpu cannot be used: The operator 'aten::x' is not implemented for this device.\n"),
    (5, MemoryError(), 'There is too little memory for the batch: choose a smaller --batch-size. '),
    (5, torch.OutOfMemoryError('CUDA out of memory.'), 'choose a smaller --batch-size'),
    (5, RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'choose a smaller --batch-size')])
def test_what_the_device_cannot_do_is_a_sentence(predict, photographs, tiny, tmp_path, monkeypatch, dimensions, error,
                                                 words):
    """An operator that it lacks before any image is read; memory that it lacks with the first batch."""
    computed = Predictor.probabilities

    def fail(self, tensors):
        if tensors.ndim == dimensions:
            raise error
        return computed(self, tensors)

    monkeypatch.setattr(Predictor, 'probabilities', fail)
    done = predict('.', '--model', tiny, cwd=photographs)
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert (tmp_path / 'out').exists() == (dimensions == 5)


def test_a_damaged_record_of_the_network_is_a_sentence(predict, photographs, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / 'net')
    (tmp_path / 'net' / 'home.json').write_text('{"thresholds"')
    done = predict('.', '--model', tmp_path / 'net', cwd=photographs)
    assert done.returncode == 2 and 'home.json is damaged or cannot be read: restore it' in done.stderr, done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['stderr', 'stdout'])
def test_a_stream_that_is_closed(photographs, tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)  # as Python has it then
    args = [photographs / 'a', '--output-dir', tmp_path / 'out', '--model', tiny, '--workers', '0']
    assert main(list(map(str, args))) == 0 and len(rows(tmp_path / 'out')) == 3


def test_an_empty_rank_is_none(predict, photographs, tiny, monkeypatch):
    monkeypatch.setenv('RANK', '')
    monkeypatch.setenv('WORLD_SIZE', 'x')  # 1 would mean that the run is complete
    assert predict('.', '--model', tiny, cwd=photographs).returncode == 2
    monkeypatch.setenv('WORLD_SIZE', '')
    assert predict('.', '--model', tiny, cwd=photographs).returncode in (0, 1)


def test_the_predictions_of_another_run_are_kept(predict, photographs, tiny, tmp_path):
    usual = '--model', tiny
    assert predict('a', '--resume', *usual, cwd=photographs).returncode == 0  # nothing to go on with: it begins
    before = (tmp_path / 'out' / 'predictions.csv').read_bytes()
    for args, words in ((['a'], 'already holds predictions'), (['b'], 'already holds predictions'),
                        (['b', '--resume'], 'images'), (['a', '--resume', '--crops', 'center'], 'crops'),
                        (['a', '--resume', '--overlays'], 'overlays'),
                        (['a', '--resume', '--format', 'jsonl'], 'format'),
                        (['a', '--resume', '--threshold-name', 'official'], 'threshold_name')):
        done = predict(*args, *usual, cwd=photographs)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert (tmp_path / 'out' / 'predictions.csv').read_bytes() == before
    done = predict('a', '--resume', *usual, cwd=photographs)
    assert done.returncode == 0 and '3 of 3 images were done before' in done.stdout
    assert (tmp_path / 'out' / 'predictions.csv').read_bytes() == before
    (tmp_path / 'out' / 'predictions.csv').unlink()
    for _ in range(2):
        done = predict('a', '--resume', *usual, cwd=photographs)
        assert done.returncode == 2 and 'is complete, but its predictions.csv was removed: put it back' in done.stderr
    (tmp_path / 'out' / 'predictions.csv').write_bytes(before)
    assert predict('a', '--resume', *usual, cwd=photographs).returncode == 0


def test_an_output_folder_without_a_name(call, photographs, tmp_path):
    done = call('timm_arl.predict', photographs, '--output-dir', '', cwd=tmp_path)
    assert done.returncode == 2 and '--output-dir: must not be empty' in done.stderr and not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_list_on_standard_input(photographs, tmp_path):
    lines = f'lesion0.png\nmissing.jpg\na\n{photographs}/lesion3.jpg\n'
    done = run('-', '--output-dir', tmp_path / 'out', stdin=lines, cwd=photographs)
    assert done.returncode == 1, done.stderr
    assert [(row['image'], row['error']) for row in rows(tmp_path / 'out')] == [
        ('lesion0.png', ''), ('missing.jpg', 'No such file or directory'), ('a/lesion1.jpg', ''), ('a/lesion4.png', ''),
        ('a/lesion7.jpg', ''), (f'{photographs}/lesion3.jpg', '')]


@pytest.mark.slow
def test_onnx(call, photographs, tmp_path):
    checkpoint = Checkpoint('arl_cnn14.isic2017')
    export_onnx(checkpoint.network(), tmp_path / 'm.onnx', weights=checkpoint.name, settings=checkpoint.settings())
    found = {}
    for name, args in (('onnx', ['--onnx', tmp_path / 'm.onnx']), ('eager', [])):
        done = call('timm_arl.predict', photographs, '--output-dir', tmp_path / name, *args, '--workers', 0)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        found[name] = rows(tmp_path / name)
    assert np.allclose(values(found['onnx']), values(found['eager']), atol=1e-4)
    assert [list(row) for row in found['onnx']] == [list(row) for row in found['eager']]
    done = call('timm_arl.predict', photographs, '--output-dir', tmp_path / 'x', '--onnx', tmp_path / 'm.onnx',
                '--overlays')
    assert done.returncode == 2 and 'gives no maps' in done.stderr
    done = call('timm_arl.predict', photographs, '--output-dir', tmp_path / 'x', '--onnx', tmp_path / 'm.onnx',
                '--device', 'cuda')
    assert done.returncode == 2 and '--device cuda: an ONNX file runs on the CPU' in done.stderr


CORE = """
import contextlib, io, json, sys
missing, *lines = map(json.loads, sys.argv[1:])
for name in missing:
    sys.modules[name] = None  # not installed
from timm_arl.predict import main
for line in lines:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status = main(line)
        except SystemExit as stopped:
            status = stopped.code
    print(json.dumps([status, err.getvalue()]))
"""
NOT_IN_THE_CORE = ('accelerate', 'datasets', 'gradio', 'jinja2', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript',
                   'pandas', 'psutil', 'pyarrow', 'pydicom', 'pytorch_grad_cam', 'scipy', 'sklearn',
                   'segmentation_models_pytorch', 'tensorboard')


@pytest.mark.slow
def test_the_core_install_is_enough(photographs, tmp_path):
    (tmp_path / 'm.onnx').touch()
    lines = [[str(photographs), '--output-dir', 'out', *args] for args in (
        ['--overlays'], ['--format', 'parquet'], ['--onnx', 'm.onnx'])]
    done = subprocess.run([sys.executable, '-c', CORE, json.dumps(NOT_IN_THE_CORE), *map(json.dumps, lines)],
                          capture_output=True, text=True, env=env(), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    (status, said), *others = map(json.loads, done.stdout.splitlines())
    assert (status, said) == (0, '') and len(others) == 2
    for (status, said), words in zip(others, ('needs pyarrow', 'not installed: pip install onnxruntime')):
        assert status == 2 and words in said and 'Traceback' not in said, said
    found, predictor = rows(tmp_path / 'out'), Predictor()
    assert len(found) == 8
    for row, p in zip(found, values(found)):  # what they are with everything installed
        tensor, _ = predictor.prepare(read_picture(row['image']))
        assert p == pytest.approx(predictor.probabilities(tensor).tolist(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('look', [dict(crops='multiscale', aspect='keep'), dict(
    crops='paper', aspect='squash', grey_world=True)], ids=['keep', 'squash'])
def test_the_same_as_evaluate_isic(call, isic_sample, tmp_path, look):
    """On real images: as they were, and as squashed copies, which a plain file is taken for what it is."""
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[16, 32, 64, 128], zero_init_last=False)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    save_network(model.eval(), tmp_path / 'run', LABELS, dict(
        timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)), channels=[16, 32, 64, 128])
    write_json(tmp_path / 'run' / 'run.json', {'arguments': {'train_ids': '0', **look}})
    done = call('evaluate_isic', '--data', isic_sample, '--checkpoint', tmp_path / 'run', '--split', 'validation',
                '--output-dir', tmp_path / 'r', '--workers', 0)
    assert done.returncode == 0, done.stderr
    split = datasets.load_dataset(isic_sample, split='validation').cast_column('image', datasets.Image(decode=False))
    (tmp_path / 'images').mkdir()
    for cells in split:
        if look['aspect'] == 'keep':
            picture = restore_aspect(decode(cells['image']), cells['aspect_ratio'])
            picture.save(tmp_path / 'images' / f'{cells["image_id"]}.png')
        else:
            (tmp_path / 'images' / f'{cells["image_id"]}.jpg').write_bytes(cells['image']['bytes'])
    done = call('timm_arl.predict', tmp_path / 'images', '--model', tmp_path / 'run', '--output-dir', tmp_path / 'out',
                '--workers', 0)
    assert done.returncode == 0, done.stderr
    found = {os.path.splitext(os.path.basename(row['image']))[0]: row for row in rows(tmp_path / 'out')}
    with open(tmp_path / 'r' / 'predictions_validation.csv', newline='') as file:
        expected = list(csv.DictReader(file))
    assert len(expected) == len(found) == 24
    assert np.allclose(values(found[row['image_id']] for row in expected), values(expected), atol=1e-6)
    assert values(expected).std() > 1e-3
