"""What all kernels of the fused gate promise: the equations in float64, and what the plain gate does."""
import threading

import pytest
import torch
import torch.nn as nn
from test_attention import FORMATS, SHAPES, pair, paper_gate

from timm_arl.attention import ATTENTIONS, MASK_SCALES, attention_residual, fused_attention_residual
from timm_arl.kernels import backend

every_gate = [pytest.mark.parametrize('attention', ATTENTIONS), pytest.mark.parametrize('mask_scale', MASK_SCALES)]


def for_every_gate(test):
    for mark in every_gate:
        test = mark(test)
    return test


@pytest.fixture(params=['torch', 'native'])
def kernels(request, monkeypatch):
    """Triton's are tested in test_triton.py, since its interpreter must be chosen before they are defined."""
    monkeypatch.setenv('TIMM_ARL_KERNELS', request.param)
    assert backend(torch.ones(1, 1, 1, 1)) == request.param
    return request.param


def norm_layer(channels, training, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, dtype=dtype).train(training)
    for t in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        t.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


def plain_tail(residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu, norm, shortcut_norm):
    f = residual if norm is None else norm(residual)
    x = shortcut if shortcut_norm is None else shortcut_norm(shortcut)
    y = attention_residual(f, x, alpha, attention, mask_scale, add_shortcut)
    return y.relu() if relu else y


@for_every_gate
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('norms', ['none', 'training', 'frozen'])
def test_gradcheck(attention, mask_scale, memory_format, relu, norms):
    tensors = [t.requires_grad_() for t in pair((2, 3, 3, 2), torch.float64, memory_format)]
    norm, shortcut_norm = (None, None) if norms == 'none' else (
        norm_layer(3, norms == 'training'), norm_layer(3, norms == 'training', seed=1))
    parameters = [] if norm is None else [*norm.parameters(), *shortcut_norm.parameters()]
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    for add_shortcut in (True, False):
        def tail(residual, shortcut, alpha, *_, add_shortcut=add_shortcut):
            return fused_attention_residual(
                residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu, norm, shortcut_norm)
        assert torch.autograd.gradcheck(tail, (*tensors, alpha, *parameters), fast_mode=True)


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('norms', ['none', 'training', 'frozen'])
def test_second_derivatives(attention, norms):
    tensors = [t.requires_grad_() for t in pair((2, 2, 2, 2), torch.float64)]
    norm = None if norms == 'none' else norm_layer(2, norms == 'training')
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    parameters = [] if norm is None else list(norm.parameters())
    assert torch.autograd.gradgradcheck(
        lambda r, s, a, *_: fused_attention_residual(r, s, a, attention, norm=norm), (*tensors, alpha, *parameters),
        fast_mode=True)


def test_second_derivatives_of_a_shortcut_that_made_the_residual():
    # as in a block without projection, with a parameter that two blocks share
    shortcut, weight = (t.requires_grad_() for t in pair((2, 3, 4, 4), torch.float64))
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    norm = norm_layer(3, True)

    def penalty(tail):
        x = shortcut
        for _ in range(2):
            x = tail((x * weight).sin(), x, alpha, 'spatial', 'softmax', True, True, norm, None)
        gradients = torch.autograd.grad(x.square().sum(), [shortcut, alpha, norm.weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), [shortcut, weight, alpha, norm.bias])
        return [*gradients, *second]

    for fused, plain in zip(penalty(fused_attention_residual), penalty(plain_tail)):
        assert torch.allclose(fused, plain, rtol=1e-9, atol=1e-9)


def test_a_batch_of_gradients():
    inputs = [t.requires_grad_() for t in pair((1, 2, 3, 3), torch.float64)]
    alpha, norm = torch.tensor([0.7], dtype=torch.float64), norm_layer(2, False)
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda r, s, tail=tail: tail(r, s, alpha, 'channel', 'mean1', True, True, norm, None), tuple(inputs),
            vectorize=True)
        for tail in (fused_attention_residual, plain_tail)]
    for fused, plain in zip(*jacobians):
        assert torch.allclose(fused, plain)


@pytest.mark.parametrize('gamma', [1., 100.])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_half_precision_gradients_through_a_batch_norm(kernels, attention, gamma):
    # F is rounded to bfloat16 on its way through the norm, and large: an F that is not rounded is another mask
    residual, shortcut = pair((4, 16, 8, 8), torch.bfloat16, torch.channels_last)
    results = []
    for tail, dtype in (
            (plain_tail, torch.float64), (plain_tail, torch.bfloat16), (fused_attention_residual, torch.bfloat16)):
        norm = norm_layer(16, True, torch.float64 if dtype == torch.float64 else torch.float32)
        nn.init.constant_(norm.weight, gamma)
        alpha = torch.tensor([0.7], dtype=norm.weight.dtype, requires_grad=True)
        inputs = [t.to(dtype).requires_grad_() for t in (residual, shortcut)]
        y = tail(*inputs, alpha, attention, 'softmax', True, False, norm, None)
        weights = torch.cos(torch.arange(y.numel())).view_as(y).to(dtype)
        gradients = torch.autograd.grad(y, [*inputs, norm.weight], weights)
        results.append([t.double() for t in gradients])
    for exact, plain, fused in zip(*results):
        assert (fused - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_the_default_device_is_not_ours():
    residual, shortcut = pair((2, 3, 4, 4))

    def work():
        with torch.device('meta'):
            results.append(fused_attention_residual(residual, shortcut, alpha))
        results.append(fused_attention_residual(residual, shortcut, alpha))

    results, alpha = [], torch.tensor([0.7])
    thread = threading.Thread(target=work)  # one that has kept no memory yet
    thread.start()
    thread.join()
    assert torch.equal(*results) and results[0].device.type == 'cpu'


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_ours(kernels, dtype):
    inputs = pair((2, 37, 5, 6))
    norm = norm_layer(37, False, torch.float32)
    options = 'spatial', 'softmax', True, True, norm, None

    def run(gate):
        tensors = [t.detach().requires_grad_() for t in (*inputs, torch.tensor([0.7], dtype=torch.float32))]
        y = gate(*tensors, *options)
        return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    expected, before = run(plain_tail), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = run(fused_attention_residual)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('channels', [1, 5, 64])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_a_norm_of_other_channels_is_refused(kernels, channels, training, grad):
    # as by its module, for example after layers were pruned: no kernel may read or write beyond a norm's tensors
    inputs = [t.requires_grad_(grad) for t in pair((2, 37, 5, 6))]
    for which in (0, 1):
        norms = [None, None]
        norms[which] = norm_layer(channels, training, torch.float32)
        before = norms[which].running_mean.clone()
        for alpha in (0., 0.7):
            with pytest.raises(RuntimeError, match='channels|elements'):
                fused_attention_residual(
                    *inputs, torch.tensor([alpha]), 'spatial', 'softmax', True, True, *norms)
        assert torch.equal(norms[which].running_mean, before)


def run_tail(tail, dtype, inputs, alpha, options, norms):
    """y and all gradients of a block's end, and what its norms then know."""
    tensors = [t.to(dtype).requires_grad_() for t in inputs]
    alpha = torch.tensor([alpha], dtype=dtype, requires_grad=True)
    channels = inputs[0].shape[1]
    layers = [None if norms == 'none' else norm_layer(channels, norms == 'training', dtype, i) for i in (0, 1)]
    y = tail(*tensors, alpha, *options, *layers)
    parameters = [p for layer in layers if layer for p in layer.parameters()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    gradients = torch.autograd.grad(y, [*tensors, alpha, *parameters], weights)
    return [y, *gradients, *(b.to(dtype) for layer in layers if layer for b in layer.buffers())]


@for_every_gate
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('norms', ['none', 'training', 'frozen'])
def test_float32_is_the_equations(kernels, attention, mask_scale, memory_format, norms):
    for shape in [*SHAPES, (2, 37, 9, 8)]:
        if norms == 'training' and shape[0] * shape[2] * shape[3] < 8:
            continue  # a batch norm of one value is refused, of three not what is tested here
        inputs = pair(shape, memory_format=memory_format)
        for add_shortcut, relu in ((True, True), (False, False)):
            options = attention, mask_scale, add_shortcut, relu
            exact = run_tail(plain_tail, torch.float64, inputs, 0.7, options, norms)
            found = run_tail(fused_attention_residual, torch.float32, inputs, 0.7, options, norms)
            plain = run_tail(plain_tail, torch.float32, inputs, 0.7, options, norms)
            assert found[0].is_contiguous(memory_format=memory_format)
            for i, (e, f, p) in enumerate(zip(exact, found, plain)):
                assert f.dtype == torch.float32
                tolerance = 3e-6 if i else 1e-6  # in gradients, differences of numbers of like size
                # a norm may enlarge errors, and that of one number, alpha's gradient, may be small by luck
                plain_error = (p - e).abs().max() * (5 if norms == 'training' else 3 if e.numel() == 1 else 1.5)
                assert (f - e).abs().max() <= tolerance * e.abs().max().clamp(min=1) + plain_error
            layers = [None if norms == 'none' else norm_layer(
                shape[1], norms == 'training', torch.float32, i) for i in (0, 1)]
            with torch.no_grad():
                y = fused_attention_residual(*inputs, torch.tensor([0.7]), *options, *layers)
            assert torch.allclose(y, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('memory_format', FORMATS)
def test_sums_of_thousands_of_equal_values(kernels, memory_format):
    # as of a channel whose norm has a weight of 0: each addition of the same number errs the same way
    inputs = pair((1, 2, 56, 56), memory_format=memory_format)

    def run(tail, dtype):
        norms = [norm_layer(2, False, dtype, i) for i in (0, 1)]
        tensors = [t.to(dtype) for t in (*inputs, torch.tensor([1.]))]
        for norm in norms:
            norm.weight.data.zero_()
            norm.bias.data.fill_(0.1)
        y = tail(*tensors, 'spatial', 'mean1', True, True, *norms)
        return y, *torch.autograd.grad(y, [norm.bias for norm in norms], torch.full_like(y, 0.1))

    (y, *gradients), (exact, *exact_gradients) = (
        run(fused_attention_residual, torch.float32), run(plain_tail, torch.float64))
    assert torch.allclose(y.double(), exact, rtol=3e-6, atol=0)
    for a, b in zip(gradients, exact_gradients):
        assert torch.allclose(a.double(), b, rtol=3e-6 if kernels == 'native' else 1e-4, atol=0)  # PyTorch's norm


@for_every_gate
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_gate(kernels, attention, mask_scale, dtype):
    # 64 channels, 14 x 14 positions; alpha large enough to matter
    residual, shortcut = pair((4, 64, 14, 14), dtype, torch.channels_last)
    weight = torch.linspace(-1, 1, residual.numel(), dtype=torch.float64).reshape(residual.shape)
    alpha = 0.7 if mask_scale == 'mean1' or attention == 'mixed' else 20.

    def run(gate, dtype):
        inputs = [residual.to(dtype), shortcut.to(dtype), torch.tensor([alpha], dtype=torch.promote_types(
            dtype, torch.float32))]
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = gate(*inputs, attention, mask_scale)
        return [t.double() for t in (y, *torch.autograd.grad(y, inputs, weight.to(dtype)))]

    exact, plain, fused = run(attention_residual, torch.float64), run(attention_residual, dtype), run(
        fused_attention_residual, dtype)
    for e, p, f in zip(exact, plain, fused):
        assert (f - e).norm() <= 1.02 * (p - e).norm() + 1e-6 * e.norm()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_large_activations(kernels, attention, dtype, memory_format):
    # beyond what float32 can exponentiate; a channel of one value throughout; an activation on top of all others
    residual, shortcut = pair((2, 4, 5, 5), dtype, memory_format)
    residual[0, 1], residual[0, 2], residual[1, 3, 2, 2] = 3e4, -3e4, 200.
    for grad in (True, False):
        y = fused_attention_residual(
            residual.clone().requires_grad_(grad), shortcut, torch.tensor([0.75], dtype=shortcut.dtype), attention)
        expected = paper_gate(residual.double().numpy(), shortcut.double().numpy(), 0.75, attention, 'softmax')
        assert torch.allclose(y.double(), torch.from_numpy(expected), rtol=torch.finfo(dtype).eps, atol=1e-5)
    gradient, = torch.autograd.grad(fused_attention_residual(
        residual.requires_grad_(), shortcut, torch.tensor([0.75], dtype=shortcut.dtype), attention).sum(), residual)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_any_strides(kernels, attention, grad):
    wide = torch.randn(3, 8, 6, 12, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    residuals = [wide[..., ::2], wide.permute(0, 2, 1, 3)[:, :, :6, :6], wide[:1].expand(3, -1, -1, -1)[..., :6],
                 wide.contiguous(memory_format=torch.channels_last)[:, 1:5], wide[:0], wide[:, :1]]
    for residual in residuals:
        shortcut = torch.randn_like(residual.contiguous()).contiguous(memory_format=torch.channels_last)
        alpha = torch.tensor([0.7], dtype=torch.float32)
        before = residual.clone()
        inputs = [t.detach().requires_grad_(grad) for t in (residual, shortcut, alpha)]
        y = fused_attention_residual(*inputs, attention)
        expected = attention_residual(*inputs, attention)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6) and torch.equal(residual, before)
        if grad and len(residual):
            upstream = torch.ones(()).expand(y.shape)  # as from a sum: no strides of its own
            for a, b in zip(torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_shortcut_of_another_dtype_and_frozen_inputs(kernels):
    residual, shortcut = pair((2, 4, 5, 5), torch.bfloat16)
    y = fused_attention_residual(residual, shortcut.float(), torch.tensor([0.7]))
    assert torch.equal(y, attention_residual(residual, shortcut.float(), torch.tensor([0.7])))
    alpha = torch.tensor([0.7], requires_grad=True)
    fused_attention_residual(residual, shortcut, alpha).sum().backward()
    expected = torch.tensor([0.7], requires_grad=True)
    attention_residual(residual, shortcut, expected).sum().backward()
    assert torch.allclose(alpha.grad, expected.grad, rtol=1e-3)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_other_transforms_take_the_plain_gate(attention):
    inputs = (*pair((2, 3, 4, 4), torch.float64), torch.tensor([0.7], dtype=torch.float64))
    tangents = tuple(torch.ones_like(t) for t in inputs)
    for transform in (
            lambda gate: torch.func.grad(lambda r, s, a: gate(r, s, a, attention).square().sum(), argnums=(0, 1, 2))(
                *inputs),
            lambda gate: torch.func.jvp(lambda r, s, a: gate(r, s, a, attention), inputs, tangents),
            lambda gate: (torch.func.vmap(lambda r, s: gate(r, s, inputs[2], attention))(
                *(t[:, None] for t in inputs[:2])),)):
        for found, expected in zip(transform(fused_attention_residual), transform(attention_residual)):
            assert torch.equal(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangents[0])
        assert torch.autograd.forward_ad.unpack_dual(
            fused_attention_residual(dual, *inputs[1:], attention)).tangent is not None
    meta = [t.to('meta') for t in inputs]
    assert fused_attention_residual(*meta, attention).shape == inputs[0].shape


def test_threads_and_inference_mode_do_not_disturb_each_other(kernels):
    cases = [pair((3, 16, 20, 20), seed=seed) for seed in range(4)]
    alpha = torch.tensor([0.7])
    expected = [attention_residual(*case, alpha) for case in cases]
    wrong = []

    def work(i):
        with torch.inference_mode():  # first: what it allocates is used outside of it next
            fused_attention_residual(*cases[i], alpha)
        for _ in range(20):
            inputs = [t.clone().requires_grad_() for t in cases[i]]
            y = fused_attention_residual(*inputs, alpha)
            y.sum().backward()
            if not torch.allclose(y, expected[i], rtol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@for_every_gate
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_inf_and_nan_are_the_plain_gates(kernels, attention, mask_scale, memory_format, dtype):
    for value in (float('inf'), -float('inf'), float('nan')):
        for which in (0, 1):
            results = []
            for gate in (fused_attention_residual, attention_residual):
                inputs = [t.clone() for t in pair((2, 5, 6, 7), dtype, memory_format)]
                inputs[which][0, 2, 3, 4] = value
                inputs = [t.requires_grad_() for t in inputs]
                y = gate(*inputs, torch.tensor([0.7]), attention, mask_scale)
                results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
            assert torch.allclose(results[0][0], results[1][0], rtol=tolerance, atol=tolerance, equal_nan=True)
            for fused, plain in zip(*results):  # the other sample knows nothing of it
                assert torch.allclose(fused[1], plain[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('bits', [0x7fffffff, -1, 0x7fc00000])  # of CUDA, of memory that was never written, of CPUs
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_nan_of_a_parameter_is_seen(kernels, bits, dtype):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    norm = norm_layer(4, False, torch.float32)
    norm.running_mean.copy_(nan.expand(4))
    for grad in (False, True):
        inputs = [t.requires_grad_(grad) for t in pair((2, 4, 5, 5), dtype)]
        assert fused_attention_residual(*inputs, nan).isnan().all()
        assert fused_attention_residual(*inputs, torch.tensor([0.7]), norm=norm).isnan().all()


@for_every_gate
def test_the_number_of_threads_changes_no_bit(kernels, attention, mask_scale):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            for memory_format in FORMATS:
                inputs = pair((3, 40, 14, 14), memory_format=memory_format)
                results.append(run_tail(fused_attention_residual, torch.float32, inputs, 0.7, (
                    attention, mask_scale, True, True), 'frozen')[:3])
    finally:
        torch.set_num_threads(before)
    for other in (results[2:4], results[4:]):
        for a, b in zip(results[:2], other):
            assert all(torch.equal(s, t) for s, t in zip(a, b))
