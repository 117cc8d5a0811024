"""What is predicted: labels, outputs, head, and how outputs become probabilities.

The only place that knows how many labels and outputs there are.
"""
from typing import Any, Sequence, Union

import numpy as np
import torch

__all__ = [
    'DIAGNOSES', 'HEADS', 'LABELS', 'OFFICIAL_THRESHOLD', 'apply_temperature', 'balancing_weights', 'diagnoses_of',
    'has_isic_outputs', 'head_labels', 'is_softmax', 'label_words', 'probabilities_of',
]

LABELS = ('melanoma', 'seborrheic_keratosis')
DIAGNOSES = ('nevus', *LABELS)  # of a lesion with none of the labels, and with one of them
HEADS = {'sigmoid': LABELS, 'softmax': DIAGNOSES}  # names of the outputs, by head
OFFICIAL_THRESHOLD = 0.5  # the challenge's scorer calls an image positive strictly above it


def label_words(label: str) -> str:
    """A label as a reader knows it: 'seborrheic keratosis'."""
    return label.replace('_', ' ')


def head_labels(outputs: int) -> Sequence[str]:
    """Names of the outputs of a network that has so many."""
    return next(names for names in HEADS.values() if len(names) == outputs)


def is_softmax(outputs: int) -> bool:
    """Whether so many outputs are a softmax over DIAGNOSES, and not a sigmoid for each of LABELS."""
    return outputs == len(DIAGNOSES)


def diagnoses_of(labels: Any) -> Any:
    """Numbers in DIAGNOSES, shape (N,), from labels of shape (N, len(LABELS)); NumPy or PyTorch, as given."""
    if isinstance(labels, torch.Tensor):
        return (labels @ torch.arange(1, len(DIAGNOSES), device=labels.device, dtype=labels.dtype)).long()
    return (np.asarray(labels) @ np.arange(1, len(DIAGNOSES))).astype(int)


def balancing_weights(labels: Union[np.ndarray, torch.Tensor]) -> np.ndarray:
    """A weight for each of DIAGNOSES by which all that occur count the same, with a mean of 1 over the images.

    Args:
        labels: Shape (N, len(LABELS)).
    """
    counts = np.bincount(diagnoses_of(np.asarray(labels)), minlength=len(DIAGNOSES))
    return counts.sum() / np.maximum(counts, 1) / (counts > 0).sum()


def has_isic_outputs(model: Any) -> bool:
    """Whether a timm model gives logits of LABELS or of DIAGNOSES, by their number and the names in its config."""
    names = tuple((getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or LABELS)
    return names in HEADS.values() and model.num_classes == len(names)


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of LABELS, shape (B, 2) in float32, from logits of LABELS (B, 2), or of DIAGNOSES (B, 3)."""
    if is_softmax(logits.shape[1]):
        return logits.float().softmax(1)[:, 1:]
    return logits.float().sigmoid()


def apply_temperature(probabilities: Any, temperature: Any) -> np.ndarray:
    """sigmoid(logit(p) / T) in float64. It keeps the order, and 0.5."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-12, 1 - 1e-12)
    yes, no = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return yes / (yes + no)
