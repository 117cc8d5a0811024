"""What test_triton.py runs in a process of its own, since Triton decides at its import whether to interpret kernels.

With TRITON_INTERPRET=1 the kernels run in Python on CPU tensors, else on the GPU. The interpreter cuts float32 off
where it makes bfloat16 of it (a GPU rounds), so that the last place of a bfloat16 may be wrong by one here.
"""
import dataclasses
import itertools

import pytest
import torch
from test_attention import FORMATS

from timm_arl.attention import ATTENTIONS, MASK_SCALES
from timm_arl.kernels import Gate, NormState, torch_ops, triton

if triton.INTERPRETED:  # it computes each int32 again in int64 for a check that it makes in debug mode alone
    from triton.runtime.interpreter import interpreter_builder
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
DEVICE = 'cpu' if triton.INTERPRETED else 'cuda'
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# the stages of a ResNet, odd sizes, columns longer than one tile, single rows; few columns, since the interpreter takes
# milliseconds for each
SMALL = [(1, 37, 14, 14), (2, 70, 7, 7), (3, 1, 3, 1), (2, 8, 1, 1), (1, 1, 1, 1)]
LARGE = {'spatial': [(1, 5, 56, 56), (1, 3, 41, 53), (1, 20, 28, 28)],
         'channel': [(1, 1640, 2, 3), (1, 8, 56, 3), (1, 20, 28, 5)]}
LARGE['mixed'] = LARGE['spatial']
KINDS = list(itertools.product(MASK_SCALES, (True, False), (True, False), (None, 'training', 'frozen')))
pytestmark = [pytest.mark.parametrize('attention', ATTENTIONS)]
both_layouts = pytest.mark.parametrize('layout', FORMATS, ids=['nchw', 'nhwc'])


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def tensors(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    """residual, shortcut, grad: eighths up to 8, so that the norms below give an F that every dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).mul(12).round().clamp(-64, 64).div(8).to(DEVICE, dtype).contiguous(
            memory_format=layout) for _ in range(3)]


def norm(channels, dtype, training, seed):
    """A norm that multiplies by 1/2, 1 or 2 and adds a whole number."""
    bits = torch.randint(0, 2, (4, channels), generator=torch.Generator().manual_seed(seed)).to(DEVICE, wide(dtype))
    weight, bias, mean, std = bits[0] + 1, bits[1] - 1, 2 * bits[2], bits[3] + 1
    return NormState(weight, bias, mean, 1 / std if training else std.square() - 0.25, training, 0.25)


def normalized(z, state):
    if state is None:
        return z.double()
    weight, bias, mean, spread = (t.double().view(-1, 1, 1) for t in state[:4])
    return (z.double() - mean) * (spread if state.training else (spread + state.eps).rsqrt()) * weight + bias


def states(shape, dtype, norms):
    return [norms and norm(shape[1], dtype, norms == 'training', seed) for seed in (1, 2)]


def paper(f, x, alpha, gate, grad, found):
    """y and the gradients of F, x and alpha in float64, by Eq. 3 to 9 and autograd; and the terms of alpha's.

    Where y was ``found`` to be 0, rounded, the ReLU lets no gradient through.
    """
    f, x, alpha = leaves = [t.detach().double().requires_grad_() for t in (f, x, alpha)]
    mask, over = {
        'spatial': lambda: (f.flatten(2).softmax(2).view_as(f), (2, 3)), 'channel': lambda: (f.softmax(1), 1),
        'mixed': lambda: (f.sigmoid(), (1, 2, 3))}[gate.attention]()
    if gate.mask_scale == 'mean1':
        mask = mask / mask.mean(over, keepdim=True)
    y = f + alpha * mask * x + (x if gate.add_shortcut else 0)
    grad = grad.double() * (found > 0) if gate.relu else grad.double()
    gradients = torch.autograd.grad(y, leaves, grad)
    return (y.relu() if gate.relu else y, *gradients), (mask * x * grad).abs()


def run(residual, shortcut, grad, alpha, gate, norms=(None, None)):
    """y and the gradients of F, x and alpha by the kernels."""
    f, x = (z if state is None else normalized(z, state).to(z.dtype) for z, state in zip((residual, shortcut), norms))
    assert triton.takes(f, x)
    y, *kept = triton.gate_forward(f, x, alpha, gate, False)
    return (y, *triton.gate_backward(
        grad, y if gate.relu else None, residual, shortcut, alpha, *norms, gate, *kept))


def check(shape, dtype, layout, gate, norms, seed=0):
    residual, shortcut, grad = tensors(shape, dtype, layout, seed)
    alpha = torch.tensor([0.7], device=DEVICE, dtype=wide(dtype))
    norms = states(shape, dtype, norms)
    found = run(residual, shortcut, grad, alpha, gate, norms)
    expected, terms = paper(normalized(residual, norms[0]), normalized(shortcut, norms[1]), alpha, gate, grad, found[0])
    work, places = 1e-13 if dtype == torch.float64 else 1e-6, 0.
    if dtype in (torch.bfloat16, torch.float16):
        places = (1 if dtype == torch.bfloat16 and triton.INTERPRETED else 0.5) * torch.finfo(dtype).eps
    for a, b in zip(found[:3], expected):
        largest = b.abs().max() + terms.max()  # of two that nearly cancel, too
        assert ((a - b).abs() <= work * largest + places * b.abs()).all(), (shape, gate, norms[0])
    assert (found[3] - expected[3]).abs() <= work * terms.sum()
    for t in found[:3]:
        assert t.dtype == dtype and t.stride() == residual.stride()
    assert found[3].dtype == alpha.dtype and found[3].shape == (1,)


@both_layouts
def test_every_gate(attention, layout):
    for i, (mask_scale, add_shortcut, relu, norms) in enumerate(KINDS):
        if triton.INTERPRETED and (i + i // 3 + i // 6) % 2 != FORMATS.index(layout):
            continue  # the other half in the other layout
        check((2, 5, 4, 3), torch.float32, layout, Gate(attention, mask_scale, add_shortcut, relu), norms)


@both_layouts
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_shape(attention, layout, dtype):
    large = LARGE[attention][:{torch.float32: None, torch.bfloat16: 1}.get(dtype, 0) if triton.INTERPRETED else None]
    shapes = list(enumerate(SMALL + large))
    if triton.INTERPRETED and dtype != torch.float32:
        shapes = shapes[FORMATS.index(layout)::2]  # the other half in the other layout
    for i, shape in shapes:
        mask_scale, add_shortcut, relu, norms = KINDS[7 * i % len(KINDS)]
        check(shape, dtype, layout, Gate(attention, mask_scale, add_shortcut, relu), norms, i)


@pytest.mark.parametrize('dtype', DTYPES)
@both_layouts
def test_values_to_overflow(attention, layout, dtype):
    # beyond what can be exponentiated; a channel of one value throughout; an activation on top of all others
    residual, shortcut, grad = tensors((2, 4, 5, 5), dtype, layout)
    residual[0, 1], residual[0, 2], residual[1, 3, 2, 2] = 3e4, -3e4, 200.
    alpha = torch.tensor([0.75], device=DEVICE, dtype=wide(dtype))
    gate = Gate(attention, 'softmax', True, False)
    found = run(residual, shortcut, grad, alpha, gate)
    expected, _ = paper(residual, shortcut, alpha, gate, grad, found[0])
    for a, b in zip(found, expected):
        assert torch.allclose(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=5e-5)


@pytest.mark.parametrize('mask_scale, layout', zip(MASK_SCALES, FORMATS))
def test_what_is_not_finite_is_as_from_torch(attention, mask_scale, layout):
    inf, nan = float('inf'), float('nan')
    for value in (inf, -inf, nan, (inf, -inf)):
        for where in range(3):  # in the residual, the shortcut, the gradient
            for all_of_it in (False, True) if where == 0 else (False,):
                values = tensors((1, 3, 2, 5), torch.float32, layout)
                for i, v in enumerate(value if isinstance(value, tuple) else [value]):
                    values[where][:, i, slice(None) if all_of_it else i] = v
                residual, shortcut, grad = values
                alpha, gate = torch.tensor([0.7], device=DEVICE), Gate(attention, mask_scale, True, True)
                found = run(residual, shortcut, grad, alpha, gate)
                y, *kept = torch_ops.gate_forward(residual, shortcut, alpha, gate, False)
                expected = y, *torch_ops.gate_backward(
                    grad, y, residual, shortcut, alpha, None, None, gate, *kept)
                for a, b in zip(found, expected):
                    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True), (value, where, all_of_it)


@both_layouts
def test_kept_tensors_serve_the_torch_kernel_too(attention, layout):
    residual, shortcut, grad = tensors((2, 6, 5, 3), layout=layout)
    alpha = torch.tensor([0.7], device=DEVICE)
    for mask_scale in MASK_SCALES:
        gate = Gate(attention, mask_scale, True, True)
        (y, *ours), (_, *theirs) = (
            kernel.gate_forward(residual, shortcut, alpha, gate, False) for kernel in (triton, torch_ops))
        expected = triton.gate_backward(grad, y, residual, shortcut, alpha, None, None, gate, *ours)
        for kernel, kept in ((triton, theirs), (torch_ops, ours)):
            found = kernel.gate_backward(grad, y, residual, shortcut, alpha, None, None, gate, *kept)
            for a, b in zip(found, expected):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@both_layouts
def test_alpha_zero_is_a_plain_sum(attention, layout):
    for dtype in (torch.float32, torch.float16):
        f, x, _ = tensors((2, 6, 5, 3), dtype, layout)
        f = f / 3
        y, *_ = triton.gate_forward(f, x, torch.zeros(1, device=DEVICE), Gate(attention, relu=True), False)
        assert torch.equal(y, (f + x).relu())


def test_in_place_any_strides_and_twice_the_same(attention):
    gate, alpha = Gate(attention, 'mean1', True, True), torch.tensor([0.7], device=DEVICE)
    wide, _, _ = tensors((2, 4, 4, 8))
    for residual in (wide[..., ::2], wide.permute(0, 2, 1, 3)[..., :5], wide[:1].expand(3, -1, -1, -1)[..., :3],
                     wide.contiguous(memory_format=torch.channels_last)[:, 1:3]):
        shortcut = torch.ones_like(residual.contiguous()).contiguous(memory_format=torch.channels_last) / 3
        grad = torch.ones((), device=DEVICE).expand(residual.shape)  # as from a sum: no strides of its own
        before = residual.clone()
        first, second = (run(residual, shortcut, grad, alpha, gate) for _ in range(2))
        assert torch.equal(residual, before)
        for a, b, c in zip(first, second, paper(residual, shortcut, alpha, gate, grad, first[0])[0]):
            assert torch.equal(a, b) and torch.allclose(a.double(), c, rtol=1e-5, atol=1e-5)
    for f in (tensors(LARGE[attention][0], layout=layout)[0] for layout in FORMATS):
        x = torch.ones_like(f)
        y, *_ = triton.gate_forward(f.clone(), x, alpha, gate, False)
        overwritten, *_ = triton.gate_forward(f, x, alpha, gate, True)
        assert overwritten.data_ptr() == f.data_ptr() and torch.equal(overwritten, y)


def test_f_is_rounded_as_it_was(attention):
    # F is large: an F that is not rounded is another mask than the one that the sums are of
    residual, shortcut, grad = tensors((2, 16, 8, 8), torch.float16, torch.channels_last)
    state = NormState(*torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).add(
        torch.tensor([[40], [0], [0], [0]])).to(DEVICE), True, 1e-5)
    alpha, gate = torch.tensor([0.7], device=DEVICE), Gate(attention)
    found = run(residual, shortcut, grad, alpha, gate, (state, None))
    expected, _ = paper(normalized(residual, state).half(), shortcut, alpha, gate, grad, found[0])
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 2e-3 * b.norm()


def test_no_samples_and_a_shortcut_of_another_dtype(attention):
    gate, alpha = Gate(attention, 'mean1', True, True), torch.tensor([0.7], device=DEVICE)
    residual, shortcut, grad = tensors((2, 6, 5, 3), torch.float16)
    found = run(residual, shortcut.float(), grad, alpha, gate)
    assert [t.dtype for t in found] == [torch.float16, torch.float16, torch.float32, torch.float32]
    for a, b in zip(found, paper(residual, shortcut, alpha, gate, grad, found[0])[0]):
        assert torch.allclose(a.double(), b, rtol=2e-3, atol=1e-4)
    found = run(residual[:0], shortcut[:0], grad[:0], alpha, gate)
    assert [t.shape for t in found] == [(0, 6, 5, 3)] * 3 + [(1,)] and found[3] == 0


def test_what_is_not_taken(attention):
    f, x, _ = tensors((2, 6, 5, 3))
    assert triton.unavailable() is None
    for other in (x[:1], x.int(), x.to(torch.complex64), x.to('meta')):
        assert not triton.takes(f, other)
    assert not triton.takes(f[0], x[0])
    huge = torch.empty((), device='meta').expand(1, 2 ** 11, 2 ** 10, 2 ** 10)  # numbers of 32 bits end there
    assert not triton.takes(huge, huge)


if not triton.INTERPRETED:
    def test_more_elements_than_32_bits_count(attention):
        samples = 2 ** 31 // (256 * 56 * 56) + 2
        f = torch.zeros(samples, 256, 56, 56, device=DEVICE, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last)
        x = torch.ones_like(f)
        f[-1].normal_()
        alpha, gate = torch.tensor([0.7], device=DEVICE), Gate(attention, 'mean1')
        last, *_ = triton.gate_forward(f[-1:].clone(), x[-1:], alpha, gate, False)
        assert torch.equal(triton.gate_forward(f, x, alpha, gate, True)[0][-1:], last)
