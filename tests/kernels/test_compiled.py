"""The C kernels under torch.compile: equal to eager mode, without graph breaks, and only where they belong."""
import copy

import pytest
import torch

from timm_arl.arl_cnn import ARLBottleneck
from timm_arl.kernels import Gate, NormState, compiled

if compiled._is_exporting():
    pytest.skip('this PyTorch cannot tell torch.compile from torch.export', allow_module_level=True)


def block(**kwargs):
    torch.manual_seed(0)
    projection = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
    return ARLBottleneck(8, 4, downsample=projection, alpha_init=2., **kwargs)


def image(batch=2):
    return torch.randn(batch, 8, 5, 6, generator=torch.Generator().manual_seed(batch))


def operators(function, *args, **kwargs):
    """The graph that Dynamo makes of a call, as text, and the result."""
    graphs = []
    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend=lambda g, _: graphs.append(str(g.graph)) or g, **kwargs)
    return traced(*args), ''.join(graphs)


def step(model, function, x, bf16=False):
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
        y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()]


STEPS = [('spatial', 'softmax', torch.channels_last, False), ('spatial', 'mean1', torch.contiguous_format, True),
         ('channel', 'softmax', torch.channels_last, True), ('mixed', 'mean1', torch.contiguous_format, False)]


@pytest.mark.parametrize('attention, mask_scale, memory_format, bf16, backend, kwargs', [
    *((*case, 'aot_eager', kwargs) for case in STEPS for kwargs in ({}, {'dynamic': True})),
    *(pytest.param(*case, 'inductor', {'mode': 'reduce-overhead'}, marks=pytest.mark.slow) for case in STEPS[:1])])
def test_a_training_step_is_that_of_eager_mode(attention, mask_scale, memory_format, bf16, backend, kwargs):
    model = block(attention=attention, mask_scale=mask_scale).to(memory_format=memory_format)
    model.bn3.momentum, model.downsample[-1].eps = 0.3, 0.1
    model.downsample[-1].eval()  # a mode and an eps of its own
    model.bn3.bias.requires_grad_(False)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    function = torch.compile(other, fullgraph=True, backend=backend, **kwargs)
    x = image().contiguous(memory_format=memory_format)
    for found, expected in zip(step(other, function, x, bf16), step(model, model, x, bf16)):
        assert torch.allclose(found, expected, rtol=1e-2 if bf16 else 1e-4, atol=(3e-2 if bf16 else 1e-5) * max(
            1., expected.abs().max().item())) and found.dtype == expected.dtype


def test_where_they_are_used(monkeypatch):
    hooked, seen = block().eval(), []
    hooked.bn3.register_forward_hook(lambda *_: seen.append(1))
    folded = block().eval()
    folded.bn3 = torch.nn.Identity()
    for model, x, count in (
            (block().eval(), image(), 1), (block(drop_path=torch.nn.Identity()).eval(), image(), 1),
            (block().double().eval(), image().double(), 0), (hooked, image(), 0), (folded, image(), 0)):
        y, graph = operators(model, x)
        assert graph.count('timm_arl.gate') == count and torch.allclose(y, model(x), atol=1e-5)
    assert len(seen) == 2
    for strict in (True, False):
        assert 'timm_arl' not in str(torch.export.export(block().eval(), (image(),), strict=strict).graph)
    monkeypatch.setenv('TIMM_ARL_KERNELS', 'torch')
    assert 'timm_arl' not in operators(block().eval(), image())[1]


def test_batches_of_any_size():
    model = block().eval()
    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True)
    for batch in (2, 1, 5, 0):
        assert torch.allclose(function(image(batch)), model(image(batch)), atol=1e-5)


@pytest.mark.parametrize('attention, norms', [
    ('spatial', 0), ('spatial', 1), ('spatial', 2), ('channel', 2), ('mixed', 2)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_operators_do_what_they_declare(attention, memory_format, norms):
    f, x = (image(b)[:2].contiguous(memory_format=memory_format).requires_grad_() for b in (2, 3))
    tensors = [[t.add(0.5).requires_grad_(j < 2) for j, t in enumerate(torch.rand(4, 8))] if i < norms else []
               for i in (0, 1)]
    torch.library.opcheck(torch.ops.timm_arl.gate.default, (
        f, x, torch.ones(1, requires_grad=True), *tensors, [False, True], [1e-5, 1e-3],
        attention, 'softmax', True, True))


def test_threads_change_no_bit():
    torch.manual_seed(0)
    f, x, found = torch.randn(3, 40, 9, 9), torch.randn(3, 40, 9, 9), []
    norm = NormState(*torch.rand(4, 40).unbind(), True, 1e-5)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = f.clone().requires_grad_()
            y = compiled.gate(z, x, torch.ones(1), Gate(relu=True), norm, None)
            found.append((y, *torch.autograd.grad(y.sum(), z)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_second_derivative_is_refused():
    z = image().requires_grad_()
    y = compiled.gate(z, z * 2, torch.ones(1), Gate(), None, None)
    gradient, = torch.autograd.grad(y.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match='timm_arl.gate_backward'):
        gradient.sum().backward()
