"""What a user calls a trained network: folders, files, names and repos, and what is told of each."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import timm_arl
from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, create_trained, load_weights_file, save_network

NARROW = dict(channels=[8, 16, 32, 64])


def test_a_checkpoint_by_each_of_its_names(run, staged, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / 'out')
    shutil.copytree(run, tmp_path / 'out' / 'last' / 'kept')
    (tmp_path / 'out' / 'last' / 'kept' / 'run.json').unlink()
    monkeypatch.chdir(tmp_path)
    for name, folder in (('out', 'out'), ('out/model.safetensors', 'out'), ('local-dir:out', 'out'),
                         ('Local-Dir:out', 'out'), ('out/last/kept', 'out/last/kept'), (str(staged), str(staged))):
        found = Checkpoint(name)
        assert str(found.folder) == folder and found.repo is None
        assert found.label_names() == ['melanoma', 'seborrheic_keratosis']
        assert found.arguments()['recipe'] == 'modern' and found.arguments()['train_ids'] == '0'
        assert found.arguments(published=False) == ({} if name == str(staged) else found.arguments())
    assert torch.equal(create_trained('out').fc.bias, create_trained('local-dir:out').fc.bias)


@pytest.mark.parametrize('name, repo, revision, labels', [
    ('arl_cnn50.a1_in1k', 'timm/resnet50.a1_in1k', None, ()), ('arl_cnn50', 'timm/resnet50.a1_in1k', None, ()),
    ('tv_resnet50', 'timm/resnet50.tv_in1k', None, ()), ('resnet14', None, None, ()),
    ('arl_cnn14', 'timm-arl/arl_cnn14.isic2017', 'v1', ('melanoma', 'seborrheic_keratosis')),
    ('hf-hub:user/model@v1', 'user/model', 'v1', None),
    ('arl_cnn14.isic2017', 'timm-arl/arl_cnn14.isic2017', 'v1', ('melanoma', 'seborrheic_keratosis')),
])
def test_a_checkpoint_that_is_no_folder(name, repo, revision, labels):
    found = Checkpoint(name)
    assert (found.path, found.repo, found.revision) == (None, repo, revision)
    if labels is not None:  # else a Hub is asked
        assert tuple(found.label_names()) == labels
        assert bool(found.arguments()) == bool(found.folder) == name.startswith('arl_cnn14')


def test_a_folder_with_the_name_of_a_model(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / 'resnet50')
    monkeypatch.chdir(tmp_path)
    assert Checkpoint('resnet50').arguments()  # as --checkpoint has it
    assert Checkpoint('resnet50', paths=False).repo == 'timm/resnet50.a1_in1k'  # as --model has it
    for name in ('nowhere', 'not/here', 'resnet51'):
        with pytest.raises(WeightsError, match=f'No folder {name}, and no model of that name'):
            Checkpoint(name)
    with pytest.raises(WeightsError, match='No weights resnet14.a1: choose resnet14'):
        Checkpoint('resnet14.a1')


@pytest.mark.parametrize('value, word', [(float('nan'), 'NaN'), (float('-inf'), 'infinite values')])
def test_weights_that_are_not_numbers(run, tmp_path, value, word):
    folder = tmp_path / 'out'
    shutil.copytree(run, folder)
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    tensors['layer1.0.conv1.weight'][3, 0] = value
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    message = f'out.* holds {word} in layer1.0.conv1.weight: choose another checkpoint'
    with pytest.raises(WeightsError, match=message):
        load_weights_file(timm.create_model('arl_cnn14', num_classes=2, **NARROW), folder)
    with pytest.raises(WeightsError, match=message):
        create_trained(str(folder))
    with pytest.raises(WeightsError, match=message):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.mark.parametrize('content', ['[]', '{}', '{"model_type": "bert"}', 'not JSON', ''])
def test_a_config_of_something_else(run, tmp_path, content):
    shutil.copytree(run, tmp_path / 'out')
    (tmp_path / 'out' / 'config.json').write_text(content)
    with pytest.raises(WeightsError, match=r'out/config.json does not describe a timm model \(it names no'):
        create_trained(str(tmp_path / 'out'))


@pytest.mark.parametrize('architecture, message', [
    ('arl_cnn50', r'does not fit ARLCNN: \d+ tensors'),
    ('resnet50', r'are of different networks: \d+ tensors|argument .attention'),
    ('vit_tiny_patch16_224', 'are of different networks|cannot be created'), ('no_such_net', 'no_such_net')])
def test_a_config_of_another_architecture(run, tmp_path, architecture, message):
    shutil.copytree(run, tmp_path / 'out')
    config = json.loads((run / 'config.json').read_text())
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(dict(config, architecture=architecture)))
    with pytest.raises(WeightsError, match=message) as raised:
        create_trained(str(tmp_path / 'out'))
    assert len(str(raised.value)) < 350 + len(str(tmp_path)) and '\n' not in str(raised.value)


def test_a_run_is_found_by_a_link_and_not_for_a_folder_that_is_staged_in_it(run, staged, tmp_path):
    shutil.copytree(run, tmp_path / 'out')
    shutil.copytree(run, tmp_path / 'out' / 'last' / 'kept')
    (tmp_path / 'out' / 'last' / 'kept' / 'run.json').unlink()
    (tmp_path / 'best').symlink_to(tmp_path / 'out' / 'last' / 'kept')
    assert Checkpoint(str(tmp_path / 'best')).arguments(published=False)['recipe'] == 'modern'
    shutil.copytree(staged, tmp_path / 'out' / 'other')
    assert Checkpoint(str(tmp_path / 'out' / 'other')).run_folder() is None


@pytest.mark.parametrize('content', ['', '{"arguments": {"train', '[]'])
def test_a_damaged_record_of_a_run_is_told(run, tmp_path, content):
    """Crops and more would be the defaults otherwise."""
    shutil.copytree(run, tmp_path / 'out')
    (tmp_path / 'out' / 'run.json').write_text(content)
    with pytest.raises(WeightsError, match='run.json is damaged or cannot be read: restore it'):
        Checkpoint(str(tmp_path / 'out')).settings()


def test_a_lenient_loading_is_not_passed_on(tmp_path):
    """By whoever saved the network: what does not fit would be left random, and nothing would say so."""
    model = timm.create_model('arl_cnn14', num_classes=2, pretrained_strict=False, **NARROW)
    save_network(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert 'pretrained_strict' not in config['model_args']
    tensors = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    safetensors.torch.save_file(
        {name: t for name, t in tensors.items() if not name.startswith('layer3')}, tmp_path / 'model.safetensors')
    config['model_args']['pretrained_strict'] = False  # of another program
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(WeightsError, match='layer3'):
        create_trained(str(tmp_path))


def test_the_mask_of_a_network_that_timm_did_not_create_is_saved(tmp_path):
    model = timm_arl.arl_cnn.arl_cnn14(attention='mixed', mask_scale='mean1', num_classes=2, **NARROW)
    save_network(model, tmp_path, **NARROW)
    found = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (found.attention, found.mask_scale) == ('mixed', 'mean1')


@pytest.mark.slow
def test_what_is_not_known_of_home_stops_nothing(run, tmp_path):
    """Offline, for one: an evaluation then shows the other clinic's images alone."""
    script = "from timm_arl.factory import Checkpoint; print(Checkpoint('hf-hub:user/model').home())"
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=200, env={
        **os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'empty')})
    assert done.stdout == '{}\n', done.stderr
    shutil.copytree(run, tmp_path / 'out')
    assert Checkpoint(str(tmp_path / 'out')).home() == {}
    (tmp_path / 'out' / 'results.json').write_text('{"home": {')
    with pytest.raises(WeightsError, match='results.json is damaged'):
        Checkpoint(str(tmp_path / 'out')).home()
