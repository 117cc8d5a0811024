"""The gate of attention residual learning (ARL), in plain PyTorch operations.

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
"""
import torch

__all__ = ['ATTENTIONS', 'MASK_SCALES', 'attention_mask', 'attention_residual']

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
    if mask_scale != 'softmax' and mask_scale != 'mean1':
        raise ValueError(f"Unknown mask_scale '{mask_scale}': choose 'softmax' or 'mean1'.")
    # promotes half precision to float32 and leaves float64 alone; FX cannot trace torch.promote_types
    wide = residual.new_ones([1], dtype=torch.float32)
    if attention == 'mixed':
        mask = torch.sigmoid(residual * wide)
        if mask_scale == 'mean1':
            mask = mask / mask.mean(dim=[1, 2, 3], keepdim=True)
        return mask
    if attention == 'spatial':
        dim = [2, 3]
    elif attention == 'channel':
        dim = [1]
    else:
        raise ValueError(f"Unknown attention '{attention}': choose 'spatial', 'channel' or 'mixed'.")
    # torch.softmax over flattened positions would copy channels_last data to NCHW; this keeps the format
    mask = (residual - residual.detach().amax(dim=dim, keepdim=True) * wide).exp()
    if mask_scale == 'mean1':
        return mask / mask.mean(dim=dim, keepdim=True)
    return mask / mask.sum(dim=dim, keepdim=True)


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
    gate = alpha * attention_mask(residual, attention, mask_scale)
    if add_shortcut:
        gate = gate + 1.
    return torch.addcmul(residual.to(gate.dtype), gate, shortcut.to(gate.dtype)).to(residual.dtype)
