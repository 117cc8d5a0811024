"""The splits of a data set, loaded and checked."""
import hashlib
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

import datasets
import numpy as np
import pyarrow
from datasets.exceptions import DatasetGenerationError, DatasetsError
from yaml import YAMLError

from ...download import plain_http
from ..task import ISIC2017, Task
from .demo import demo_dataset
from .sources import DataError, check_image_id, image_files, read_folder

__all__ = ['SPLITS', 'StreamedSplit', 'check_usable', 'label_array', 'load_splits']

SPLITS = ('train', 'validation', 'test')
NO_SHARDS = ('--streaming reads Parquet shards, and {} has none: leave out --streaming, or make shards with python -m '
             'timm_arl.isic.dataset prepare.')


class StreamedSplit(NamedTuple):
    """A split whose images arrive as they are needed, from Parquet shards.

    Attributes:
        stream: Undecoded images, and what else an image needs.
        table: image_id and labels of all of them, shard after shard.
        shards: How many each shard has.
    """
    stream: datasets.IterableDataset
    table: datasets.Dataset
    shards: Sequence[int]


class Data(NamedTuple):
    """Images, and what is predicted of them.

    Attributes:
        task: What is predicted.
        splits: By name, each with the columns image (undecoded), image_id and those of the task's labels.
        groups: Column of the patient or lesion of each image, none of which is in two splits; '': not known.
    """
    task: Task
    splits: Dict[str, Any]
    groups: str = ''

    def group_ids(self, name: str) -> Optional[List[str]]:
        """Patient or lesion of each image of a split, or None where they are not known."""
        return [str(group) for group in self.splits[name][self.groups]] if self.groups else None


def load_data(data: str, seed: int = 0, streaming: bool = False) -> Data:
    """As load_splits, with what is predicted."""
    return Data(ISIC2017, load_splits(data, seed, streaming))


def load_splits(data: str, seed: int = 0, streaming: bool = False) -> Dict[str, Any]:
    """Load and check the three splits.

    Args:
        data: ``'demo'`` for generated (synthetic) images; a folder that ``datasets.load_dataset`` or
            :func:`~timm_arl.isic.dataset.sources.read_folder` reads; or a Hub id.
        seed: Seed of the generated images.
        streaming: Leave the images of train where they are, in Parquet shards, until they are needed.

    Returns:
        The splits train, validation and test, each with the columns image (undecoded), image_id and those of LABELS,
        and whatever else the source has. When streaming, train is a StreamedSplit.

    Raises:
        DataError: No such data, a split or column missing, a label that is not 0 or 1, two labels of one image that
            are 1, an impossible aspect_ratio, an image_id that occurs twice, or a validation split that lacks a class
            (no AUC could choose an epoch).
    """
    if streaming:
        return _load_streaming(data)
    return check_splits(demo_dataset(seed=seed) if data == 'demo' else _load_folder_or_hub(data), data)


def check_splits(
        source: Mapping[str, datasets.Dataset],
        data: str,
        streamed: Sequence[str] = (),
) -> Dict[str, datasets.Dataset]:
    """Check what load_splits promises; images and masks become undecoded cells.

    Args:
        source: Splits by name.
        data: What messages call it.
        streamed: Splits whose images are elsewhere.
    """
    missing = [name for name in SPLITS if name not in source]
    if missing:
        raise DataError(f'{data} has no split {", ".join(missing)} (it has {", ".join(source)}): '
                        f'the splits must be named {", ".join(SPLITS)}.')
    splits = {}
    for name in SPLITS:
        split = source[name]
        if name not in streamed:
            _check_columns(split, f'{data}, split {name}')
        if split.features['image_id'].dtype != 'string':
            split = split.cast_column('image_id', datasets.Value('string'))
        _check_labels(split, f'{data}, split {name}')
        _check_aspect_ratios(split, f'{data}, split {name}')
        for column in ('image', 'mask'):
            if column in split.column_names:
                split = undecoded(split, column, f'{data}, split {name}')
        splits[name] = split
    _check_ids(splits, data)
    check_usable(splits, data)
    return splits


def check_usable(splits: Mapping[str, Any], data: str, task: Task = ISIC2017) -> None:
    """Refuse a split without images, and a validation split that lacks a class; again after images were left out.

    Raises:
        DataError: There is one.
    """
    for name, split in splits.items():
        if not len(split.table if isinstance(split, StreamedSplit) else split):
            raise DataError(f'{data}, split {name}, has no images.')
    if 'validation' not in splits:
        return
    labels = label_array(splits['validation'], task)
    for k, label in enumerate(task.labels):
        if labels[:, k].min() == labels[:, k].max():
            raise DataError(f'{data}, split validation, has {int(labels[:, k].sum())} images of {label} out of '
                            f'{len(labels)}: the AUC that chooses epochs and thresholds needs both classes.')


def _check_columns(split: Union[datasets.Dataset, datasets.IterableDataset], where: str) -> None:
    columns = list(split.features)
    absent = [column for column in ('image', 'image_id', *ISIC2017.labels) if column not in columns]
    if absent:
        raise DataError(f'{where}, has no column {", ".join(absent)} (it has {", ".join(columns)}): rename or add it.')


AnySplit = TypeVar('AnySplit', datasets.Dataset, datasets.IterableDataset)


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


def _load_folder_or_hub(data: str) -> datasets.DatasetDict:
    folder = Path(data) if data and Path(data).is_dir() else None
    files = read_folder(folder) if folder else None
    source = _load_dataset(data) if files is None else files
    for name, split in source.items() if folder and files is None else ():
        _check_rows(folder / name, split)
    return source


def _check_rows(folder: Path, split: datasets.Dataset) -> None:
    """Refuse images without a row in the metadata of their folder, which the datasets library leaves out silently."""
    if not any((folder / f'metadata.{ending}').is_file() for ending in ('csv', 'jsonl')):
        return
    cells = undecoded(split, 'image', str(folder))['image'] if 'image' in split.column_names else []
    loaded = {Path(cell['path']).name for cell in cells if cell and cell['path']}
    alone = sorted(path.name for path in image_files(folder).values() if path.name not in loaded)
    if alone:
        raise DataError(f'{folder}: there is no row of metadata for {alone[0]} ({len(alone)} such images): add it, or '
                        f'take the image out.')


def _load_dataset(data: str, **kwargs) -> Any:
    is_folder = bool(data) and Path(data).is_dir()
    if not is_folder and (data.count('/') != 1 or data.startswith(('.', '/', '~'))):
        raise DataError(f"No folder {data}: pass a folder (the challenge's, what `isic image download` wrote, or one "
                        f'with train, validation and test splits in Parquet), a dataset id on the Hugging Face Hub '
                        f"(user/name), or 'demo'.")
    try:
        with plain_http():
            return datasets.load_dataset(data, cache_dir=_cache_of(Path(data)) if is_folder else None, **kwargs)
    except (OSError, ValueError, RuntimeError, YAMLError, DatasetsError, DatasetGenerationError) as error:
        reason = ' '.join(str(error).split())
        if is_folder:
            raise DataError(f'{data} is not a dataset that can be read (ISIC-2017_Training_Data/ and so on, or '
                            f'data/train-*.parquet and so on): '
                            f'{reason}') from error
        raise DataError(f'No folder {data}, and no dataset of that id could be loaded from the Hugging Face Hub: '
                        f'{reason.rstrip(".")}; check the id and the network, log in where it is private or gated '
                        f'(hf auth login, or HF_TOKEN), or name a mirror (HF_ENDPOINT).') from error


def _load_streaming(data: str) -> Dict[str, Any]:
    if data == 'demo' or (Path(data).is_dir() and read_folder(Path(data)) is not None):
        raise DataError(NO_SHARDS.format(data))
    source = _load_dataset(data, streaming=True)
    tables: Dict[str, datasets.Dataset] = {}
    shards: List[int] = []
    try:
        for name in [name for name in SPLITS if name in source]:
            stream = source[name]
            if stream.features is None:  # only of Parquet are they known before it is read
                raise DataError(NO_SHARDS.format(data))
            _check_columns(stream, f'{data}, split {name}')
            for column in ('image', 'mask'):
                if column in stream.features:
                    stream = undecoded(stream, column, f'{data}, split {name}')
            if stream.features['image_id'].dtype != 'string':
                stream = stream.cast_column('image_id', datasets.Value('string'))
            source[name] = stream
            if name == 'train':  # the images of the others are all needed at once
                about = [c for c in ('image_id', *ISIC2017.labels, 'aspect_ratio') if c in stream.features]
                try:
                    stream = _load_dataset(data, split=name, streaming=True, columns=about)
                except DataError as error:  # images in files, say, whose reader knows no columns
                    raise DataError(NO_SHARDS.format(data)) from error
            parts = [list(stream.shard(stream.num_shards, i)) for i in range(stream.num_shards)]
            tables[name] = datasets.Dataset.from_list(sum(parts, []), features=stream.features)
            shards = [len(part) for part in parts] if name == 'train' else shards
    except (TypeError, OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{data} cannot be streamed: {" ".join(str(error).split())}') from error
    splits: Dict[str, Any] = check_splits(tables, data, streamed=['train'])
    splits['train'] = StreamedSplit(source['train'], splits['train'], shards)
    return splits


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


def _check_labels(split: datasets.Dataset, where: str) -> None:
    for label in ISIC2017.labels:
        wrong = [(i, v) for i, v in zip(split['image_id'], split[label]) if v not in (0, 1)]
        if wrong:
            raise DataError(f'{where}: {label} must be 0 or 1, but is {wrong[0][1]!r} for image {wrong[0][0]} '
                            f'({len(wrong)} such images).')
    several = np.flatnonzero(label_array(split).sum(1) > 1)
    if len(several):
        raise DataError(f'{where}: image {split[int(several[0])]["image_id"]} has more than one label '
                        f'({" and ".join(ISIC2017.labels)}; {len(several)} such images): a lesion has one diagnosis.')


def _check_aspect_ratios(split: datasets.Dataset, where: str) -> None:
    if 'aspect_ratio' not in split.column_names:
        return
    for image_id, ratio in zip(split['image_id'], split['aspect_ratio']):
        usable = ratio is None or (isinstance(ratio, (int, float)) and (math.isnan(ratio) or 0.1 <= ratio <= 10))
        if not usable:
            raise DataError(f'{where}: aspect_ratio is {ratio!r} for image {image_id}; it must be the original width / '
                            f'height, between 0.1 and 10, or null.')


def _check_ids(splits: Dict[str, datasets.Dataset], data: str) -> None:
    seen: Dict[str, str] = {}
    for name, split in splits.items():
        for image_id in split['image_id']:
            check_image_id(str(image_id), f'{data}, split {name}')
            if image_id in seen:
                raise DataError(f'{data}: image_id {image_id} occurs twice (splits {seen[image_id]} and {name}): '
                                f'remove one, or it counts twice in the scores, or the test has images of training.')
            seen[image_id] = name


def label_array(split: datasets.Dataset, task: Task = ISIC2017) -> np.ndarray:
    """The labels as float32, shape (N, labels), columns in the order of the task's labels."""
    return np.stack([np.asarray(list(split[label]), dtype=np.float32) for label in task.labels], axis=1)
