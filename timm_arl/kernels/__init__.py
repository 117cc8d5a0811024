"""The kernels of the fused gate: passes over memory, without autograd.

========  ==================================================  ======================================================
kernels   for                                                 file
========  ==================================================  ======================================================
torch     everything                                          torch_ops.py, PyTorch's operations
native    float32 and bfloat16 on a CPU                       native.c, built with the package by a C compiler
triton    floating point on an NVIDIA GPU                     triton.py, compiled when first called
========  ==================================================  ======================================================

Each tensor gets the last of them that takes it; :func:`backend` says which. The environment variable
``TIMM_ARL_KERNELS`` (``auto``, ``torch``, ``native`` or ``triton``) allows one of them alone, and ``torch`` for what
that one does not take.

Each is a module with two functions. For y = relu(x + F + alpha * n(F) * x), as :class:`Gate` says:

``gate_forward(f, x, alpha, gate, inplace) -> (y, top, total)``
    F, x and y of shape (B, C, H, W), alpha of shape (1,). y has the dtype and memory format of F, and may take the
    memory of F if ``inplace``. Of each softmax, ``top`` is what was subtracted from F before it was exponentiated and
    ``total`` the sum of the exponentials; shapes (B, C, 1, 1) or (B, 1, H, W), float32 or float64. Kernels that
    :func:`folds_norms` is true of take two :class:`NormState` more, of the norms that f and x are then the inputs of.

``gate_backward(grad, y, residual, shortcut, alpha, norm, shortcut_norm, gate, top, total)``
    F and x were not kept: they are ``norm`` of ``residual`` and ``shortcut_norm`` of ``shortcut``, each a
    :class:`NormState`, or None where there is no norm. ``y`` is None without ReLU. The result is the gradients of F,
    x and alpha, from which :func:`norm_backward` makes those of a norm. Kernels that :func:`folds_norms` is true of
    have ``gate_norms_backward`` too, for all at once: (residual, weight, bias), (shortcut, weight, bias), alpha.

compiled.py has the native kernels as operators, which torch.compile calls instead of making its own; norms.py, what a
batch norm does beside its output.

Inputs may have any strides. Sums and masks are in float32, or float64 for float64 inputs.
"""
import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import torch_ops
from .torch_ops import Gate, NormState, norm_backward, release_scratch

__all__ = [
    'Gate', 'NormState', 'backend', 'folds_norms', 'kernels_for', 'norm_backward', 'problem', 'release_scratch',
]

FASTER = {'native': 'cpu', 'triton': 'cuda'}  # and the devices that they are for


def _wanted() -> str:
    wanted = os.environ.get('TIMM_ARL_KERNELS', 'auto')
    if wanted not in ('auto', 'torch', *FASTER):
        raise ValueError(f"TIMM_ARL_KERNELS is '{wanted}': set it to auto, torch, native or triton.")
    return wanted


@cache
def _module(name: str) -> ModuleType:
    return import_module(f'.{name}', __name__)  # at the first use: to import Triton takes a while


def kernels_for(f: torch.Tensor, x: torch.Tensor) -> ModuleType:
    """The kernels that such F and x get.

    Raises:
        ValueError: An unknown ``TIMM_ARL_KERNELS``.
        RuntimeError: ``TIMM_ARL_KERNELS`` asks for kernels that this machine cannot run.
    """
    wanted = _wanted()
    for name, device in FASTER.items():
        if wanted == name or wanted == 'auto' and f.device.type == device:
            module = _module(name)
            reason = module.unavailable()
            if reason and wanted == name:
                raise RuntimeError(f'TIMM_ARL_KERNELS asks for {name}. {reason}')
            if not reason and module.takes(f, x):
                return module
    return torch_ops


def problem() -> str:
    """What is wrong with ``TIMM_ARL_KERNELS`` on this machine, or ''; programs ask before their work."""
    try:
        kernels_for(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ''


def folds_norms(f: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the kernels of such F and x can apply batch norms on the way."""
    kernels = kernels_for(f, x)
    return hasattr(kernels, 'folds_norms') and kernels.folds_norms()


def backend(t: torch.Tensor) -> str:
    """Which kernels the gate of such F and x uses: 'torch', 'native' or 'triton'.

    Warns, once, with the reason where faster ones exist for the device of ``t`` but not on this machine.

    Raises:
        ValueError, RuntimeError: See :func:`kernels_for`.
    """
    found = kernels_for(t, t)
    if found is not torch_ops:
        return next(name for name in FASTER if found.__name__.endswith(f'.{name}'))
    for name, device in FASTER.items():
        reason = _module(name).unavailable() if _wanted() == 'auto' and t.device.type == device else None
        if reason:
            warnings.warn(f"The gate uses PyTorch's operations. {reason}", stacklevel=2)
    return 'torch'
