"""Grad-CAM and its relatives: against autograd, and of which networks."""
import importlib.util

import numpy as np
import pytest
import timm
import torch
from as_trained import IMAGES, create
from torch import nn

from timm_arl.explain import METHODS, class_activation_map, gate_maps, gradient_map


def stretched(maps, side=64):
    """As Grad-CAM shows maps: what is below 0 left out, from 0 to 1 in each image, at the size of the input."""
    maps = maps.clamp(min=0)
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = nn.functional.interpolate(
        (maps / maps.amax((1, 2), keepdim=True))[:, None], size=(side, side), mode='bilinear')[:, 0]
    return (maps - maps.amin((1, 2), keepdim=True)) / maps.amax((1, 2), keepdim=True)


@pytest.mark.parametrize('name', ['arl_cnn14', 'ran14', 'resnet18'])
@pytest.mark.parametrize('method', ['gradcam', 'hirescam'])
def test_grad_cam_of_the_last_stage_is_the_cam(name, method):
    """Behind a pooled linear head the gradient is the classifier's weight everywhere."""
    model = create(name)
    expected = stretched(class_activation_map(model, IMAGES)[:, 1])
    np.testing.assert_allclose(gradient_map(model, IMAGES, 1, method=method), expected, atol=1e-3)


@pytest.mark.parametrize('layer', ['layer3.0.bn3', 'layer3.0', 'layer2'])
@pytest.mark.parametrize('name', ['resnet14', 'arl_cnn14'])
def test_grad_cam_of_an_inner_layer(name, layer):
    """Held against autograd; what follows bn3 works in place."""
    model, seen = create(name, channels=[64, 128, 256, 512]), {}  # narrow ones have maps without a value above 0

    def keep(module, inputs, output):
        seen['maps'] = output
        return output.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    gradient, = torch.autograd.grad(model(IMAGES)[:, 0].sum(), seen['maps'])
    hook.remove()
    expected = stretched((gradient.mean((2, 3), keepdim=True) * seen['maps'].detach()).sum(1))
    np.testing.assert_allclose(gradient_map(model, IMAGES, 0, layer), expected, atol=5e-3)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['arl_tf_efficientnet_lite0', 'mobilenetv3_small_050'])
def test_every_method_gives_maps_of_each_image(method, name):
    model = create(name)
    maps = gradient_map(model, IMAGES, 1, method=method)
    assert maps.shape == (3, 64, 64) and maps.dtype == torch.float32
    assert 0 <= maps.min() and maps.max() <= 1 and maps.amax((1, 2)).max() > 0.9
    assert not torch.equal(maps[0], maps[1])


def test_what_gradient_map_refuses(monkeypatch):
    model = create('resnet18')
    for match, args in [('Unknown method', dict(label=0, method='lime')), ("Unknown layer 'layer9'.*layer4", dict(
            label=0, layer='layer9')), ('Output 2 does not exist: the network has 2', dict(label=2)), (
            "'fc' does not give maps", dict(label=0, layer='fc'))]:
        with pytest.raises(ValueError, match=match):
            gradient_map(model, IMAGES, **args)
    with pytest.raises(ValueError, match='does not give maps'):
        gradient_map(timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=2, depth=1), IMAGES, 0)
    with pytest.raises(ValueError, match='Sequential does not say which layer'):
        gradient_map(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), IMAGES, 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'pytorch_grad_cam' else find(name))
    with pytest.raises(ImportError, match=r"grad-cam is not installed: in a checkout, pip install -e '.\[explain\]'"):
        gradient_map(model, IMAGES, 0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradient_maps_of_half_precision(dtype):
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64], zero_init_last=False)
    images = torch.randn(2, 3, 64, 64)
    expected = gradient_map(model, images.to(dtype).float(), 1)
    found = gradient_map(model.to(dtype), images.to(dtype), 1)
    assert found.dtype == torch.float32 and found.shape == (2, 64, 64)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9
    assert next(model.parameters()).dtype == dtype
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert gradient_map(model.float(), images, 1).dtype == torch.float32
    with pytest.raises(ValueError, match='no image'):
        gradient_map(model, images[:0], 1)


@pytest.mark.parametrize('layer', ['', 'layer3'])
def test_gradient_maps_of_checkpointed_and_compiled_networks(layer):
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64], zero_init_last=False).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = gradient_map(model, images, 1, layer)
    model.set_grad_checkpointing()
    assert torch.allclose(gradient_map(model, images, 1, layer), expected)
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    gates = gate_maps(model, images)
    compiled = torch.compile(model, backend='eager')
    assert torch.allclose(gradient_map(compiled, images, 1, layer), expected)
    assert gate_maps(compiled, images).keys() == gates.keys()
    model.compile(backend='aot_eager')
    with torch.no_grad():
        model(images)
    again = gate_maps(model, images)
    other = timm.create_model('resnet18', num_classes=2).eval()
    other.compile(backend='aot_eager')
    with pytest.raises(ValueError, match='has no block'):
        gate_maps(other, images)
    assert torch._dynamo.eval_frame._stance.stance == 'default'  # what is compiled stays so
    assert again.keys() == gates.keys() and all(torch.allclose(again[name].mask, gates[name].mask) for name in gates)
    assert torch.allclose(gradient_map(model, images, 1, layer), expected)
