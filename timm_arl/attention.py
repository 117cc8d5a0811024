"""The gate of attention residual learning (ARL): written out, and as one autograd function.

Paper: `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944

With ``F`` the output of a residual branch (after its last norm layer), ``x`` the shortcut (projected where the block
projects it) and ``n`` one of the normalisations below, a block computes (Eq. 3-9, with O = F)

    y = x + F + alpha * n(F) * x

before its last activation. ``alpha`` is one learnable scalar a block; with ``alpha = 0`` the block is a residual block.

=========  ====  =============================================================  =======================
attention  Eq.   n(F)                                                           sums to 1 over
=========  ====  =============================================================  =======================
spatial    4     softmax over the H*W positions, per sample and channel         positions
channel    5     softmax over the C channels, per sample and position           channels
mixed      6     sigmoid, elementwise                                           (nothing)
=========  ====  =============================================================  =======================

:func:`attention_mask` and :func:`attention_residual` are the reference, in plain operations that scripting, tracing,
exporting and compiling see through. :class:`FusedAttentionResidual` computes the same in eager mode with less memory
and fewer passes over it; docs/performance.md has the figures.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import kernels

__all__ = [
    'ATTENTIONS', 'MASK_SCALES', 'FusedAttentionResidual', 'alphas_of', 'attention_mask', 'attention_residual',
    'can_fuse', 'fused_attention_residual', 'fused_block_tail',
]

ATTENTIONS = ('spatial', 'channel', 'mixed')
MASK_SCALES = ('softmax', 'mean1')


def attention_mask(
        residual: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
) -> torch.Tensor:
    """The attention mask n(F) of a residual branch, Eq. 4 (spatial), 5 (channel) or 6 (mixed).

    A spatial softmax over 56 x 56 positions has a mean of 1/3136, which is why ``mask_scale='mean1'`` exists: it
    divides the mask by its mean over the positions (spatial), the channels (channel) or the whole sample (mixed).

    Args:
        residual: F, shape (B, C, H, W), any floating dtype and memory format.
        attention: Normalisation, 'spatial', 'channel' or 'mixed'.
        mask_scale: 'softmax', the mask as printed, or 'mean1', rescaled to a mean of 1 (not in the paper).

    Returns:
        Mask of shape (B, C, H, W) in the memory format of ``residual``; float32, or float64 for a float64 residual.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale`` (a ``torch.jit.Error`` once scripted).
    """
    mask, total, share = _mask_parts(residual, attention, mask_scale)
    return mask if total is None else mask * (share / total)


def _mask_parts(
        residual: torch.Tensor,
        attention: str,
        mask_scale: str,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], float]:
    """The mask as e, t and c, of which it is e * c / t, or e where t is None; t is one number a softmax."""
    if mask_scale != 'softmax' and mask_scale != 'mean1':
        raise ValueError(f"Unknown mask_scale '{mask_scale}': choose 'softmax' or 'mean1'.")
    # promotes half precision to float32 and leaves float64 alone; FX cannot trace torch.promote_types
    wide = residual.new_ones([1], dtype=torch.float32)
    total: Optional[torch.Tensor] = None
    # torch.softmax over flattened positions would copy channels_last data to NCHW; this keeps the format. One dimension
    # after the other, since a compiler makes slow loops of both at once (inductor on a CPU: 13 ms for 11)
    if attention == 'mixed':
        mask = torch.sigmoid(residual * wide)
        if mask_scale == 'mean1':
            total = mask.mean(dim=[1, 2, 3], keepdim=True)
        return mask, total, 1.
    if attention == 'spatial':
        top = residual.detach().amax(dim=2, keepdim=True).amax(dim=3, keepdim=True)
        mask = (residual - top * wide).exp()
        total = mask.sum(dim=2, keepdim=True).sum(dim=3, keepdim=True)
        count = residual.shape[2] * residual.shape[3]
    elif attention == 'channel':
        mask = (residual - residual.detach().amax(dim=1, keepdim=True) * wide).exp()
        total = mask.sum(dim=1, keepdim=True)
        count = residual.shape[1]
    else:
        raise ValueError(f"Unknown attention '{attention}': choose 'spatial', 'channel' or 'mixed'.")
    return mask, total, float(count) if mask_scale == 'mean1' else 1.


def attention_residual(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        add_shortcut: bool = True,
) -> torch.Tensor:
    """Attention residual learning, y = x + F + alpha * n(F) * x (Eq. 3-9), before the last activation.

    Mask, product and sum are computed in float32 and rounded once, to the dtype of ``residual``: a float32 ``alpha``
    would else promote the whole residual stream under autocast.

    Args:
        residual: F, shape (B, C, H, W).
        shortcut: x, shape (B, C, H, W).
        alpha: Learnable weight, shape (1,).
        attention: Normalisation n, 'spatial' (Eq. 4), 'channel' (Eq. 5) or 'mixed' (Eq. 6).
        mask_scale: 'softmax' or 'mean1', see :func:`attention_mask`.
        add_shortcut: False leaves out the leading ``x``, for stochastic depth: y = x + drop_path(F + alpha * n(F) * x).

    Returns:
        y of shape (B, C, H, W) in the dtype and memory format of ``residual``.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale`` (a ``torch.jit.Error`` once scripted).
    """
    mask, total, share = _mask_parts(residual, attention, mask_scale)
    gate = mask * (alpha if total is None else alpha * share / total)  # a pass less than alpha times the mask
    if add_shortcut:
        gate = gate + 1.
    return torch.addcmul(residual.to(gate.dtype), gate, shortcut.to(gate.dtype)).to(residual.dtype)


def alphas_of(model: nn.Module) -> Dict[str, nn.Parameter]:
    """The alphas of a model, by the name of the parameter; empty for a model without attention residual learning."""
    return {name: p for name, p in model.named_parameters() if name.endswith('.alpha') and p.numel() == 1}


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether the fused gate can take these: ordinary tensors, run eagerly, with backward as the only transform."""
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None):  # make_fx
        return False
    return all(
        type(t) in (torch.Tensor, nn.Parameter) and t.device.type != 'meta'
        and torch.autograd.forward_ad.unpack_dual(t).tangent is None
        for t in tensors)


def fused_attention_residual(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        add_shortcut: bool = True,
        relu: bool = False,
        inplace: bool = False,
) -> torch.Tensor:
    """:func:`attention_residual`, fused in eager mode, and as written there when scripted, exported or compiled.

    An alpha of exactly 0 skips the gate where no gradient is needed (on a CPU).

    Args:
        relu: Whether a ReLU follows the sum.
        inplace: Whether the result may overwrite ``residual`` where no gradient is needed.
        residual, shortcut, alpha, attention, mask_scale, add_shortcut: See :func:`attention_residual`.
    """
    if not torch.jit.is_scripting():
        if can_fuse(residual, shortcut, alpha):
            if torch.is_grad_enabled():
                return fused_block_tail(residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu)
            _check(attention, mask_scale)
            if _is_off(alpha):
                return _without_gate(residual, shortcut, add_shortcut, relu)
            return kernels.gate(residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu, inplace)[0]
    y = attention_residual(residual, shortcut, alpha, attention, mask_scale, add_shortcut)
    return y.relu() if relu else y


def fused_block_tail(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        add_shortcut: bool = True,
        relu: bool = False,
        norm: Optional[nn.BatchNorm2d] = None,
        shortcut_norm: Optional[nn.BatchNorm2d] = None,
) -> torch.Tensor:
    """The end of a block, relu(x + F + alpha * n(F) * x) with F = norm(residual) and x = shortcut_norm(shortcut).

    Args:
        residual: Input of ``norm``, or F itself, shape (B, C, H, W).
        shortcut: Input of ``shortcut_norm``, or x itself, shape (B, C, H, W).
        relu: Whether a ReLU follows the sum.
        alpha, attention, mask_scale, add_shortcut: See :func:`attention_residual`.
        norm: Last norm layer of the residual branch, called on ``residual`` with all effects of its own forward.
        shortcut_norm: Last norm layer of the projection, called on ``shortcut``.

    Returns:
        y of shape (B, C, H, W) in the dtype and memory format of ``residual``.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale``.
    """
    _check(attention, mask_scale)
    if not alpha.requires_grad and _is_off(alpha):
        f = residual if norm is None else norm(residual)
        x = shortcut if shortcut_norm is None else shortcut_norm(shortcut)
        return _without_gate(f, x, add_shortcut, relu)
    parameters = [getattr(m, name, None) for m in (norm, shortcut_norm) for name in ('weight', 'bias')]
    return FusedAttentionResidual.apply(
        residual, shortcut, alpha, *parameters, norm, shortcut_norm, attention, mask_scale, add_shortcut, relu)


def _check(attention: str, mask_scale: str) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"Unknown attention '{attention}': choose 'spatial', 'channel' or 'mixed'.")
    if mask_scale not in MASK_SCALES:
        raise ValueError(f"Unknown mask_scale '{mask_scale}': choose 'softmax' or 'mean1'.")


def _is_off(alpha: torch.Tensor) -> bool:
    """Whether alpha is exactly 0; asked on a CPU alone, since an accelerator would have to be waited for."""
    return alpha.device.type == 'cpu' and alpha.item() == 0


def _without_gate(f: torch.Tensor, x: torch.Tensor, add_shortcut: bool, relu: bool) -> torch.Tensor:
    y = (f + x).to(f.dtype) if add_shortcut else f
    return y.relu() if relu else y


class FusedAttentionResidual(torch.autograd.Function):
    """:func:`fused_block_tail` with a backward pass of its own.

    Kept for backward are the inputs of the batch norms, which these keep anyway, y, which the ReLU keeps anyway, and a
    row of numbers: F, x and the mask are computed again. With g the gradient of the sum, m = n(F), s the factor of
    ``mask_scale`` and <.> a sum over what the mask sums to 1 over, the gradients are

        alpha: s * sum(g * x * m)    x: g + alpha * s * g * m    F: g + alpha * s * m * (g * x - <g * x * m>)

    for a softmax; for the sigmoid, the last is g + alpha * s * m * (1 - m) * (g * x - <g * x * m> / <m>), where the
    quotient belongs to 'mean1' alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]  # autograd's own is declared (*args)
            ctx: Any,
            residual: torch.Tensor,
            shortcut: torch.Tensor,
            alpha: torch.Tensor,
            weight: Optional[torch.Tensor],
            bias: Optional[torch.Tensor],
            shortcut_weight: Optional[torch.Tensor],
            shortcut_bias: Optional[torch.Tensor],
            norm: Optional[nn.BatchNorm2d],
            shortcut_norm: Optional[nn.BatchNorm2d],
            attention: str,
            mask_scale: str,
            add_shortcut: bool,
            relu: bool,
    ) -> torch.Tensor:
        f, x = residual, shortcut
        statistics: List[Optional[torch.Tensor]] = [None] * 4
        if norm is not None:
            f, *statistics[:2] = kernels.normalize(residual, norm)
        if shortcut_norm is not None:
            x, *statistics[2:] = kernels.normalize(shortcut, shortcut_norm)
        # a batch norm's output is ours to overwrite
        y, tops, sums = kernels.gate(
            f, x, alpha, attention, mask_scale, add_shortcut, relu, inplace=norm is not None)
        ctx.save_for_backward(
            residual, shortcut, alpha, weight, bias, shortcut_weight, shortcut_bias, *statistics, tops, sums,
            y if relu else None)
        ctx.options = kernels.layout(f), attention, mask_scale, add_shortcut
        # the mode is that of the forward pass, whatever the module is set to by the time of the backward pass
        ctx.norm = None if norm is None else (norm.training, norm.eps)
        ctx.shortcut_norm = None if shortcut_norm is None else (shortcut_norm.training, shortcut_norm.eps)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]  # the same
        (residual, shortcut, alpha, weight, bias, shortcut_weight, shortcut_bias, mean, spread, shortcut_mean,
         shortcut_spread, tops, sums, y) = ctx.saved_tensors
        norm = ctx.norm and kernels.NormState._make((*ctx.norm, weight, bias, mean, spread))
        shortcut_norm = ctx.shortcut_norm and kernels.NormState._make(
            (*ctx.shortcut_norm, shortcut_weight, shortcut_bias, shortcut_mean, shortcut_spread))
        fmt, attention, mask_scale, add_shortcut = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or not can_fuse(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            # create_graph, or a batch of gradients
            return _differentiable_backward(
                grad, residual, shortcut, alpha, norm, shortcut_norm, attention, mask_scale, add_shortcut,
                y is not None, needs)
        grad_f, grad_x, grad_alpha = kernels.gate_backward(
            grad, y, residual, shortcut, alpha, tops, sums, norm, shortcut_norm, fmt, attention, mask_scale,
            add_shortcut)
        grad_residual, grad_weight, grad_bias = kernels.normalize_backward(
            grad_f, residual, norm, [needs[0], needs[3], needs[4]])
        grad_shortcut, grad_shortcut_weight, grad_shortcut_bias = kernels.normalize_backward(
            grad_x, shortcut, shortcut_norm, [needs[1], needs[5], needs[6]])
        return (
            grad_residual, grad_shortcut, grad_alpha, grad_weight, grad_bias, grad_shortcut_weight, grad_shortcut_bias,
            None, None, None, None, None, None)


def _differentiable_backward(
        grad: torch.Tensor,
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        norm: Optional[kernels.NormState],
        shortcut_norm: Optional[kernels.NormState],
        attention: str,
        mask_scale: str,
        add_shortcut: bool,
        relu: bool,
        needs: Tuple[bool, ...],
) -> Tuple[Optional[torch.Tensor], ...]:
    """The gradients by autograd through the plain gate, for a backward pass that is itself differentiated."""
    def normalize(z, state, weight, bias):
        if state is None:
            return z
        mean, variance = (None, None) if state.training else (state.mean, state.spread)
        return F.batch_norm(z, mean, variance, weight, bias, state.training, 0., state.eps)

    def plain(tensors):
        residual, shortcut, alpha, weight, bias, shortcut_weight, shortcut_bias = map(tensors.get, range(7))
        f = normalize(residual, norm, weight, bias)
        x = normalize(shortcut, shortcut_norm, shortcut_weight, shortcut_bias)
        y = attention_residual(f, x, alpha, attention, mask_scale, add_shortcut)
        return y.relu() if relu else y

    inputs = {0: residual, 1: shortcut, 2: alpha}
    if norm is not None:
        inputs.update({3: norm.weight, 4: norm.bias})
    if shortcut_norm is not None:
        inputs.update({5: shortcut_norm.weight, 6: shortcut_norm.bias})
    # func.vjp and not autograd.grad, which would follow the inputs into each other where one was made from another
    grads, = torch.func.vjp(plain, inputs)[1](grad)
    return tuple(grads.get(i) if needs[i] else None for i in range(len(needs)))
