"""The gate in PyTorch's operations: the cache-sized blocks that it works on."""
import pytest
import torch
from test_attention import FORMATS, SHAPES, pair

from timm_arl.attention import ATTENTIONS, MASK_SCALES, attention_residual, fused_attention_residual
from timm_arl.kernels import torch_ops


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('mask_scale', MASK_SCALES)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_blocks_of_any_size(monkeypatch, attention, mask_scale, memory_format):
    monkeypatch.setenv('TIMM_ARL_KERNELS', 'torch')
    for shape in [*SHAPES, (5, 16, 9, 9)]:
        results = []
        for block in (0, 1, 300, 2 ** 19):
            monkeypatch.setattr(torch_ops, 'BLOCK_ELEMENTS', block)
            inputs = [t.requires_grad_() for t in (*pair(shape, memory_format=memory_format), torch.tensor([0.7]))]
            y = (fused_attention_residual if block else attention_residual)(*inputs, attention, mask_scale)
            weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
            results.append((y, *torch.autograd.grad(y, inputs[:2], weights)))
        for plain, *blocks in zip(*results):
            for fused in blocks:
                assert (fused - plain).abs().max() <= 2e-6 * plain.abs().max()
