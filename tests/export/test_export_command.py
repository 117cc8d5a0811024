"""The command as a user types it: what it writes, what it says, and what it refuses."""
import json
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from any_data import class_folders, table
from PIL import Image
from test_arl_cnn import create, image, with_alpha
from test_onnx_file import randomise
from timm.models import save_for_hf

from timm_arl.export import OnnxModel
from timm_arl.export.__main__ import main
from timm_arl.export.calibration import CalibrationImages, Loss
from timm_arl.export.quantize import update_metadata
from timm_arl.factory import Checkpoint
from timm_arl.files import write_json
from timm_arl.isic.dataset import load_data
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.task import LABELS, Task
from timm_arl.onnx_file import export_onnx
from timm_arl.predictor import Predictor


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder of files that the command has exported, and their names by what they are of."""
    return tmp_path_factory.mktemp('exported'), {}


@pytest.fixture(autouse=True)
def export_once(exported, monkeypatch):
    """The same weights at the same size are exported once, and copied from then on."""
    folder, files = exported

    def export(model, path, img_size, fold, weights, settings):
        key = weights, img_size, fold
        if key not in files:
            files[key] = export_onnx(model, folder / f'{len(files)}.onnx', img_size, fold, weights, settings)
        return shutil.copyfile(files[key], path)

    monkeypatch.setattr('timm_arl.export.__main__.export_onnx', export)


@pytest.mark.slow
def test_command(call, tmp_path):
    model = randomise(with_alpha(create(num_classes=2), 2.))
    save_for_hf(model, tmp_path / 'run', safe_serialization=True, model_args={'channels': [16, 32, 64, 128]})
    command = ['timm_arl.export.__main__', '--model', tmp_path / 'run', '--img-size', '64']
    done = call(*command, '--output', tmp_path / 'deep' / 'm.onnx')
    assert done.returncode == 0 and 'm.onnx' in done.stdout, done.stderr
    assert 'are taken for melanoma and seborrheic keratosis, because its config.json has no label_names' in done.stdout
    assert Predictor(tmp_path / 'deep' / 'm.onnx').labels == LABELS  # and the file names them
    with torch.inference_mode():
        expected = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()(image())
    assert np.allclose(OnnxModel(tmp_path / 'deep' / 'm.onnx')(image().numpy()), expected, atol=1e-4, rtol=1e-3)
    for wrong, sentence in ((['--model', 'arl_cnn15'], 'Unknown model arl_cnn15'),
                            (['--output', str(tmp_path)], 'is a folder'), (['--img-size', '3'], 'at least 32'),
                            (['--int8'], '--int8 needs --calibration'), (['--calibration', 'x'], 'is for --int8'),
                            (['--calibration-images', 31], 'at least 32'),
                            (['--model', 'arl_cnn14', '--with-preprocessing'], 'what the 1000 outputs')):
        done = call(*command, '--output', tmp_path / 'x.onnx', *wrong)
        assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / 'x.onnx').exists()


def test_a_file_that_could_not_be_written_is_told_before_anything_is_loaded(call, tmp_path):
    (tmp_path / 'file').touch()
    for output, sentence in (('m.onx', "m.onx: the name of an ONNX file ends in .onnx."),
                             ('file/m.onnx', 'Cannot make the folder')):
        done = call('timm_arl.export.__main__', '--model', 'no_such_model', '--output', tmp_path / output)
        assert done.returncode == 2 and sentence in done.stderr and 'no_such_model' not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def weights_of(path):
    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}['weights']


@pytest.mark.slow
def test_a_name_with_a_tag_has_its_weights(call, tmp_path):
    done = call('timm_arl.export.__main__', '--model', 'arl_cnn14.isic2017', '--output', tmp_path / 'm.onnx')
    assert done.returncode == 0 and 'RANDOM' not in done.stdout, done.stderr
    model = timm.create_model('arl_cnn14.isic2017', pretrained=True).eval()
    with torch.inference_mode():
        expected = model(image(160))
    assert np.allclose(OnnxModel(tmp_path / 'm.onnx')(image(160).numpy()), expected, atol=1e-4, rtol=1e-3)
    assert weights_of(tmp_path / 'm.onnx') == 'arl_cnn14.isic2017'
    predictor = Predictor(tmp_path / 'm.onnx')
    assert predictor.thresholds == Predictor('arl_cnn14.isic2017').thresholds and predictor.temperatures


@pytest.mark.slow
def test_thresholds_of_another_size_are_left_out(call, tmp_path):
    done = call('timm_arl.export.__main__', '--model', 'arl_cnn14.isic2017', '--img-size', 64, '--output',
                tmp_path / 'm.onnx')
    assert done.returncode == 0 and 'Thresholds and calibration of arl_cnn14.isic2017' in done.stdout
    assert 'were chosen with images of 160 px: they are left out of the file' in done.stdout
    predictor = Predictor(tmp_path / 'm.onnx')
    assert list(predictor.thresholds) == ['official'] and not predictor.temperatures and predictor.img_size == 64


@pytest.mark.slow
@pytest.mark.parametrize('name, whole', [('levit_128s', False), ('visformer_tiny', True)])  # the first takes long
def test_networks_that_take_images_of_one_size(call, tmp_path, name, whole):
    if whole:
        done = call('timm_arl.export.__main__', '--model', name, '--output', tmp_path / 'm.onnx')
        assert done.returncode == 0, done.stderr
    done = call('timm_arl.export.__main__', '--model', name, '--img-size', 64, '--output', tmp_path / 'x.onnx')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and not (tmp_path / 'x.onnx').exists()


@pytest.mark.slow
def test_random_weights_are_called_so(call, tmp_path):
    done = call('timm_arl.export.__main__', '--model', 'test_resnet', '--img-size', 64, '--output', tmp_path / 'm.onnx')
    assert done.returncode == 0 and 'WARNING: test_resnet has RANDOM WEIGHTS' in done.stdout, done.stderr
    assert weights_of(tmp_path / 'm.onnx') == 'random'


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """34 pictures of several sizes, and a file that is none."""
    folder, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for k in range(34):
        pixels = rng.integers(60, 200, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96 + k, 80), Image.Resampling.BICUBIC).save(folder / f'{k:02d}.png')
    (folder / 'broken.jpg').write_text('no picture')
    return folder


@pytest.mark.slow
def test_8_bits_of_a_data_set(call, few, tmp_path):
    command = ['timm_arl.export.__main__', '--model', 'arl_cnn14.isic2017', '--img-size', 64, '--int8',
               '--calibration', few]
    done = call(*command, '--output', tmp_path / 'm.onnx', '--with-preprocessing')
    worse = done.returncode == 1
    assert done.returncode in (0, 1) and worse == ('WARNING' in done.stderr), done.stderr
    assert f'calibrating on 32 train images of {few}' in done.stdout and '12 validation images' in done.stdout
    for label in ('melanoma', 'seborrheic keratosis'):
        assert f'{label}: AUC 0.' in done.stdout
    assert f'no AUC is lower by more than 0.003: {"no" if worse else "yes"}' in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['m.onnx']
    predictor = Predictor(tmp_path / 'm.onnx')
    assert list(predictor.thresholds) == ['official']  # the others are of images of 160 px
    assert (len(predictor.remarks) == 2) == worse
    about = OnnxModel(tmp_path / 'm.onnx').about['int8']
    assert about['calibration_images'] == 32 and list(about['auc']) == list(LABELS)


@pytest.mark.slow
def test_8_bits_of_a_folder(call, photographs, tmp_path):
    command = ['timm_arl.export.__main__', '--model', 'arl_cnn14.isic2017', '--img-size', 64, '--int8',
               '--output', tmp_path / 'm.onnx']
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'few').mkdir()
    Image.new('RGB', (96, 80)).save(tmp_path / 'few' / 'a.png')
    for folder, words in (('empty', 'holds no images'), ('few', '1 images of'), ('none', 'none')):
        done = call(*command, '--calibration', tmp_path / folder)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert 'at least 32' in call(*command, '--calibration', tmp_path / 'few').stderr
    assert not (tmp_path / 'm.onnx').exists()
    done = call(*command, '--calibration', photographs)
    assert done.returncode == 0 and '34 images of' in done.stdout and '1 more cannot be read' in done.stdout
    assert 'no AUC was compared' in done.stdout and '34 images of the calibration' in done.stdout
    update_metadata(tmp_path / 'm.onnx', int8={'worse': 'melanoma 0.9000 to 0.8000'})
    assert 'melanoma 0.9000 to 0.8000' in Predictor(tmp_path / 'm.onnx').remarks[0]


ABOUT = {'input_size': [3, 64, 64], 'mean': [0.5] * 3, 'std': [0.5] * 3, 'label_names': ['MEL', 'NV']}


def test_ranges_are_of_the_training_images_of_the_run(tmp_path):
    """Which has divided the data by a seed of its own."""
    data = str(table(tmp_path / 'data', 60, ('MEL', 'NV')))
    splits = load_data(data, seed=5).splits
    run = tmp_path / 'run'
    run.mkdir()
    write_json(run / 'run.json', {'arguments': {
        'data': data, 'seed': 5, 'division_seed': None, 'task': None, 'labels': None, 'columns': None, 'splits': None,
        'group_column': None, 'train_ids': ids_digest(splits['train']['image_id'])}})
    found = CalibrationImages(data, ABOUT, checkpoint=Checkpoint(str(run)))
    assert found.validation.image_ids == list(splits['validation']['image_id'])
    assert CalibrationImages(data, ABOUT).validation.image_ids != found.validation.image_ids


@pytest.mark.parametrize('labels, labelled, says', [
    (['MEL', 'NV'], True, 'train images'), (['melanoma', 'seborrheic_keratosis'], False, 'images of'),
    (['MEL', 'NV', 'BCC'], False, 'taken as pictures without labels: ')])
def test_folders_of_classes_are_labels_where_the_network_has_them(tmp_path, labels, labelled, says):
    data = class_folders(tmp_path, 40)
    about = {**ABOUT, 'label_names': labels, 'task': Task('t', tuple(labels), 'multiclass').config()}
    found = CalibrationImages(str(data), about)
    assert (found.validation is not None) == labelled and says in found.what


def test_which_aucs_are_worse():
    loss = Loss(9, {'melanoma': (0.9, 0.8975), 'nevus': (0.9, 0.8965), 'other': (0.8, 0.9)}, 0., 0., (0, 9))
    assert loss.worse() == 'nevus 0.9000 to 0.8965'


@pytest.mark.slow
def test_pictures_in_and_probabilities_out(call, photographs, tmp_path):
    name = str(tmp_path / 'whole.onnx')
    assert main(['--model', 'arl_cnn14.isic2017', '--output', name, '--with-preprocessing']) == 0
    found = {}
    for name, option in (('plain', []), ('whole', ['--onnx', tmp_path / 'whole.onnx'])):
        done = call('timm_arl.predict', photographs, *option, '--output-dir', tmp_path / name, '--workers', 0,
                    '--batch-size', 8, '--calibrated', '--format', 'jsonl')
        assert done.returncode == 1 and 'smaller than' in done.stderr, done.stderr
        found[name] = [json.loads(line) for line in (tmp_path / name / 'predictions.jsonl').read_text().splitlines()]
    for plain, whole in zip(found['plain'], found['whole']):
        assert plain['image'] == whole['image'] and plain['error'] == whole['error']
        for label in LABELS:
            assert plain['error'] or abs(plain[label] - whole[label]) <= 5e-3
    done = call('timm_arl.predict', photographs, '--onnx', tmp_path / 'whole.onnx', '--output-dir', tmp_path / 'x',
                '--crops', 'center')
    assert done.returncode == 2 and 'cuts pictures itself, with crops multiscale' in done.stderr

    # without this package, as docs/models.md shows
    import onnxruntime
    session = onnxruntime.InferenceSession(tmp_path / 'whole.onnx')
    picture = np.asarray(Image.open(photographs / '07.png'))
    probabilities, calibrated = session.run(None, {'pictures': np.stack([picture, picture[:, ::-1]])})
    assert probabilities.shape == calibrated.shape == (2, 2)
    predictor = Predictor(tmp_path / 'whole.onnx')
    assert np.allclose(predictor.calibrated(torch.from_numpy(probabilities)), calibrated, atol=1e-6)
    with open(tmp_path / 'whole' / 'predictions.jsonl') as file:
        row = json.loads(file.readlines()[7])
    assert np.allclose(calibrated[0], [row[label] for label in LABELS], atol=1e-6)
