"""Weights from names and files: what fits is loaded, what does not is named."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import timm_arl  # noqa: F401  registers the models
from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, create_for_task, load_weights_file, save_network
from timm_arl.files import write_json

NARROW = dict(channels=[8, 16, 32, 64])


def save(model, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def test_resnet_checkpoint_keeps_the_alphas(tmp_path):
    resnet = timm.create_model('resnet14', num_classes=2)
    arl = timm.create_model('arl_cnn14', num_classes=2, alpha_init=0.5)
    assert load_weights_file(arl, save(resnet, tmp_path / 'model.safetensors')) == []
    assert torch.equal(arl.fc.weight, resnet.fc.weight) and arl.layer1[0].alpha.item() == 0.5
    assert load_weights_file(arl, tmp_path) == []  # the folder works too


def test_classifier_of_another_size_is_left(tmp_path):
    path = save(timm.create_model('arl_cnn14', num_classes=7), tmp_path / 'w.safetensors')
    model = timm.create_model('arl_cnn14', num_classes=2)
    before = model.fc.weight.clone()
    assert load_weights_file(model, path) == ['fc.weight', 'fc.bias']
    assert torch.equal(model.fc.weight, before)


def test_no_classifier_takes_any(tmp_path):
    path = save(timm.create_model('arl_cnn14', num_classes=7), tmp_path / 'w.safetensors')
    assert load_weights_file(timm.create_model('arl_cnn14', num_classes=0), path) == []


def test_another_attention_is_refused(tmp_path):
    save_network(timm.create_model('arl_cnn14_mixed', num_classes=2, **NARROW), tmp_path, **NARROW)
    assert load_weights_file(
        timm.create_model('arl_cnn14', num_classes=2, attention='mixed', **NARROW), tmp_path) == []
    for kwargs, message in (({}, 'attention mixed, not attention spatial'),
                            (dict(attention='mixed', mask_scale='mean1'), 'mask_scale softmax, not mask_scale mean1')):
        with pytest.raises(WeightsError, match=f'trained with {message}'):
            load_weights_file(timm.create_model('arl_cnn14', num_classes=2, **NARROW, **kwargs), tmp_path)
        for name, overlay in ((f'local-dir:{tmp_path}', {}), (
                'arl_cnn14', dict(file=str(tmp_path / 'model.safetensors')))):
            with pytest.raises(WeightsError, match=f'trained with {message}'):
                timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{
                    'attention': 'spatial', **NARROW, **kwargs})


@pytest.mark.parametrize('change', [
    lambda text: text[:50], lambda text: '', lambda text: '[]', lambda text: 'null',
    lambda text: text.replace('"arl_cnn14_mixed"', '5'),
    lambda text: text.replace('"model_args": {', '"model_args": [0], "x": {'),
    lambda text: text.replace('"attention": "mixed"', '"attention": "sideways"')])
def test_a_damaged_config_is_refused(tmp_path, change):
    """Nothing is known of the mask then, and every tensor would fit."""
    save_network(timm.create_model('arl_cnn14_mixed', num_classes=2, **NARROW), tmp_path, **NARROW)
    config = tmp_path / 'config.json'
    text = change(config.read_text())
    assert text != config.read_text()
    config.write_text(text)
    for load in (lambda: load_weights_file(timm.create_model('arl_cnn14', num_classes=2, **NARROW), tmp_path),
                 lambda: timm.create_model(
                     'arl_cnn14', pretrained=True, num_classes=2, **NARROW,
                     pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))):
        with pytest.raises(WeightsError, match=r'config.json, which tells the mask of model.safetensors, is damaged'):
            load()


def test_arguments_of_a_later_release_hide_no_mask(tmp_path):
    save_network(timm.create_model('arl_cnn14_mixed', num_classes=2), tmp_path)
    config = tmp_path / 'config.json'
    config.write_text(config.read_text().replace('"model_args": {', '"model_args": {"invented_later": 1,'))
    with pytest.raises(WeightsError, match='trained with attention mixed, not attention spatial'):
        load_weights_file(timm.create_model('arl_cnn14', num_classes=2), tmp_path)
    config.write_text('{"architectures": ["Other"]}')  # of another program
    assert load_weights_file(timm.create_model('arl_cnn14', num_classes=2), tmp_path) == []


def test_our_own_weights_have_one_gate():
    with pytest.raises(WeightsError, match='trained with attention spatial, not attention channel'):
        timm.create_model('arl_cnn14.isic2017', pretrained=True, attention='channel')


def test_other_models_are_refused_and_nothing_is_loaded(tmp_path):
    path = save(timm.create_model('resnet26', num_classes=2), tmp_path / 'w.safetensors')
    model = timm.create_model('arl_cnn14', num_classes=2)
    before = model.conv1.weight.clone()
    with pytest.raises(WeightsError, match='does not fit ARLCNN.*layer1.1'):
        load_weights_file(model, path)
    assert torch.equal(model.conv1.weight, before)


def test_missing_corrupt_and_pickled_files_are_refused(tmp_path):
    model = timm.create_model('resnet14')
    with pytest.raises(WeightsError, match='No weights at'):
        load_weights_file(model, tmp_path)
    path = save(model, tmp_path / 'w.safetensors')
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match='not a readable safetensors'):
        load_weights_file(model, path)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='not a readable safetensors'):
        load_weights_file(model, tmp_path / 'w.pth')


def test_files_by_timms_own_arguments(tmp_path):
    model = timm.create_model('arl_cnn14', num_classes=2, **NARROW)
    path, other = save(model, tmp_path / 'w.safetensors'), tmp_path / 'other'
    save_for_hf(model, tmp_path / 'w', safe_serialization=True)
    save_for_hf(timm.create_model('arl_cnn14', num_classes=2, **NARROW), other, safe_serialization=True)
    for given in (dict(file=str(path)), dict(file=str(path.parent / 'w')), dict(state_dict=model.state_dict())):
        for name in ('arl_cnn14', f'local-dir:{other}'):  # what the caller gives, not what a config.json does
            found = timm.create_model(name, pretrained=True, num_classes=2, **NARROW,
                                      pretrained_cfg_overlay=dict(given, num_classes=2))
            assert torch.equal(found.fc.weight, model.fc.weight)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='w.pth is no .safetensors file, and only those are opened: save the'):
        timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth')))
    (other / 'model.safetensors').unlink()
    torch.save(model.state_dict(), other / 'pytorch_model.bin')
    for create in (timm.create_model, create_for_task):
        with pytest.raises(WeightsError, match='No weights at .*other/model.safetensors'):
            create(f'local-dir:{other}', pretrained=True)
    for name, message in (('nowhere.safetensors', 'No weights at nowhere.safetensors'),
                          (str(tmp_path / 'cut.safetensors'), 'cut.safetensors is not a readable safetensors file')):
        (tmp_path / 'cut.safetensors').write_bytes(b'{"a')
        with pytest.raises(WeightsError, match=message):
            timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg_overlay=dict(file=name))


@pytest.mark.parametrize('name, kwargs, message', [
    ('arl_cnn15', {}, 'did you mean arl_cnn1'),
    ('', {}, r'Unknown model \(an empty name\)'),
    ('user/model', {}, "Unknown model user/model: .*(Use 'hf-hub:user/model'|timm.list_models)"),
    ('Local-Dir:/nowhere/at/all', dict(pretrained=True), 'No weights at /nowhere/at/all/model.safetensors'),
    ('nothing-like-it', {}, "Unknown model nothing-like-it: timm.list_models"),
    ('arl_cnn50.no_such_tag', {}, 'no_such_tag'),
    ('arl_cnn50.no_such_tag', dict(pretrained=True),
     'No weights arl_cnn50.no_such_tag: choose arl_cnn50.a1_in1k or arl_cnn50.tv_in1k'),
    ('arl_cnn14.no_such_tag', {}, 'No weights arl_cnn14.no_such_tag: choose arl_cnn14.isic2017'),
    ('/', {}, 'Unknown model /: that is on this disk; a folder that timm reads is named local-dir:/'),
    ('arl_cnn14_channel', dict(pretrained=True), 'No pretrained weights exist for arl_cnn14_channel'),
    ('vit_tiny_patch16_224', dict(attention='mixed'), 'vit_tiny_patch16_224 cannot be created: .*attention'),
    ('local-dir:/nowhere/at/all', dict(pretrained=True), '/nowhere/at/all'),
])
def test_models_that_cannot_be_created(name, kwargs, message):
    with pytest.raises(WeightsError, match=message):
        create_for_task(name, num_classes=2, **kwargs)


@pytest.mark.parametrize('classes, overlay', [
    (1000, {}), (2, {}), (7, {}), (None, {}), (2, dict(num_classes=2)), (2, dict(num_classes=1000))])
def test_a_file_by_timms_overlay_is_loaded_whole(tmp_path, classes, overlay):
    saved = timm.create_model('arl_cnn14', num_classes=2)
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(
        file=str(save(saved, tmp_path / 'w.safetensors')), **overlay))
    if overlay.get('num_classes') == 1000:  # what the caller says of the file is wrong: nothing is guessed
        with pytest.raises(WeightsError, match='has the 2 outputs of the model, but num_classes of its config is 1000'):
            timm.create_model('arl_cnn14', num_classes=2, **given)  # timm would leave a random classifier
        with pytest.raises(WeightsError, match=r'w.safetensors has 2 outputs, not 1000: pass num_classes=2\.'):
            timm.create_model('arl_cnn14', **given)
        return
    found = timm.create_model('arl_cnn14', **given, **(dict(num_classes=classes) if classes else {}))
    expected = saved.state_dict()
    assert found.num_classes == (classes or 2)
    for key, value in found.state_dict().items():
        assert (key.startswith('fc.') and classes in (7, 1000)) or value.equal(expected[key]), key


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=2), dict(num_classes=0), dict(features_only=True),
                                    dict(in_chans=1, num_classes=2)])
def test_a_file_by_timms_overlay_that_does_not_fit(tmp_path, kwargs):
    other = save(timm.create_model('resnet26', **NARROW), tmp_path / 'w.safetensors')
    kwargs = {**NARROW, **kwargs}
    with pytest.raises(WeightsError, match=r'w.safetensors does not fit ARLCNN: \d+ tensors are missing') as raised:
        timm.create_model('arl_cnn50', pretrained=True, pretrained_cfg_overlay=dict(file=str(other)), **kwargs)
    assert len(str(raised.value)) < 400 + len(str(other))
    with pytest.raises(WeightsError, match='The given state_dict does not fit ARLCNN'):
        timm.create_model('arl_cnn50', pretrained=True, pretrained_cfg_overlay=dict(state_dict={'a': torch.ones(1)}),
                          **kwargs)


def test_what_to_pass_where_the_ends_alone_differ():
    saved = timm.create_model('arl_cnn14', num_classes=2, in_chans=1).state_dict()
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=saved))
    for classes in ({}, dict(num_classes=2)):  # it says how many it has
        found = timm.create_model('arl_cnn14', in_chans=1, **given, **classes).state_dict()
        assert all(found[key].equal(value) for key, value in saved.items())
    assert timm.create_model('arl_cnn14', in_chans=1, num_classes=7, **given).conv1.weight.equal(saved['conv1.weight'])
    given['pretrained_cfg_overlay']['num_classes'] = 1000
    with pytest.raises(WeightsError, match='The given state_dict has 2 outputs, not 1000: pass num_classes=2'):
        timm.create_model('arl_cnn14', in_chans=1, **given)
    given['pretrained_cfg_overlay']['num_classes'] = 2
    with pytest.raises(WeightsError, match='takes images of 1 channels, not 3: pass in_chans=1'):
        timm.create_model('arl_cnn14', num_classes=2, **given)


def test_images_of_four_channels(tmp_path):
    """timm adapts first convolutions of 3 channels; one that fits is taken as it is, also by timm 1.0.26."""
    saved = timm.create_model('arl_cnn14', in_chans=4)
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(save(saved, tmp_path / 'w.safetensors'))))
    with pytest.raises(WeightsError, match='takes images of 4 channels, not 3: pass in_chans=4'):
        timm.create_model('arl_cnn14', **given)
    for of_features in ({}, dict(features_only=True)):
        loaded = timm.create_model('arl_cnn14', in_chans=4, **given, **of_features)
        assert loaded.conv1.weight.equal(saved.conv1.weight) and loaded.pretrained_cfg['first_conv'] == 'conv1'
    save_network(saved, tmp_path / 'out', ())
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert again.conv1.weight.equal(saved.conv1.weight) and again.fc.weight.equal(saved.fc.weight)
    save_network(again, tmp_path / 'again', ())  # what was loaded is saved as what was made
    for folder in ('out', 'again'):
        colour = timm.create_model(f'local-dir:{tmp_path / folder}', pretrained=True, in_chans=3)
        assert colour.conv1.weight.shape == (64, 3, 7, 7)


def test_a_gate_given_by_block_args_is_known_again(tmp_path):
    saved = timm.create_model('arl_cnn14', block_args=dict(attention='channel', mask_scale='mean1'))
    save_network(saved, tmp_path / 'out', ())
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert (again.attention, again.mask_scale) == ('channel', 'mean1') and again.fc.weight.equal(saved.fc.weight)
    with pytest.raises(WeightsError, match='was trained with attention channel'):
        timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'out' / 'model.safetensors')))


def test_first_convolutions_of_other_shapes(tmp_path):
    state_dict = timm.create_model('arl_cnn14').state_dict()
    for shape in ((64, 3, 3, 3), (32, 3, 7, 7)):
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(
            state_dict={**state_dict, 'conv1.weight': torch.zeros(shape)}))
        for in_chans in (1, 3):
            with pytest.raises(WeightsError, match=r'1 tensors are .* of another shape \(conv1.weight\)'):
                timm.create_model('arl_cnn14', in_chans=in_chans, **given)


def test_what_timm_adapts_still_fits(tmp_path):
    saved = timm.create_model('resnet14')
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(save(saved, tmp_path / 'w.safetensors'))))
    grey = timm.create_model('arl_cnn14', in_chans=1, num_classes=2, **given)
    assert torch.allclose(grey.conv1.weight, saved.conv1.weight.sum(1, keepdim=True))
    assert timm.create_model('arl_cnn14', features_only=True, **given).conv1.weight.equal(saved.conv1.weight)
    loose = timm.create_model('arl_cnn14', pretrained_strict=False, block_args=dict(attn_layer='se'), **given)
    assert loose.conv1.weight.equal(saved.conv1.weight)  # timm's own way to ask for a part
    tensors = {k: v for k, v in saved.state_dict().items() if not k.endswith('num_batches_tracked')}  # as of 2017
    safetensors.torch.save_file(tensors, tmp_path / 'w.safetensors')
    assert timm.create_model('arl_cnn14', **given).fc.weight.equal(saved.fc.weight)
    assert load_weights_file(timm.create_model('arl_cnn14'), tmp_path / 'w.safetensors') == []


FORBIDDEN = """
import os, pathlib, sys
import timm, timm_arl
from timm_arl.factory import create_trained, load_weights_file
model = timm.create_model('arl_cnn14', num_classes=2)
os.chdir(sys.argv[1])
if os.getuid() == 0:  # to whom nothing is forbidden
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
overlay = dict(file='out/model.safetensors')
for load in (lambda: load_weights_file(model, 'out'), lambda: create_trained('out'), lambda: create_trained('shut'),
             lambda: timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg_overlay=overlay)):
    try:
        load()
    except timm_arl.WeightsError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_file_that_must_not_be_read_is_not_called_missing(run, tmp_path):
    for name in ('out', 'shut'):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / 'out' / 'model.safetensors').chmod(0)
    (tmp_path / 'shut').chmod(0)
    tmp_path.chmod(0o755)
    try:
        done = subprocess.run([sys.executable, '-c', FORBIDDEN, tmp_path], capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    finally:
        (tmp_path / 'shut').chmod(0o755)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all('ermission denied' in line for line in lines), done.stdout
    assert 'shut' in lines[2] and all('out/model.safetensors' in lines[k] for k in (0, 1, 3))


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_the_classifier_of_a_wrapped_network_is_loaded(tmp_path, prefix):
    """As DistributedDataParallel and the compiler name the tensors, which timm takes too."""
    saved = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64])
    safetensors.torch.save_file({prefix + key: t for key, t in saved.state_dict().items()}, tmp_path / 'a.safetensors')
    given = dict(pretrained=True, channels=[8, 16, 32, 64], pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'a.safetensors')))
    for classes in {}, dict(num_classes=2):
        model = timm.create_model('arl_cnn14', **given, **classes)
        assert torch.equal(model.fc.weight, saved.fc.weight)


def test_features_of_a_file_without_a_classifier(tmp_path):
    saved = timm.create_model('arl_cnn14', num_classes=0, channels=[8, 16, 32, 64]).eval()
    safetensors.torch.save_file(saved.state_dict(), tmp_path / 'a.safetensors')
    given = dict(pretrained=True, channels=[8, 16, 32, 64], pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'a.safetensors')))
    images = torch.rand(1, 3, 64, 64)
    features = timm.create_model('arl_cnn14', features_only=True, **given).eval()(images)
    assert torch.equal(features[-1], saved.forward_features(images))
    with pytest.raises(WeightsError, match='fc.bias'):
        timm.create_model('arl_cnn14', **given)


def test_the_run_of_a_folder_above_is_that_of_its_own_network(run, tmp_path):
    """Weights of another network that lie somewhere below a run were not trained by it."""
    outer, inner = tmp_path / 'out', tmp_path / 'out' / 'last' / 'kept'
    shutil.copytree(run, outer)
    shutil.copytree(run, inner)
    (inner / 'run.json').unlink()
    record = json.loads((outer / 'run.json').read_text())
    for model, used in (('arl_cnn14', True), ('arl_cnn14.isic2017', True), ('hf-hub:user/model', True),
                        ('arl_cnn50', False), ('resnet14', False)):
        write_json(outer / 'run.json', {**record, 'arguments': {**record['arguments'], 'model': model}})
        assert Checkpoint(str(inner)).run_folder() == (outer if used else None), model
        assert bool(Checkpoint(str(inner / 'model.safetensors')).arguments()) == used
        assert Checkpoint(str(outer)).run_folder() == outer  # its own is no guess
