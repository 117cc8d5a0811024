"""From a DICOM file to an RGB picture of 8 bits, as a viewer shows it. Needs the extra `dicom`; pydicom decodes."""
import contextlib
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Tuple, Union

import numpy as np
from PIL import Image

from ..extras import missing

__all__ = ['SUFFIXES', 'is_dicom', 'read_dicom']

SUFFIXES = ('.dcm', '.dicom', '.dic')
DEFLATED = b'1.2.840.10008.1.2.1.99'  # the transfer syntax of files that are compressed as a whole


def is_dicom(path: Union[str, Path]) -> bool:
    """Whether a file begins as DICOM files do, or is named as they are.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM' or str(path).lower().endswith(SUFFIXES)


def read_dicom(file: Union[str, Path, BinaryIO]) -> Image.Image:
    """Read the picture of a DICOM file: RGB, 8 bits.

    YBR_FULL, YBR_FULL_422 and what JPEG 2000 uses are converted, and palettes looked up. Grey values pass through the
    rescale (or modality LUT) and the first window (or VOI LUT) of the file; without one, black and white are the ends
    of the stored bits. MONOCHROME1 is inverted.

    Raises:
        OSError: pydicom is not installed, the file is not DICOM, is compressed as a whole, holds no picture, several
            frames, more pixels than Pillow allows or grey values without a range, or cannot be decoded here.
    """
    if missing('dicom'):
        raise OSError(missing('dicom'))
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter('ignore')  # pydicom's remarks on files that it reads all the same
            content: Any = file if hasattr(file, 'read') else stack.enter_context(open(file, 'rb'))
            if _is_deflated(content):  # pydicom would inflate it without a limit, before anything is known of it
                raise OSError('it is compressed as a whole (deflated): save it without that')
            content.seek(0)
            _check_size(dcmread(content, stop_before_pixels=True))  # before its pixels, which may be a long film
            content.seek(0)
            return _picture(dcmread(content))
    except InvalidDicomError as error:
        raise OSError('it is not a DICOM file') from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # pydicom and its decoders raise what they like about a damaged file
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OSError(f'its picture cannot be decoded: {reason}') from error


def _is_deflated(file: BinaryIO) -> bool:
    before = b''
    while chunk := file.read(1 << 20):  # a film must not fill the memory
        if DEFLATED in before + chunk:
            return True
        before = chunk[-len(DEFLATED):]
    return False


def _check_size(ds: Any) -> None:
    frames, pixels = int(ds.get('NumberOfFrames') or 1), (ds.get('Rows') or 0) * (ds.get('Columns') or 0)
    if frames > 1:
        raise OSError(f'it holds {frames} frames: save the one that is meant as a file of its own')
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # as Pillow's own
    if 0 < limit < pixels:
        raise OSError(f'it has {pixels / 1e6:.0f} megapixels, above the limit of {limit / 1e6:.0f}')


def _picture(ds: Any) -> Image.Image:
    from pydicom.pixels import apply_color_lut, pixel_array

    if 'FloatPixelData' in ds or 'DoubleFloatPixelData' in ds:
        raise OSError('it has floating-point pixels')
    if 'PixelData' not in ds:
        raise OSError('it holds no picture, as reports and indexes (DICOMDIR) do not')
    photometric = str(ds.PhotometricInterpretation)
    pixels = pixel_array(ds)  # colour comes as RGB
    if photometric.startswith('MONOCHROME'):
        grey = _grey(pixels, ds)
        pixels = 1 - grey if photometric == 'MONOCHROME1' else grey
    elif photometric == 'PALETTE COLOR':
        pixels = apply_color_lut(pixels, ds) / (2 ** ds.RedPaletteColorLookupTableDescriptor[2] - 1)
    elif pixels.ndim == 3 and pixels.dtype == np.uint8 and ds.BitsStored == 8:
        return Image.fromarray(pixels).convert('RGB')
    elif pixels.ndim == 3:
        pixels = pixels / np.float32(2 ** ds.BitsStored - 1)
    else:
        raise OSError(f'its colours are {photometric}, which are not read')
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8)).convert('RGB')


def _grey(pixels: np.ndarray, ds: Any) -> np.ndarray:
    """Grey values from 0, black, to 1, white."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    low, high = _ends(ds)
    if not low < high:
        raise OSError('its black and white are the same value (is its RescaleSlope 0?)')
    values = apply_voi_lut(apply_modality_lut(pixels, ds), ds)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)


def _ends(ds: Any) -> Tuple[float, float]:
    """The values that apply_voi_lut gives to black and to white."""
    for sequence in ('VOILUTSequence', 'ModalityLUTSequence'):
        if ds.get(sequence):
            return 0, 2 ** ds[sequence].value[0].LUTDescriptor[2] - 1
    low = -2 ** (ds.BitsStored - 1) if ds.PixelRepresentation else 0
    ends = [x * float(ds.get('RescaleSlope', 1)) + float(ds.get('RescaleIntercept', 0))
            for x in (low, low + 2 ** ds.BitsStored - 1)]
    return min(ends), max(ends)
