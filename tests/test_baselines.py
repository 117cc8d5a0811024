"""The baselines: the parameter counts of the paper, and the networks they are."""
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import timm_arl


@pytest.mark.parametrize('name, millions', [('resnet14', 8.02), ('seresnet14', 10.81)])
def test_parameters_with_two_outputs(name, millions):
    model = timm.create_model(name, num_classes=2)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert [len(getattr(model, f'layer{n}')) for n in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_squeeze_and_excitation_reduces_by_four():
    block = timm.create_model('seresnet14').layer1[0]
    assert (block.se.fc1.in_channels, block.se.fc1.out_channels) == (256, 64)


@pytest.mark.parametrize('name', ['resnet14', 'seresnet14'])
def test_timm_promises(name):
    model = timm.create_model(name, num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    assert torch.allclose(torch.jit.script(model)(x), model(x), atol=1e-6)
    assert [o.shape[1] for o in timm.create_model(name, features_only=True)(x)] == [64, 256, 512, 1024, 2048]
    assert name not in timm.list_pretrained()


@pytest.mark.parametrize('name', ['resnet14', 'seresnet14'])
def test_weights_are_loaded_as_all_others_here(name, tmp_path):
    with pytest.raises(timm_arl.WeightsError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)
    saved = timm.create_model(name, num_classes=2)
    torch.save(saved.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(timm_arl.WeightsError, match='only those are opened'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth')))
    safetensors.torch.save_file(saved.state_dict(), tmp_path / 'w.safetensors')
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.safetensors')))
    assert torch.equal(timm.create_model(name, **given).fc.weight, saved.fc.weight)


@pytest.mark.slow
def test_a_name_that_timm_has_taken_is_left_to_timm():
    script = (
        'import warnings, timm; warnings.simplefilter("error")\n'
        'from timm.models import register_model\n'
        'def resnet14(pretrained=False, **kwargs): return "timm\'s own"\n'
        'register_model(resnet14)\n'
        'import timm_arl\n'
        'print(timm.create_model.__module__, timm.model_entrypoint("resnet14")(), timm.is_model("seresnet14"))\n')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert "timm's own True" in done.stdout, done.stderr
