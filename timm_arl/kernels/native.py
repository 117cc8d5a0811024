"""The gate's kernels in C, for float32 and bfloat16 on a CPU: native.c, built with the package by hatch_build.py.

They run on the threads of PyTorch's own OpenMP, as many as ``torch.get_num_threads()`` says.
"""
import ctypes
import math
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any, Optional, Tuple

import torch

from .torch_ops import Gate, NormGradients, NormState, layout, norm_backward, small_shape

__all__ = ['folds_norms', 'gate_backward', 'gate_forward', 'gate_norms_backward', 'takes', 'unavailable']

ATTENTIONS = ('spatial', 'channel', 'mixed')  # in the order of native.c
_forked = False


class _Call(ctypes.Structure):
    """struct call of native.c."""
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            'y', 'f', 'x', 'dy', 'df', 'dx', 'top', 'total', 'inner', 'scale', 'shift', 'x_scale', 'x_shift',
            'mean', 'x_mean', 'sums', 'alpha')),
        *((name, ctypes.c_int64) for name in (
            'samples', 'channels', 'positions', 'channels_last', 'attention', 'mean1', 'add_shortcut', 'relu', 'half',
            'threads', 'next')),
        ('parallel', ctypes.c_void_p)]


def _after_fork() -> None:
    global _forked
    _forked = True  # the threads of OpenMP stayed behind


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _library() -> ctypes.CDLL:
    """The library for this processor.

    Raises:
        OSError: It was not built, cannot be loaded, or was built from another native.c, as after `git pull`.
    """
    # what PyTorch's own kernels use, which ATEN_CPU_CAPABILITY can lower
    kind = {'AVX512': 'avx512', 'AVX2': 'avx2'}.get(torch.backends.cpu.get_cpu_capability(), 'any')
    path = Path(__file__).with_name(f'native.{kind}.so')
    library = ctypes.CDLL(str(path))
    if ctypes.c_uint32.in_dll(library, 'arl_source').value != zlib.crc32(path.with_name('native.c').read_bytes()):
        raise OSError(f'{path.name} was built from another native.c')
    library.arl_gate_inner.restype = ctypes.c_int64
    return library


@cache
def _parallel() -> Optional[int]:
    """Address of GOMP_parallel in the OpenMP that PyTorch has loaded for all, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):  # another OpenMP, or an operating system that does not say
        return None


@cache
def _missing() -> Optional[str]:
    try:
        _library()
    except (AttributeError, OSError, ValueError) as error:  # a function of it, all of it, or arl_source
        return f'The C kernels are missing ({error}). Install a C compiler, then timm-arl again.'
    return None


def unavailable() -> Optional[str]:
    """Why these kernels cannot be used on this machine, in one sentence, or None if they can."""
    if _missing():
        return _missing()
    if _parallel() is None and torch.get_num_threads() > 1:
        return "The OpenMP of this PyTorch has no GOMP_parallel, by which the C kernels would use PyTorch's threads."
    return None


def takes(f: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether these kernels are for such F and x."""
    return (f.device.type == x.device.type == 'cpu' and f.dtype == x.dtype and f.shape == x.shape and f.ndim == 4
            and f.numel() > 0 and f.dtype in (torch.float32, torch.bfloat16))


@cache
def folds_norms() -> bool:
    """Whether a norm with running statistics that is applied here is PyTorch's bit for bit, as FX graphs promise.

    It is if both are compiled to round equally often: always, as far as is known.
    """
    with torch.inference_mode():
        start = torch.arange(1, 1 + 64 * 8, dtype=torch.float32, device='cpu').sin()
        z, ones, *parameters = (start.mul(k).view(1, 64, 2, 4) for k in (9, 0, 1, 2, 3))
        weight, bias, mean = (p[0, :, 0, 0].contiguous() for p in parameters)
        variance, eps = bias.square(), 1e-5
        norm = NormState(weight, bias, mean, variance, False, eps)
        found, _, _ = gate_forward(z, ones, ones.view(-1)[:1], Gate('mixed', add_shortcut=False), False, norm)
        return torch.equal(found, torch.batch_norm(z, weight, bias, mean, variance, False, 0., eps, False))


def _call(fmt: torch.memory_format, f: torch.Tensor, alpha: torch.Tensor, gate: Gate, **tensors: Any) -> _Call:
    pointers = {name: t if t is None else t.data_ptr() for name, t in tensors.items()}
    return _Call(
        **pointers, f=f.data_ptr(), alpha=alpha.data_ptr(), samples=f.shape[0], channels=f.shape[1],
        positions=f.shape[2] * f.shape[3], channels_last=fmt == torch.channels_last,
        attention=ATTENTIONS.index(gate.attention), mean1=gate.mask_scale == 'mean1', add_shortcut=gate.add_shortcut,
        relu=gate.relu, half=f.dtype == torch.bfloat16, threads=1 if _forked else torch.get_num_threads(),
        parallel=_parallel())


def _affine(norm: Optional[NormState], t: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    if norm is None:  # whatever the default dtype and device are
        return t.new_ones(t.shape[1], dtype=torch.float32), t.new_zeros(t.shape[1], dtype=torch.float32)
    scale, shift = norm.affine(torch.float32)
    return _parameter(scale, t), _parameter(shift, t)


def _parameter(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A parameter in float32 for the gate of ``t``. CUDA's NaN, 0x7fffffff, would be rounded to 0 in bfloat16."""
    p = p.detach().to(t.device, torch.float32)
    return (p.nan_to_num(math.nan, math.inf, -math.inf) if t.dtype == torch.bfloat16 else p).contiguous()


def gate_forward(
        f: torch.Tensor,
        x: torch.Tensor,
        alpha: torch.Tensor,
        gate: Gate,
        inplace: bool,
        norm: Optional[NormState] = None,
        shortcut_norm: Optional[NormState] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fmt = layout(f)
    f, x = f.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    alpha = _parameter(alpha, f)
    y = f if inplace else torch.empty_like(f, memory_format=fmt)
    top = torch.zeros(small_shape(f, gate.attention), dtype=torch.float32, device='cpu')
    total = torch.zeros_like(top)  # which a sigmoid leaves alone
    norms = dict.fromkeys(('scale', 'shift', 'x_scale', 'x_shift'))
    if norm is not None or shortcut_norm is not None:
        norms = dict(zip(norms, (*_affine(norm, f), *_affine(shortcut_norm, f))))
    _library().arl_gate_forward(ctypes.byref(_call(fmt, f, alpha, gate, y=y, x=x, top=top, total=total, **norms)))
    return y, top, total


def gate_backward(
        grad: torch.Tensor,
        y: Optional[torch.Tensor],
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        norm: Optional[NormState],
        shortcut_norm: Optional[NormState],
        gate: Gate,
        top: torch.Tensor,
        total: torch.Tensor,
        sums: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``sums``, shape (B, C, 4), receives what the gradients of the norms need: struct sums of native.c."""
    fmt = layout(residual)
    grad, y, f, x = (
        t.contiguous(memory_format=fmt) for t in (grad, grad if y is None else y, residual, shortcut))
    df, dx = torch.empty_like(f, memory_format=fmt), torch.empty_like(x, memory_format=fmt)
    scale, shift, x_scale, x_shift = *_affine(norm, f), *_affine(shortcut_norm, f)
    weight = _parameter(alpha, f)  # held here, like all that the call points to
    mean, x_mean = (
        None if sums is None or state is None else _parameter(state.mean, f) for state in (norm, shortcut_norm))
    call = _call(
        fmt, f, weight, gate, y=y, x=x, dy=grad, df=df, dx=dx, top=top, total=total, scale=scale,
        shift=shift, x_scale=x_scale, x_shift=x_shift, mean=mean, x_mean=x_mean, sums=sums)
    inner = torch.empty(_library().arl_gate_inner(ctypes.byref(call)), dtype=torch.float32, device='cpu')
    call.inner = inner.data_ptr()
    _library().arl_gate_backward(ctypes.byref(call))
    return df, dx, inner.sum().view(1).to(alpha.dtype)


def gate_norms_backward(
        grad: torch.Tensor,
        y: Optional[torch.Tensor],
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        norm: Optional[NormState],
        shortcut_norm: Optional[NormState],
        gate: Gate,
        top: torch.Tensor,
        total: torch.Tensor,
) -> Tuple[NormGradients, NormGradients, torch.Tensor]:
    if norm is None or gate.attention != 'spatial':
        df, dx, grad_alpha = gate_backward(grad, y, residual, shortcut, alpha, norm, shortcut_norm, gate, top, total)
        return norm_backward(df, residual, norm), norm_backward(dx, shortcut, shortcut_norm), grad_alpha
    sums = torch.empty(*residual.shape[:2], 4, dtype=torch.float32, device='cpu')
    df, dx, grad_alpha = gate_backward(
        grad, y, residual, shortcut, alpha, norm, shortcut_norm, gate, top, total, sums)
    sums = sums.sum(0, dtype=torch.float64)
    return (_norm_backward(df, residual, norm, sums[:, :2]), _norm_backward(dx, shortcut, shortcut_norm, sums[:, 2:]),
            grad_alpha)


def _norm_backward(
        grad: torch.Tensor,
        z: torch.Tensor,
        norm: Optional[NormState],
        sums: torch.Tensor,
) -> NormGradients:
    """:func:`torch_ops.norm_backward` in the memory of ``grad``, with the sums of grad and of grad * (z - mean)."""
    if norm is None:
        return grad, None, None
    fmt = layout(grad)
    z = z.contiguous(memory_format=fmt)
    total, product = sums.unbind(1)
    spread = norm.spread.double()
    rstd = spread if norm.training else (spread + norm.eps).rsqrt()
    # running statistics are constants
    means = sums * (z.shape[1] / z.numel()) if norm.training else torch.zeros_like(sums)
    parameters = norm.weight * rstd, means[:, 0], means[:, 1] * rstd.square(), norm.mean
    scale, shift, x_scale, x_shift = (_parameter(p, grad) for p in parameters)
    _library().arl_norm_backward(ctypes.byref(_call(
        fmt, z, scale, Gate('mixed'), df=grad, scale=scale, shift=shift, x_scale=x_scale, x_shift=x_shift)))
    return grad, (product * rstd).to(norm.weight.dtype), total.to(norm.bias.dtype)
