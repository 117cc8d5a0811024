"""EfficientNet-Lite0 with the gate, held against timm's own, the paper's equation and timm's promises."""
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from test_attention import paper_gate
from timm.models import create_feature_extractor

from timm_arl import WeightsError
from timm_arl.arl_efficientnet import ARLInvertedResidual
from timm_arl.attention import alphas_of

NAME, PLAIN = 'arl_tf_efficientnet_lite0', 'tf_efficientnet_lite0'
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def create(name=NAME, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=2, **kwargs).eval()


def test_nine_alphas_and_nothing_else():
    model, plain = create(), create(PLAIN)
    alphas = alphas_of(model)
    assert len(alphas) == 9 and all(p.shape == (1,) and p.item() == pytest.approx(1e-3) for p in alphas.values())
    assert model.state_dict().keys() - plain.state_dict().keys() == alphas.keys()
    assert {name.rpartition('.')[0] for name in alphas} == {
        name for name, m in plain.named_modules() if getattr(m, 'has_skip', False)}


@pytest.mark.parametrize('kwargs', [{}, dict(attention='channel'), dict(attention='mixed', mask_scale='mean1')])
@pytest.mark.parametrize('training', [False, True])
def test_alpha_zero_is_timms_network_bit_for_bit(kwargs, training):
    arl, plain = create(alpha_init=0., drop_path_rate=0.2, **kwargs), create(PLAIN, drop_path_rate=0.2)
    missing, unexpected = arl.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) == set(alphas_of(arl))
    results = []
    for model in (arl.train(training), plain.train(training)):
        torch.manual_seed(3)
        output = model(IMAGES)
        output.square().sum().backward()
        results.append((output, model.conv_stem.weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert any(p.grad.abs() > 0 for p in alphas_of(arl).values())  # alpha itself learns from zero


@pytest.mark.parametrize('attention', ['spatial', 'channel', 'mixed'])
@pytest.mark.parametrize('mask_scale', ['softmax', 'mean1'])
def test_a_block_computes_the_papers_equation(attention, mask_scale):
    block = create(attention=attention, mask_scale=mask_scale, alpha_init=2.).blocks[2][1]
    seen = {}
    block.bn3.register_forward_hook(lambda m, i, o: seen.update(residual=o.detach().clone()))
    x = torch.randn(2, 40, 8, 8)
    found = block(x).detach().numpy()
    expected = paper_gate(seen['residual'].numpy(), x.numpy(), 2., attention, mask_scale)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_weights_of_timms_network(tmp_path):
    assert timm.list_pretrained(f'{NAME}*') == [f'{NAME}.in1k', f'{NAME}.isic2017']
    config = timm.get_pretrained_cfg(NAME)
    assert config.hf_hub_id == 'timm/tf_efficientnet_lite0.in1k' and config.mean == config.std == (0.5, 0.5, 0.5)
    theirs = timm.get_pretrained_cfg(PLAIN)
    assert (config.interpolation, config.crop_pct, config.input_size) == (
        theirs.interpolation, theirs.crop_pct, theirs.input_size)
    plain = timm.create_model(PLAIN).eval()
    path = str(tmp_path / 'model.safetensors')
    safetensors.torch.save_file(plain.state_dict(), path)
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(file=path), alpha_init=0.).eval()
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_weights_of_a_feature_extractor(tmp_path):
    plain = timm.create_model(PLAIN).eval()
    path = tmp_path / 'model.safetensors'
    given = dict(features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    safetensors.torch.save_file(plain.state_dict(), path)
    for strict in ({}, dict(pretrained_strict=True), dict(pretrained_strict=False)):
        maps = timm.create_model(NAME, alpha_init=0., **given, **strict).eval()(IMAGES)
        assert torch.equal(maps[-1], plain.forward_intermediates(IMAGES, intermediates_only=True)[-1])
    part = {k: v for k, v in plain.state_dict().items() if not k.startswith('blocks.5.')}
    safetensors.torch.save_file(part, path)
    with pytest.raises(WeightsError, match='tensors are missing.*blocks.5.0.bn1.bias'):
        timm.create_model(NAME, **given)
    safetensors.torch.save_file(timm.create_model('resnet14').state_dict(), path)
    with pytest.raises(WeightsError, match='does not fit ARLEfficientNetFeatures'):
        timm.create_model(NAME, **given)


def test_the_block_alone():
    block = ARLInvertedResidual(16, 16, attention='channel', alpha_init=0.5).eval()
    plain = timm.models._efficientnet_blocks.InvertedResidual(16, 16).eval()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k != 'alpha'})
    x = torch.randn(2, 16, 8, 8)
    f = (plain(x) - x).detach().numpy()
    expected = paper_gate(f, x.numpy(), 0.5, 'channel', 'softmax')
    assert list(alphas_of(block)) == ['alpha'] and np.allclose(block(x).detach().numpy(), expected, atol=1e-5)
    for bad in (dict(stride=2), dict(out_chs=32)):
        with pytest.raises(ValueError, match='needs an identity shortcut'):
            ARLInvertedResidual(**{'in_chs': 16, 'out_chs': 16, **bad})


def test_timm_promises():
    model = create(drop_path_rate=0.1, alpha_init=1.).train()
    model(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = create(alpha_init=1.)
    expected = model(IMAGES)
    traced = create_feature_extractor(model, ['classifier'])  # by FX, with timm's leaves
    assert torch.equal(traced(IMAGES)['classifier'], expected)
    assert torch.allclose(torch.jit.script(traced)(IMAGES)['classifier'], expected, atol=1e-4)
    assert torch.allclose(torch.jit.script(model)(IMAGES), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected, atol=1e-5)
    features = model.forward_features(IMAGES)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        final, stages = model.forward_intermediates(IMAGES)
        assert torch.equal(final, features) and [s.shape[1] for s in stages] == [16, 24, 40, 112, 320]
    backbone = timm.create_model(NAME, features_only=True, attention='mixed')
    assert [o.shape[1] for o in backbone(IMAGES)] == [16, 24, 40, 112, 320] and len(alphas_of(backbone)) == 9
    model.reset_classifier(0, '')
    assert model(IMAGES).shape == (2, 1280, 2, 2)
    assert timm.create_model(NAME, output_stride=16)(IMAGES).shape == (2, 1000)
    assert next(timm.create_model(NAME, device='meta').parameters()).is_meta
    with pytest.raises(ValueError, match="Unknown attention 'softmax2d'"):
        timm.create_model(NAME, attention='softmax2d')


def test_another_norm_layer():
    model = timm.create_model(NAME, norm_layer=partial(torch.nn.BatchNorm2d, eps=0.5), num_classes=2)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.5}
