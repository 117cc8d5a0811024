"""Dermoscopic images with two binary labels, from a Parquet folder, a Hub dataset, or the demo generator."""
import io
import math
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import datasets
import numpy as np
import pyarrow
import torch
from datasets.exceptions import DatasetGenerationError, DatasetsError
from PIL import Image
from yaml import YAMLError

from . import LABELS
from .demo import demo_dataset
from .transforms import restore_aspect

__all__ = ['DataError', 'SPLITS', 'IsicSplit', 'load_splits', 'unreadable_images']

SPLITS = ('train', 'validation', 'test')


class DataError(ValueError):
    """Data that cannot be used; the message names what is wrong and what to do."""


def load_splits(data: str, seed: int = 0) -> Dict[str, datasets.Dataset]:
    """Load and check the three splits.

    Args:
        data: ``'demo'`` for generated (synthetic) images, a folder that ``datasets.load_dataset`` reads, or a Hub id.
        seed: Seed of the generated images.

    Returns:
        The splits train, validation and test, each with the columns image (undecoded), image_id, melanoma and
        seborrheic_keratosis, and whatever else the source has.

    Raises:
        DataError: No such data, a split or column missing, a label that is not 0 or 1, both labels 1, an impossible
            aspect_ratio, an image_id that occurs twice, or a validation split that lacks a class (no AUC could choose
            an epoch).
    """
    source = demo_dataset(seed=seed) if data == 'demo' else _load_folder_or_hub(data)
    missing = [name for name in SPLITS if name not in source]
    if missing:
        raise DataError(f'{data} has no split {", ".join(missing)} (it has {", ".join(source)}): '
                        f'the splits must be named {", ".join(SPLITS)}.')
    splits = {}
    for name in SPLITS:
        split = source[name]
        absent = [column for column in ('image', 'image_id', *LABELS) if column not in split.column_names]
        if absent:
            raise DataError(f'{data}, split {name}, has no column {", ".join(absent)} '
                            f'(it has {", ".join(split.column_names)}): rename or add it.')
        if not len(split):
            raise DataError(f'{data}, split {name}, has no images.')
        _check_labels(split, f'{data}, split {name}')
        _check_aspect_ratios(split, f'{data}, split {name}')
        try:
            splits[name] = split.cast_column('image', datasets.Image(decode=False))
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f'{data}, split {name}: column image holds no images; it must have the feature type Image '
                            f'of the datasets library.') from error
    _check_ids(splits, data)
    labels = label_array(splits['validation'])
    for k, label in enumerate(LABELS):
        if labels[:, k].min() == labels[:, k].max():
            raise DataError(f'{data}, split validation, has {int(labels[:, k].sum())} images of {label} out of '
                            f'{len(labels)}: the AUC that chooses the epoch needs both classes.')
    return splits


def _load_folder_or_hub(data: str) -> datasets.DatasetDict:
    is_folder = bool(data) and Path(data).is_dir()
    if not is_folder and (data.count('/') != 1 or data.startswith(('.', '/', '~'))):
        raise DataError(f'No folder {data}: pass a folder with train, validation and test splits in Parquet, '
                        f"a dataset id on the Hugging Face Hub (user/name), or 'demo'.")
    try:
        return datasets.load_dataset(data)
    except (OSError, ValueError, RuntimeError, YAMLError, DatasetsError, DatasetGenerationError) as error:
        reason = ' '.join(str(error).split())
        if is_folder:
            raise DataError(f'{data} is not a dataset that can be read (data/train-*.parquet and so on): '
                            f'{reason}') from error
        raise DataError(f'No folder {data}, and no dataset of that id could be loaded from the Hugging Face Hub: '
                        f'{reason}') from error


def _check_labels(split: datasets.Dataset, where: str) -> None:
    for label in LABELS:
        wrong = [(i, v) for i, v in zip(split['image_id'], split[label]) if v not in (0, 1)]
        if wrong:
            raise DataError(f'{where}: {label} must be 0 or 1, but is {wrong[0][1]!r} for image {wrong[0][0]} '
                            f'({len(wrong)} such images).')
    melanoma, keratosis = (split[label] for label in LABELS)
    both = [i for i, m, k in zip(split['image_id'], melanoma, keratosis) if m and k]
    if both:
        raise DataError(f'{where}: image {both[0]} is labelled both melanoma and seborrheic_keratosis '
                        f'({len(both)} such images): a lesion has one diagnosis.')


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
            if image_id in seen:
                raise DataError(f'{data}: image_id {image_id} occurs twice (splits {seen[image_id]} and {name}): '
                                f'remove one, or scores count it double or test on what was trained on.')
            seen[image_id] = name


def label_array(split: datasets.Dataset) -> np.ndarray:
    """The labels as float32, shape (N, 2), columns in the order of LABELS."""
    return np.stack([np.asarray(list(split[label]), dtype=np.float32) for label in LABELS], axis=1)


def decode(image: Optional[Dict]) -> Image.Image:
    """Decode an undecoded image cell to an RGB picture.

    Raises:
        OSError: No bytes, a format unknown to Pillow, a truncated file, or one of unreasonably many pixels.
    """
    if image is None or (image['bytes'] is None and image['path'] is None):
        raise OSError('no bytes')
    source = image['path'] if image['bytes'] is None else io.BytesIO(image['bytes'])
    try:
        with Image.open(source) as picture:
            return picture.convert('RGB')
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises beside OSError
        raise OSError(str(error)) from error


def unreadable_images(split: datasets.Dataset, progress: Callable = iter) -> List[int]:
    """Row numbers of the images that do not decode.

    Args:
        split: A split of load_splits.
        progress: Wraps the iteration, for a progress bar.
    """
    images, bad = split.select_columns(['image']), []
    for row in progress(range(len(images))):
        try:
            decode(images[row]['image'])
        except OSError:
            bad.append(row)
    return bad


class IsicSplit(torch.utils.data.Dataset):
    """One split for a DataLoader.

    The augmentation of an image depends on seed, epoch and image alone: not on workers, processes or resumption.
    """

    def __init__(self, split: datasets.Dataset, transform: Callable, seed: int = 0) -> None:
        """
        Args:
            split: A split of load_splits.
            transform: RGB picture to tensor.
            seed: Seed of the random transforms.
        """
        # only what an item needs: a mask, say, would be decoded at every access
        self.images = split.select_columns([c for c in ('image', 'aspect_ratio') if c in split.column_names])
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.image_ids = [str(image_id) for image_id in split['image_id']]
        self.labels = torch.from_numpy(label_array(split))

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tuple[torch.Tensor, torch.Tensor, int]:
        """Image (3, H, W), labels (2,) as float32, and the row number."""
        cells = self.images[row]
        image = decode(cells['image'])
        if 'aspect_ratio' in cells:
            image = restore_aspect(image, cells['aspect_ratio'])
        sequence = np.random.SeedSequence((self.seed, self.epoch, row))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(sequence.generate_state(1)[0]))
            return self.transform(image), self.labels[row], row
