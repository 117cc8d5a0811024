"""Weights from files: what fits is loaded, what does not is named."""
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import timm_arl  # noqa: F401  registers the models
from timm_arl.download import WeightsError
from timm_arl.factory import create_for_task, load_weights_file


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
