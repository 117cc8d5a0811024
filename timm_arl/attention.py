"""Attention residual learning (ARL): the reference in plain operations, and the fused gate for eager mode.

Paper: `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944

``F`` is the output of the residual branch (after its last norm layer), ``x`` the shortcut (after its projection, if
any) and ``n`` one of the normalisations below. Before its last activation, a block computes (Eq. 3-9, with O = F)

    y = x + F + alpha * n(F) * x

``alpha`` is one learnable scalar per block. With ``alpha = 0`` the block is a plain residual block.

=========  ====  =============================================================  =======================
attention  Eq.   n(F)                                                           sums to 1 over
=========  ====  =============================================================  =======================
spatial    4     softmax over the H*W positions, per sample and channel         positions
channel    5     softmax over the C channels, per sample and position           channels
mixed      6     sigmoid, elementwise                                           (nothing)
=========  ====  =============================================================  =======================

:func:`attention_mask` and :func:`attention_residual` are the reference. They can be scripted, traced, exported and
compiled. :func:`fused_attention_residual` is what the blocks call: the same result in eager mode, and under
torch.compile on a CPU, with less memory and fewer passes over it (figures in docs/performance.md).
"""
import math
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import kernels
from .kernels import Gate, NormState, compiled, kernels_for
from .kernels.norms import normalize, statistics_of, traced_statistics

__all__ = [
    'ATTENTIONS', 'MASK_SCALES', 'FusedAttentionResidual', 'alphas_of', 'attention_mask', 'attention_residual',
    'can_fuse', 'check_gate', 'check_names', 'folds_norms', 'fused_attention_residual', 'gated_sum', 'temperatures_of',
]

ATTENTIONS = ('spatial', 'channel', 'mixed')
MASK_SCALES = ('softmax', 'mean1')


def check_names(attention: str, mask_scale: str) -> None:
    """Raise ValueError for an unknown ``attention`` or ``mask_scale``."""
    # written out, since TorchScript cannot read the tuples above
    if attention not in ('spatial', 'channel', 'mixed'):
        raise ValueError(f"Unknown attention '{attention}': choose 'spatial', 'channel' or 'mixed'.")
    if mask_scale not in ('softmax', 'mean1'):
        raise ValueError(f"Unknown mask_scale '{mask_scale}': choose 'softmax' or 'mean1'.")


def check_gate(
        attention: str,
        mask_scale: str,
        alpha_init: float,
        mask_temperature: float = 1.,
        learn_temperature: bool = False,
) -> None:
    """Raise ValueError for what the blocks do not take: an unknown name, or a number out of range."""
    check_names(attention, mask_scale)
    if not isinstance(alpha_init, (int, float)) or not math.isfinite(alpha_init):
        raise ValueError(f'alpha_init must be a finite number, not {alpha_init!r}.')
    if isinstance(mask_temperature, bool) or not (
            isinstance(mask_temperature, (int, float)) and 1e-6 <= mask_temperature <= 1e6):
        raise ValueError(f'mask_temperature must be a number from 1e-6 to 1e6, not {mask_temperature!r}.')
    if learn_temperature not in (True, False):
        raise ValueError(f'learn_temperature must be True or False, not {learn_temperature!r}.')


def attention_mask(
        residual: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        temperature: float = 1.,
        log_temperature: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The attention mask n(F) of a residual branch, Eq. 4 (spatial), 5 (channel) or 6 (mixed).

    A spatial softmax over 56 x 56 positions has a mean of 1/3136. ``mask_scale='mean1'`` therefore divides the mask by
    its mean over the positions (spatial), the channels (channel) or the whole sample (mixed).

    Args:
        residual: F, shape (B, C, H, W), any floating dtype and memory format.
        attention: Normalisation, 'spatial', 'channel' or 'mixed'.
        mask_scale: 'softmax', the mask as printed, or 'mean1', rescaled to a mean of 1 (not in the paper).
        temperature: T of n(F / T), above 0; below 1 the mask is more peaked than the paper's, for which T is 1.
        log_temperature: The logarithm of T, shape (1,), instead of ``temperature``, where it is learned.

    Returns:
        Mask of shape (B, C, H, W) in the memory format of ``residual``; float32, or float64 for a float64 residual.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale``, or a ``temperature`` that is not above 0 (a
            ``torch.jit.Error`` once scripted).
    """
    mask, total = _mask_parts(residual, attention, mask_scale, temperature, log_temperature)
    return mask if total is None else mask * (1. / total)


def _sharpened(logits: torch.Tensor, temperature: float, log_temperature: Optional[torch.Tensor]) -> torch.Tensor:
    """Divide by the temperature; after the largest value was subtracted, or large ones would lose their differences."""
    if log_temperature is not None:
        return logits * log_temperature.to(logits.dtype).neg().exp()
    return logits if temperature == 1. else logits * (1. / temperature)


def _mask_parts(
        residual: torch.Tensor,
        attention: str,
        mask_scale: str,
        temperature: float,
        log_temperature: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Returns (e, total); mask = e / total, or e where total is None. total: one number per softmax."""
    check_names(attention, mask_scale)
    if not temperature > 0.:
        raise ValueError(f'The temperature must be above 0, not {temperature}.')
    # promotes half precision to float32 and leaves float64 alone; FX cannot trace torch.promote_types
    wide = residual.new_ones([1], dtype=torch.float32)
    mean1 = mask_scale == 'mean1'
    if attention == 'mixed':
        logits = _sharpened(residual * wide, temperature, log_temperature)
        if not mean1:
            return torch.sigmoid(logits), None
        # logarithms of the sigmoids, relative to the largest, since all of a sample may be 0; F.logsigmoid would give
        # channels_last data back as NCHW, and ONNX would make it log(sigmoid)
        logs = -F.softplus(-logits, threshold=60.)
        mask = (logs - logs.detach().amax(dim=[1, 2, 3], keepdim=True)).exp()
        return mask, mask.mean(dim=[1, 2, 3], keepdim=True)
    # torch.softmax over flattened positions would copy channels_last data to NCHW; this keeps the format. H and W are
    # reduced one after the other: inductor makes slower loops of both at once (13 ms instead of 11 on a CPU). A mean,
    # and not the sum and H * W, which would become constants of what is traced
    if attention == 'spatial':
        top = residual.detach().amax(dim=2, keepdim=True).amax(dim=3, keepdim=True)
        mask = _sharpened(residual - top * wide, temperature, log_temperature).exp()
        if mean1:
            return mask, mask.mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        return mask, mask.sum(dim=2, keepdim=True).sum(dim=3, keepdim=True)
    top = residual.detach().amax(dim=1, keepdim=True)
    mask = _sharpened(residual - top * wide, temperature, log_temperature).exp()
    return mask, mask.mean(dim=1, keepdim=True) if mean1 else mask.sum(dim=1, keepdim=True)


def attention_residual(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        add_shortcut: bool = True,
        temperature: float = 1.,
        log_temperature: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Attention residual learning, y = x + F + alpha * n(F) * x (Eq. 3-9), before the last activation.

    Mask, product and sum are computed in float32 and rounded once, to the dtype of ``residual``. Without that, a
    float32 ``alpha`` would promote the whole residual stream under autocast.

    Args:
        residual: F, shape (B, C, H, W).
        shortcut: x, shape (B, C, H, W).
        alpha: Learnable weight, shape (1,).
        attention: Normalisation n, 'spatial' (Eq. 4), 'channel' (Eq. 5) or 'mixed' (Eq. 6).
        mask_scale: 'softmax' or 'mean1', see :func:`attention_mask`.
        add_shortcut: False omits the leading ``x``, for stochastic depth: y = x + drop_path(F + alpha * n(F) * x).
        temperature, log_temperature: T of n(F / T), see :func:`attention_mask`.

    Returns:
        y of shape (B, C, H, W) in the dtype and memory format of ``residual``.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale`` (a ``torch.jit.Error`` once scripted).
    """
    mask, total = _mask_parts(residual, attention, mask_scale, temperature, log_temperature)
    gate = mask * (alpha if total is None else alpha / total)  # one pass fewer than alpha times the mask
    if add_shortcut:
        gate = gate + 1.
    return torch.addcmul(residual.to(gate.dtype), gate, shortcut.to(gate.dtype)).to(residual.dtype)


def alphas_of(model: nn.Module) -> Dict[str, nn.Parameter]:
    """The alphas of a model by parameter name; empty for a model without attention residual learning."""
    return {name: p for name, p in model.named_parameters() if name.rpartition('.')[2] == 'alpha' and p.numel() == 1}


def temperatures_of(model: nn.Module) -> Dict[str, nn.Parameter]:
    """The learned temperatures' logarithms of a model's masks by parameter name; empty where none is learned."""
    return {name: p for name, p in model.named_parameters() if name.rpartition('.')[2] == 'log_temperature'}


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether the fused gate may run: eagerly, on ordinary tensors, with backward as the only transform."""
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None):  # make_fx
        return False
    return all(
        type(t) in (torch.Tensor, nn.Parameter) and t.device.type != 'meta'
        and torch.autograd.forward_ad.unpack_dual(t).tangent is None
        for t in tensors)


def _unseen() -> bool:
    """Whether no mode is active, which may have kept what an operation gave."""
    return not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack()


def folds_norms(residual: torch.Tensor, shortcut: torch.Tensor, alpha: torch.Tensor) -> bool:
    """Whether the gate's kernels apply batch norms on the way; not where alpha is 0: that is timm's, bit for bit."""
    return kernels.folds_norms(residual, shortcut) and alpha.item() != 0


def fused_attention_residual(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str = 'spatial',
        mask_scale: str = 'softmax',
        add_shortcut: bool = True,
        relu: bool = False,
        norm: Optional[nn.BatchNorm2d] = None,
        shortcut_norm: Optional[nn.BatchNorm2d] = None,
        inplace: bool = False,
        temperature: float = 1.,
        log_temperature: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The end of a block, relu(x + F + alpha * n(F) * x) with F = norm(residual) and x = shortcut_norm(shortcut).

    Fused in eager mode and, with a ``norm``, where torch.compile calls the C kernels; elsewhere (traced,
    exported, otherwise compiled, under functorch transforms, on meta tensors) the norms and :func:`attention_residual`
    one after the other. Scripted code calls :func:`attention_residual` itself.
    An ``alpha`` of exactly 0 that needs no gradient skips the gate (on a CPU). A temperature other than 1 has no fused
    gate: it is computed by :func:`attention_residual`.

    Args:
        residual: Input of ``norm``, or F itself, shape (B, C, H, W).
        shortcut: Input of ``shortcut_norm``, or x itself, shape (B, C, H, W).
        alpha, attention, mask_scale, add_shortcut: See :func:`attention_residual`.
        relu: Whether a ReLU follows the sum.
        norm: Last norm layer of the residual branch, with weight, bias, momentum and running statistics; its hooks are
            not called.
        shortcut_norm: Last norm layer of the projection, under the same conditions.
        inplace: Whether the result may overwrite ``residual`` where no gradient is needed and no mode sees it.
        temperature, log_temperature: T of n(F / T), see :func:`attention_mask`.

    Returns:
        y of shape (B, C, H, W) in the dtype and memory format of ``residual``.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale``.
        RuntimeError: A norm for another number of channels.
    """
    check_names(attention, mask_scale)
    grad, fuse = torch.is_grad_enabled(), can_fuse(residual, shortcut, alpha)
    # whether alpha is 0 is asked on a CPU alone: an accelerator would have to synchronise
    learned = alpha.requires_grad or log_temperature is not None and log_temperature.requires_grad
    off = fuse and not (grad and learned) and alpha.device.type == 'cpu' and alpha.item() == 0
    papers = temperature == 1 and log_temperature is None
    fuse = fuse and papers
    gate = Gate(attention, mask_scale, add_shortcut, relu)
    if grad and fuse and not off:
        parameters = [getattr(m, name, None) for m in (norm, shortcut_norm) for name in ('weight', 'bias')]
        return FusedAttentionResidual.apply(residual, shortcut, alpha, norm, shortcut_norm, gate, *parameters)
    if norm is not None and papers and compiled.takes(residual, shortcut, alpha):
        states = traced_statistics(residual, norm), traced_statistics(shortcut, shortcut_norm)
        return compiled.gate(residual, shortcut, alpha, gate, *states)
    if fuse and not off and folds_norms(residual, shortcut, alpha):
        states = statistics_of(residual, norm), statistics_of(shortcut, shortcut_norm)
        return kernels_for(residual, shortcut).gate_forward(
            residual, shortcut, alpha, gate, inplace and _unseen(), *states)[0]
    f = residual if norm is None else norm(residual)
    x = shortcut if shortcut_norm is None else shortcut_norm(shortcut)
    if off:
        y = (f + x).to(f.dtype) if add_shortcut else f
    elif fuse and can_fuse(f, x):
        return kernels_for(f, x).gate_forward(f, x, alpha, gate, (inplace or norm is not None) and _unseen())[0]
    else:
        y = attention_residual(f, x, alpha, attention, mask_scale, add_shortcut, temperature, log_temperature)
    return y.relu() if relu else y


def gated_sum(
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        attention: str,
        mask_scale: str,
        add_shortcut: bool,
        relu: bool,
        inplace: bool,
        temperature: float,
        log_temperature: Optional[torch.Tensor],
) -> torch.Tensor:
    """:func:`fused_attention_residual` of F and x, without norms: a leaf of FX graphs that TorchScript can compile.

    Args:
        residual: F, shape (B, C, H, W).
        shortcut: x, shape (B, C, H, W).
        alpha, attention, mask_scale, add_shortcut, relu, inplace, temperature, log_temperature: As there.

    Returns:
        y of shape (B, C, H, W) in the dtype and memory format of ``residual``.

    Raises:
        ValueError: An unknown ``attention`` or ``mask_scale`` (a ``torch.jit.Error`` once scripted).
    """
    if torch.jit.is_scripting():
        y = attention_residual(
            residual, shortcut, alpha, attention, mask_scale, add_shortcut, temperature, log_temperature)
        return y.relu() if relu else y
    else:
        if isinstance(residual, torch.fx.Proxy):  # a copied graph that is traced again, where FX has lost its leaves
            return residual.tracer.create_proxy('call_function', gated_sum, (
                residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu, inplace, temperature,
                log_temperature), {})
        return fused_attention_residual(
            residual, shortcut, alpha, attention, mask_scale, add_shortcut, relu, inplace=inplace,
            temperature=temperature, log_temperature=log_temperature)


class FusedAttentionResidual(torch.autograd.Function):
    """:func:`fused_attention_residual` where a gradient is needed, with a backward pass of its own.

    Kept for backward: the inputs of the batch norms and y, which batch norms and ReLU would keep anyway, and what the
    kernel asks for, about one number per softmax. F, x and the mask are computed again. With g the gradient of the
    sum, m = n(F), s the factor of ``mask_scale`` and <.> a sum over what the mask sums to 1 over, the gradients are

        alpha: s * sum(g * x * m)    x: g + alpha * s * g * m    F: g + alpha * s * m * (g * x - <g * x * m>)

    for a softmax. For the sigmoid, the last is g + alpha * s * m * (1 - m) * (g * x - <g * x * m> / <m>), where the
    quotient belongs to 'mean1' alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]  # autograd's own is declared (*args)
            ctx: Any,
            residual: torch.Tensor,
            shortcut: torch.Tensor,
            alpha: torch.Tensor,
            norm: Optional[nn.BatchNorm2d],
            shortcut_norm: Optional[nn.BatchNorm2d],
            gate: Gate,
            *parameters: Optional[torch.Tensor],  # of the norms, for autograd to know of them
    ) -> torch.Tensor:
        if folds_norms(residual, shortcut, alpha):
            state, shortcut_state = statistics_of(residual, norm), statistics_of(shortcut, shortcut_norm)
            y, *kept = kernels_for(residual, shortcut).gate_forward(
                residual, shortcut, alpha, gate, False, state, shortcut_state)
        else:
            f, state = normalize(residual, norm)
            x, shortcut_state = normalize(shortcut, shortcut_norm)
            y, *kept = kernels_for(f, x).gate_forward(
                f, x, alpha, gate, inplace=norm is not None and _unseen())
        nothing = (None,) * 4
        ctx.save_for_backward(
            residual, shortcut, alpha, y if gate.relu else None, *(state or nothing)[:4],
            *(shortcut_state or nothing)[:4], *kept)
        # training or not is decided here, whatever mode the module is in by the time of the backward pass
        ctx.gate, ctx.modes = gate, [s and s[4:] for s in (state, shortcut_state)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]  # the same
        residual, shortcut, alpha, y, *saved = ctx.saved_tensors
        norm, shortcut_norm = (
            mode and NormState(*saved[i:i + 4], *mode) for i, mode in zip((0, 4), ctx.modes))
        if torch.is_grad_enabled() or not can_fuse(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            # create_graph, or a batch of gradients
            return _differentiable_backward(grad, residual, shortcut, alpha, norm, shortcut_norm, ctx.gate)
        used, arguments = kernels_for(residual, shortcut), (
            grad, y, residual, shortcut, alpha, norm, shortcut_norm, ctx.gate, *saved[8:])
        if folds_norms(residual, shortcut, alpha):
            (grad_f, *grads), (grad_x, *shortcut_grads), grad_alpha = used.gate_norms_backward(*arguments)
        else:
            grad_f, grad_x, grad_alpha = used.gate_backward(*arguments)
            grad_f, *grads = kernels.norm_backward(grad_f, residual, norm)
            grad_x, *shortcut_grads = kernels.norm_backward(grad_x, shortcut, shortcut_norm)
        return grad_f, grad_x, grad_alpha, None, None, None, *grads, *shortcut_grads


def _differentiable_backward(
        grad: torch.Tensor,
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        alpha: torch.Tensor,
        norm: Optional[NormState],
        shortcut_norm: Optional[NormState],
        gate: Gate,
) -> Tuple[Optional[torch.Tensor], ...]:
    """The gradients by autograd through the plain gate, for a backward pass that is itself differentiated."""
    def normalized(z, state, parameters):
        if state is None:
            return z
        statistics = (None, None) if state.training else (state.mean, state.spread)
        return F.batch_norm(z, *statistics, *parameters, state.training, 0., state.eps)

    def plain(residual, shortcut, alpha, parameters, shortcut_parameters):
        f, x = normalized(residual, norm, parameters), normalized(shortcut, shortcut_norm, shortcut_parameters)
        y = attention_residual(f, x, alpha, gate.attention, gate.mask_scale, gate.add_shortcut)
        return y.relu() if gate.relu else y

    parameters = [() if state is None else (state.weight, state.bias) for state in (norm, shortcut_norm)]
    # func.vjp and not autograd.grad, which would follow the inputs into each other where one was made from another
    *grads, norm_grads, shortcut_norm_grads = torch.func.vjp(plain, residual, shortcut, alpha, *parameters)[1](grad)
    return *grads, None, None, None, *(norm_grads or (None, None)), *(shortcut_norm_grads or (None, None))
