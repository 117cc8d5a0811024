"""Small datasets in Parquet, made for tests."""
import io

import datasets
from PIL import Image

FEATURES = datasets.Features({
    'image': datasets.Image(), 'image_id': datasets.Value('string'),
    'melanoma': datasets.Value('float32'), 'seborrheic_keratosis': datasets.Value('float32')})

WITH_ASPECT = datasets.Features({**FEATURES, 'aspect_ratio': datasets.Value('float32')})


def jpeg(color=(120, 80, 60), size=(32, 32), mode='RGB', format='JPEG'):
    buffer = io.BytesIO()
    Image.new('RGB', size, color).convert(mode).save(buffer, format=format)
    return buffer.getvalue()


def rows(count=4, first=0, **changes):
    """Alternating diagnoses; changes are {column: {row: value}}."""
    made = [{'image': {'bytes': jpeg(), 'path': None}, 'image_id': f'ISIC_{first + i:07d}',
             'melanoma': float(i % 4 == 1), 'seborrheic_keratosis': float(i % 4 == 3)} for i in range(count)]
    for column, values in changes.items():
        for row, value in values.items():
            made[row][column] = value
    return made


def write(folder, features=FEATURES, drop=(), **splits):
    (folder / 'data').mkdir(parents=True)
    for name, content in {'train': rows(8), 'validation': rows(first=100), 'test': rows(first=200), **splits}.items():
        if content is not None:
            content = [{**dict.fromkeys(features), **row} for row in content]
            split = datasets.Dataset.from_list(content, features=features).remove_columns(list(drop))
            split.to_parquet(folder / 'data' / f'{name}-00000-of-00001.parquet')
    return str(folder)
