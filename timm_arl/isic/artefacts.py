"""Hair and gel bubbles drawn on pictures, to measure how far they move a network's map or its probabilities."""
from typing import Callable, Tuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ['draw_bubbles', 'draw_hair']

FINE = 3  # shapes are drawn so many times as large and then reduced, for smooth edges


def draw_hair(picture: Image.Image, seed: int, count: int = 12) -> Tuple[Image.Image, Image.Image]:
    """Draw dark hairs across a picture.

    Args:
        picture: RGB, any size; hairs are 0.3 to 0.7 % of its shorter side wide.
        seed: Decides all, on pictures of one size.
        count: Number of hairs.

    Returns:
        The picture with hairs, and a mask of its size, mode L: 255 where a hair was drawn, else 0.
    """
    rng = np.random.default_rng(seed)
    side = min(picture.size)
    steps = np.linspace(0, 1, 48)[:, None]
    weights = np.hstack([(1 - steps) ** 2, 2 * steps * (1 - steps), steps ** 2])  # of a quadratic Bezier curve

    def paint(draw: ImageDraw.ImageDraw, scale: float) -> None:
        for _ in range(count):
            angle, length = rng.uniform(0, np.pi), side * rng.uniform(0.5, 1.1)
            along = np.array([np.cos(angle), np.sin(angle)]) * length / 2
            middle = rng.uniform(0.1, 0.9, 2) * picture.size
            bend = np.array([-along[1], along[0]]) * rng.uniform(-0.7, 0.7)
            curve = weights @ np.stack([middle - along, middle + bend, middle + along]) * scale
            thick = max(round(side * rng.uniform(0.003, 0.007) * scale), 1)
            draw.line([tuple(point) for point in curve], 255, thick, joint='curve')

    cover = _cover(picture.size, paint)
    brown = rng.uniform(0.4, 1.1) * np.array((52, 36, 26))
    shade = Image.new('RGB', picture.size, tuple(int(v) for v in brown))
    return Image.composite(shade, picture, cover.point([round(0.9 * v) for v in range(256)])), _drawn(cover)


def draw_bubbles(picture: Image.Image, seed: int, count: int = 6) -> Tuple[Image.Image, Image.Image]:
    """Draw bubbles of immersion gel on a picture: discs that brighten it, with a dark rim and a highlight.

    Args:
        picture: RGB, any size; bubbles are 4 to 16 % of its shorter side across.
        seed: Decides all, on pictures of one size.
        count: Number of bubbles.

    Returns:
        The picture with bubbles, and a mask of its size, mode L: 255 inside a bubble, else 0.
    """
    rng = np.random.default_rng(seed)
    side = min(picture.size)
    discs = [(*(rng.uniform(0.05, 0.95, 2) * picture.size), side * rng.uniform(0.02, 0.08)) for _ in range(count)]

    def paint(radius: float, shift: float = 0.) -> Callable[[ImageDraw.ImageDraw, float], None]:
        def painter(draw: ImageDraw.ImageDraw, scale: float) -> None:
            for x, y, r in discs:
                centre, reach = (x - shift * r, y - shift * r), radius * r
                draw.ellipse([(v + sign * reach) * scale for sign in (-1, 1) for v in centre], 255)
        return painter

    whole, inside, highlight = (
        _cover(picture.size, paint(*shape)) for shape in ((1.,), (0.86,), (0.2, 0.45)))
    rim = ImageChops.subtract(whole, inside)
    for colour, cover, opacity in (((255, 250, 245), whole, 0.18), ((60, 45, 40), rim, 0.5),
                                   ((255, 255, 255), highlight.filter(ImageFilter.GaussianBlur(side / 400)), 0.95)):
        shade = Image.new('RGB', picture.size, colour)
        picture = Image.composite(shade, picture, cover.point([round(opacity * v) for v in range(256)]))
    return picture, _drawn(whole)


def _cover(size: Tuple[int, int], paint: Callable[[ImageDraw.ImageDraw, float], None]) -> Image.Image:
    """What is painted in white on a canvas FINE times as large, at the size asked for."""
    canvas = Image.new('L', (size[0] * FINE, size[1] * FINE))
    paint(ImageDraw.Draw(canvas), FINE)
    return canvas.resize(size, Image.Resampling.BOX)


def _drawn(cover: Image.Image) -> Image.Image:
    return cover.point([0] + [255] * 255)
