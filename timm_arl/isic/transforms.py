"""From a picture of any size to what the network sees. torchvision.transforms.v2 does the pixel work."""
import contextlib
import math
import zlib
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from .crops import MULTISCALE, SCALES, Box, multiscale_boxes, patch_boxes, patches, shorter_side_for

__all__ = [
    'AUGMENTATIONS', 'CROPS', 'CROP_PCT', 'USUAL_ASPECT_RATIO', 'EvalCrops', 'Transform', 'eval_transform',
    'grey_world', 'lesion_crop', 'normalisation', 'restore_aspect', 'seeded', 'train_transform',
]

AUGMENTATIONS = ('modern', 'paper', 'plain')
CROPS = ('multiscale', 'paper', 'center')
CROP_PCT = 0.875  # a centre crop's share of the shorter side, as timm's
USUAL_ASPECT_RATIO = 1.5  # of ISIC 2017 images whose own is not known
PAPER_TEST_PATCHES = 9
EVAL_GAP = 2  # test pictures are decoded with twice the pixels needed: the crops are then nearly those of a full decode
ZOOM = (0.9, 1.1)  # of the paper's training patches, in width and height


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

    def __init__(self, img_size: int) -> None:
        self.img_size = img_size

    def __call__(self, image: Image.Image) -> Image.Image:
        rng = _generator()
        (left, top, right, bottom), = patch_boxes(image.size, 1, rng, scales=[rng.choice(SCALES)])
        x, y = (left + right) / 2, (top + bottom) / 2
        half_width, half_height = ((right - left) / 2 / rng.uniform(*ZOOM) for _ in range(2))
        box = (max(x - half_width, 0), max(y - half_height, 0),
               min(x + half_width, image.width), min(y + half_height, image.height))
        return next(patches(image, [box], self.img_size))


class Transform(v2.Compose):
    """Steps one after another, and what they need.

    Attributes:
        shorter_side: Pixels that the shorter side of a picture should have, so that no part of it is enlarged because
            it was decoded small; None: all that there are.
    """

    def __init__(self, steps: Sequence[Callable], shorter_side: Optional[int]) -> None:
        super().__init__(steps)
        self.shorter_side = shorter_side


def train_transform(
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str = 'modern',
) -> Transform:
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
        shorter_side = shorter_side_for(img_size, min(SCALES) / max(ZOOM))
        steps = [
            RandomPatch(img_size), v2.Pad(margin, padding_mode='reflect'), v2.RandomRotation(10, bilinear),
            v2.CenterCrop(img_size), *flips]
    elif augmentation == 'modern':
        shorter_side = math.floor(img_size / CROP_PCT)
        steps = [
            v2.Resize(shorter_side, bilinear), v2.Pad(margin, padding_mode='reflect'),
            v2.RandomAffine(180, (0.05, 0.05), (0.8, 1.5), 10, bilinear), v2.CenterCrop(img_size), *flips,
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.03)]
    elif augmentation == 'plain':
        area, ratios = (0.4, 1.), (3 / 4, 4 / 3)
        shorter_side = shorter_side_for(img_size, math.sqrt(min(area) * min(ratios)))
        steps = [
            v2.RandomResizedCrop(img_size, area, ratios, bilinear), *flips,
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)]
    else:
        raise ValueError(f'Unknown augmentation {augmentation!r}: choose {", ".join(AUGMENTATIONS)}.')
    return Transform([*steps, v2.ToImage(), normalisation(mean, std)], shorter_side)


def normalisation(mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Tensors of 8 bits, shape (..., 3, H, W), to normalised float32."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class EvalCrops:
    """RGB picture to the crops of :func:`eval_transform` before normalisation, uint8 (K, 3, img_size, img_size)."""

    def __init__(self, img_size: int, crops: str) -> None:
        self.img_size, self.crops = img_size, crops
        resized = math.floor(img_size / CROP_PCT)
        self.center = v2.Resize(resized, InterpolationMode.BILINEAR), v2.CenterCrop(img_size)
        needs = {'center': resized, 'multiscale': shorter_side_for(img_size, min(MULTISCALE)),
                 'paper': shorter_side_for(img_size)}
        if crops not in needs:
            raise ValueError(f'Unknown crops {crops!r}: choose {", ".join(CROPS)}.')
        self.shorter_side = needs[crops] * EVAL_GAP

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.with_boxes(image)[0]

    def with_boxes(self, image: Image.Image) -> Tuple[torch.Tensor, List[Box]]:
        """The crops, and where each was cut: (left, top, right, bottom) in pixels of the picture, not rounded."""
        if self.crops == 'center':
            resize, crop = self.center
            resized = resize(image)
            cut, boxes = [crop(resized)], [self._center_box(image.size, resized.size)]
        else:
            boxes = (multiscale_boxes(image.size) if self.crops == 'multiscale'
                     else patch_boxes(image.size, PAPER_TEST_PATCHES, _generator()))
            cut = list(patches(image, boxes, self.img_size))
        return torch.stack([v2.functional.pil_to_tensor(crop) for crop in cut]), boxes

    def _center_box(self, size: Tuple[int, int], resized: Tuple[int, int]) -> Box:
        x, y = (full / small for full, small in zip(size, resized))
        left, top = (round((side - self.img_size) / 2) for side in resized)  # as CenterCrop rounds
        return left * x, top * y, (left + self.img_size) * x, (top + self.img_size) * y


def eval_transform(
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crops: str = 'center',
) -> Transform:
    """RGB picture to the crops whose probabilities are averaged, shape (K, 3, img_size, img_size).

    Args:
        img_size: Side in pixels.
        mean, std: Of the normalisation.
        crops: 'center': one crop, shorter side to img_size / 0.875, as timm. 'multiscale': the five squares of
            :func:`~timm_arl.isic.crops.multiscale_boxes`. 'paper': nine random patches at the paper's four scales,
            which the state of torch's random generator decides.
    """
    cut = EvalCrops(img_size, crops)
    return Transform([cut, normalisation(mean, std)], cut.shorter_side)


@contextlib.contextmanager
def seeded(image_id: str, seed: int = 0, epoch: int = 0, occurrence: int = 0) -> Iterator[None]:
    """What is random about an image depends on these alone; the random generator is then as it was.

    Args:
        image_id: Of the image.
        seed: Of the run.
        epoch: Of the run.
        occurrence: How often the epoch has shown the image before.
    """
    entropy = (seed, epoch, occurrence, zlib.crc32(image_id.encode(errors='surrogateescape')))
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: torch.manual_seed would seed those of all devices
        torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        yield


def _generator() -> np.random.Generator:
    """NumPy's generator, seeded from torch's state: one seed decides all."""
    return np.random.default_rng(int(torch.randint(2 ** 62, ())))
