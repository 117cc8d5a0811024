"""The ISIC 2017 Part 3 task: which diagnosis a dermoscopic image shows. Knows dermoscopy, knows nothing of ARL."""
from .task import LABELS, probabilities_of

__all__ = ['LABELS', 'probabilities_of']
