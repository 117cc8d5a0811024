"""Synthetic lesions, so that everything runs with no download. Not dermoscopy: scores on them mean nothing.

``python -m timm_arl.isic.dataset demo SHEET.png`` draws a contact sheet.
"""
import argparse
import io
from typing import Dict, List

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from ...files import replacing
from ..synthetic import draw_lesion
from ..task import DIAGNOSES, LABELS, label_words
from .sources import DataError

__all__ = ['DEMO_SIZES', 'add_arguments', 'contact_sheet', 'demo_dataset', 'draw', 'draw_lesion']

DEMO_SIZES = {'train': 384, 'validation': 96, 'test': 96}

FEATURES = Features({
    'image': Image(),
    'image_id': Value('string'),
    **{label: Value('int8') for label in LABELS},
    'diagnosis': ClassLabel(names=list(DIAGNOSES)),
})


def demo_dataset(sizes: Dict[str, int] = DEMO_SIZES, size: int = 160, seed: int = 0) -> DatasetDict:
    """Generate the synthetic dataset: half nevi, a quarter each of melanoma and seborrheic keratosis.

    Args:
        sizes: Number of images by split.
        size: Side of the images in pixels.
        seed: Same seed, same images.

    Returns:
        Splits with the columns image, image_id (``DEMO_...``), diagnosis, and those of LABELS.
    """
    splits, number = {}, 0
    for s, (split, count) in enumerate(sizes.items()):
        rows: List[Dict] = []
        for i in range(count):
            diagnosis = ('nevus', 'melanoma', 'nevus', 'seborrheic_keratosis')[i % 4]
            image = draw_lesion(diagnosis, np.random.default_rng((seed, s, i)), size)
            buffer = io.BytesIO()
            image.save(buffer, format='JPEG', quality=90)
            rows.append({
                'image': {'bytes': buffer.getvalue(), 'path': None},
                'image_id': f'DEMO_{number:07d}',
                **{label: int(label == diagnosis) for label in LABELS},
                'diagnosis': DIAGNOSES.index(diagnosis),
            })
            number += 1
        splits[split] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)


def contact_sheet(columns: int = 8, size: int = 120, seed: int = 0) -> PILImage.Image:
    """A row of synthetic lesions for each diagnosis, with its name, titled as synthetic."""
    title, label = 22, 18
    sheet = PILImage.new('RGB', (columns * size, title + len(DIAGNOSES) * (size + label)), 'white')
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 5), 'SYNTHETIC images (timm-arl demo set), not dermoscopy', fill='black')
    for row, diagnosis in enumerate(DIAGNOSES):
        top = title + row * (size + label)
        draw.text((4, top + 3), label_words(diagnosis), fill='black')
        for column in range(columns):
            rng = np.random.default_rng((seed, row, column))
            sheet.paste(draw_lesion(diagnosis, rng, 160).resize((size, size)), (column * size, top + label))
    return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('path', metavar='SHEET.png', help='PNG file to write')
    parser.add_argument('--seed', type=int, default=0, help='same seed, same images (default: %(default)s)')


def draw(args: argparse.Namespace) -> int:
    """Write a contact sheet of the demo set.

    Raises:
        DataError: A negative seed.
    """
    if args.seed < 0:
        raise DataError('--seed must be at least 0.')
    with replacing(args.path) as temporary:
        contact_sheet(seed=args.seed).save(temporary, format='PNG')
    print(f'Contact sheet of synthetic images: {args.path}')
    return 0
