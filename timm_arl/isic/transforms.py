"""From a picture of any size to what the network sees. torchvision.transforms.v2 does the pixel work."""
import math
from typing import Optional, Sequence

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

__all__ = ['USUAL_ASPECT_RATIO', 'eval_transform', 'restore_aspect', 'train_transform']

USUAL_ASPECT_RATIO = 1.5  # of ISIC 2017 images whose own is not known


def restore_aspect(image: Image.Image, aspect_ratio: Optional[float]) -> Image.Image:
    """Stretch a square copy back to the original width/height; other pictures pass as they are.

    Args:
        image: Picture, square if it was squashed.
        aspect_ratio: Original width / height; None or NaN for unknown, taken as 1.5.
    """
    if image.width != image.height:
        return image
    if aspect_ratio is None or math.isnan(aspect_ratio):
        aspect_ratio = USUAL_ASPECT_RATIO
    width = round(image.height * aspect_ratio)
    return image.resize((width, image.height), Image.Resampling.BILINEAR)


def train_transform(img_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Random crop of 40 to 100 % of the area, flips, mild colour jitter; RGB picture to (3, img_size, img_size)."""
    return v2.Compose([
        v2.RandomResizedCrop(img_size, scale=(0.4, 1.0), interpolation=InterpolationMode.BILINEAR),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        *_to_normalised_tensor(mean, std),
    ])


def eval_transform(
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_pct: float = 0.875,
) -> v2.Transform:
    """Shorter side to img_size / crop_pct, centre crop, as timm; RGB picture to (3, img_size, img_size)."""
    return v2.Compose([
        v2.Resize(math.floor(img_size / crop_pct), interpolation=InterpolationMode.BILINEAR),
        v2.CenterCrop(img_size),
        *_to_normalised_tensor(mean, std),
    ])


def _to_normalised_tensor(mean: Sequence[float], std: Sequence[float]) -> Sequence[v2.Transform]:
    return v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)
