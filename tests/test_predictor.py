"""A checkpoint used from Python: crops, probabilities, thresholds and temperatures are those it was evaluated with."""
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from dicom_files import dataset, save
from loopback_hub import Hub
from PIL import Image
from predict_program import rows
from scipy.special import expit, logit

from timm_arl import WeightsError
from timm_arl.export import export_onnx
from timm_arl.export.quantize import set_metadata
from timm_arl.factory import Checkpoint, save_network
from timm_arl.files import write_json
from timm_arl.isic import LABELS, probabilities_of
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.isic.task import Task
from timm_arl.isic.transforms import eval_transform, grey_world
from timm_arl.onnx_file import metadata_of
from timm_arl.predictor import Predictor, read_picture


@pytest.fixture(scope='module')
def shipped():
    return Predictor()


@pytest.fixture(scope='module')
def picture():
    return draw_lesion('melanoma', np.random.default_rng(0))


@pytest.fixture
def trained(tmp_path):
    """Makes an output folder of a run, with the arguments and the config entries that are given."""
    def make(arguments=None, outputs=LABELS, **config):
        torch.manual_seed(0)
        model = timm.create_model('arl_cnn14', num_classes=len(outputs))
        save_network(model, tmp_path / 'out', outputs, dict(
            timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)))
        saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
        write_json(tmp_path / 'out' / 'config.json', {**saved, **config})
        write_json(tmp_path / 'out' / 'run.json', {'arguments': {'train_ids': '0', **(arguments or {})}})
        return tmp_path / 'out'

    return make


def small_onnx(path, outputs=2, **about):
    """A file whose logits are sums over the channels' means."""
    make, sums = onnx.helper, onnx.numpy_helper.from_array(np.ones((3, outputs), np.float32), 'sums')
    values = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (
        ('images', ['N', 3, 64, 64]), ('logits', ['N', outputs]))]
    model = make.make_model(make.make_graph([
        make.make_node('GlobalAveragePool', ['images'], ['means']), make.make_node('Flatten', ['means'], ['flat']),
        make.make_node('MatMul', ['flat', 'sums'], ['logits'])], 'small', values[:1], values[1:], [sums]),
        opset_imports=[make.make_opsetid('', 17)], ir_version=8)
    set_metadata(model, {'mean': [0.5] * 3, 'std': [0.5] * 3, 'input_size': [3, 64, 64], **about})
    onnx.save(model, path)
    return path


def test_the_shipped_weights(shipped, picture):
    """As README and card do it step by step."""
    model = timm.create_model('arl_cnn14.isic2017', pretrained=True).eval()
    crops = eval_transform(160, model.pretrained_cfg['mean'], model.pretrained_cfg['std'], 'multiscale')
    with torch.inference_mode():
        expected = probabilities_of(model(crops(picture))).mean(0)
    tensor, boxes = shipped.prepare(picture)
    assert tensor.shape == (5, 3, 160, 160) and len(boxes) == 5 and boxes[3] == (0, 0, 160, 160)
    found = shipped.probabilities(tensor)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(shipped.probabilities(torch.stack([tensor, tensor.flip(3)]))[0], expected, atol=1e-6)
    assert shipped.labels == LABELS and shipped.img_size == 160 and shipped.crops == 'multiscale'
    assert not shipped.remarks and shipped.network is not None


def test_thresholds_and_calibration_of_the_card(shipped):
    folder = Checkpoint('arl_cnn14.isic2017').folder
    config = json.loads((folder / 'config.json').read_text())
    assert shipped.thresholds == config['thresholds'] and shipped.temperatures == config['temperatures']
    assert shipped.biases == config['biases'] and shipped.biases.keys() == set(LABELS)
    assert shipped.point == 'youden on validation' == shipped.operating_point('youden')
    assert shipped.operating_point('sensitivity') == 'sensitivity 0.9 on validation'
    assert shipped.operating_point('speed') == ''
    between = torch.tensor([0.4, 0.28])  # melanoma above Youden's, but not above 0.5
    assert shipped.decide(between) == {'melanoma': True, 'seborrheic_keratosis': False}
    assert not any(shipped.decide(between, 'official').values())
    assert shipped.decide(torch.tensor([0.4, 0.6]), 'official') == {'melanoma': False, 'seborrheic_keratosis': True}
    assert not any(shipped.decide(torch.tensor([0.5, 0.5]), 'official').values())  # as the scorer
    by_hand = expit(logit(between.double().numpy()) / list(config['temperatures'].values())
                    + list(config['biases'].values()))
    assert np.allclose(shipped.calibrated(between), by_hand, atol=1e-12)


def test_as_the_run_prepared_its_images(trained, picture):
    plain = Predictor(trained({'crops': 'center'}))
    tensor, boxes = plain.prepare(picture)
    assert tensor.shape == (1, 3, 64, 64) and plain.thresholds == {'official': dict.fromkeys(LABELS, .5)}
    assert plain.point == 'official' and plain.temperatures == {} and 'using 0.5' in plain.remarks[0]
    assert np.array_equal(plain.calibrated(torch.tensor([.25, .75])), [.25, .75])
    assert Predictor(trained({'crops': 'center'}), crops='paper').prepare(picture)[0].shape[0] == 9
    greyed = Predictor(trained({'crops': 'center', 'grey_world': True}))
    assert torch.equal(greyed.prepare(picture)[0], plain.prepare(grey_world(picture))[0])
    assert not torch.equal(greyed.prepare(picture)[0], tensor)


def test_a_temperature_without_a_bias_is_of_an_older_version(trained):
    old = Predictor(trained({'crops': 'center'}, temperatures=dict.fromkeys(LABELS, 2.)))
    assert old.temperatures == {} and np.array_equal(old.calibrated(torch.tensor([.25, .75])), [.25, .75])


def test_random_crops_depend_on_the_name_alone(trained, picture):
    paper = Predictor(trained({'crops': 'paper'}))
    state = torch.get_rng_state()
    first, again, other = (paper.prepare(picture, name)[0] for name in ('a', 'a', 'b'))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_three_outputs_give_two_probabilities(trained, picture):
    softmax = Predictor(trained(outputs=('nevus', *LABELS)))
    assert softmax.probabilities(softmax.prepare(picture)[0]).shape == (2,)


def refusal(name):
    with pytest.raises(WeightsError) as refused:
        Predictor(name)
    return str(refused.value)


def test_outputs_that_nobody_named(trained, tmp_path):
    assert Predictor(trained({'crops': 'center'}, label_names=None)).remarks[0] == (
        f'The outputs of {tmp_path / "out"} are taken for melanoma and seborrheic keratosis, because its config.json '
        f'has no label_names.')
    folder = tmp_path / 'other'
    save_network(timm.create_model('test_resnet', num_classes=2), folder)
    words = refusal(folder)
    assert f'What the 2 outputs of {folder} mean is not known, because its config.json has no label_names: set' in words
    entry = words[words.index('"task"'):words.index(' (kind')]  # what it says helps
    config = json.loads((folder / 'config.json').read_text())
    write_json(folder / 'config.json', {**config, **json.loads(f'{{{entry}}}')})
    named = Predictor(folder)
    assert named.labels == ('nevus', 'melanoma') and named.task.kind == 'multiclass'
    write_json(folder / 'config.json', {**config, 'label_names': ['scar', 'ulcer']})
    words = refusal(folder)
    assert 'only calls them scar, ulcer: set' in words and '"labels": ["scar", "ulcer"]' in words


def test_outputs_of_an_onnx_file_that_nobody_named(tmp_path):
    for outputs in 2, 3:
        words = refusal(small_onnx(tmp_path / 'm.onnx', outputs))
        assert f'What the {outputs} outputs of' in words and 'because its metadata has no label_names: set' in words
        assert words.endswith('in the config.json of the network, and export it again.')
    names = ['nevus', *LABELS]
    assert Predictor(small_onnx(tmp_path / 'm.onnx', 3, label_names=names)).labels == LABELS


def test_an_onnx_file_runs_on_the_cpu_whatever_the_machine_has(predict, tmp_path, picture):
    file = small_onnx(tmp_path / 'm.onnx', label_names=LABELS)
    assert Predictor(file, 'meta').device.type == 'cpu'
    picture.save(tmp_path / 'a.png')
    done = predict('a.png', '--model', file, '--device', 'cuda')
    assert done.returncode == 2 and '--device cuda: an ONNX file runs on the CPU: leave --device out' in done.stderr
    done = predict('a.png', '--model', file)
    assert done.returncode == 0 and len(rows(tmp_path / 'out')) == 1, done.stderr


@pytest.mark.parametrize('name', ['run.json', 'home.json', 'results.json'])
def test_a_damaged_record_is_not_replaced_by_defaults(trained, name):
    folder = trained({'crops': 'center'})
    if name == 'results.json':  # which is looked for where there is no run.json
        (folder / 'run.json').unlink()
    (folder / name).write_text('{"arguments": {')
    assert f'out/{name} is damaged or cannot be read: restore it, or remove it' in refusal(folder)


ASK = """
import sys
from timm_arl.predictor import Predictor
for name in sys.argv[1:]:
    try:
        print(*Predictor(name).remarks)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_record_on_the_hub_may_be_missing_but_not_out_of_reach(tiny, tmp_path):
    files = {name: tiny / name for name in ('config.json', 'model.safetensors')}
    with Hub({'row/plain': files, 'row/shut': {**files, 'results.json': b'{}'}}) as hub:
        hub.fault('HEAD /row/shut/resolve/.*results.json', 'status', code=403, times=-1)
        done = subprocess.run([sys.executable, '-c', ASK, 'hf-hub:row/plain', 'hf-hub:row/shut'], capture_output=True,
                              env={**os.environ, **hub.env(tmp_path)}, text=True, timeout=200)
    plain, shut = done.stdout.splitlines()
    assert 'How hf-hub:row/plain was evaluated is not known (no run.json or results.json)' in plain, done.stderr
    assert 'results.json of row/shut (revision' in shut and 'could not be loaded' in shut


def test_what_a_user_should_know(trained):
    remarks = Predictor(trained({'crops': 'multiscale', 'lesion_crop': True}, thresholds={
        'youden on validation': dict.fromkeys(LABELS, .3)}), crops='center').remarks
    assert len(remarks) == 2 and 'cut to the lesion' in remarks[0]
    assert 'chosen with crops multiscale, not center' in remarks[1]


def test_thresholds_and_temperatures_that_a_run_keeps_beside_it(trained):
    folder = trained({'crops': 'center'})
    home = {'thresholds': {'youden on validation': dict.fromkeys(LABELS, .3)},
            'temperatures': dict.fromkeys(LABELS, 2.), 'biases': dict.fromkeys(LABELS, -1.),
            'shown': {'crops': 'center', 'img_size': 64}}
    write_json(folder / 'home.json', home)
    run = Predictor(folder)
    assert run.point == 'youden on validation' and run.temperatures['melanoma'] == 2. and not run.remarks
    assert run.biases['melanoma'] == -1.
    assert run.decide(torch.tensor([.31, .29])) == {'melanoma': True, 'seborrheic_keratosis': False}
    # those of images that were prepared in another way are of no use
    write_json(folder / 'home.json', {**home, 'shown': {'crops': 'paper'}})
    assert Predictor(folder).point == 'official'


def test_the_most_probable_of_exclusive_classes(trained):
    outputs = ('scar', 'ulcer', 'mole')
    assert Predictor(trained(outputs=outputs, task=Task('mine', outputs, 'multiclass').config())).most_probable(
        torch.tensor([.3, .36, .34])) == 'ulcer'


def test_a_network_of_squashed_copies_says_so(trained):
    squashed, kept = (Predictor(trained({'crops': 'center', 'aspect': a})).remarks for a in ('squash', 'keep'))
    assert 'squashed to a square: squash yours' in squashed[-1] and len(squashed) == len(kept) + 1
    config = (trained({'aspect': 'squash'}) / 'config.json').read_text()
    assert 'aspect' not in config  # published files stay as they are


def test_maps_laid_over_the_picture(shipped, picture):
    maps = shipped.explain(picture)
    assert list(maps) == [*LABELS, 'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']
    assert list(shipped.explain(picture, gates=False)) == list(LABELS)
    wide = shipped.explain(Image.new('L', (3000, 1000), 90), gates=False)['melanoma']
    assert wide.width == 1024 and wide.height > 341  # with a legend below
    assert np.abs(np.asarray(maps['melanoma']).astype(int) - np.asarray(maps['seborrheic_keratosis'])).max() > 50


def test_a_map_shows_what_the_label_was_found_in(trained, picture):
    """With weights on one channel alone, that channel is the map of its label, and the other map is flat."""
    softmax = Predictor(trained({'crops': 'center'}, outputs=('nevus', *LABELS)))
    with torch.no_grad():
        softmax.network.fc.weight.zero_()
        softmax.network.fc.weight[1, 0] = 1.
    maps = {label: np.asarray(m)[60:300, 60:300].astype(int) for label, m in softmax.explain(picture).items()}
    spread = {label: np.abs(m[..., 0] - m[..., 2]).std() for label, m in maps.items()}
    assert spread['melanoma'] > 3 * spread['seborrheic_keratosis']


def test_networks_without_gates_and_without_maps(tmp_path, picture):
    data = dict(input_size=(3, 64, 64))
    for name in ('resnet14', 'vit_tiny_patch16_224'):
        kwargs = {'img_size': 64} if 'vit' in name else {}
        model = timm.create_model(name, num_classes=2, **kwargs)
        save_network(model, tmp_path / name, LABELS, dict(timm.data.resolve_model_data_config(model), **data), **kwargs)
    assert list(Predictor(tmp_path / 'resnet14').explain(picture)) == list(LABELS)
    with pytest.raises(ValueError, match='has no class activation map'):
        Predictor(tmp_path / 'vit_tiny_patch16_224').explain(picture)


@pytest.mark.slow
def test_onnx(tmp_path, shipped, picture):
    checkpoint = Checkpoint('arl_cnn14.isic2017')
    file = export_onnx(checkpoint.network(), tmp_path / 'm.onnx', weights=checkpoint.name,
                       settings=checkpoint.settings())
    exported = Predictor(file)
    assert exported.network is None and not exported.remarks
    for name in ('labels', 'img_size', 'crops', 'thresholds', 'temperatures', 'biases', 'point'):
        assert getattr(exported, name) == getattr(shipped, name), name
    tensor, boxes = exported.prepare(picture)
    assert torch.equal(tensor, shipped.prepare(picture)[0])
    assert torch.allclose(exported.probabilities(tensor), shipped.probabilities(tensor), atol=1e-4)
    with pytest.raises(ValueError, match='gives no maps'):
        exported.explain(picture)

    def with_settings(name, settings):
        """The same network as if it had been exported with these."""
        model = onnx.load(file)
        set_metadata(model, metadata_of(checkpoint.network(), settings=settings))
        onnx.save(model, tmp_path / name)
        return Predictor(tmp_path / name)

    older = with_settings('older.onnx', {
        key: value for key, value in checkpoint.settings().items() if key != 'biases'})  # calibrated otherwise
    assert older.temperatures == older.biases == {} and older.thresholds == exported.thresholds
    bare = with_settings('bare.onnx', None)
    assert bare.point == 'official' and 'has no thresholds' in bare.remarks[0]
    assert bare.sha256 != exported.sha256


def test_what_is_refused(tmp_path, trained, shipped, picture):
    (tmp_path / 'text.onnx').write_text('no ONNX')
    begun = tmp_path / 'begun'
    begun.mkdir()
    (begun / 'run.json').touch()
    for make, words in ((lambda: begun, 'begun has no finished epoch yet: go on with it, by finetune_isic.py --resume'),
                        (lambda: tmp_path / 'none.onnx', 'No file'), (lambda: tmp_path / 'text.onnx', 'no ONNX file'),
                        (lambda: 'arl_cnn15', 'did you mean'), (lambda: tmp_path, 'holds no config.json'),
                        (lambda: trained(outputs=('a', 'b')), 'What the 2 outputs of .* mean is not known'),
                        (lambda: trained({'crops': 'spiral'}), "crops 'spiral', which are not known")):
        with pytest.raises(WeightsError, match=words):
            Predictor(make())
    for size in ((1, 1), (300, 15), (20, 201)):
        with pytest.raises(OSError, match=f'{size[0]} x {size[1]} px'):
            shipped.prepare(Image.new('RGB', size))
    shipped.prepare(Image.new('L', (16, 160)))  # of any mode


def test_reads_dicom_and_images(tmp_path, picture):
    path = save(dataset(np.asarray(picture), 'RGB'), tmp_path / 'IM1')
    picture.save(tmp_path / 'a.png')
    assert read_picture(path) == read_picture(tmp_path / 'a.png') == picture


def test_16_bits_of_grey(shipped):
    """As read_picture gives them, white is not cut off at 255."""
    values = np.linspace(0, 65535, 96 * 128).reshape(96, 128).astype(np.uint16)
    deep, usual = Image.fromarray(values), Image.fromarray((values / 257).round().astype(np.uint8))
    assert torch.equal(shipped.prepare(deep)[0], shipped.prepare(usual)[0])
    with pytest.raises(OSError, match='floating-point pixels'):
        shipped.prepare(Image.fromarray(values.astype(np.float32)))
