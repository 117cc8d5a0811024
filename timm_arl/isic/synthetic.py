"""Pictures of synthetic lesions. Not dermoscopy: what a network says of them means nothing.

What a lesion looks like depends on its diagnosis, with overlap: a nevus is round, soft-edged and of one brown; a
melanoma is asymmetric, ragged and of several colours; a seborrheic keratosis is sharp-edged, waxy and dotted; the other
classes of ISIC 2018 differ in colour and edge. Skin, hair, ruler marks and vignette do not depend on it.
"""
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

__all__ = ['draw_lesion']

BROWNS = np.array([(121, 78, 52), (104, 66, 45), (138, 92, 64)], dtype=np.float32)
WAXY = np.array([(142, 116, 88), (126, 106, 86), (110, 88, 70)], dtype=np.float32)
PEARLY = np.array([(196, 140, 132), (186, 128, 124), (204, 152, 140)], dtype=np.float32)
RED_SCALY = np.array([(190, 120, 96), (202, 136, 108), (180, 108, 90)], dtype=np.float32)
PALE = np.array([(206, 158, 132), (196, 148, 126), (188, 146, 118)], dtype=np.float32)
PURPLE = np.array([(140, 44, 60), (110, 36, 66), (164, 50, 54)], dtype=np.float32)
# per diagnosis: mean raggedness of the border, asymmetry, number of extra colours, edge width (share of the radius),
# colours, and whether it has bright dots
LOOKS = {
    'nevus': (0.04, 0.08, 0.2, 0.16, BROWNS, False),
    'melanoma': (0.10, 0.28, 2.2, 0.10, BROWNS, False),
    'seborrheic_keratosis': (0.06, 0.12, 0.3, 0.04, WAXY, True),
    'BCC': (0.07, 0.16, 0.6, 0.12, PEARLY, False),
    'AKIEC': (0.14, 0.20, 0.3, 0.30, RED_SCALY, True),
    'DF': (0.03, 0.06, 0.1, 0.40, PALE, False),
    'VASC': (0.05, 0.10, 0.1, 0.05, PURPLE, False),
}
LOOKS.update(MEL=LOOKS['melanoma'], NV=LOOKS['nevus'], BKL=LOOKS['seborrheic_keratosis'])
EXTRAS = np.array([(42, 30, 28), (86, 92, 112), (150, 66, 60), (66, 40, 30), (176, 160, 150)], dtype=np.float32)


def draw_lesion(diagnosis: str, rng: np.random.Generator, size: int = 160) -> PILImage.Image:
    """Draw one synthetic lesion.

    Args:
        diagnosis: One of DIAGNOSES, or of the labels of ISIC 2018.
        rng: Source of all randomness.
        size: Side of the square image in pixels.

    Returns:
        RGB image of size x size pixels.
    """
    ragged, asymmetry, colours, edge, palette, dotted = LOOKS[diagnosis]
    ragged, asymmetry = ragged * rng.lognormal(0, 0.35), asymmetry * rng.lognormal(0, 0.35)

    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    skin = np.array((222, 178, 152), dtype=np.float32) + rng.normal(0, 6, 3) + rng.normal(0, 14)
    picture = skin + (x * rng.normal(0, 30) + y * rng.normal(0, 30))[..., None]

    # border: a circle, squeezed by the asymmetry, with harmonics that grow with raggedness
    cx, cy = rng.normal(0, 0.05, 2)
    turn = rng.uniform(0, 2 * np.pi)
    u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    v = v * (1 + asymmetry * (1 + np.sign(u) * 0.8))
    angle, distance = np.arctan2(v, u), np.hypot(u, v)
    radius = np.full_like(distance, rng.uniform(0.20, 0.31))
    for k in range(2, 9):
        radius *= 1 + ragged * rng.normal() / np.sqrt(k - 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    inside = 1 / (1 + np.exp(np.clip((distance - radius) / (radius * edge * 0.4), -30, 30)))[..., None]

    lesion = palette[rng.integers(len(palette))] + rng.normal(0, 5, 3) + _texture(rng, size, 12) * 14
    for _ in range(rng.poisson(colours)):
        blot = np.clip(_texture(rng, size, 5) - 0.5, 0, 1)
        lesion = lesion * (1 - blot) + EXTRAS[rng.integers(len(EXTRAS))] * blot
    picture = picture * (1 - inside) + lesion * inside
    if dotted:
        for _ in range(rng.poisson(9)):
            r, a, width = rng.uniform(0, 0.2), rng.uniform(0, 2 * np.pi), rng.uniform(0.006, 0.014)
            dot = np.exp(-((x - cx - r * np.cos(a)) ** 2 + (y - cy - r * np.sin(a)) ** 2) / width ** 2)[..., None]
            picture = picture * (1 - 0.6 * dot * inside) + np.float32(225) * 0.6 * dot * inside

    picture = picture + rng.normal(0, 4, picture.shape)
    if rng.random() < 0.3:
        picture = picture * (1 - np.clip((np.hypot(x, y) - rng.uniform(0.46, 0.56)) * 9, 0, 0.95))[..., None]
    image = PILImage.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    _draw_hair_and_ruler(image, rng)
    return image.filter(ImageFilter.GaussianBlur(0.5))


def _texture(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise of zero mean and unit variance, (size, size, 1), about `cells` bumps a side."""
    coarse = PILImage.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    noise = np.asarray(coarse.resize((size, size), PILImage.Resampling.BICUBIC))
    return ((noise - noise.mean()) / noise.std())[..., None]


def _draw_hair_and_ruler(image: PILImage.Image, rng: np.random.Generator) -> None:
    draw, size = ImageDraw.Draw(image), image.width
    if rng.random() < 0.4:
        for _ in range(rng.integers(2, 9)):
            (x0, y0), (x1, y1) = rng.uniform(-0.1, 1.1, (2, 2)) * size
            bend_x, bend_y = rng.normal(0, 0.12, 2) * size
            t = np.linspace(0, 1, 20)
            xs = x0 + (x1 - x0) * t + bend_x * np.sin(np.pi * t)
            ys = y0 + (y1 - y0) * t + bend_y * np.sin(np.pi * t)
            draw.line(list(zip(xs.tolist(), ys.tolist())), fill=(48, 34, 28), width=1)
    if rng.random() < 0.25:
        step = size * rng.uniform(0.03, 0.05)
        for tick in range(int(size / step)):
            length = size * (0.06 if tick % 5 == 0 else 0.03)
            draw.line([(tick * step, size - 1), (tick * step, size - 1 - length)], fill=(40, 40, 40), width=1)
