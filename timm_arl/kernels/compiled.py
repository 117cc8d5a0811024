"""The C kernels as operators, for torch.compile on a CPU: Inductor calls them instead of fusing the plain gate itself.

The statistics of the batch norms stay with the compiler, which has read the maps anyway.
"""
from typing import Any, List, Optional, Sequence, Tuple

import torch

from . import kernels_for, native
from .torch_ops import Gate, NormState, layout, small_shape

__all__ = ['gate', 'takes']

# False in torch.export, which traces as torch.compile does; older PyTorch cannot tell them apart
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: True)


@torch.compiler.assume_constant_result  # the environment and the library are looked at, not traced
def _wanted() -> bool:
    t = torch.ones(1, 1, 1, 1, dtype=torch.float32, device='cpu')
    return kernels_for(t, t) is native


def takes(f: torch.Tensor, x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Whether the gate of such F and x, traced by torch.compile, calls these operators."""
    return (torch.compiler.is_dynamo_compiling() and not _is_exporting()
            and not torch._C._are_functorch_transforms_active()
            and all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == 'cpu'
                    for t in (f, x, *parameters))
            and native.takes(f, x) and _wanted())


def gate(
        f: torch.Tensor,
        x: torch.Tensor,
        alpha: torch.Tensor,
        gate: Gate,
        *norms: Optional[NormState],
) -> torch.Tensor:
    """y of shape (B, C, H, W), differentiable once. ``norms``: of the inputs that ``f`` and ``x`` then are."""
    tensors = [[] if n is None else [n.weight, n.bias, n.mean, n.spread] for n in norms]
    training, eps = [n is not None and n.training for n in norms], [0. if n is None else n.eps for n in norms]
    return _forward(
        f, x, alpha, *tensors, training, eps, gate.attention, gate.mask_scale, gate.add_shortcut, gate.relu)[0]


def _states(norms: Sequence[Any], training: Sequence[bool], eps: Sequence[float]) -> Any:
    return [NormState._make([*norm, t, e]) if norm else None for norm, t, e in zip(norms, training, eps)]


@torch.library.custom_op('timm_arl::gate', mutates_args=())
def _forward(
        f: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor,
        norm: Sequence[torch.Tensor], shortcut_norm: Sequence[torch.Tensor],
        training: Sequence[bool], eps: Sequence[float],
        attention: str, mask_scale: str, add_shortcut: bool, relu: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = _states((norm, shortcut_norm), training, eps)
    return native.gate_forward(f, x, alpha, Gate(attention, mask_scale, add_shortcut, relu), False, *states)


@_forward.register_fake
def _(f, x, alpha, norm, shortcut_norm, training, eps, attention, *_):
    top = f.new_empty(small_shape(f, attention), dtype=torch.float32)
    return torch.empty_like(f, memory_format=layout(f)), top, torch.empty_like(top)


@torch.library.custom_op('timm_arl::gate_backward', mutates_args=())
def _backward(
        grad: torch.Tensor, y: Optional[torch.Tensor], f: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor,
        norm: Sequence[torch.Tensor], shortcut_norm: Sequence[torch.Tensor],
        top: torch.Tensor, total: torch.Tensor,
        training: Sequence[bool], eps: Sequence[float],
        attention: str, mask_scale: str, add_shortcut: bool, relu: bool,
) -> List[torch.Tensor]:
    norms: Any = _states((norm, shortcut_norm), training, eps)
    (of_f, *of_norm), (of_x, *of_shortcut_norm), of_alpha = native.gate_norms_backward(
        grad, y, f, x, alpha, norms[0], norms[1], Gate(attention, mask_scale, add_shortcut, relu), top, total)
    return [of_alpha, of_f, of_x, *(t for t in (*of_norm, *of_shortcut_norm) if t is not None)]


@_backward.register_fake
def _(grad, y, f, x, alpha, norm, shortcut_norm, *_):
    fmt = layout(f)
    return [torch.empty_like(alpha), torch.empty_like(f, memory_format=fmt), torch.empty_like(x, memory_format=fmt),
            *map(torch.empty_like, (*norm[:2], *shortcut_norm[:2]))]


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, ...]) -> None:
    f, x, alpha, norm, shortcut_norm, *ctx.options = inputs
    y, top, total = output
    ctx.split = len(norm)
    ctx.save_for_backward(y if ctx.options[-1] else None, f, x, alpha, *norm, *shortcut_norm, top, total)


def _gradients(ctx: Any, grad: torch.Tensor, *_: None) -> Tuple[Any, ...]:
    y, f, x, alpha, *norms, top, total = ctx.saved_tensors
    norm, shortcut_norm = norms[:ctx.split], norms[ctx.split:]
    of_alpha, of_f, of_x, *found = _backward(grad, y, f, x, alpha, norm, shortcut_norm, top, total, *ctx.options)
    # the gradients of f and x have those by way of the statistics
    of_norms = [[found.pop(0), found.pop(0), None, None] if n else [] for n in (norm, shortcut_norm)]
    return (of_f, of_x, of_alpha, *of_norms, *[None] * 6)


_forward.register_autograd(_gradients, setup_context=_keep)
