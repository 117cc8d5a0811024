"""Weights from names and files: what fits is loaded, what does not is named."""
import shutil

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import timm_arl  # noqa: F401  registers the models
from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, create_for_task, create_trained, load_weights_file


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
    save_for_hf(timm.create_model('arl_cnn14_mixed', num_classes=2), tmp_path, safe_serialization=True)
    assert load_weights_file(timm.create_model('arl_cnn14', num_classes=2, attention='mixed'), tmp_path) == []
    for kwargs in ({}, dict(attention='mixed', mask_scale='mean1')):
        with pytest.raises(WeightsError, match='trained with mixed attention and mask_scale softmax, not'):
            load_weights_file(timm.create_model('arl_cnn14', num_classes=2, **kwargs), tmp_path)


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
    model = timm.create_model('arl_cnn14', num_classes=2)
    path, other = save(model, tmp_path / 'w.safetensors'), tmp_path / 'other'
    save_for_hf(model, tmp_path / 'w', safe_serialization=True)
    save_for_hf(timm.create_model('arl_cnn14', num_classes=2), other, safe_serialization=True)
    for given in (dict(file=str(path)), dict(file=str(path.parent / 'w')), dict(state_dict=model.state_dict())):
        for name in ('arl_cnn14', f'local-dir:{other}'):  # what the caller gives, not what a config.json does
            found = timm.create_model(name, pretrained=True, num_classes=2,
                                      pretrained_cfg_overlay=dict(given, num_classes=2))
            assert torch.equal(found.fc.weight, model.fc.weight)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='w.pth is no .safetensors file, and only those are opened: write'):
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
    ('user/model', {}, "Unknown model user/model: .*Use 'hf-hub:user/model'"),
    ('Local-Dir:/nowhere/at/all', dict(pretrained=True), 'No weights at /nowhere/at/all/model.safetensors'),
    ('nothing-like-it', {}, "Unknown model nothing-like-it: timm.list_models"),
    ('arl_cnn50.no_such_tag', {}, 'no_such_tag'),
    ('arl_cnn50.no_such_tag', dict(pretrained=True),
     'No weights arl_cnn50.no_such_tag: choose arl_cnn50.a1_in1k or arl_cnn50.tv_in1k'),
    ('/', {}, 'Unknown model /: that is on this disk; a folder that timm reads is named local-dir:/'),
    ('arl_cnn14_channel', dict(pretrained=True), 'No pretrained weights exist for arl_cnn14_channel'),
    ('vit_tiny_patch16_224', dict(attention='mixed'), 'vit_tiny_patch16_224 cannot be created: .*attention'),
    ('local-dir:/nowhere/at/all', dict(pretrained=True), '/nowhere/at/all'),
])
def test_models_that_cannot_be_had(name, kwargs, message):
    with pytest.raises(WeightsError, match=message):
        create_for_task(name, num_classes=2, **kwargs)


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
    ('tv_resnet50', 'timm/resnet50.tv_in1k', None, ()), ('arl_cnn14', None, None, ()),
    ('hf-hub:user/model@v1', 'user/model', 'v1', None),
    ('arl_cnn14.isic2017', 'timm-arl/arl_cnn14.isic2017', 'v1', ('melanoma', 'seborrheic_keratosis')),
])
def test_a_checkpoint_that_is_no_folder(name, repo, revision, labels):
    found = Checkpoint(name)
    assert (found.path, found.repo, found.revision) == (None, repo, revision)
    if labels is not None:  # else a Hub is asked
        assert tuple(found.label_names()) == labels
        assert bool(found.arguments()) == bool(found.folder) == name.endswith('.isic2017')


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
