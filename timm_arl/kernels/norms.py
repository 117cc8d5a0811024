"""What a batch norm does beside its output, for gates that apply the norm themselves."""
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn

from .torch_ops import NormState

__all__ = ['normalize', 'statistics_of', 'traced_statistics']


def _check_norm(z: torch.Tensor, norm: nn.BatchNorm2d) -> None:
    """Raise RuntimeError if a norm is not for z: ATen's functions would read and write beyond its tensors."""
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if t is not None and (t.shape != z.shape[1:2] or t.device != z.device):
            raise RuntimeError(
                f'A batch norm of {len(t)} channels on {t.device} was given {z.shape[1]} channels on {z.device}.')


def statistics_of(z: torch.Tensor, norm: Optional[nn.BatchNorm2d]) -> Optional[NormState]:
    """All effects of a batch norm's forward but its output.

    Raises:
        RuntimeError: A norm for another number of channels, or on another device.
    """
    if norm is None:
        return None
    _check_norm(z, norm)
    if not norm.training:
        statistics: Tuple[Any, Any] = norm.running_mean, norm.running_var
    else:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # the block passes no norm without it
        mean, var = torch.batch_norm_update_stats(
            z, norm.running_mean, norm.running_var, norm.momentum)  # type: ignore[arg-type]  # nor without momentum
        statistics = mean, (var + norm.eps).rsqrt()
    return NormState(norm.weight, norm.bias, *statistics, norm.training, norm.eps)


@torch.no_grad()
def traced_statistics(z: torch.Tensor, norm: Optional[nn.BatchNorm2d]) -> Optional[NormState]:
    """:func:`statistics_of` in operations that a compiler fuses with what wrote ``z``.

    Raises:
        RuntimeError: See :func:`statistics_of`.
    """
    if norm is None or not norm.training:
        return statistics_of(z, norm)
    _check_norm(z, norm)
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # the block passes no norm without it
    var, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
    count = z.numel() / z.shape[1]
    for running, found in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        running.lerp_(found.to(running.dtype), norm.momentum)  # type: ignore[union-attr, arg-type]  # nor without these
    mean, rstd = (t.to(norm.weight.dtype) for t in (mean, (var + norm.eps).rsqrt()))  # as PyTorch's norm keeps them
    return NormState(norm.weight, norm.bias, mean, rstd, True, norm.eps)


def normalize(z: torch.Tensor, norm: Optional[nn.BatchNorm2d]) -> Tuple[torch.Tensor, Optional[NormState]]:
    """A batch norm with all effects of its module's forward, and what it did; without a norm, ``z`` and None.

    Raises:
        RuntimeError: See :func:`statistics_of`.
    """
    if norm is None:
        return z, None
    _check_norm(z, norm)
    if norm.training:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # the block passes no norm without it
    f, mean, rstd = torch.native_batch_norm(
        z, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training,
        norm.momentum, norm.eps)  # type: ignore[arg-type]  # nor without momentum
    statistics: Tuple[Any, Any] = (mean, rstd) if norm.training else (norm.running_mean, norm.running_var)
    return f, NormState(norm.weight, norm.bias, *statistics, norm.training, norm.eps)
