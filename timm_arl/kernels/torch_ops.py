"""The gate's kernels in PyTorch operations, for any device and dtype.

On a CPU they work on a few samples at a time: what one operation writes is still in the caches for the next.
"""
import math
import threading
from typing import List, NamedTuple, Optional, Tuple, Union

import torch

__all__ = ['Gate', 'NormGradients', 'NormState', 'gate_backward', 'gate_forward', 'norm_backward', 'release_scratch']

LOG2_E = 1.4426950408889634
# elements that a CPU works on at a time, per thread, for at most 8 threads
BLOCK_ELEMENTS = 2 ** 19
_scratch_memory = threading.local()
# of a norm's input, weight and bias
NormGradients = Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


class Gate(NamedTuple):
    """Which gate: relu(x + F + alpha * n(F) * x), of which ``x`` and the ReLU may be left out."""
    attention: str = 'spatial'
    mask_scale: str = 'softmax'
    add_shortcut: bool = True
    relu: bool = False


class NormState(NamedTuple):
    """What a batch norm did in the forward pass; tensors of shape (C,)."""
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor  # of the batch in training mode, else the running one
    spread: torch.Tensor  # 1 / std of the batch in training mode, else the running variance
    training: bool
    eps: float

    def affine(self, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift, shape (C,), by which the norm maps its input to its output."""
        mean, spread = self.mean.to(dtype), self.spread.to(dtype)
        scale = self.weight.to(dtype) * (spread if self.training else (spread + self.eps).rsqrt())
        return scale, torch.addcmul(self.bias.to(dtype), mean, scale, value=-1)  # rounded as often as PyTorch's own


def layout(t: torch.Tensor) -> torch.memory_format:
    """The memory format to work in: the tensor's own if it is channels_last, else contiguous."""
    if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def small_shape(t: torch.Tensor, attention: str) -> List[int]:
    """Shape of what there is one of for each softmax: (B, C, 1, 1), (B, 1, H, W), or (B, 1, 1, 1) for the sigmoid."""
    reduced = {'spatial': (2, 3), 'channel': (1,), 'mixed': (1, 2, 3)}[attention]
    return [1 if i in reduced else n for i, n in enumerate(t.shape)]


def _flat(t: torch.Tensor, fmt: torch.memory_format) -> torch.Tensor:
    """A view of shape (B, H*W, C) if ``fmt`` is channels_last, else (B, C, H*W); a copy if ``t`` differs from it."""
    t = t.contiguous(memory_format=fmt)
    return t.permute(0, 2, 3, 1).flatten(1, 2) if fmt == torch.channels_last else t.flatten(2)


def _dims(attention: str, fmt: torch.memory_format) -> Tuple[int, ...]:
    """The dimensions that the mask is normalised over, in the view of :func:`_flat`."""
    positions, channels = (1, 2) if fmt == torch.channels_last else (2, 1)
    return {'spatial': (positions,), 'channel': (channels,), 'mixed': (1, 2)}[attention]


def _blocks(t: torch.Tensor) -> Tuple[int, range]:
    """Samples per block and the first sample of each block: what fits the caches of a CPU, else the whole batch."""
    batch, sample = len(t), t[:1].numel()
    size = batch
    if t.device.type == 'cpu':
        size = min(batch, BLOCK_ELEMENTS * min(torch.get_num_threads(), 8) // max(sample, 1))
    return max(size, 1), range(0, batch, max(size, 1))


def _scratch(count: int, size: int, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for ``count`` blocks of ``size`` samples like those of ``t``.

    On a CPU it is kept for the thread's next call, since touching fresh pages takes longer than the gate itself.
    """
    shape = (count, size, *t.shape[1:])
    if t.device.type != 'cpu':
        return t.new_empty(shape, dtype=dtype)
    need = math.prod(shape) * dtype.itemsize
    kept = getattr(_scratch_memory, 'memory', None)
    if kept is None or kept.numel() < need:
        with torch.inference_mode(False):  # otherwise only inference mode could write to it
            kept = _scratch_memory.memory = torch.empty(need, dtype=torch.uint8, device=t.device)
    return kept[:need].view(dtype).view(shape)


def release_scratch() -> None:
    """Free the memory that the gate keeps on a CPU between calls, for the calling thread.

    After training, that is 8 MB for each PyTorch thread (at most 8 of them), or four float32 copies of one sample's
    largest F if that is more.
    """
    vars(_scratch_memory).clear()


def _work_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def gate_forward(
        f: torch.Tensor,
        x: torch.Tensor,
        alpha: torch.Tensor,
        gate: Gate,
        inplace: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; and per softmax, what was subtracted from F and the sum of the exponentials, (B, C, 1, 1) or (B, 1, H, W)."""
    fmt, dtype = layout(f), _work_dtype(f)
    dims = _dims(gate.attention, fmt)
    y = f if inplace and f.is_contiguous(memory_format=fmt) else torch.empty_like(f, memory_format=fmt)
    tops = f.new_zeros(small_shape(f, gate.attention), dtype=dtype)
    sums = torch.empty_like(tops)
    f, x, out, top, total = (_flat(t, fmt) for t in (f, x, y, tops, sums))
    size, starts = _blocks(f)
    scratch, = _scratch(1, size, f, dtype)
    one = f.new_ones(1, dtype=dtype)
    for i in starts:
        fb, xb, yb, topb, totalb = (t[i:i + size] for t in (f, x, out, top, total))
        mask = scratch[:len(fb)]
        if gate.attention == 'mixed':
            mask.copy_(fb).sigmoid_()
            factor = alpha / mask.mean(dims, keepdim=True) if gate.mask_scale == 'mean1' else alpha
        else:
            _exponentials(fb, dims, mask, topb, totalb)
            factor = alpha / totalb * (f.shape[dims[0]] if gate.mask_scale == 'mean1' else 1)
        weight = torch.addcmul(one, mask, factor, out=mask) if gate.add_shortcut else mask.mul_(factor)
        torch.addcmul(fb, weight, xb, out=yb)
        if gate.relu:
            yb.relu_()
    return y, tops, sums


def _exponentials(f: torch.Tensor, dims: Tuple[int, ...], mask: torch.Tensor, top: torch.Tensor, total: torch.Tensor):
    """Write exp(f - top) to ``mask``, its sums to ``total`` and what was subtracted to ``top``, which is passed as 0.

    exp2 takes about half the time of exp on a CPU. A CPU also skips the search for the largest values, unless the sums
    show that float32 needs it; on an accelerator, looking at the sums would mean to synchronise.
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
        norm: Optional[NormState],
        shortcut_norm: Optional[NormState],
        gate: Gate,
        tops: torch.Tensor,
        sums: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of F, x and alpha, by the equations of ``FusedAttentionResidual``."""
    fmt, dtype = layout(residual), _work_dtype(residual)
    dims = _dims(gate.attention, fmt)
    grad_f = torch.empty_like(residual, memory_format=fmt)
    grad_x = torch.empty_like(shortcut, memory_format=fmt)
    grad_alpha = torch.zeros_like(alpha, dtype=dtype)
    z, x, dy, df, dx, top, totals = (
        _flat(t, fmt) for t in (residual, shortcut, grad, grad_f, grad_x, tops, sums))
    out = None if y is None else _flat(y, fmt)
    by_channel = (-1,) if fmt == torch.channels_last else (-1, 1)
    scale, shift = z.new_ones(1, dtype=dtype), z.new_zeros(1, dtype=dtype)
    if norm is not None:
        scale, shift = (t.view(by_channel) for t in norm.affine(dtype))
    if shortcut_norm is not None:
        shortcut_scale, shortcut_shift = (t.view(by_channel) for t in shortcut_norm.affine(dtype))
    size, starts = _blocks(z)
    scratch = _scratch(4, size, z, dtype)
    for i in starts:
        zb, xb, dyb = z[i:i + size], x[i:i + size], dy[i:i + size]
        g, mask, u, product = scratch[:, :len(zb)]
        if out is None:
            g.copy_(dyb)
        else:
            torch.ops.aten.threshold_backward.grad_input(dyb, out[i:i + size], 0, grad_input=g)
        if (gate.attention != 'mixed' and mask.dtype == zb.dtype and z.device.type == 'cpu'
                and not top[i:i + size].any()):
            torch.addcmul(shift * LOG2_E, zb, scale * LOG2_E, out=mask).exp2_()  # two passes fewer
        else:
            torch.addcmul(shift, zb, scale, out=mask)
            if mask.dtype != zb.dtype:
                mask.copy_(mask.to(zb.dtype))  # rounded, as the F was that the sums are of
            mask.sigmoid_() if gate.attention == 'mixed' else mask.sub_(top[i:i + size]).mul_(LOG2_E).exp2_()
        if shortcut_norm is not None:
            xb = torch.addcmul(shortcut_shift, xb, shortcut_scale, out=product)
        torch.mul(g, xb, out=u)
        inner = torch.mul(u, mask, out=product).sum(dims, keepdim=True)
        factor: Union[float, torch.Tensor] = 1.
        if gate.attention == 'mixed':
            if gate.mask_scale == 'mean1':
                total = mask.sum(dims, keepdim=True)
                factor = mask[0].numel() / total
                u.sub_(inner / total)
            u.addcmul_(u, mask, value=-1)
        else:
            total = totals[i:i + size]
            factor = (z.shape[dims[0]] if gate.mask_scale == 'mean1' else 1) / total
            u.sub_(inner / total)
        grad_alpha += (factor * inner).sum()
        mask.mul_(alpha * factor)
        torch.addcmul(g, u, mask, out=df[i:i + size])
        dxb = dx[i:i + size]
        torch.addcmul(g, g, mask, out=dxb) if gate.add_shortcut else torch.mul(g, mask, out=dxb)
    return grad_f, grad_x, grad_alpha.to(alpha.dtype)


def norm_backward(grad: torch.Tensor, z: torch.Tensor, norm: Optional[NormState]) -> NormGradients:
    """Gradients of a batch norm's input z, weight and bias from that of its output; without a norm, ``grad``."""
    if norm is None:
        return grad, None, None
    statistics = norm.mean, norm.spread
    running, saved = ((None, None), statistics) if norm.training else (statistics, (None, None))
    return torch.ops.aten.native_batch_norm_backward(
        grad, z, norm.weight, *running, *saved, norm.training, norm.eps, [True] * 3)
