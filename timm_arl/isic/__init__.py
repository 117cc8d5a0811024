"""The ISIC 2017 Part 3 task: two binary labels of a dermoscopic image. Knows dermoscopy, knows nothing of ARL."""

LABELS = ('melanoma', 'seborrheic_keratosis')

__all__ = ['LABELS']
