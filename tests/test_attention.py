"""The gate, held against the paper's equations written in numpy."""
import numpy as np
import pytest
import torch

from timm_arl.arl_cnn import ARLBottleneck
from timm_arl.attention import (
    ATTENTIONS,
    MASK_SCALES,
    attention_mask,
    attention_residual,
    fused_attention_residual,
)

FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (3, 8, 1, 1), (1, 16, 7, 7), (2, 5, 13, 1)]


def paper_mask(f: np.ndarray, attention: str, mask_scale: str) -> np.ndarray:
    """Eq. 4, 5, 6 in float64."""
    f = f.astype(np.float64)
    b, c, h, w = f.shape
    if attention == 'mixed':
        mask = 1 / (1 + np.exp(-f))
        return mask if mask_scale == 'softmax' else np.stack([m / m.mean() for m in mask])
    mask = np.empty_like(f)
    if attention == 'spatial':
        for i in range(b):
            for k in range(c):
                e = np.exp(f[i, k] - f[i, k].max())
                mask[i, k] = e / e.sum() * (h * w if mask_scale == 'mean1' else 1)
    else:
        for i in range(b):
            for y in range(h):
                for x in range(w):
                    e = np.exp(f[i, :, y, x] - f[i, :, y, x].max())
                    mask[i, :, y, x] = e / e.sum() * (c if mask_scale == 'mean1' else 1)
    return mask


def paper_gate(f, x, alpha, attention, mask_scale):
    return x.astype(np.float64) + f + alpha * paper_mask(f, attention, mask_scale) * x


def pair(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul(3).to(dtype).contiguous(memory_format=memory_format)
            for _ in range(2)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('mask_scale', MASK_SCALES)
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_mask_is_the_papers(attention, mask_scale, shape):
    residual, _ = pair(shape)
    mask = attention_mask(residual, attention, mask_scale)
    assert np.allclose(mask.numpy(), paper_mask(residual.numpy(), attention, mask_scale), rtol=2e-6, atol=0)


def test_spatial_is_not_softmax2d():
    # what public copies call spatial is nn.Softmax2d, a softmax over channels: Eq. 5
    residual, _ = pair((2, 3, 4, 5))
    softmax2d = torch.nn.Softmax2d()(residual)
    assert torch.allclose(attention_mask(residual, 'channel'), softmax2d)
    assert not torch.allclose(attention_mask(residual, 'spatial'), softmax2d)


def test_masks_sum_to_one_or_have_mean_one():
    residual, _ = pair((2, 3, 4, 5), torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert torch.allclose(attention_mask(residual, 'spatial').sum((2, 3)), one)
    assert torch.allclose(attention_mask(residual, 'channel').sum(1), one)
    assert torch.allclose(attention_mask(residual, 'spatial', 'mean1').mean((2, 3)), one)
    assert torch.allclose(attention_mask(residual, 'channel', 'mean1').mean(1), one)
    assert torch.allclose(attention_mask(residual, 'mixed', 'mean1').mean((1, 2, 3)), one)


@pytest.mark.parametrize('alpha', [1e-3, 0.7, -2.0])
@pytest.mark.parametrize('mask_scale', MASK_SCALES)
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_gate_is_the_papers(attention, mask_scale, alpha):
    residual, shortcut = pair((2, 6, 5, 7))
    y = attention_residual(residual, shortcut, torch.tensor([alpha]), attention, mask_scale).numpy()
    expected = paper_gate(residual.numpy(), shortcut.numpy(), alpha, attention, mask_scale)
    assert np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max()
    branch = attention_residual(residual, shortcut, torch.tensor([alpha]), attention, mask_scale, add_shortcut=False)
    assert np.abs(branch.numpy() - (expected - shortcut.numpy())).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('mask_scale', MASK_SCALES)
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_gradients(attention, mask_scale, memory_format):
    residual, shortcut = (t.requires_grad_() for t in pair((2, 3, 3, 2), torch.float64, memory_format))
    alpha = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    for add_shortcut in (True, False):
        assert torch.autograd.gradcheck(
            lambda r, s, a, add=add_shortcut: attention_residual(r, s, a, attention, mask_scale, add),
            (residual, shortcut, alpha), fast_mode=True)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_shape_dtype_and_format_are_kept(attention, dtype, memory_format, shape):
    residual, shortcut = pair(shape, dtype, memory_format)
    for alpha_dtype in (torch.float32, dtype):  # a float32 parameter under autocast, or a model converted whole
        if dtype == torch.float64 and alpha_dtype != dtype:
            continue
        y = attention_residual(residual, shortcut, torch.tensor([0.5], dtype=alpha_dtype), attention)
        assert y.shape == residual.shape and y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
    for mask_scale in MASK_SCALES:
        mask = attention_mask(residual, attention, mask_scale)
        assert mask.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert mask.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_gradients_keep_dtype_and_format(attention):
    residual, shortcut = (t.requires_grad_() for t in pair((2, 8, 6, 6), torch.bfloat16, torch.channels_last))
    y = attention_residual(residual, shortcut, torch.tensor([0.5], requires_grad=True), attention)
    for gradient in torch.autograd.grad(y.float().square().sum(), (residual, shortcut)):
        assert gradient.dtype == torch.bfloat16
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_half_precision_is_rounded_once(attention, dtype):
    residual, shortcut = pair((2, 8, 6, 6), dtype)
    expected = paper_gate(residual.double().numpy(), shortcut.double().numpy(), 0.7, attention, 'mean1')
    y = attention_residual(residual, shortcut, torch.tensor([0.7]), attention, 'mean1').double().numpy()
    # half a unit in the last place, and float32's own error
    assert (np.abs(y - expected) <= torch.finfo(dtype).eps / 2 * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_large_activations_stay_finite(attention, dtype):
    residual = torch.tensor([-3e4, 0, 3e4, 3e4], dtype=dtype).reshape(1, 2, 2, 1)
    y = attention_residual(residual, torch.ones_like(residual), torch.tensor([1.0]), attention)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize('mask_scale', MASK_SCALES)
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_alpha_zero_is_a_plain_sum(attention, mask_scale):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        residual, shortcut = pair((2, 8, 6, 6), dtype)
        assert torch.equal(
            attention_residual(residual, shortcut, torch.zeros(1), attention, mask_scale), residual + shortcut)


@pytest.mark.parametrize('gate, error', [
    (attention_residual, ValueError), (torch.jit.script(attention_residual), torch.jit.Error),
    (fused_attention_residual, ValueError)], ids=['plain', 'scripted', 'fused'])
def test_unknown_names_are_refused(gate, error):
    residual, shortcut = pair((1, 2, 2, 2))
    with pytest.raises(error, match="Unknown attention 'both': choose 'spatial', 'channel' or 'mixed'"):
        gate(residual, shortcut, torch.ones(1), 'both')
    with pytest.raises(error, match="Unknown mask_scale 'mean': choose 'softmax' or 'mean1'"):
        gate(residual, shortcut, torch.ones(1), 'mixed', 'mean')
    for value in (0., -1.):
        with pytest.raises(error, match='The temperature must be above 0'):
            gate(residual, shortcut, torch.ones(1), temperature=value)


@pytest.mark.parametrize('value', ['0.1', float('inf'), None])
def test_alphas_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match=f'alpha_init must be a finite number, not {value!r}'):
        ARLBottleneck(64, 16, alpha_init=value)


@pytest.mark.slow
def test_inductor_computes_the_same():
    residual, shortcut = (t.requires_grad_() for t in pair((2, 8, 6, 6), memory_format=torch.channels_last))
    alpha = torch.tensor([0.7], requires_grad=True)
    results = []
    for gate in (attention_residual, torch.compile(attention_residual, fullgraph=True)):
        y = gate(residual, shortcut, alpha)
        results.append((y, *torch.autograd.grad(y.square().sum(), (residual, shortcut, alpha))))
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_traced_mask_is_of_the_image_that_it_sees():
    residual, shortcut = pair((1, 3, 4, 5))
    larger = pair((1, 3, 7, 2))
    for attention in ATTENTIONS:
        def gate(r, s, attention=attention):
            return attention_residual(r, s, torch.tensor([0.7]), attention, 'mean1')
        assert torch.allclose(torch.jit.trace(gate, (residual, shortcut))(*larger), gate(*larger))


@pytest.mark.parametrize('value', [-95., -1e4])
def test_a_mixed_mask_of_mean_one_where_every_sigmoid_is_nothing(value):
    residual = torch.full((1, 3, 4, 5), value, requires_grad=True)
    mask = attention_mask(residual, 'mixed', 'mean1')
    assert torch.equal(mask, torch.ones_like(mask))
    (mask * torch.rand(mask.shape)).sum().backward()
    assert residual.grad.isfinite().all()
