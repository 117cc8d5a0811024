"""Networks that timm's own functions save, resolve and load."""
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import timm_arl
from timm_arl.pretrained import safe_name

NARROW = dict(channels=[8, 16, 32, 64])


def saved_by_timm(folder, **kwargs):
    model = timm.create_model('arl_cnn14', **NARROW, **kwargs)
    save_for_hf(model, folder, safe_serialization=True, model_args=NARROW)
    return model


@pytest.mark.skipif(not hasattr(timm.models, 'get_model_args'), reason='timm 1.0.31 or newer saves them')
def test_the_mask_of_a_network_that_no_factory_made_is_saved(tmp_path):
    """Every tensor fits another mask too."""
    model = timm_arl.arl_cnn.arl_cnn14(num_classes=2, attention='mixed', mask_scale='mean1', **NARROW)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=NARROW)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (again.attention, again.mask_scale) == ('mixed', 'mean1')
    assert timm.create_model('arl_tf_efficientnet_lite0', attention='channel')._model_args['attention'] == 'channel'


def test_the_config_that_timms_scripts_fill_in_is_no_choice_of_weights():
    given = timm.get_pretrained_cfg('arl_cnn14').to_dict()
    model = timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg=given)
    expected = timm.create_model('arl_cnn14.isic2017', pretrained=True)
    assert torch.equal(model.fc.weight, expected.fc.weight)


def test_outputs_that_a_config_drops(tmp_path):
    model = timm.create_model('arl_cnn14', num_classes=11, **NARROW)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'w.safetensors')
    found = timm.create_model('arl_cnn14', pretrained=True, num_classes=10, **NARROW, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'w.safetensors'), num_classes=10, label_offset=1))
    assert torch.equal(found.fc.weight, model.fc.weight[1:]) and torch.equal(found.fc.bias, model.fc.bias[1:])


def test_a_state_dict_brings_its_classes_to_a_folder_of_other_weights(tmp_path):
    saved_by_timm(tmp_path, num_classes=2)
    tensors = timm.create_model('arl_cnn14', num_classes=5, **NARROW).state_dict()
    found = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5,
                              pretrained_cfg_overlay=dict(state_dict=tensors))
    assert torch.equal(found.fc.weight, tensors['fc.weight'])


def test_a_state_dict_for_images_of_four_channels():
    tensors = timm.create_model('arl_cnn14', in_chans=4, num_classes=2, **NARROW).state_dict()
    for given in (dict(in_chans=4), {}):  # in the second, the config alone says so
        overlay = dict(state_dict=tensors, **({} if given else dict(input_size=(4, 224, 224))))
        found = timm.create_model('arl_cnn14', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay,
                                  **given, **NARROW)
        assert torch.equal(found.conv1.weight, tensors['conv1.weight'])


def test_the_safetensors_beside_a_pickle():
    """The name that timm tries first."""
    assert [safe_name(name) for name in (None, 'pytorch_model.bin', 'best.bin', 'a.safetensors')] == [
        'model.safetensors', 'model.safetensors', 'best.safetensors', 'a.safetensors']
