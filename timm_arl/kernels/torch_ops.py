"""The passes over memory that the fused gate of attention.py is made of: plain PyTorch, without autograd.

A CPU works on a few samples at a time, so that what one operation writes is still in its caches for the next.
"""
import math
import threading
from typing import List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn

__all__ = ['NormState', 'gate', 'gate_backward', 'layout', 'normalize', 'normalize_backward', 'release_scratch']

LOG2_E = 1.4426950408889634
# elements per thread that a CPU works on at a time, for as many as 8 threads
BLOCK_ELEMENTS = 2 ** 19
_kept = threading.local()


class NormState(NamedTuple):
    """A batch norm as its forward pass found it, tensors of shape (C,)."""
    training: bool
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor  # of the batch in training mode, else the running one
    spread: torch.Tensor  # 1 / std of the batch in training mode, else the running variance


def normalize(z: torch.Tensor, norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch norm with all effects of its module's forward; with its output, the mean and spread of `NormState`."""
    if norm.training:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # of a norm that _folds took, it is there
    f, mean, rstd = torch.native_batch_norm(
        z, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training,
        norm.momentum, norm.eps)  # type: ignore[arg-type]  # so is its momentum
    if norm.training:
        return f, mean, rstd
    return f, norm.running_mean, norm.running_var  # type: ignore[return-value]  # and its running statistics


def affine(norm: NormState, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, shape (C,), by which a batch norm maps its input to its output."""
    mean, spread = norm.mean.to(dtype), norm.spread.to(dtype)
    scale = norm.weight.to(dtype) * (spread if norm.training else (spread + norm.eps).rsqrt())
    return scale, norm.bias.to(dtype) - mean * scale


def normalize_backward(
        grad: torch.Tensor,
        z: torch.Tensor,
        norm: Optional[NormState],
        wanted: List[bool],
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of a batch norm's input, weight and bias, those that are wanted; without a norm, F is the input."""
    if norm is None:
        return grad, None, None
    statistics = norm.mean, norm.spread
    running, saved = ((None, None), statistics) if norm.training else (statistics, (None, None))
    return torch.ops.aten.native_batch_norm_backward(
        grad, z, norm.weight, *running, *saved, norm.training, norm.eps, wanted)


def layout(t: torch.Tensor) -> torch.memory_format:
    """The format the gate works in for a tensor: its own, if it has one of the two."""
    if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _flat(t: torch.Tensor, fmt: torch.memory_format) -> torch.Tensor:
    """A view of shape (B, H*W, C) of a channels_last tensor, (B, C, H*W) of another; a copy if the format differs."""
    t = t.contiguous(memory_format=fmt)
    return t.permute(0, 2, 3, 1).flatten(1, 2) if fmt == torch.channels_last else t.flatten(2)


def _dims(attention: str, fmt: torch.memory_format) -> Tuple[int, ...]:
    """What the mask is normalised over, in the view of :func:`_flat`."""
    positions, channels = (1, 2) if fmt == torch.channels_last else (2, 1)
    return {'spatial': (positions,), 'channel': (channels,), 'mixed': (1, 2)}[attention]


def _blocks(t: torch.Tensor) -> Tuple[int, range]:
    """Samples in a block, and the first sample of each: on a CPU what fits its caches, elsewhere the whole batch."""
    batch, sample = len(t), t[:1].numel()
    size = batch
    if t.device.type == 'cpu':
        size = min(batch, BLOCK_ELEMENTS * min(torch.get_num_threads(), 8) // max(sample, 1))
    return max(size, 1), range(0, batch, max(size, 1))


def _scratch(count: int, size: int, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for ``count`` blocks of ``size`` samples like those of ``t``, undefined values.

    A CPU keeps it for the next call of the thread: to touch fresh pages costs it more than the gate itself.
    """
    shape = (count, size, *t.shape[1:])
    if t.device.type != 'cpu':
        return t.new_empty(shape, dtype=dtype)
    need = math.prod(shape) * dtype.itemsize
    kept = getattr(_kept, 'memory', None)
    if kept is None or kept.numel() < need:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            kept = _kept.memory = torch.empty(need, dtype=torch.uint8, device=t.device)
    return kept[:need].view(dtype).view(shape)


def release_scratch() -> None:
    """Give back the memory that a CPU's gate keeps for this thread between calls.

    After training, that is 8 MB for each of at most 8 threads of PyTorch, or four float32 copies of one sample's
    largest F where that is more.
    """
    vars(_kept).clear()


def _work_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def gate(
        f: torch.Tensor,
        x: torch.Tensor,
        alpha: torch.Tensor,
        attention: str,
        mask_scale: str,
        add_shortcut: bool,
        relu: bool,
        inplace: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """relu(x + f + alpha * n(f) * x), in the memory of ``f`` if ``inplace``; tops and sums of :func:`_exponentials`."""
    fmt, dtype = layout(f), _work_dtype(f)
    dims = _dims(attention, fmt)
    y = f if inplace and f.is_contiguous(memory_format=fmt) else torch.empty_like(f, memory_format=fmt)
    f, x, out = _flat(f, fmt), _flat(x, fmt), _flat(y, fmt)
    size, starts = _blocks(f)
    scratch, = _scratch(1, size, f, dtype)
    sums = f.new_empty([1 if i in dims else n for i, n in enumerate(f.shape)], dtype=dtype)
    tops = torch.zeros_like(sums)
    one = f.new_ones(1, dtype=dtype)
    for i in starts:
        fb, xb, yb, total, top = (t[i:i + size] for t in (f, x, out, sums, tops))
        mask = scratch[:len(fb)]
        if attention == 'mixed':
            mask.copy_(fb).sigmoid_()
            factor = alpha / mask.mean(dims, keepdim=True) if mask_scale == 'mean1' else alpha
        else:
            _exponentials(fb, dims, mask, total, top)
            factor = alpha / total * (f.shape[dims[0]] if mask_scale == 'mean1' else 1)
        gate = torch.addcmul(one, mask, factor, out=mask) if add_shortcut else mask.mul_(factor)
        torch.addcmul(fb, gate, xb, out=yb)
        if relu:
            yb.relu_()
    return y, tops, sums


def _exponentials(f: torch.Tensor, dims: Tuple[int, ...], mask: torch.Tensor, total: torch.Tensor, top: torch.Tensor):
    """Write exp(f - top) to ``mask``, its sums to ``total`` and what was subtracted to ``top``, which comes as zeros.

    exp2 takes about half the time of exp on a CPU. A CPU also does without the pass that looks for the largest
    values, unless the sums tell that float32 cannot do without; elsewhere the sums would have to be waited for.
    """
    if f.device.type == 'cpu':
        log2_e = mask.new_full((1,), LOG2_E)  # a tensor, since half precision times a number stays half precision
        torch.sum(torch.mul(f, log2_e, out=mask).exp2_(), dims, keepdim=True, out=total)
        low, high = total.aminmax()
        if low > 2. ** -32 and high < 2. ** 32:
            return
    top.copy_(f.amax(dims, keepdim=True))
    torch.sum(torch.sub(f, top, out=mask).mul_(LOG2_E).exp2_(), dims, keepdim=True, out=total)


def gate_backward(
        grad: torch.Tensor,
        y: Optional[torch.Tensor],
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        tops: torch.Tensor,
        sums: torch.Tensor,
        norm: Optional[NormState],
        shortcut_norm: Optional[NormState],
        fmt: torch.memory_format,
        attention: str,
        mask_scale: str,
        add_shortcut: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of F, of x and of alpha, by the equations of ``FusedAttentionResidual``; ``y`` if a ReLU made it."""
    dtype, dims = _work_dtype(residual), _dims(attention, fmt)
    grad_f = torch.empty_like(residual, memory_format=fmt)
    grad_x = torch.empty_like(shortcut, memory_format=fmt)
    grad_alpha = torch.zeros_like(alpha, dtype=dtype)
    z, x, dy, df, dx = (_flat(t, fmt) for t in (residual, shortcut, grad, grad_f, grad_x))
    out = None if y is None else _flat(y, fmt)
    by_channel = (-1,) if fmt == torch.channels_last else (-1, 1)
    scale, shift = z.new_ones(1, dtype=dtype), z.new_zeros(1, dtype=dtype)
    if norm is not None:
        scale, shift = (t.view(by_channel) for t in affine(norm, dtype))
    if shortcut_norm is not None:
        shortcut_scale, shortcut_shift = (t.view(by_channel) for t in affine(shortcut_norm, dtype))
    size, starts = _blocks(z)
    scratch = _scratch(4, size, z, dtype)
    for i in starts:
        zb, xb, dyb = z[i:i + size], x[i:i + size], dy[i:i + size]
        g, mask, u, product = scratch[:, :len(zb)]
        if out is None:
            g.copy_(dyb)
        else:
            torch.ops.aten.threshold_backward.grad_input(dyb, out[i:i + size], 0, grad_input=g)
        if attention != 'mixed' and mask.dtype == zb.dtype and z.device.type == 'cpu' and not tops[i:i + size].any():
            torch.addcmul(shift * LOG2_E, zb, scale * LOG2_E, out=mask).exp2_()  # two passes fewer
        else:
            torch.addcmul(shift, zb, scale, out=mask)
            if mask.dtype != zb.dtype:
                mask.copy_(mask.to(zb.dtype))  # as rounded as the F whose sums these are
            mask.sigmoid_() if attention == 'mixed' else mask.sub_(tops[i:i + size]).mul_(LOG2_E).exp2_()
        if shortcut_norm is not None:
            xb = torch.addcmul(shortcut_shift, xb, shortcut_scale, out=product)
        torch.mul(g, xb, out=u)
        inner = torch.mul(u, mask, out=product).sum(dims, keepdim=True)
        factor: Union[float, torch.Tensor] = 1.
        if attention == 'mixed':
            if mask_scale == 'mean1':
                total = mask.sum(dims, keepdim=True)
                factor = mask[0].numel() / total
                u.sub_(inner / total)
            u.addcmul_(u, mask, value=-1)
        else:
            total = sums[i:i + size]
            factor = (z.shape[dims[0]] if mask_scale == 'mean1' else 1) / total
            u.sub_(inner / total)
        grad_alpha += (factor * inner).sum()
        mask.mul_(alpha * factor)
        torch.addcmul(g, u, mask, out=df[i:i + size])
        dxb = dx[i:i + size]
        torch.addcmul(g, g, mask, out=dxb) if add_shortcut else torch.mul(g, mask, out=dxb)
    return grad_f, grad_x, grad_alpha.to(alpha.dtype)
