"""From an image file to an upright RGB picture of 8 bits."""
import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple, Union

import numpy as np
from PIL import Image, ImageOps

__all__ = ['decode', 'decode_mask', 'open_reduced', 'read_image', 'unreadable_images']


def decode(image: Optional[Dict]) -> Image.Image:
    """Decode an undecoded image cell to an RGB picture, turned as its EXIF orientation says.

    16-bit grey is scaled to 8 bits, CMYK and palettes are converted, an alpha channel is dropped.

    Raises:
        OSError: No bytes, a format unknown to Pillow, a truncated file, one of unreasonably many pixels, or of
            floating-point ones, whose white is not known.
    """
    if image is None or (image['bytes'] is None and image['path'] is None):
        raise OSError('no bytes')
    source = image['path'] if image['bytes'] is None else io.BytesIO(image['bytes'])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # 100 megapixels are a photograph here
            with Image.open(source) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode == 'F':
                    raise OSError('floating-point pixels')
                if picture.mode.startswith('I'):  # 16 bits of grey, which convert would cut off at 255
                    values = np.asarray(picture, np.float32)
                    picture = Image.fromarray((values / 257 if values.max() > 255 else values).round().astype(np.uint8))
                return picture.convert('RGB')
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises beside OSError
        raise OSError(str(error)) from error


def read_image(path: Union[str, Path]) -> Image.Image:
    """A picture of any format as the networks here have been shown it: RGB, upright.

    Args:
        path: Image file.

    Raises:
        OSError: As decode.
    """
    return decode({'bytes': None, 'path': str(path)})


def decode_mask(mask: Dict, size: Tuple[int, int]) -> Image.Image:
    """Decode an undecoded mask cell to a grey picture.

    Args:
        mask: Cell.
        size: Width and height of the image it belongs to, decoded.

    Raises:
        OSError: As decode, or a mask that lies across its image, one of them turned and the other not.
    """
    picture = decode(mask).convert('L')
    if (picture.width - picture.height) * (size[0] - size[1]) < 0:
        raise OSError(f'its mask has {picture.width} x {picture.height} px, the image {size[0]} x {size[1]}')
    return picture


def unreadable_images(split: Any, progress: Callable = iter, masks: bool = False) -> List[int]:
    """Row numbers of the images that do not decode.

    Args:
        split: A split of load_splits.
        progress: Wraps the iteration, for a progress bar.
        masks: Whether those whose mask does not decode are named too.
    """
    columns = ['image', *['mask'] * (masks and 'mask' in split.column_names)]
    cells, bad = split.select_columns(columns), []
    for row in progress(range(len(cells))):
        try:
            cell = cells[row]
            size = decode(cell['image']).size
            if cell.get('mask') is not None:
                decode_mask(cell['mask'], size)
        except OSError:
            bad.append(row)
    return bad


def open_reduced(source: Union[str, BinaryIO], shorter_side: int) -> Image.Image:
    """Decode a picture at the smallest size a JPEG gives cheaply, with at least the shorter side that is asked for.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size straight from its coefficients; other formats at full size.

    Args:
        source: File name or binary file.
        shorter_side: Pixels that the shorter side should keep, where it has them.

    Returns:
        RGB picture, of the whole field of view.

    Raises:
        OSError: Not a picture, or a truncated one.
    """
    with Image.open(source) as picture:
        # Pillow takes the largest reduction that leaves both sides at least this long
        scale = shorter_side / min(picture.size)
        picture.draft('RGB', (round(picture.width * scale), round(picture.height * scale)))
        return picture.convert('RGB')
