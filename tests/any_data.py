"""Small data sets of every kind that users have: tables, folders, challenges; noise instead of lesions."""
from pathlib import Path

import numpy as np
from PIL import Image

SEVEN = ('MEL', 'NV', 'BCC', 'AKIEC', 'BKL', 'DF', 'VASC')
EIGHT = ('MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC', 'UNK')
DX = ('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc')


def picture(path, number=0, size=(40, 32)):
    """An image whose colour tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    base = np.array([(number * 37) % 200, (number * 91) % 200, (number * 53) % 200])
    pixels = base + rng.integers(0, 55, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def lines(path, head, rows, delimiter=','):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(delimiter.join(map(str, row)) for row in [head, *rows]) + '\n')
    return path


def table(folder, count=40, classes=('melanoma', 'nevus'), head=('image', 'label'), more=lambda k: (), name='mine.csv'):
    """A CSV of count images, of each class in turn."""
    for k in range(count):
        picture(folder / 'images' / f'{k}.png', k)
    return lines(folder / name, head, [
        (f'images/{k}.png', classes[k % len(classes)], *more(k)) for k in range(count)])


def class_folders(folder, count=10, classes=('MEL', 'NV'), splits=('',)):
    for s, split in enumerate(splits):
        for c, label in enumerate(classes):
            for k in range(count):
                picture(folder / split / label / f'{k}.png', 100 * s + 10 * c + k)
    return folder


def one_hot(folder, truth, labels, count, first=0, stem='ISIC_{:07d}'):
    """A challenge's images, and its table of 0.0 and 1.0."""
    ids = [stem.format(first + k) for k in range(count)]
    for k, image_id in enumerate(ids):
        picture(folder / f'{image_id}.jpg', first + k)
    lines(truth, ('image', *labels), [(i, *(float(k % len(labels) == c) for c in range(len(labels))))
                                      for k, i in enumerate(ids)])
    return ids


def isic2018(folder, count=21):
    for s, word in enumerate(('Training', 'Validation', 'Test')):
        name = f'ISIC2018_Task3_{word}'
        truth = folder / f'{name}_GroundTruth' / f'{name}_GroundTruth.csv'
        ids = one_hot(folder / f'{name}_Input', truth, SEVEN, count, 100 * s)
        if word == 'Training':
            lines(folder / f'{name}_LesionGroupings.csv', ('image', 'lesion_id', 'diagnosis_confirm_type'),
                  [(i, f'HAM_{k // 2}', 'histopathology') for k, i in enumerate(ids)])
    (folder / 'ISIC2018_Task3_Training_Input' / 'LICENSE.txt').write_text('CC-BY-NC')
    return folder


def isic2019(folder, count=32):
    ids = one_hot(folder / 'ISIC_2019_Training_Input', folder / 'ISIC_2019_Training_GroundTruth.csv', EIGHT[:-1], count)
    path = folder / 'ISIC_2019_Training_GroundTruth.csv'
    head, *rows = path.read_text().splitlines()
    path.write_text('\n'.join([head + ',UNK', *(f'{row},0.0' for row in rows)]) + '\n')
    head = ('image', 'age_approx', 'anatom_site_general', 'lesion_id', 'sex')
    lines(folder / 'ISIC_2019_Training_Metadata.csv', head,
          [(i, 55.0, 'anterior torso', f'MSK_{k // 2}' if k % 4 else '', 'male') for k, i in enumerate(ids)])
    ids = one_hot(folder / 'ISIC_2019_Test_Input', folder / 'ISIC_2019_Test_GroundTruth.csv', EIGHT, 18, 500)
    lines(folder / 'ISIC_2019_Test_Metadata.csv', ('image', 'age_approx', 'anatom_site_general', 'sex'),
          [(i, '', 'head/neck', 'female') for i in ids])
    return folder


def isic2020(folder, count=24):
    ids = [f'ISIC_{k:07d}' for k in range(count)]
    for k, image_id in enumerate(ids):
        picture(folder / 'train' / f'{image_id}.jpg', k)
    lines(folder / 'ISIC_2020_Training_GroundTruth_v2.csv', (
        'image_name', 'patient_id', 'lesion_id', 'sex', 'age_approx', 'anatom_site_general_challenge', 'diagnosis',
        'benign_malignant', 'target'), [
        (i, f'IP_{k // 3}', f'IL_{k}', 'female', 45.0, 'torso', 'unknown', ('benign', 'malignant')[k % 2], k % 2)
        for k, i in enumerate(ids)])
    return folder


def isic2024(folder, count=20):
    ids = [f'ISIC_{k:07d}' for k in range(count)]
    for k, image_id in enumerate(ids):
        picture(folder / 'ISIC_2024_Training_Input' / f'{image_id}.jpg', k)
    lines(folder / 'ISIC_2024_Training_GroundTruth.csv', ('isic_id', 'malignant'),
          [(i, float(k % 2)) for k, i in enumerate(ids)])
    lines(folder / 'ISIC_2024_Training_Input' / 'metadata.csv', ('isic_id', 'attribution', 'age_approx', 'sex',
        'patient_id'),
          [(i, 'us', 60, 'male', f'IP_{k // 2}') for k, i in enumerate(ids)])
    return folder


def ham10000(folder, count=42):
    ids = [f'ISIC_{k:07d}' for k in range(count)]
    for k, image_id in enumerate(ids):
        picture(folder / f'HAM10000_images_part_{1 + k % 2}' / f'{image_id}.jpg', k)
    lines(folder / 'HAM10000_metadata', ('lesion_id', 'image_id', 'dx', 'dx_type', 'age', 'sex', 'localization'),
          [(f'HAM_{k // 2}', i, DX[k // 2 % 7], 'histo', 60.0, 'male', 'back') for k, i in enumerate(ids)])
    return folder


KINDS = {  # how to make it, its task and labels, its column of groups
    'csv': (lambda folder: table(folder / 'c'), 'mine', ('melanoma', 'nevus'), ''),
    'classes': (lambda folder: class_folders(folder / 'own photos'), 'own-photos', ('MEL', 'NV'), ''),
    'splits of classes': (
        lambda folder: class_folders(folder / 'f', splits=('train', 'val', 'test')), 'f', ('MEL', 'NV'), ''),
    'isic2018': (isic2018, 'isic2018', SEVEN, 'lesion_id'),
    'isic2019': (isic2019, 'isic2019', EIGHT[:-1], 'lesion_id'),
    'isic2020': (isic2020, 'isic2020', ('malignant',), 'patient_id'),
    'isic2024': (isic2024, 'isic2024', ('malignant',), 'patient_id'),
    'ham10000': (ham10000, 'ham10000', DX, 'lesion_id'),
}


def make(kind, folder: Path) -> str:
    return str(KINDS[kind][0](folder))
