"""From a picture of any size to what the network sees. torchvision.transforms.v2 does the pixel work."""
import math
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from .crops import SCALES, multiscale_boxes, patch_boxes, patches

__all__ = [
    'AUGMENTATIONS', 'CROPS', 'CROP_PCT', 'USUAL_ASPECT_RATIO', 'eval_transform', 'grey_world', 'lesion_crop',
    'restore_aspect', 'train_transform',
]

AUGMENTATIONS = ('modern', 'paper', 'plain')
CROPS = ('multiscale', 'paper', 'center')
CROP_PCT = 0.875  # a centre crop's share of the shorter side, as timm's
USUAL_ASPECT_RATIO = 1.5  # of ISIC 2017 images whose own is not known
PAPER_TEST_PATCHES = 9


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


def grey_world(image: Image.Image) -> Image.Image:
    """Colour constancy: scale each channel so that all three have the same mean (Buchsbaum's grey world).

    Args:
        image: RGB picture. A channel that is 0 throughout stays so.
    """
    pixels = np.asarray(image, dtype=np.float32)
    means = pixels.mean(axis=(0, 1))
    scaled = pixels * np.divide(means.mean(), means, out=np.ones(3, np.float32), where=means > 0)
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def lesion_crop(image: Image.Image, mask: Optional[Image.Image], margin: float = 0.25) -> Image.Image:
    """Cut a square around the lesion, its bounding box and a margin of that share of the box's longer side all round.

    Args:
        image: RGB picture, or a mask.
        mask: Lesion mask of the same field of view, any size, lesion above 127; the picture is left whole where it is
            None or empty.
        margin: Share of the longer side of the bounding box.

    Returns:
        The part of that square that lies within the picture.
    """
    box = None if mask is None else mask.convert('L').point([0] * 128 + [255] * 128).getbbox()
    if box is None or mask is None:
        return image
    left, right = (x * image.width / mask.width for x in (box[0], box[2]))
    top, bottom = (y * image.height / mask.height for y in (box[1], box[3]))
    half = max(right - left, bottom - top) * (0.5 + margin)
    x, y = (left + right) / 2, (top + bottom) / 2
    return image.crop((
        max(round(x - half), 0), max(round(y - half), 0),
        min(round(x + half), image.width), min(round(y + half), image.height)))


class RandomPatch:
    """A patch of the paper's: one of four scales, from the central part, zoomed by 90 to 110 % in width and height."""

    def __init__(self, img_size: int, zoom: Tuple[float, float] = (0.9, 1.1)) -> None:
        self.img_size = img_size
        self.zoom = zoom

    def __call__(self, image: Image.Image) -> Image.Image:
        rng = _generator()
        (left, top, right, bottom), = patch_boxes(image.size, 1, rng, scales=[rng.choice(SCALES)])
        x, y = (left + right) / 2, (top + bottom) / 2
        half_width, half_height = ((right - left) / 2 / rng.uniform(*self.zoom) for _ in range(2))
        box = (max(x - half_width, 0), max(y - half_height, 0),
               min(x + half_width, image.width), min(y + half_height, image.height))
        return next(patches(image, [box], self.img_size))


def train_transform(
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str = 'modern',
) -> v2.Transform:
    """RGB picture to a randomly changed tensor (3, img_size, img_size).

    Args:
        img_size: Side in pixels.
        mean, std: Of the normalisation.
        augmentation: 'paper': multi-scale patches, rotation by 10 degrees, zoom by 90 to 110 % in width and height,
            both flips. 'modern': the whole field of view, any rotation, scale 0.8 to 1.5, shear, shift, both flips,
            colour. 'plain': a random crop of 40 to 100 % of the area, flips, mild colour jitter.
    """
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    bilinear = InterpolationMode.BILINEAR
    margin = math.ceil(img_size / 2)  # mirrored, so that no corner turns black
    if augmentation == 'paper':
        steps = [
            RandomPatch(img_size), v2.Pad(margin, padding_mode='reflect'), v2.RandomRotation(10, bilinear),
            v2.CenterCrop(img_size), *flips]
    elif augmentation == 'modern':
        steps = [
            v2.Resize(math.floor(img_size / CROP_PCT), bilinear), v2.Pad(margin, padding_mode='reflect'),
            v2.RandomAffine(180, (0.05, 0.05), (0.8, 1.5), 10, bilinear), v2.CenterCrop(img_size), *flips,
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.03)]
    elif augmentation == 'plain':
        steps = [
            v2.RandomResizedCrop(img_size, scale=(0.4, 1.0), interpolation=bilinear), *flips,
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)]
    else:
        raise ValueError(f'Unknown augmentation {augmentation!r}: choose {", ".join(AUGMENTATIONS)}.')
    return v2.Compose([*steps, *_to_normalised_tensor(mean, std)])


def eval_transform(
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crops: str = 'center',
) -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture to the crops whose probabilities are averaged, shape (K, 3, img_size, img_size).

    Args:
        img_size: Side in pixels.
        mean, std: Of the normalisation.
        crops: 'center': one crop, shorter side to img_size / 0.875, as timm. 'multiscale': the five squares of
            :func:`~timm_arl.isic.crops.multiscale_boxes`. 'paper': nine random patches at the paper's four scales,
            which the state of torch's random generator decides.
    """
    normalise = v2.Compose(_to_normalised_tensor(mean, std))
    if crops == 'center':
        center = v2.Compose([
            v2.Resize(math.floor(img_size / CROP_PCT), interpolation=InterpolationMode.BILINEAR),
            v2.CenterCrop(img_size), normalise])
        return lambda image: center(image).unsqueeze(0)
    if crops == 'multiscale':
        boxes_of = multiscale_boxes
    elif crops == 'paper':
        def boxes_of(size: Tuple[int, int]) -> List:
            return patch_boxes(size, PAPER_TEST_PATCHES, _generator())
    else:
        raise ValueError(f'Unknown crops {crops!r}: choose {", ".join(CROPS)}.')
    return lambda image: torch.stack([normalise(p) for p in patches(image, boxes_of(image.size), img_size)])


def _generator() -> np.random.Generator:
    """NumPy's generator, seeded from torch's state: one seed decides all."""
    return np.random.default_rng(int(torch.randint(2 ** 62, ())))


def _to_normalised_tensor(mean: Sequence[float], std: Sequence[float]) -> Sequence[v2.Transform]:
    return v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)
