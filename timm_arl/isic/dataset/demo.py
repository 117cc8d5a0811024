"""Synthetic lesions, so that everything runs with no download. Not dermoscopy: scores on them mean nothing.

'demo' has the labels of ISIC 2017, 'demo-7' those of ISIC 2018, and 'demo-groups' has patients and no splits.

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
from ..task import DIAGNOSES, ISIC2017, LABELS, TASKS, DataError, Task, label_words
from .groups import WHOLE

__all__ = ['DEMO_SIZES', 'DEMO_TASKS', 'add_arguments', 'contact_sheet', 'demo_dataset', 'draw', 'draw_lesion']

DEMO_SIZES = {'train': 384, 'validation': 96, 'test': 96}

FEATURES = Features({
    'image': Image(),
    'image_id': Value('string'),
    **{label: Value('int8') for label in LABELS},
    'diagnosis': ClassLabel(names=list(DIAGNOSES)),
})
SEVEN = Features({
    'image': Image(), 'image_id': Value('string'), 'diagnosis': ClassLabel(names=list(TASKS['isic2018'].labels))})
PATIENTS = Features({
    'image': Image(), 'age_approximate': Value('float32'), **dict.fromkeys(
        ('image_id', 'diagnosis', 'patient_id', 'lesion_id', 'sex', 'site', 'skin_type'), Value('string'))})
DEMO_TASKS = {
    'demo': ISIC2017, 'demo-7': TASKS['isic2018'],
    'demo-groups': Task('demo-groups', tuple(sorted(DIAGNOSES)), 'multiclass', column='diagnosis')}
TURNS = {'demo': ('nevus', 'melanoma', 'nevus', 'seborrheic_keratosis'), 'demo-7': (*TASKS['isic2018'].labels, 'NV')}


def demo_dataset(
        sizes: Dict[str, int] = DEMO_SIZES,
        size: int = 160,
        seed: int = 0,
        kind: str = 'demo',
) -> DatasetDict:
    """Generate a synthetic dataset. 'demo': half nevi, a quarter each of melanoma and seborrheic keratosis.

    Args:
        sizes: Number of images by split.
        size: Side of the images in pixels.
        seed: Same seed, same images.
        kind: One of DEMO_TASKS.

    Returns:
        Splits with the columns image, image_id (``DEMO_...``), diagnosis, and those of LABELS. 'demo-7': the same
        without those. 'demo-groups': all of them as one split, with patient_id, lesion_id, age_approximate, sex, site
        and skin_type.
    """
    if kind == 'demo-groups':
        return DatasetDict({WHOLE: _of_patients(sum(sizes.values()), size, seed)})
    splits, number = {}, 0
    for s, (split, count) in enumerate(sizes.items()):
        rows: List[Dict] = []
        for i in range(count):
            diagnosis = TURNS[kind][i % len(TURNS[kind])]
            image = draw_lesion(diagnosis, np.random.default_rng((seed, s, i)), size)
            if kind == 'demo-7':
                rows.append({'image': _jpeg(image), 'image_id': f'DEMO_{number:07d}', 'diagnosis': diagnosis})
                number += 1
                continue
            rows.append({
                'image': _jpeg(image),
                'image_id': f'DEMO_{number:07d}',
                **{label: int(label == diagnosis) for label in LABELS},
                'diagnosis': DIAGNOSES.index(diagnosis),
            })
            number += 1
        splits[split] = Dataset.from_list(rows, features=FEATURES if kind == 'demo' else SEVEN)
    return DatasetDict(splits)


def _jpeg(image: PILImage.Image) -> Dict:
    buffer = io.BytesIO()
    image.save(buffer, format='JPEG', quality=90)
    return {'bytes': buffer.getvalue(), 'path': None}


def _of_patients(count: int, size: int, seed: int) -> Dataset:
    """Patients with one to three lesions, each photographed once or twice."""
    rng = np.random.default_rng((seed, 7))
    rows: List[Dict] = []
    patient = lesion = 0
    while len(rows) < count:
        patient += 1
        about = {
            'patient_id': f'PATIENT_{patient:04d}', 'age_approximate': float(rng.integers(4, 17) * 5),
            'sex': str(rng.choice(['female', 'male'])), 'skin_type': str(rng.choice(['I', 'II', 'III', 'IV']))}
        for _ in range(rng.integers(1, 4)):
            lesion += 1
            diagnosis = str(rng.choice(TURNS['demo']))
            site = str(rng.choice(['back', 'arm', 'leg', 'face']))
            for photograph in range(rng.integers(1, 3)):
                look = np.random.default_rng((seed, lesion))  # the same lesion; what follows is drawn again
                image = draw_lesion(diagnosis, look, size)
                rows.append({
                    'image': _jpeg(image.rotate(90 * photograph)), 'image_id': f'DEMO_{len(rows):07d}',
                    'diagnosis': diagnosis, 'lesion_id': f'LESION_{lesion:04d}', 'site': site, **about})
    return Dataset.from_list(rows[:count], features=PATIENTS)


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
