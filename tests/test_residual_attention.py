"""The Residual Attention Networks, held against the papers and against what timm promises of its own models."""
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import timm_arl  # noqa: F401  registers the models
from timm_arl.residual_attention import AttentionModule

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name, millions, blocks, widths', [
    ('ran14', 11.88, [1, 1, 1, 1], [64, 256, 512]), ('ran50', 39.48, [3, 4, 6, 3], [256, 512, 1024])])
def test_the_layouts_of_the_paper(name, millions, blocks, widths):
    model = timm.create_model(name, num_classes=2)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    modules = [m for m in model.modules() if isinstance(m, AttentionModule)]
    assert [m.mask[0].num_features for m in modules] == widths
    stages = [getattr(model, f'layer{i}') for i in (1, 2, 3, 4)]
    assert [sum(not isinstance(m, AttentionModule) for m in stage) for stage in stages] == blocks


@pytest.mark.parametrize('size', [14, 7, 2, 1])
def test_the_module_is_the_equation(size):
    torch.manual_seed(0)
    module = AttentionModule(64).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-0.2, 0.3)
    x = torch.rand(2, 64, size, size)
    first = module.first(x)
    half = module.down(F.max_pool2d(first, 3, 2, 1))
    low = module.bottom(F.max_pool2d(half, 3, 2, 1))
    y = F.interpolate(low, half.shape[2:], mode='bilinear') + module.skip(half)
    mask = torch.sigmoid(module.mask(F.interpolate(module.up(y), first.shape[2:], mode='bilinear')))
    expected = module.last((1 + mask) * module.trunk(first))  # H = (1 + M) * T
    assert module(x).shape == x.shape and torch.allclose(module(x), expected, atol=1e-6)
    with torch.no_grad():
        module.mask[-1].weight.zero_()  # a mask of one half everywhere
    assert torch.allclose(module(x), module.last(1.5 * module.trunk(first)), atol=1e-6)


def test_resnet_weights_load_into_the_trunk_of_ran50(tmp_path):
    resnet = timm.create_model('resnet50')
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(resnet.state_dict(), path)
    model = timm.create_model('ran50', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), num_classes=2)
    for name, tensor in resnet.state_dict().items():
        assert name.startswith('fc.') or torch.equal(model.state_dict()[name], tensor), name
    assert {'ran50.a1_in1k', 'ran50.tv_in1k'} == set(timm.list_pretrained('ran50*'))
    # and a whole checkpoint of its own comes back as it was
    safetensors.torch.save_file(model.state_dict(), path)
    again = timm.create_model('ran50', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=2),
                              num_classes=2)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_timm_promises():
    torch.manual_seed(0)
    model = timm.create_model('ran14', num_classes=5, drop_path_rate=0.1)
    model(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = model(IMAGES)
    assert torch.equal(torch.fx.symbolic_trace(model)(IMAGES), expected)
    assert torch.allclose(torch.jit.script(model)(IMAGES), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected, atol=1e-5)
    features = model.forward_features(IMAGES)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        final, stages = model.forward_intermediates(IMAGES)
        assert torch.equal(final, features)
        assert [stage.shape[1] for stage in stages] == [64, 256, 512, 1024, 2048]
    assert [o.shape[1] for o in timm.create_model('ran14', features_only=True)(IMAGES)] == [64, 256, 512, 1024, 2048]
    model.reset_classifier(0, '')
    assert model(IMAGES).shape == (2, 2048, 2, 2)
    assert timm.create_model('ran14', output_stride=16)(IMAGES).shape == (2, 1000)
    assert timm.create_model('ran14', in_chans=1)(IMAGES[:, :1]).shape == (2, 1000)
    with torch.device('meta'):
        assert next(timm.create_model('ran14').parameters()).is_meta
    half = timm.create_model('ran14', num_classes=2).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    assert half(IMAGES.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['ran14', 'ran50'])
def test_layers_by_name_as_timms_resnets_take_them(name):
    model = timm.create_model(name, act_layer='silu', norm_layer='groupnorm1')
    kinds = {type(m).__name__ for m in model.modules()}
    assert {'SiLU', 'GroupNorm1'} <= kinds and not {'ReLU', 'BatchNorm2d'} & kinds
