"""From maps to pictures: crops laid on the whole picture, colours with a legend, panels. Needs NumPy and Pillow."""
from typing import Any, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['colours', 'on_picture', 'overlay', 'panel']

# cividis (Nunez, Anderton and Renslow, 2018) at nine equal steps: lighter all the way, the same to the colour-blind
ANCHORS = np.array([
    (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120),
    (155, 148, 118), (188, 174, 108), (222, 201, 88), (254, 232, 56)], np.float32)
OPACITY = 0.6  # of the colours over the grey picture
SMALLEST_WIDTH = 360  # in pixels, for words that can be read
PAPER, INK = (255, 255, 255), (32, 32, 32)


def colours(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1 (others are clipped), in which more is lighter.

    Args:
        values: Any shape.

    Returns:
        float32 of that shape and a last dimension of 3, red, green and blue from 0 to 255.
    """
    steps = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(values, steps, channel) for channel in ANCHORS.T], -1).astype(np.float32)


def on_picture(maps: Any, boxes: Sequence[Sequence[float]], size: Tuple[int, int]) -> np.ndarray:
    """Lay the maps of a picture's crops on the picture, bilinear, averaged where crops overlap.

    Args:
        maps: Shape (N, h, w), tensor or array, any resolution.
        boxes: (left, top, right, bottom) of the N crops, in pixels of the picture, as
            :meth:`timm_arl.isic.transforms.EvalCrops.with_boxes` gives them.
        size: Width and height of the picture.

    Returns:
        (height, width), float32; NaN where no crop looked.

    Raises:
        ValueError: Another number of boxes than of maps, or a box outside the picture or without an area.
    """
    maps = np.asarray(maps.detach().float().cpu() if hasattr(maps, 'detach') else maps, np.float32)
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(f'{len(boxes)} boxes need maps of shape ({len(boxes)}, h, w), not {maps.shape}.')
    width, height = size
    total, crops = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint16)
    for heat, box in zip(maps, boxes):
        left, top, right, bottom = box
        if not (-1 < left < right < width + 1 and -1 < top < bottom < height + 1):
            raise ValueError(f'Box {tuple(box)} does not lie in a picture of {width} x {height} px.')
        rows, down = _resampling(top, bottom, heat.shape[0], height)
        columns, across = _resampling(left, right, heat.shape[1], width)
        total[rows, columns] += down @ heat @ across.T
        crops[rows, columns] += 1
    with np.errstate(invalid='ignore'):  # 0 / 0 where no crop looked
        return np.divide(total, crops, out=total)


def _resampling(low: float, high: float, count: int, side: int) -> Tuple[slice, np.ndarray]:
    """Pixels whose centres lie between low and high, and the weights (pixels, count) that interpolate `count` cells."""
    pixels = slice(max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), side))
    cells = (high - low) / count  # pixels in one
    places = ((np.arange(pixels.start, pixels.stop) + 0.5 - low) / cells - 0.5).clip(0, count - 1)
    reach = max(1 / cells, 1.)  # a map finer than the picture is averaged
    weights = (1 - np.abs(places[:, None] - np.arange(count)) / reach).clip(0)
    return pixels, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def overlay(
        picture: Image.Image,
        heat: np.ndarray,
        legend: str,
        limits: Optional[Tuple[float, float]] = None,
) -> Image.Image:
    """A picture in grey under the colours of a map, with a colour bar, its numbers and a legend below.

    Args:
        picture: RGB; where the map is NaN it is shown as it is.
        heat: Shape (height, width) of the picture.
        legend: What the numbers are, in words.
        limits: Values of the darkest and the lightest colour; None: the smallest and the largest of the map. State them
            where maps are compared, and for a map that may be flat: rounding errors would be stretched to all colours.

    Returns:
        RGB, as wide as the picture, or 360 px where the picture is narrower and is enlarged.

    Raises:
        ValueError: A map of another size, one that is NaN throughout, or limits that are not two rising numbers.
    """
    heat = np.asarray(heat, np.float32)
    if heat.shape != picture.size[::-1]:
        raise ValueError(f'A picture of {picture.width} x {picture.height} px needs a map of shape '
                         f'{picture.size[::-1]}, not {heat.shape}.')
    seen = ~np.isnan(heat)
    if not seen.any():
        raise ValueError('The map is NaN throughout: no crop looked at the picture.')
    low, high = limits or (float(heat[seen].min()), float(heat[seen].max()))
    if not (low < high or limits is None):
        raise ValueError(f'Limits must be two rising numbers, not {limits}.')
    levels = np.nan_to_num((heat - low) / (high - low) if high > low else 0 * heat).clip(0, 1) * 255
    shade = Image.fromarray(levels.round().astype(np.uint8))
    shade.putpalette(colours(np.linspace(0, 1, 256)).round().astype(np.uint8).tobytes())
    mixed = Image.blend(picture.convert('L').convert('RGB'), shade.convert('RGB'), OPACITY)
    image = Image.composite(mixed, picture.convert('RGB'), Image.fromarray(seen.astype(np.uint8) * 255))
    if image.width < SMALLEST_WIDTH:
        image = image.resize(
            (SMALLEST_WIDTH, round(image.height * SMALLEST_WIDTH / image.width)), Image.Resampling.BICUBIC)
    return _stack(image, _legend(image.width, low, high, legend))


def panel(pictures: Sequence[Tuple[Image.Image, str]], columns: int, width: Optional[int] = None) -> Image.Image:
    """Pictures side by side in rows, each under its caption.

    All are scaled to one width and aligned at the top, so that a picture and its overlays, whose legends differ in
    height, lie side by side at the same scale.

    Args:
        pictures: Each with its caption, which may be ''.
        columns: Pictures in a row.
        width: Of each in pixels; None: that of the widest.

    Raises:
        ValueError: No picture, or less than one column.
    """
    if not pictures or columns < 1:
        raise ValueError(f'A panel needs at least one picture and one column, not {len(pictures)} and {columns}.')
    width = width or max(picture.width for picture, _ in pictures)
    gap = max(width // 40, 4)
    rows = []
    for first in range(0, len(pictures), columns):
        row = pictures[first:first + columns]
        captions = [_text(caption, width) for _, caption in row]
        shown = [picture if picture.width == width else picture.resize(
            (width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS) for picture, _ in row]
        above, below = max(c.height for c in captions), max(s.height for s in shown)
        sheet = Image.new('RGB', (min(columns, len(pictures)) * (width + gap) + gap, above + below + gap), PAPER)
        for number, (caption, picture) in enumerate(zip(captions, shown)):
            left = gap + number * (width + gap)
            sheet.paste(caption, (left, above - caption.height))
            sheet.paste(picture, (left, above))
        rows.append(sheet)
    return _stack(*rows)


def _legend(width: int, low: float, high: float, words: str) -> Image.Image:
    """A strip of a colour bar, its numbers and words."""
    font, margin = _font(width), width // 40
    line, bar = round(font.size * 1.35), width - 2 * margin
    strip = Image.new('RGB', (width, margin + round(line * 2.2)), PAPER)
    row = colours(np.linspace(0, 1 if high > low else 0, bar)).round().astype(np.uint8)
    strip.paste(Image.fromarray(np.repeat(row[None], line, 0)), (margin, margin))
    draw, y = ImageDraw.Draw(strip), margin + round(line * 1.15)
    first, last, middle = _numbers(low, high)
    draw.text((margin, y), first, INK, font)
    if high > low:
        draw.text((margin + bar, y), last, INK, font, anchor='ra')
        x = margin + bar * ((middle - low) / (high - low))
        text = f'{middle:g}'
        half = font.getlength(text) / 2 + line / 2
        if margin + font.getlength(first) < x - half and x + half < margin + bar - font.getlength(last):
            draw.text((x, y), text, INK, font, anchor='ma')
            draw.line((x, margin, x, y), INK)
    return _stack(strip, _text(words, width))


def _numbers(low: float, high: float) -> Tuple[str, str, float]:
    """The limits in as many digits as tell them apart, and the number to mark between them: 0 where it lies there."""
    for digits in range(3, 9):
        first, last = (f'{value:.{digits}g}' for value in (low, high))
        if first != last:
            break
    return first, last, 0. if low < 0 < high else float(f'{(low + high) / 2:.{digits}g}')


def _font(width: int) -> Any:
    return ImageFont.load_default(min(max(width / 30, 13), 40))


def _text(words: str, width: int) -> Image.Image:
    """Words on a strip of this width, in as many lines as they need."""
    font, margin = _font(width), width // 40
    line, lines = round(font.size * 1.35), ['']
    for word in words.split():
        longer = f'{lines[-1]} {word}'.strip()
        if lines[-1] and font.getlength(longer) > width - 2 * margin:
            lines.append(word)
        else:
            lines[-1] = longer
    strip = Image.new('RGB', (width, line * len(lines) + margin if words else margin), PAPER)
    for number, text in enumerate(lines):
        ImageDraw.Draw(strip).text((margin, margin // 2 + number * line), text, INK, font)
    return strip


def _stack(*pictures: Image.Image) -> Image.Image:
    """Pictures of one width, one below the other."""
    sheet = Image.new('RGB', (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
