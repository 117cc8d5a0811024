"""A copy of a data set whose images have other lesion masks."""
import io
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import datasets
from PIL import Image
from tqdm import tqdm

from ...files import replacing_folder
from ..images import decode

__all__ = ['write_with_masks']

SHARD = 256  # images


def write_with_masks(
        folder: Union[str, Path],
        splits: Mapping[str, datasets.Dataset],
        masks: Mapping[str, Sequence[Image.Image]],
        card: str = '',
) -> None:
    """Write a data set that load_splits reads, in Parquet; it takes the place of the folder, and is whole or not there.

    Columns, labels, order and the bytes of the images are those of the splits.

    Args:
        folder: Where to.
        splits: Of load_splits.
        masks: By split, a mask for each image, of the same field of view and of any size and shape; it is stored in the
            shape of its image. A split that is not named keeps its own masks.
        card: Text of the folder's README.md.

    Raises:
        OSError: An image that cannot be read, or a disk that is full or cannot be written to.
    """
    lines = ['---', 'configs:', '- config_name: default', '  data_files:']
    with replacing_folder(folder) as new:
        (new / 'data').mkdir()
        for name, split in splits.items():
            features = datasets.Features({**split.features, 'image': datasets.Image(), 'mask': datasets.Image()})
            shards = -(-len(split) // SHARD)
            for shard in tqdm(range(shards), desc=f'writing {name}', leave=False):
                rows = range(shard * SHARD, min((shard + 1) * SHARD, len(split)))
                content = split.select(rows).to_list()
                for row, cells in zip(rows, content):
                    if name in masks:
                        cells['mask'] = _cell(masks[name][row], cells['image'])
                    for column in ('image', 'mask'):
                        cells[column] = _with_bytes(cells.get(column))
                datasets.Dataset.from_list(content, features=features).to_parquet(
                    str(new / 'data' / f'{name}-{shard:05d}-of-{shards:05d}.parquet'))
            lines += [f'  - split: {name}', f'    path: data/{name}-*.parquet']
        (new / 'README.md').write_text('\n'.join([*lines, '---', '', card]) + '\n', encoding='utf-8')


def _cell(mask: Image.Image, image: Dict[str, Any]) -> Dict[str, Any]:
    size = decode(image, min(mask.size)).size  # a square copy has a square mask
    file = io.BytesIO()
    mask.convert('1', dither=Image.Dither.NONE).resize(size, Image.Resampling.NEAREST).save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def _with_bytes(cell: Optional[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The cell with the content of its file, where it only named it."""
    if cell is None or cell['bytes'] is not None:
        return cell
    return {'bytes': Path(cell['path']).read_bytes(), 'path': Path(cell['path']).name}
