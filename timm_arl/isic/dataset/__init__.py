"""Dermoscopic images with their labels: from Parquet, image files, a Hub dataset, or the demo generator."""
from ...extras import require

require('train', __name__)

from ..images import decode, decode_mask, read_image, unreadable_images
from ..task import DataError
from .options import Wanted, add_data_arguments, wanted_of
from .splits import SPLITS, Data, StreamedSplit, check_usable, label_array, load_data, load_splits

__all__ = [
    'Data', 'DataError', 'SPLITS', 'StreamedSplit', 'Wanted', 'add_data_arguments', 'check_usable', 'decode',
    'decode_mask', 'label_array', 'load_data', 'load_splits', 'read_image', 'unreadable_images', 'wanted_of',
]
