"""Data that the datasets library reads: a folder, a file of Parquet or a Hub id."""
import glob
import hashlib
import os
from pathlib import Path
from typing import Any, Mapping, Sequence, Tuple, TypeVar

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError, DatasetsError
from yaml import YAMLError

from ...download import plain_http
from ..task import DataError
from .names import plain
from .sources import IMAGE_SUFFIXES
from .tables import renamed

__all__ = ['check_rows', 'load_library', 'undecoded', 'with_names']

AnySplit = TypeVar('AnySplit', datasets.Dataset, datasets.IterableDataset)


def load_library(data: str, **kwargs: Any) -> Any:
    """What datasets.load_dataset gives of a folder, a Parquet file or a Hub id.

    Args:
        data: It.
        **kwargs: Of datasets.load_dataset.

    Raises:
        DataError: No such data, or data that cannot be read.
    """
    is_folder = bool(data) and Path(data).is_dir()
    is_file = data.endswith('.parquet') and Path(data).is_file()
    if not is_folder and not is_file and (data.count('/') != 1 or data.startswith(('.', '/', '~'))):
        if Path(data).is_file():
            raise DataError(f'{data} is no CSV or Parquet file: ' + (
                'unpack it, and pass the folder.' if data.lower().endswith('.zip') else
                'pass one, or a folder of images.'))
        raise DataError(f"No folder {data}: pass a folder (the challenge's, what `isic image download` wrote, one of "
                        f'classes, or one with splits in Parquet), a CSV of image paths, a dataset id on the Hugging '
                        f"Face Hub (user/name), or 'demo'.")
    if is_folder and glob.escape(data) != data:  # the datasets library would read other folders too, or none
        raise DataError(f'{data}: in names of folders, [, * and ? have a meaning of their own: rename it.')
    try:
        with plain_http():
            if is_file:
                return datasets.load_dataset('parquet', data_files={'train': glob.escape(data)}, **kwargs)
            return datasets.load_dataset(data, cache_dir=_cache_of(Path(data)) if is_folder else None, **kwargs)
    except (OSError, ValueError, RuntimeError, YAMLError, DatasetsError, DatasetGenerationError) as error:
        reason = ' '.join(str(error).split())
        if is_folder or is_file:
            raise DataError(f'{data} is not a dataset that can be read (ISIC-2017_Training_Data/ and so on, a folder '
                            f'for each class, or data/train-*.parquet and so on): {reason}') from error
        raise DataError(f'No folder {data}, and no dataset of that id could be loaded from the Hugging Face Hub: '
                        f'{reason.rstrip(".")}; check the id and the network, log in where it is private or gated '
                        f'(hf auth login, or HF_TOKEN), or name a mirror (HF_ENDPOINT).') from error


def _cache_of(folder: Path) -> str:
    """A cache for this folder as it is now.

    The datasets library takes two folders of one name, or one folder before and after a change, for the same dataset
    where their cards list the same files.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(folder.rglob('*')):
        status = path.stat()
        digest.update(f'{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0'.encode())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f'timm_arl-{digest.hexdigest()[:24]}')


def is_metadata(file: Path) -> bool:
    """Whether it is a table by which the datasets library tells the labels of the images in a folder."""
    if file.name == 'metadata.parquet':
        return True
    if file.name not in ('metadata.csv', 'metadata.jsonl'):
        return False
    with file.open(encoding='utf-8', errors='replace') as lines:
        return 'file_name' in lines.readline()


def check_rows(data: Path, splits: Mapping[str, datasets.Dataset]) -> None:
    """Refuse images without a row in the metadata of their folder, which the datasets library leaves out silently."""
    tables = sorted({path.parent for path in data.rglob('metadata.*') if is_metadata(path)})
    if not tables:
        return
    loaded = {os.path.realpath(path) for split in splits.values()
              for column, feature in split.features.items() if isinstance(feature, datasets.Image)  # masks too
              for table in split.select_columns(column).with_format('arrow').iter(1000)
              for chunk in table[column].chunks for path in chunk.field('path').to_pylist() if path}
    for folder in tables:
        images = {str(path.relative_to(folder)): os.path.realpath(path) for path in sorted(folder.rglob('*'))
                  if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith('_superpixels')
                  # the library leaves these out, too
                  and not any(part.startswith(('.', '__')) for part in path.relative_to(folder).parts)}
        alone = [name for name, place in images.items() if place not in loaded]
        if alone and len(alone) < len(images):  # a folder of which nothing is loaded is no split of these data
            raise DataError(f'{folder}: there is no row of metadata for {alone[0]} ({len(alone)} such images): add it, '
                            f'or take the image out.')


def undecoded(split: AnySplit, column: str, where: str) -> AnySplit:
    """The split with a column of images left as bytes or paths.

    Raises:
        DataError: The column holds something else.
    """
    try:
        return split.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f'{where}: column {column} holds no images; it must have the feature type Image '
                        f'of the datasets library.') from error


def with_names(split: AnySplit, columns: Sequence[Tuple[str, str]], where: str) -> AnySplit:
    """The split with its columns called as --columns says.

    Raises:
        DataError: A column that is not there.
    """
    names = renamed(list(split.features), columns, where)
    new = {plain(name) for name in names.values()}
    taken = [name for name in split.features if plain(name) in new and name not in names]
    return split.remove_columns(taken).rename_columns(names) if names else split
