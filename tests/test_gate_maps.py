"""Gates against the equations in float64."""
import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from as_trained import IMAGES, create
from scipy.special import expit, softmax
from torch import nn

from timm_arl.explain import gate_maps, scaled_alphas


def gated_blocks(model, images):
    """Name, F, x and block of each gated block, and the logits, in float64 by the layers and Eq. 3 alone."""
    model = copy.deepcopy(model).double()
    found = []

    def mask_of(f, block):
        axes = {'spatial': (2, 3), 'channel': 1}
        mask = expit(f) if block.attention == 'mixed' else softmax(f, axis=axes[block.attention])
        over = {'spatial': (2, 3), 'channel': 1, 'mixed': (1, 2, 3)}[block.attention]
        return mask / mask.mean(over, keepdims=True) if block.mask_scale == 'mean1' else mask

    def gate(name, block, f, x):
        f, x = f.numpy(), x.numpy()
        mask = mask_of(f, block)
        found.append((name, f, x, mask, block))
        return torch.from_numpy(x + f + block.alpha.item() * mask * x)

    with torch.no_grad():
        if hasattr(model, 'conv_stem'):
            x = model.bn1(model.conv_stem(images.double()))
            for name, block in [(f'blocks.{i}.{j}', b) for i, s in enumerate(model.blocks) for j, b in enumerate(s)]:
                if hasattr(block, 'alpha'):
                    f = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
                    x = gate(name, block, block.bn3(block.conv_pwl(f)), x)
                else:
                    x = block(x)
            return found, model.forward_head(model.bn2(model.conv_head(x)))
        x = model.maxpool(model.act1(model.bn1(model.conv1(images.double()))))
        for i in (1, 2, 3, 4):
            for j, block in enumerate(getattr(model, f'layer{i}')):
                f = block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x))))))
                f = block.bn3(block.conv3(f))
                f = f if block.se is None else block.se(f)
                x = gate(f'layer{i}.{j}', block, f, x if block.downsample is None else block.downsample(x)).relu()
        return found, model.forward_head(x)


@pytest.mark.parametrize('mask_scale', ['softmax', 'mean1'])
@pytest.mark.parametrize('name, kwargs', [
    ('arl_cnn14', {}), ('arl_cnn14_channel', {}), ('arl_cnn14_mixed', {}), ('arl_cnn14', dict(drop_path_rate=0.3)),
    ('arl_cnn26', {}), ('arl_cnn14', dict(block_args=dict(attn_layer='se'))), ('arl_tf_efficientnet_lite0', {}),
    ('arl_tf_efficientnet_lite0', dict(attention='channel', drop_path_rate=0.3)),
    ('arl_tf_efficientnet_lite0', dict(attention='mixed'))])
def test_gate_maps_are_the_equations(name, kwargs, mask_scale):
    model = create(name, mask_scale=mask_scale, **kwargs)
    expected, logits = gated_blocks(model, IMAGES)
    with torch.no_grad():  # the test's own network is the same
        np.testing.assert_allclose(model(IMAGES), logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    maps = gate_maps(model, IMAGES)
    assert list(maps) == [entry[0] for entry in expected]
    for block_name, f, x, mask, block in expected:
        found = maps[block_name]
        size, channels = f.shape[2] * f.shape[3], f.shape[1]
        plain = {'spatial': lambda f: softmax(f, (2, 3)), 'channel': lambda f: softmax(f, 1), 'mixed': expit}[
            block.attention](f)
        heat, parts, axis = {
            'spatial': (plain.mean(1) * size, plain, (2, 3)), 'channel': (plain.max(1) * channels, plain, 1),
            'mixed': (mask.mean(1), plain / plain.sum((2, 3), keepdims=True), (2, 3))}[block.attention]
        share = np.exp(-(parts * np.log(parts)).sum(axis)) / (channels if axis == 1 else size)
        term = block.alpha.item() * mask * x
        contribution = np.sqrt((term ** 2).sum(1)) / (np.sqrt(((x + f) ** 2).sum(1)) + 1e-6)
        for key, value in dict(
                mask=heat, contribution=contribution, effective_share=share.reshape(3, -1).mean(1),
                largest=plain.max((1, 2, 3)), std=f.std((1, 2, 3))).items():
            given = getattr(found, key)
            assert given.dtype == torch.float32
            np.testing.assert_allclose(given, value, rtol=5e-3, atol=1e-5 * np.abs(value).max(), err_msg=key)
        assert found.alpha == pytest.approx(block.alpha.item())


def test_threads_that_share_a_network_see_their_own_images():
    """As those of a web server: one asks for masks while the other predicts."""
    model, batches = create('arl_cnn14'), [torch.randn(k + 1, 3, 64, 64) for k in range(3)]
    with torch.no_grad():
        expected, alone = [gate_maps(model, images) for images in batches], model(batches[0])

    def ask(k):
        with torch.no_grad():
            return [gate_maps(model, batches[k]) if k else model(batches[0]) for _ in range(8)]

    with ThreadPoolExecutor(3) as pool:
        plain, *maps = pool.map(ask, range(3))
    assert all(torch.equal(logits, alone) for logits in plain)
    for k, found in enumerate(maps, 1):
        for one in found:
            assert list(one) == list(expected[k])
            assert all(torch.equal(one[name].mask, expected[k][name].mask) for name in one)


def test_a_fresh_block_is_flat_and_alpha_zero_adds_nothing():
    fresh = timm.create_model('arl_cnn14')  # its last norms start at 0, so F is 0
    for found in gate_maps(fresh, IMAGES).values():
        size = found.mask[0].numel()
        assert torch.allclose(found.mask, torch.ones(())) and torch.allclose(found.effective_share, torch.ones(()))
        assert torch.allclose(found.largest, torch.tensor(1 / size)) and not found.std.any()
    model = create('arl_cnn14')
    assert all((found.contribution > 0).any() for found in gate_maps(model, IMAGES).values())
    with scaled_alphas(model, 0):
        assert not any(found.contribution.any() or found.alpha for found in gate_maps(model, IMAGES).values())


@pytest.mark.parametrize('name', ['resnet14', 'ran14', 'convnext_atto'])
def test_no_gates_no_gate_maps(name):
    model = timm.create_model(name, num_classes=2)
    with pytest.raises(ValueError, match='no block of attention residual learning'):
        gate_maps(model, IMAGES)
    with pytest.raises(ValueError, match='no block of attention residual learning'), scaled_alphas(model, 2):
        pass


def test_scaled_alphas_come_back_bit_for_bit():
    model = create('arl_tf_efficientnet_lite0')
    alphas = {key: p for key, p in model.named_parameters() if key.endswith('.alpha')}
    for number, p in enumerate(alphas.values()):
        nn.init.constant_(p, 0.1 + 1e-8 * number if number else float('nan'))
    before = {key: p.detach().clone().view(torch.int32) for key, p in alphas.items()}
    with scaled_alphas(model, 1 / 3):
        values = [p.item() for p in alphas.values()]
        assert values[1:] == pytest.approx([0.1 / 3] * 8)
    for factor in (0, -2.5, 1e30):
        with pytest.raises(KeyError), scaled_alphas(model, factor):
            changed = [not torch.equal(p.detach().view(torch.int32), before[key]) for key, p in alphas.items()]
            assert all(changed[1:])
            raise KeyError
        assert all(torch.equal(p.detach().view(torch.int32), before[key]) for key, p in alphas.items())
    with pytest.raises(ValueError, match='finite number, not nan'), scaled_alphas(model, float('nan')):
        pass


def test_a_factor_of_zero_is_the_plain_network():
    model, plain = create('arl_cnn14'), create('resnet14')
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith('.alpha')})
    with torch.no_grad(), scaled_alphas(model, 0):
        assert torch.equal(model(IMAGES), plain(IMAGES))
    with torch.no_grad():
        assert not torch.equal(model(IMAGES), plain(IMAGES))
