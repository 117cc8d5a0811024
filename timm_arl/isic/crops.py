"""Patches of several scales from one picture, as the paper cuts them, and how large the picture must be for them."""
import math
from typing import Iterator, List, Sequence, Tuple

import numpy as np
from PIL import Image

__all__ = ['MULTISCALE', 'SCALES', 'multiscale_boxes', 'patch_boxes', 'patches', 'shorter_side_for']

SCALES = (1 / 5, 2 / 5, 3 / 5, 4 / 5)  # side of a patch of the paper, as a share of the picture's shorter side
MULTISCALE = (1., 4 / 5, 3 / 5)  # the same of the centred squares of multiscale_boxes

Box = Tuple[float, float, float, float]


def shorter_side_for(img_size: float, share: float = min(SCALES)) -> int:
    """Shorter side in pixels that a picture needs so that no patch has to be enlarged to ``img_size``.

    Args:
        img_size: Side of the network's input in pixels.
        share: Side of the smallest patch, as a share of the picture's shorter side.
    """
    return math.ceil(round(img_size / share, 6))


def patch_boxes(
        size: Tuple[int, int],
        count: int,
        rng: np.random.Generator,
        scales: Sequence[float] = SCALES,
) -> List[Box]:
    """Squares at the paper's four scales in turn, with centres in the central half of the picture.

    Args:
        size: Width and height of the picture.
        count: Number of patches; the paper takes 60 of a training image, 9 of a test image.
        rng: Source of the positions.
        scales: Sides as shares of the shorter side.

    Returns:
        (left, top, right, bottom) in pixels, inside the picture.
    """
    width, height = size
    boxes = []
    for i in range(count):
        side = scales[i % len(scales)] * min(width, height)
        left, top = (
            min(max(rng.uniform(0.25, 0.75) * extent - side / 2, 0), extent - side) for extent in (width, height))
        boxes.append((left, top, left + side, top + side))
    return boxes


def multiscale_boxes(size: Tuple[int, int]) -> List[Box]:
    """Five squares that cover a picture: centred ones of 1, 4/5 and 3/5 of its shorter side, and one at each end.

    Args:
        size: Width and height of the picture.

    Returns:
        (left, top, right, bottom) in pixels, inside the picture.
    """
    width, height = size
    shorter = min(size)
    boxes = []
    for share in MULTISCALE:
        half = share * shorter / 2
        boxes.append((width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half))
    return [*boxes, (0., 0., shorter, shorter), (width - shorter, height - shorter, width, height)]


def patches(picture: Image.Image, boxes: List[Box], img_size: int) -> Iterator[Image.Image]:
    """Cut boxes from a picture and resize them to img_size x img_size, bilinear, antialiased."""
    for box in boxes:
        yield picture.resize((img_size, img_size), Image.Resampling.BILINEAR, box=box)
