"""The kernels of the fused gate: passes over memory, without autograd.

========  ==================================================  ======================================================
kernels   for                                                 file
========  ==================================================  ======================================================
torch     everything                                          torch_ops.py, PyTorch's operations
native    float32 and bfloat16 on a CPU                       native.c, built with the package by a C compiler
triton    float32, bfloat16 and float16 on an NVIDIA GPU      triton.py, compiled at the first call
========  ==================================================  ======================================================

Each tensor gets the last of them that takes it; :func:`backend` says which. The environment variable
``TIMM_ARL_KERNELS`` (``auto``, ``torch``, ``native`` or ``triton``) allows only one beside ``torch``.

Each is a module with two functions. For y = relu(x + F + alpha * n(F) * x), as :class:`Gate` says:

``gate_forward(f, x, alpha, gate, inplace) -> (y, top, total)``
    F, x and y of shape (B, C, H, W), alpha of shape (1,). y has the dtype and memory format of F, and may take the
    memory of F if ``inplace``. Of each softmax, ``top`` is what was subtracted from F before it was exponentiated and
    ``total`` the sum of the exponentials; shapes (B, C, 1, 1) or (B, 1, H, W), float32 or float64. Kernels in
    ``FOLDING`` take the :class:`NormState` of two norms more, of which f and x are then the inputs.

``gate_backward(grad, y, residual, shortcut, alpha, norm, shortcut_norm, gate, top, total)``
    F and x were not kept: they are ``norm`` of ``residual`` and ``shortcut_norm`` of ``shortcut``, each a
    :class:`NormState`, or None where there is no norm. ``y`` is None without ReLU. The result is the gradients of F,
    x and alpha; those of the norms are left to the caller.

Inputs may have any strides. Sums and masks are in float32, or float64 for float64 inputs.
"""
import os
import warnings
from types import ModuleType

import torch

from . import native, torch_ops
from .torch_ops import Gate, NormState, release_scratch

__all__ = ['FOLDING', 'Gate', 'NormState', 'backend', 'kernels_for', 'release_scratch']

KERNELS = {'torch': torch_ops, 'native': native}
FOLDING = (native,)


def kernels_for(f: torch.Tensor, x: torch.Tensor) -> ModuleType:
    """The kernels that such F and x get.

    Raises:
        ValueError: An unknown ``TIMM_ARL_KERNELS``.
        RuntimeError: ``TIMM_ARL_KERNELS`` asks for kernels that this machine cannot run.
    """
    wanted = os.environ.get('TIMM_ARL_KERNELS', 'auto')
    if wanted not in ('auto', *KERNELS):
        raise ValueError(f"TIMM_ARL_KERNELS is '{wanted}': set it to 'auto' or to one of {', '.join(KERNELS)}.")
    for name, module in reversed(KERNELS.items()):
        if name == 'torch' or wanted == 'torch':
            break
        reason = module.unavailable() if wanted in ('auto', name) else ''
        if reason and wanted == name:
            raise RuntimeError(f'TIMM_ARL_KERNELS asks for {name}, but {reason}')
        if reason is None and module.takes(f, x):
            return module
    return torch_ops


def backend(t: torch.Tensor) -> str:
    """Which kernels the gate of such F and x uses: 'torch', 'native' or 'triton'.

    Warns with the reason where faster ones exist for ``t``, but not on this machine.

    Raises:
        ValueError, RuntimeError: See :func:`kernels_for`.
    """
    found = kernels_for(t, t)
    if found is torch_ops and os.environ.get('TIMM_ARL_KERNELS', 'auto') == 'auto':
        for module in (native,):
            if module.takes(t, t):
                warnings.warn(f"The gate uses PyTorch's operations: {module.unavailable()}", stacklevel=2)
    return next(name for name, module in KERNELS.items() if module is found)
