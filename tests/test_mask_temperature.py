"""n(F / T), a variant that the paper does not have: T = 1 is the paper's, a small T makes masks that attend."""
import numpy as np
import pytest
import timm
import torch
from test_attention import pair, paper_gate, paper_mask

import timm_arl  # noqa: F401  registers the models
from timm_arl.attention import alphas_of, attention_mask, attention_residual, fused_attention_residual, temperatures_of
from timm_arl.download import WeightsError
from timm_arl.explain import gate_maps
from timm_arl.factory import create_trained, load_weights_file, save_network

NARROW = dict(channels=[16, 32, 64, 128])
NETWORKS = {'arl_cnn14': NARROW, 'arl_tf_efficientnet_lite0': {}}
KWARGS = [dict(mask_temperature=0.25), dict(learn_temperature=True), dict(mask_temperature=0.5, learn_temperature=True)]
ATTENTIONS = pytest.mark.parametrize('attention', ['spatial', 'channel', 'mixed'])


def create(name='arl_cnn14', alpha=3., **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **NETWORKS[name], **kwargs).eval()
    for p in alphas_of(model).values():
        torch.nn.init.constant_(p, alpha)
    for name, p in model.named_parameters():
        if name.endswith('bn3.weight') and not p.any():  # in a new ResNet: F would be 0 too
            torch.nn.init.ones_(p)
    return model


def images(seed=0):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@ATTENTIONS
@pytest.mark.parametrize('mask_scale', ['softmax', 'mean1'])
def test_mask_and_gate_are_those_of_f_over_t(attention, mask_scale):
    f, x = pair((2, 3, 4, 5), torch.float64)
    alpha, log = torch.tensor([1.5], dtype=torch.float64), torch.tensor([-0.7], dtype=torch.float64)
    for temperature, log_temperature, t in ((0.3, None, 0.3), (1., log, np.exp(-0.7)), (2., log, np.exp(-0.7))):
        expected = paper_mask(f.numpy() / t, attention, mask_scale)
        assert np.allclose(attention_mask(f, attention, mask_scale, temperature, log_temperature), expected, rtol=1e-9)
        for gate in (attention_residual, fused_attention_residual):
            y = gate(f, x, alpha, attention, mask_scale, temperature=temperature, log_temperature=log_temperature)
            assert np.allclose(y, x.numpy() + f.numpy() + 1.5 * expected * x.numpy(), rtol=1e-9)


@ATTENTIONS
def test_gradients_reach_f_x_alpha_and_t(attention):
    f, x = (t.requires_grad_() for t in pair((2, 3, 4, 5), torch.float64))
    scalars = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (1.5, -0.7)]
    assert torch.autograd.gradcheck(
        lambda f, x, alpha, log: fused_attention_residual(f, x, alpha, attention, log_temperature=log),
        (f, x, *scalars), fast_mode=True)


def test_in_half_precision_the_mask_is_in_float32():
    f, _ = pair((2, 3, 4, 5), torch.bfloat16)
    mask = attention_mask(f, log_temperature=torch.full((1,), 0.5, dtype=torch.bfloat16))
    assert mask.dtype == torch.float32
    assert np.allclose(mask, paper_mask(f.float().numpy() / np.exp(0.5), 'spatial', 'softmax'), rtol=1e-5)


def test_large_values_at_a_small_temperature():
    f = 2000 + torch.arange(12.).view(1, 1, 3, 4) / 2048
    expected = paper_mask(f.double().numpy() / 1e-3, 'spatial', 'softmax')
    for how in (dict(temperature=1e-3), dict(log_temperature=torch.tensor([1e-3]).log())):
        assert np.allclose(attention_mask(f, **how), expected, rtol=1e-5)
    assert attention_mask(f * 1e3, temperature=1e-6).isfinite().all()


@pytest.mark.parametrize('name', NETWORKS)
def test_a_temperature_of_1_is_the_papers(name):
    plain = create(name)
    learned = create(name, learn_temperature=True)
    assert plain.state_dict().keys() == create(name, mask_temperature=1.).state_dict().keys()
    assert len(temperatures_of(learned)) == len(alphas_of(learned)) == len(alphas_of(plain))
    assert not temperatures_of(plain)
    learned.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(learned(images()), plain(images()), atol=1e-5)
    for kwargs in KWARGS[::2]:
        other = create(name, **kwargs)
        other.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(other(images()), plain(images()), atol=1e-4)


@pytest.mark.parametrize('kwargs', KWARGS[:2], ids=str)
@pytest.mark.parametrize('name', NETWORKS)
def test_timms_promises(name, kwargs):
    model = create(name, **kwargs)
    expected = model(images())
    assert torch.allclose(torch.jit.script(model)(images()), expected, atol=1e-5)
    if name == 'arl_cnn14':  # FX cannot trace the padding of the other, which is timm's
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(images()), expected)
        assert torch.allclose(torch.jit.script(traced)(images()), expected, atol=1e-5)
    features = timm.create_model(name, features_only=True, **NETWORKS[name], **kwargs)(images())
    assert len(features) == 5
    model.train()(images()).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', NETWORKS)
def test_alpha_zero_is_timms_network_bit_for_bit(name):
    model = create(name, alpha=0., mask_temperature=0.1)
    plain = name.replace('arl_cnn', 'resnet').removeprefix('arl_')
    plain = timm.create_model(plain, num_classes=2, **NETWORKS[name]).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith('.alpha')})
    with torch.inference_mode():
        assert torch.equal(model(images()), plain(images()))


def test_a_frozen_alpha_of_zero_leaves_no_parameter_out():
    model = create(alpha=0., learn_temperature=True).train()
    for p in alphas_of(model).values():
        p.requires_grad_(False)
    model(images()).sum().backward()
    assert all(p.grad is not None for p in temperatures_of(model).values())  # or DDP waits for them


def test_block_computes_the_equation_at_its_temperature():
    model = create(mask_temperature=0.2)
    seen = {}
    for part, module in (('f', model.layer2[0].bn3), ('x', model.layer2[0].downsample), ('y', model.layer2[0])):
        module.register_forward_hook(lambda m, i, o, part=part: seen.update({part: o.detach().numpy().copy()}))
    model(images())
    expected = paper_gate(seen['f'], seen['x'], 3., 'spatial', 'softmax')
    assert not np.allclose(seen['y'], np.maximum(expected, 0), atol=1e-4)
    mask = paper_mask(seen['f'] / 0.2, 'spatial', 'softmax')
    expected = seen['x'].astype(np.float64) + seen['f'] + 3 * mask * seen['x']
    assert np.allclose(seen['y'], np.maximum(expected, 0), atol=1e-5 * np.abs(expected).max())


def test_maps_show_the_mask_that_is_applied():
    flat, peaked = (gate_maps(create(mask_temperature=t), images())['layer2.0'] for t in (100., 0.05))
    assert flat.effective_share.min() > 0.99 > 0.5 > peaked.effective_share.max()


def test_saved_networks_keep_their_temperature(tmp_path):
    model = create(mask_temperature=0.5, learn_temperature=True)
    for p in temperatures_of(model).values():
        torch.nn.init.constant_(p, -0.3)
    save_network(model, tmp_path, ['melanoma', 'seborrheic_keratosis'], mask_temperature=0.5, learn_temperature=True,
                 **NARROW)
    assert torch.equal(create_trained(tmp_path).eval()(images()), model(images()))
    again = create(learn_temperature=True)
    load_weights_file(again, tmp_path)  # the file holds what was learned, from whichever start
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(WeightsError, match='4 tensors are missing, unexpected'):
        load_weights_file(create(), tmp_path)


def test_weights_without_temperatures_start_at_the_given_one(tmp_path):
    save_network(create(alpha=0.7), tmp_path / 'plain', ['melanoma', 'seborrheic_keratosis'], **NARROW)
    learned = create(learn_temperature=True)
    load_weights_file(learned, tmp_path / 'plain')
    assert all(p.item() == pytest.approx(0.7) for p in alphas_of(learned).values())
    assert all(p.item() == 0 for p in temperatures_of(learned).values())
    with pytest.raises(WeightsError, match='trained with mask_temperature 1.0, not mask_temperature 0.5'):
        load_weights_file(create(learn_temperature=True, mask_temperature=0.5), tmp_path / 'plain')


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('value', [0., -1., float('nan'), float('inf')])
def test_temperatures_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match='mask_temperature must be a number from 1e-6 to 1e6, not'):
        timm.create_model(name, mask_temperature=value)
    with pytest.raises(ValueError, match="learn_temperature must be True or False, not 'false'"):  # of --model-kwargs
        timm.create_model(name, learn_temperature='false')

