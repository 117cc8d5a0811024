"""What a network's outputs mean: two sigmoids, one a label, or a softmax over the three diagnoses."""
from typing import Any

import torch

from . import LABELS

__all__ = ['DIAGNOSES', 'HEADS', 'has_isic_outputs', 'probabilities_of']

DIAGNOSES = ('nevus', *LABELS)
HEADS = {'sigmoid': LABELS, 'softmax': DIAGNOSES}  # names of the outputs, by head


def has_isic_outputs(model: Any) -> bool:
    """Whether a timm model gives logits of LABELS or of DIAGNOSES, by their number and the names in its config."""
    names = tuple((getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or LABELS)
    return names in HEADS.values() and model.num_classes == len(names)


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of LABELS, shape (B, 2) in float32, from logits (B, 2) or, of DIAGNOSES, (B, 3)."""
    if logits.shape[1] == len(DIAGNOSES):
        return logits.float().softmax(1)[:, 1:]
    return logits.float().sigmoid()
