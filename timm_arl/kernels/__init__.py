"""The passes over memory that the fused gate is made of."""
from .torch_ops import (
    NormState,
    gate,
    gate_backward,
    layout,
    normalize,
    normalize_backward,
    release_scratch,
)

__all__ = ['NormState', 'gate', 'gate_backward', 'layout', 'normalize', 'normalize_backward', 'release_scratch']
