"""The kernels of the fused gate: passes over memory, without autograd.

A kernel is a module with two functions. For y = relu(x + F + alpha * n(F) * x), as :class:`Gate` says:

``gate_forward(f, x, alpha, gate, inplace) -> (y, *kept)``
    F, x and y of shape (B, C, H, W), alpha of shape (1,). y has the dtype and memory format of F, and may take the
    memory of F if ``inplace``. ``kept`` are the small tensors that its own backward function wants back.

``gate_backward(grad, y, residual, shortcut, alpha, norm, shortcut_norm, gate, *kept) -> (grad_f, grad_x, grad_alpha)``
    F and x were not kept: they are ``norm`` of ``residual`` and ``shortcut_norm`` of ``shortcut``, each a
    :class:`NormState`, or None where there is no norm. ``y`` is None without ReLU. The result is the gradients of F,
    x and alpha; those of the norms are left to the caller.

Inputs may have any strides. Sums and masks are in float32, or float64 for float64 inputs.
"""
import torch

from .torch_ops import Gate, NormState, gate_backward, gate_forward, release_scratch

__all__ = ['Gate', 'NormState', 'backend', 'gate_backward', 'gate_forward', 'release_scratch']


def backend(tensor: torch.Tensor) -> str:
    """The kernels that the gate uses for an F of this shape, type, place and memory format: 'torch'."""
    return 'torch'
