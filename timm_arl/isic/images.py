"""From an image file to an upright RGB picture of 8 bits."""
import codecs
import io
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

__all__ = [
    'SEVERAL', 'decode', 'decode_mask', 'read_image', 'readings', 'reason_of', 'stored_size', 'to_rgb',
    'unreadable_images',
]

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
ORIENTATION = 274  # tag of EXIF
TURNS = {  # by its values
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC, which Pillow applies to 8 bits alone
OF_FRAMES = ('TIFF', 'GIF', 'PNG', 'WEBP', 'AVIF')  # not MPO, whose others are views of the same
SEVERAL = 'several_frames'  # in Image.info of the first of several
HEIC = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')  # brands


def decode(cell: Optional[Dict], shorter_side: Optional[int] = None) -> Image.Image:
    """Decode an undecoded image cell to an RGB picture, turned as its EXIF orientation says.

    16-bit grey is scaled to 8 bits, CMYK and palettes are converted, an alpha channel is dropped. Of several frames or
    pages it is the first, and `info[SEVERAL]` says so.

    Args:
        cell: ``{'bytes': ..., 'path': ...}``, one of them None.
        shorter_side: Pixels that the shorter side should keep, where it has them. A JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size straight from its coefficients, other formats in full. None: in full.

    Raises:
        OSError: No bytes, a file that may not be read, a format unknown to Pillow, a truncated file, one of too many
            pixels, or of floating-point ones or grey values beyond 16 bits, whose white is not known.
    """
    if cell is None or (cell['bytes'] is None and cell['path'] is None):
        raise OSError('it has no bytes')
    source = cell['path'] if cell['bytes'] is None else io.BytesIO(cell['bytes'])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # 100 megapixels are a photograph here
            with Image.open(source) as file:
                if file.format == 'EPS':  # Pillow would start Ghostscript, which runs what the file says
                    raise OSError('it is EPS, which is not opened')
                if shorter_side:
                    _reduce(file, shorter_side)
                tags = getattr(file, 'tag_v2', {})
                bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # a TIFF may have 12
                picture = to_rgb(_upright(file), bits, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
                picture.info.update({SEVERAL: True} if _has_frames(file) else {})
                return picture
    except UnidentifiedImageError as error:
        raise OSError(_unknown(source)) from error
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        pixels, limit = (int(number) / 1e6 for number in re.findall(r'\d+', str(error))[:2])
        raise OSError(f'it has {pixels:.0f} megapixels, above the limit of {limit:.0f}') from error
    except Exception as error:  # Pillow raises almost anything for a damaged file
        if isinstance(error, OSError) and str(error):
            raise
        raise OSError(str(error) or f'it is damaged ({type(error).__name__})') from error


def _has_frames(file: Image.Image) -> bool:
    try:
        return file.format in OF_FRAMES and getattr(file, 'is_animated', False)
    except Exception:  # what follows the first is damaged
        return False


def _unknown(source: Any) -> str:
    """Why Pillow does not know a file, and what to do with it."""
    with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else open(source, 'rb') as file:
        head = file.read(512)
    if not head:
        return 'it is empty'
    kind = (', but HEIC: convert it to JPEG' if head[4:8] == b'ftyp' and head[8:12] in HEIC else
            ', but a ZIP file: unpack it' if head.startswith(b'PK\3\4') else
            ', but plain text' if _is_text(head) else '')
    return f'it is not an image in a format that Pillow knows{kind}'


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file is text in UTF-8."""
    try:
        text = codecs.getincrementaldecoder('utf-8-sig')().decode(head)  # which may be cut inside a letter
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)


def _upright(file: Image.Image) -> Image.Image:
    file.load()  # what is wrong with the pixels is told
    try:
        turn = TURNS.get(file.getexif().get(ORIENTATION))  # type: ignore[arg-type]
    except Exception:  # a damaged block of metadata; the pixels may be fine
        return file
    # ImageOps.exif_transpose would write the block again, and fail where another entry of it is damaged
    return file if turn is None else file.transpose(turn)


def to_rgb(picture: Image.Image, bits: int = 16, white_is_zero: bool = False) -> Image.Image:
    """An RGB picture of 8 bits, of one of any mode.

    Args:
        picture: With more than 8 bits, grey; where no pixel is above 255, its values are those of 8 bits.
        bits: Of grey values that are above 255: the largest is white.
        white_is_zero: Whether 0 is white, where the mode does not say so.

    Raises:
        OSError: Floating-point pixels or grey values beyond 16 bits, whose white is not known.
    """
    if picture.mode == 'F':
        raise OSError('it has floating-point pixels')
    if picture.mode.startswith('I'):  # grey, which convert would cut off at 255
        values = np.asarray(picture, np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise OSError('it has grey values beyond 16 bits, whose white is not known')
        white = 2 ** (bits if 8 < bits < 16 and values.max() < 2 ** bits else 16) - 1
        white = white if values.max() > 255 or white_is_zero else 255
        values = white - values if white_is_zero else values
        picture = Image.fromarray((values * 255 / white).round().astype(np.uint8))
    return picture.convert('RGB')


def _reduce(picture: Image.Image, shorter_side: int) -> None:
    """Let a JPEG be decoded smaller, but never make it square by rounding: a square is taken for a squashed copy."""
    width, height = picture.size
    for scale in (8, 4, 2):
        square = -(-width // scale) == -(-height // scale)
        if min(width, height) // scale >= shorter_side and square == (width == height):
            picture.draft(None, (width // scale, height // scale))
            return


def read_image(path: Union[str, Path], shorter_side: Optional[int] = None) -> Image.Image:
    """Read a picture of any format as the networks here are shown it: RGB, upright.

    Args:
        path: Image file.
        shorter_side: As for decode.

    Raises:
        OSError: As decode.
    """
    return decode({'bytes': None, 'path': str(path)}, shorter_side)


def decode_mask(mask: Dict, size: Tuple[int, int]) -> Image.Image:
    """Decode an undecoded mask cell to a grey picture.

    Args:
        mask: Cell.
        size: Width and height of the image it belongs to, decoded.

    Raises:
        OSError: As decode, a mask that is turned by 90 degrees against its image, or one without white that is not
            black.
    """
    picture = decode(mask).convert('L')
    largest = int(np.asarray(picture).max())
    if 0 < largest < 128:  # such a lesion would be black
        remedy = 'multiply masks by 255' if largest == 1 else 'store masks in grey, with 255 for the lesion'
        raise OSError(f'the largest value of its mask is {largest}, but a lesion is white, 255: {remedy}')
    if (picture.width - picture.height) * (size[0] - size[1]) < 0:
        raise OSError(f'its mask has {picture.width} x {picture.height} px, the image {size[0]} x {size[1]}')
    return picture


def stored_size(cell: Dict) -> Tuple[int, int]:
    """Width and height in pixels of an undecoded image cell, as stored: not turned.

    Raises:
        OSError: A file that cannot be opened.
    """
    with Image.open(cell['path'] if cell['bytes'] is None else io.BytesIO(cell['bytes'])) as file:
        return file.size


def reason_of(error: OSError) -> str:
    """Why an image cannot be read: 'Permission denied: /data/ISIC_1.jpg'."""
    return f'{error.strerror}: {error.filename}' if error.strerror else str(error)


class _Readings:
    """For a DataLoader: (row, what `read` gives of it, None), or (row, None, reason)."""

    def __init__(self, read: Callable[[int], Any], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tuple[int, Any, Optional[str]]:
        try:
            return self.rows[i], self.read(self.rows[i]), None
        except OSError as error:
            return self.rows[i], None, reason_of(error)


def readings(read: Callable[[int], Any], rows: Sequence[int], workers: int = 0) -> Iterable:
    """Read images in worker processes: (row, what `read` gives, None) of each, or (row, None, why it cannot be read).

    Args:
        read: Takes a row number; raises OSError where its image cannot be read.
        rows: Row numbers.
        workers: Processes; 0: this one.
    """
    return DataLoader(_Readings(read, rows), batch_size=None, num_workers=workers)  # type: ignore[arg-type]


def unreadable_images(
        split: Any,
        progress: Callable = iter,
        masks: bool = False,
        rows: Optional[Sequence[int]] = None,
        workers: int = 0,
) -> Dict[int, str]:
    """Row numbers of the images that cannot be read, and why.

    Args:
        split: A split of load_splits.
        progress: Wraps the iteration, for a progress bar.
        masks: Whether masks are read too.
        rows: Row numbers to look at; None: all.
        workers: Processes that read; 0: this one.
    """
    cells = split.select_columns(['image', *['mask'] * (masks and 'mask' in split.column_names)])
    found = readings(partial(_read, cells), range(len(cells)) if rows is None else rows, workers)
    return {row: reason for row, _, reason in progress(found) if reason}


def _read(cells: Any, row: int) -> None:
    cell = cells[row]
    size = decode(cell['image'], shorter_side=1).size  # as small as can be: all of the file is read all the same
    if cell.get('mask') is not None:
        decode_mask(cell['mask'], size)
