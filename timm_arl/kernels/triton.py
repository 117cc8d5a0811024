"""The gate's kernels in Triton, for NVIDIA GPUs: each reads its inputs in two passes, of which the second writes.

A sample is a table of R x K elements: a softmax runs down each of its K columns. Spatial attention has a row for each
position and a column for each channel, channel attention the reverse; NCHW and channels_last differ in which of the
two lie side by side in memory. So one body serves all four. A program takes a few neighbouring columns of one sample.
Its first pass collects their sums; its second reads the inputs again, from the last rows to the first, since those
that were read last are still in the caches. The sigmoid of mixed attention needs no first pass, or one over the whole
sample ('mean1', which takes two launches).

Nothing is added atomically, and tiles depend on shapes and dtypes alone: results repeat bit for bit.
"""
from __future__ import annotations  # the kernels' signatures are read where Triton is missing, too

import contextlib
import functools
import os
from textwrap import shorten
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch

from .torch_ops import Gate, NormState

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:
    triton = None

    def jit(kernel):
        return kernel

__all__ = ['gate_backward', 'gate_forward', 'takes', 'unavailable']

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# read once, as Triton reads it where a kernel is defined: with it, kernels run in Python on the CPU, for tests
INTERPRETED = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'


@functools.cache
def unavailable(device: int = 0) -> Optional[str]:
    """Why Triton cannot be used on the CUDA device of this index, in one sentence; None if it can."""
    if triton is None:
        return 'Triton is not installed.'
    if INTERPRETED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 'PyTorch sees no NVIDIA GPU.'
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f'The GPU has compute capability {capability[0]}.{capability[1]}, and the Triton kernels need 8.0.'
    try:
        triton.runtime.driver.active.get_current_target()  # compiles a small C file, as each first launch does
    except Exception as error:  # no compiler, no Python headers, no libcuda.so: each has a type of its own
        return 'Triton does not start; it needs a C compiler and the headers of Python. ' + shorten(str(error), 300)
    return None


def takes(f: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether these kernels can gate F and x of shape (B, C, H, W), with any strides."""
    if f.device != x.device or not (f.is_cuda or INTERPRETED) or f.dtype not in DTYPES or x.dtype not in DTYPES:
        return False
    if f.ndim != 4 or f.shape != x.shape or f.shape[1:].numel() >= 2 ** 31:  # within a sample, offsets are int32
        return False
    return unavailable(f.device.index or 0) is None


@jit
def _columns(R, K, Q: constexpr):
    """Of a program that takes whole columns: its columns, the index of its sample and where that starts."""
    blocks = tl.cdiv(K, Q)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    return tl.program_id(0) % blocks * Q + tl.arange(0, Q)[None, :], sample, sample * R * K


@jit
def _tile(R, K, P: constexpr, Q: constexpr):
    """Of a program that takes one tile: its rows, its columns, the index of its sample and where that starts."""
    blocks = tl.cdiv(K, Q)
    tiles = tl.cdiv(R, P) * blocks
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    r = tile // blocks * P + tl.arange(0, P)[:, None]
    return r, tile % blocks * Q + tl.arange(0, Q)[None, :], sample, sample * R * K


@jit
def _write_y(y, at, inside, f, x, gate, SHORTCUT: constexpr, RELU: constexpr):
    if SHORTCUT:
        gate += 1
    f += gate * x
    if RELU:
        f = tl.where(f < 0, 0., f)  # NaN stays NaN
    tl.store(y + at, f, inside)


@jit
def _normalized(z, weight, bias, mean, spread, EPS: constexpr, channel, inside):
    """z * scale + shift, as in NormState.affine. EPS is None where ``spread`` is 1 / std already."""
    rstd = tl.load(spread + channel, inside, 1).to(z.dtype)
    if EPS is not None:
        rstd = tl.rsqrt(rstd + EPS)
    scale = tl.load(weight + channel, inside, 0).to(z.dtype) * rstd
    shift = tl.load(bias + channel, inside, 0).to(z.dtype) - tl.load(mean + channel, inside, 0).to(z.dtype) * scale
    return z * scale + shift


@jit
def _read(
        grad, y, residual, shortcut, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread, start, at,
        inside, channel, inside_channel, EPS: constexpr, X_EPS: constexpr, W: constexpr):
    """For backward: the gradient of the sum, x and F. The last is rounded, as the F was that the sums are of."""
    g = tl.load(grad + start + at, inside, 0).to(W)
    if y is not None:
        g = tl.where(tl.load(y + start + at, inside, 0).to(W) <= 0, 0., g)
    x = tl.load(shortcut + start + at, inside, 0).to(W)
    if x_weight is not None:
        x = _normalized(x, x_weight, x_bias, x_mean, x_spread, X_EPS, channel, inside_channel)
    f = tl.load(residual + start + at, inside, 0).to(W)
    if weight is not None:
        f = _normalized(f, weight, bias, mean, spread, EPS, channel, inside_channel)
        f = f.to(residual.dtype.element_ty).to(W)
    return g, x, f


@jit
def _write_gradients(grad_f, grad_x, at, inside, g, u, gate, SHORTCUT: constexpr):
    tl.store(grad_f + at, g + u * gate, inside)
    gate *= g
    if SHORTCUT:
        gate += g
    tl.store(grad_x + at, gate, inside)


@jit
def softmax_forward(
        f, x, alpha, y, tops, sums, R, K, step_r, step_k,
        MEAN1: constexpr, SHORTCUT: constexpr, RELU: constexpr, W: constexpr, P: constexpr, Q: constexpr):
    k, sample, start = _columns(R, K, Q)
    # each place in a tile keeps the largest of its own values and its own sum, until all rows are read
    top_here = tl.full([P, Q], float('-inf'), W)
    sum_here = tl.zeros([P, Q], W)
    for i in range(0, tl.cdiv(R, P)):
        r = i * P + tl.arange(0, P)[:, None]
        v = tl.load(f + start + (r * step_r + k * step_k), (r < R) & (k < K), float('-inf')).to(W)
        e = tl.where(v == top_here, 1., tl.exp(-tl.abs(v - top_here)))  # of two infinite values, too
        sum_here = tl.where(v > top_here, sum_here * e + 1, sum_here + e)
        top_here = tl.where(v > top_here, v, top_here)
    top = tl.max(top_here, 0)[None, :]
    total = tl.sum(sum_here * tl.exp(top_here - top), 0)[None, :]
    tl.store(tops + sample * K + k, top, k < K)
    tl.store(sums + sample * K + k, total, k < K)
    factor = tl.load(alpha).to(W) / total
    if MEAN1:
        factor *= R
    for i in range(0, tl.cdiv(R, P)):
        r = (tl.cdiv(R, P) - 1 - i) * P + tl.arange(0, P)[:, None]
        at = r * step_r + k * step_k
        inside = (r < R) & (k < K)
        v = tl.load(f + start + at, inside, 0).to(W)
        shortcut = tl.load(x + start + at, inside, 0).to(W)
        _write_y(y + start, at, inside, v, shortcut, tl.exp(v - top) * factor, SHORTCUT, RELU)


@jit
def softmax_backward(
        grad, y, residual, shortcut, alpha, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread,
        tops, sums, grad_f, grad_x, grad_alpha, R, K, step_r, step_k, EPS: constexpr, X_EPS: constexpr,
        SPATIAL: constexpr, MEAN1: constexpr, SHORTCUT: constexpr, W: constexpr, P: constexpr, Q: constexpr):
    k, sample, start = _columns(R, K, Q)
    top = tl.load(tops + sample * K + k, k < K, 0)
    total = tl.load(sums + sample * K + k, k < K, 1)
    inner = tl.zeros([P, Q], W)
    for i in range(0, tl.cdiv(R, P)):
        r = i * P + tl.arange(0, P)[:, None]
        at = r * step_r + k * step_k
        inside = (r < R) & (k < K)
        g, x, f = _read(
            grad, y, residual, shortcut, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread, start, at,
            inside, k if SPATIAL else r, (k < K) if SPATIAL else (r < R), EPS, X_EPS, W)
        inner += tl.where(inside, g * x * tl.exp(f - top), 0.)
    inner = tl.sum(inner, 0)[None, :]
    factor = 1 / total
    if MEAN1:
        factor *= R
    tl.store(grad_alpha + tl.program_id(0), tl.sum(factor * inner))
    factor *= tl.load(alpha).to(W)
    inner /= total
    for i in range(0, tl.cdiv(R, P)):
        r = (tl.cdiv(R, P) - 1 - i) * P + tl.arange(0, P)[:, None]
        at = r * step_r + k * step_k
        inside = (r < R) & (k < K)
        g, x, f = _read(
            grad, y, residual, shortcut, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread, start, at,
            inside, k if SPATIAL else r, (k < K) if SPATIAL else (r < R), EPS, X_EPS, W)
        gate = tl.exp(f - top) * factor
        _write_gradients(grad_f + start, grad_x + start, at, inside, g, g * x - inner, gate, SHORTCUT)


@jit
def mixed_sums(f, sums, R, K, step_r, step_k, W: constexpr, P: constexpr, Q: constexpr):
    r, k, _, start = _tile(R, K, P, Q)
    inside = (r < R) & (k < K)
    v = tl.load(f + start + (r * step_r + k * step_k), inside, 0).to(W)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, tl.sigmoid(v), 0.)))


@jit
def mixed_forward(
        f, x, alpha, y, sums, R, K, step_r, step_k,
        MEAN1: constexpr, SHORTCUT: constexpr, RELU: constexpr, W: constexpr, P: constexpr, Q: constexpr):
    r, k, sample, start = _tile(R, K, P, Q)
    at = r * step_r + k * step_k
    inside = (r < R) & (k < K)
    factor = tl.load(alpha).to(W)
    if MEAN1:
        factor *= R * K / tl.load(sums + sample)
    v = tl.load(f + start + at, inside, 0).to(W)
    shortcut = tl.load(x + start + at, inside, 0).to(W)
    _write_y(y + start, at, inside, v, shortcut, tl.sigmoid(v) * factor, SHORTCUT, RELU)


@jit
def mixed_backward(
        grad, y, residual, shortcut, alpha, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread,
        inners, totals, grad_f, grad_x, R, K, step_r, step_k, EPS: constexpr, X_EPS: constexpr,
        SUM: constexpr, WRITE: constexpr, SHORTCUT: constexpr, W: constexpr, P: constexpr, Q: constexpr):
    """SUM stores the sums of a tile; WRITE without SUM, for 'mean1', takes those of a sample in their place."""
    r, k, sample, start = _tile(R, K, P, Q)
    at = r * step_r + k * step_k
    inside = (r < R) & (k < K)
    g, x, f = _read(
        grad, y, residual, shortcut, weight, bias, mean, spread, x_weight, x_bias, x_mean, x_spread, start, at,
        inside, k, k < K, EPS, X_EPS, W)
    mask = tl.sigmoid(f)
    u = g * x
    if SUM:
        tl.store(inners + tl.program_id(0), tl.sum(tl.where(inside, u * mask, 0.)))
        tl.store(totals + tl.program_id(0), tl.sum(tl.where(inside, mask, 0.)))
    if WRITE:
        factor = tl.load(alpha).to(W)
        if not SUM:
            total = tl.load(totals + sample)
            u -= tl.load(inners + sample) / total
            factor *= R * K / total
        _write_gradients(grad_f + start, grad_x + start, at, inside, g, u - u * mask, mask * factor, SHORTCUT)


class _Table(NamedTuple):
    """How a (B, C, H, W) tensor is taken as B tables of R x K elements, in tiles of P x Q."""
    layout: torch.memory_format
    work: Any  # Triton's dtype of masks and sums
    b: int
    r: int
    k: int
    step_r: int
    step_k: int
    p: int
    q: int
    warps: int

    @classmethod
    def of(cls, t: torch.Tensor, attention: str, per_thread: int) -> _Table:
        last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        size = t.shape[2] * t.shape[3]
        positions, channels = (size, t.shape[1] if last else 1), (t.shape[1], 1 if last else size)
        (r, step_r), (k, step_k) = (channels, positions) if attention == 'channel' else (positions, channels)
        size = t.element_size()
        if attention == 'mixed':
            p, q = _tile_of_any(r, k, step_k, size, 256 * per_thread)
        else:
            # columns so long that few fit the level 2 cache: fewer programs at a time, of more threads
            threads = 512 if r > 1024 and (k if step_k == 1 else r) % 16 == 0 else 256
            p, q = _tile_of_columns(t.shape[0], r, k, step_k, size, threads * per_thread)
        return cls(
            torch.channels_last if last else torch.contiguous_format,
            tl.float64 if t.dtype == torch.float64 else tl.float32, t.shape[0], r, k, step_r, step_k, p, q,
            warps=min(max(p * q // (32 * per_thread), 1), 16))

    @property
    def columns(self) -> int:
        """Programs that take whole columns."""
        return self.b * triton.cdiv(self.k, self.q)

    @property
    def tiles(self) -> int:
        """Programs that take one tile."""
        return self.columns * triton.cdiv(self.r, self.p)

    def run(self, kernel: Any, programs: int, *args: Any, **kinds: Any) -> None:
        device = args[0].device
        with torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext():
            kernel[(programs,)](
                *args, self.r, self.k, self.step_r, self.step_k, **kinds,
                W=self.work, P=self.p, Q=self.q, num_warps=self.warps)


def _tile_of_columns(b: int, r: int, k: int, step_k: int, size: int, elements: int) -> Tuple[int, int]:
    """Rows and columns of a tile, powers of two, of at most ``elements`` elements of ``size`` bytes.

    Columns that lie side by side are taken 128 bytes wide, or less, down to the 32 that memory is read by, until all
    programs together have work for 132 processors and their columns fit the level 2 cache.
    """
    if step_k == 1:
        q = min(128 // size, triton.next_power_of_2(k))
        while q * size > 32 and (r * q * size > 2 ** 16 or b * triton.cdiv(k, q) < 2 * 132):
            q //= 2
        return min(elements // q, triton.next_power_of_2(r)), q
    p = min(elements, 1024, triton.next_power_of_2(r))
    q = min(elements // p, triton.next_power_of_2(k))
    while q > 1 and p * q > 512 and b * triton.cdiv(k, q) < 2 * 132:
        q //= 2
    return p, q


def _tile_of_any(r: int, k: int, step_k: int, size: int, elements: int) -> Tuple[int, int]:
    """The same where no sum runs down a column: 128 bytes or more of what lies side by side."""
    if step_k == 1:
        q = min(128 // size, triton.next_power_of_2(k))
        return min(elements // q, triton.next_power_of_2(r)), q
    p = min(elements, triton.next_power_of_2(r))
    return p, min(elements // p, triton.next_power_of_2(k))


def gate_forward(
        f: torch.Tensor,
        x: torch.Tensor,
        alpha: torch.Tensor,
        gate: Gate,
        inplace: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; and per softmax, the largest of F and the sum of the exponentials, (B, C, 1, 1) or (B, 1, H, W)."""
    table = _Table.of(f, gate.attention, 8)
    y = f if inplace and f.is_contiguous(memory_format=table.layout) else torch.empty_like(
        f, memory_format=table.layout)
    f, x = (t.contiguous(memory_format=table.layout) for t in (f, x))
    reduced = {'spatial': (2, 3), 'channel': (1,), 'mixed': (1, 2, 3)}[gate.attention]
    tops = f.new_zeros(
        [1 if i in reduced else n for i, n in enumerate(f.shape)], dtype=torch.promote_types(f.dtype, torch.float32))
    sums = torch.empty_like(tops)
    if not f.numel():
        return y, tops, sums
    kinds = {'MEAN1': gate.mask_scale == 'mean1', 'SHORTCUT': gate.add_shortcut, 'RELU': gate.relu}
    if gate.attention != 'mixed':
        table.run(softmax_forward, table.columns, f, x, alpha, y, tops, sums, **kinds)
        return y, tops, sums
    if gate.mask_scale == 'mean1':
        parts = sums.new_empty(table.tiles)
        table.run(mixed_sums, table.tiles, f, parts)
        torch.sum(parts.view(table.b, -1), 1, out=sums.view(-1))
    table.run(mixed_forward, table.tiles, f, x, alpha, y, sums, **kinds)
    return y, tops, sums


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
    table = _Table.of(residual, gate.attention, 4)
    grad_f = torch.empty_like(residual, memory_format=table.layout)
    grad_x = torch.empty_like(shortcut, memory_format=table.layout)
    if not residual.numel():
        return grad_f, grad_x, torch.zeros_like(alpha)
    inputs = [
        t if t is None else t.contiguous(memory_format=table.layout) for t in (grad, y, residual, shortcut)]
    inputs += [alpha, *(norm[:4] if norm else [None] * 4), *(shortcut_norm[:4] if shortcut_norm else [None] * 4)]
    kinds: Dict[str, Any] = {'SHORTCUT': gate.add_shortcut}
    for name, state in (('EPS', norm), ('X_EPS', shortcut_norm)):
        kinds[name] = None if state is None or state.training else state.eps
    mean1 = gate.mask_scale == 'mean1'
    if gate.attention != 'mixed':
        grad_alpha = sums.new_empty(table.columns)
        table.run(
            softmax_backward, table.columns, *inputs, tops, sums, grad_f, grad_x, grad_alpha,
            SPATIAL=gate.attention == 'spatial', MEAN1=mean1, **kinds)
        return grad_f, grad_x, grad_alpha.sum().to(alpha.dtype).view_as(alpha)
    inners, totals = sums.new_empty(2, table.tiles)
    table.run(mixed_backward, table.tiles, *inputs, inners, totals, grad_f, grad_x, SUM=True, WRITE=not mean1, **kinds)
    if mean1:
        inners, totals = (t.view(table.b, -1).sum(1) for t in (inners, totals))
        table.run(mixed_backward, table.tiles, *inputs, inners, totals, grad_f, grad_x, SUM=False, WRITE=True, **kinds)
        inners = inners * (residual[0].numel() / totals)
    return grad_f, grad_x, inners.sum().to(alpha.dtype).view_as(alpha)

