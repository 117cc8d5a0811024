"""Dermoscopic images with two binary labels: from Parquet, image files, a Hub dataset, or the demo generator."""
import argparse
import hashlib
import io
import math
import os
import sys
import warnings
import zlib
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import datasets
import numpy as np
import pyarrow
import torch
from datasets.exceptions import DatasetGenerationError, DatasetsError
from PIL import Image, ImageOps
from yaml import YAMLError

from . import LABELS
from .demo import demo_dataset
from .sources import DataError, check_image_id, read_folder
from .transforms import grey_world, lesion_crop, restore_aspect

__all__ = ['DataError', 'EpochBatches', 'IsicSplit', 'SPLITS', 'diagnosis_array', 'load_splits', 'unreadable_images']

SPLITS = ('train', 'validation', 'test')


def load_splits(data: str, seed: int = 0) -> Dict[str, datasets.Dataset]:
    """Load and check the three splits.

    Args:
        data: ``'demo'`` for generated (synthetic) images; a folder that ``datasets.load_dataset`` or
            :func:`~timm_arl.isic.sources.read_folder` reads; or a Hub id.
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
        if split.features['image_id'].dtype != 'string':
            split = split.cast_column('image_id', datasets.Value('string'))
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
        raise DataError(f"No folder {data}: pass a folder (the challenge's, what `isic image download` wrote, or one "
                        f'with train, validation and test splits in Parquet), a dataset id on the Hugging Face Hub '
                        f"(user/name), or 'demo'.")
    files = read_folder(Path(data)) if is_folder else None
    if files is not None:
        return files
    try:
        return datasets.load_dataset(data, cache_dir=_cache_of(Path(data)) if is_folder else None)
    except (OSError, ValueError, RuntimeError, YAMLError, DatasetsError, DatasetGenerationError) as error:
        reason = ' '.join(str(error).split())
        if is_folder:
            raise DataError(f'{data} is not a dataset that can be read (ISIC-2017_Training_Data/ and so on, or '
                            f'data/train-*.parquet and so on): '
                            f'{reason}') from error
        raise DataError(f'No folder {data}, and no dataset of that id could be loaded from the Hugging Face Hub: '
                        f'{reason}') from error


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
            check_image_id(str(image_id), f'{data}, split {name}')
            if image_id in seen:
                raise DataError(f'{data}: image_id {image_id} occurs twice (splits {seen[image_id]} and {name}): '
                                f'remove one, or scores count it double or test on what was trained on.')
            seen[image_id] = name


def label_array(split: datasets.Dataset) -> np.ndarray:
    """The labels as float32, shape (N, 2), columns in the order of LABELS."""
    return np.stack([np.asarray(list(split[label]), dtype=np.float32) for label in LABELS], axis=1)


def diagnosis_array(labels: Union[np.ndarray, torch.Tensor]) -> np.ndarray:
    """0 nevus, 1 melanoma, 2 seborrheic keratosis, shape (N,), from labels of shape (N, 2)."""
    return np.asarray(labels) @ np.arange(1, 3)


def decode(image: Optional[Dict]) -> Image.Image:
    """Decode an undecoded image cell to an RGB picture, turned as its EXIF orientation says.

    16-bit grey is scaled to 8 bits, CMYK and palettes are converted, an alpha channel is dropped.

    Raises:
        OSError: No bytes, a format unknown to Pillow, a truncated file, or one of unreasonably many pixels.
    """
    if image is None or (image['bytes'] is None and image['path'] is None):
        raise OSError('no bytes')
    source = image['path'] if image['bytes'] is None else io.BytesIO(image['bytes'])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # 100 megapixels are a photograph here
            with Image.open(source) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith('I'):  # 16 bits of grey, which convert would cut off at 255
                    values = np.asarray(picture, np.float32)
                    picture = Image.fromarray((values / 257 if values.max() > 255 else values).round().astype(np.uint8))
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

    What is random about an image depends on seed, epoch, image_id and how often the epoch has shown it alone: not on
    workers, processes, the order of rows or resumption.
    """

    def __init__(
            self,
            split: datasets.Dataset,
            transform: Callable,
            seed: int = 0,
            keep_aspect: bool = True,
            colour_constancy: bool = False,
            crop_to_lesion: bool = False,
            every_epoch: bool = True,
    ) -> None:
        """
        Args:
            split: A split of load_splits.
            transform: RGB picture to tensor.
            seed: Seed of the random transforms.
            keep_aspect: Undo the squash of square copies.
            colour_constancy: Grey-world.
            crop_to_lesion: Cut to the lesion, where the split has a mask of it.
            every_epoch: Whether what is random changes with the epoch; test crops should not.
        """
        # only what an item needs: a mask, say, would be decoded at every access
        columns = ['image', *['aspect_ratio'] * keep_aspect, *['mask'] * crop_to_lesion]
        self.cells = split.select_columns([c for c in columns if c in split.column_names])
        self.transform = transform
        self.seed = seed
        self.colour_constancy = colour_constancy
        self.every_epoch = every_epoch
        self.epoch = 0
        self.image_ids = [str(image_id) for image_id in split['image_id']]
        self.labels = torch.from_numpy(label_array(split))

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of another epoch."""
        self.epoch = epoch if self.every_epoch else 0

    def __len__(self) -> int:
        return len(self.cells)

    def picture(self, row: int) -> Image.Image:
        """The RGB picture that is handed to the transform."""
        cells = self.cells[row]
        image = decode(cells['image'])
        if 'aspect_ratio' in cells:  # first, since a square crop is no squashed copy
            image = restore_aspect(image, cells['aspect_ratio'])
        if 'mask' in cells:
            image = lesion_crop(image, cells['mask'])
        return grey_world(image) if self.colour_constancy else image

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor, int]:
        """What the transform makes of an image, labels (2,) as float32, and the row number.

        Args:
            index: Row number, plus the number of rows for each time that the epoch has shown the image before.
        """
        occurrence, row = divmod(index, len(self))
        entropy = (self.seed, self.epoch, occurrence, zlib.crc32(self.image_ids[row].encode()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            return self.transform(self.picture(row)), self.labels[row], row


class EpochBatches(torch.utils.data.Sampler):
    """The batches of a training epoch: drawn from seed and epoch alone, and each image once, however many processes.

    A last batch that is not full is divided among the processes; one too small for that joins the batch before it.
    """

    def __init__(
            self,
            labels: torch.Tensor,
            batch_size: int,
            seed: int = 0,
            patches_per_image: int = 1,
            balanced: bool = False,
            processes: int = 1,
            rank: int = 0,
    ) -> None:
        """
        Args:
            labels: Shape (N, 2).
            batch_size: Images a process.
            seed: Seed of the order.
            patches_per_image: How often an epoch shows each image.
            balanced: Draw N * patches_per_image images with replacement instead, each diagnosis as often as another.
            processes: How many share the images.
            rank: Which of them this is.
        """
        self.diagnoses = diagnosis_array(labels)
        self.global_batch = batch_size * processes
        self.seed = seed
        self.patches_per_image = patches_per_image
        self.balanced = balanced
        self.processes = processes
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.diagnoses) * self.patches_per_image, self.global_batch)
        return max(whole + (rest >= 2 * self.processes), 1)  # one image alone has no batch statistics

    def order(self) -> List[int]:
        """Row numbers of the epoch, plus the number of rows for each time that an image was shown before."""
        rng = np.random.default_rng((self.seed, self.epoch))
        images = len(self.diagnoses)
        if not self.balanced:
            return rng.permutation(images * self.patches_per_image).tolist()
        _, which, counts = np.unique(self.diagnoses, return_inverse=True, return_counts=True)
        weights = 1 / counts[which]
        rows = rng.choice(images, images * self.patches_per_image, p=weights / weights.sum()).tolist()
        shown: Dict[int, int] = {}
        for i, row in enumerate(rows):
            shown[row] = shown.get(row, -1) + 1
            rows[i] = row + images * shown[row]
        return rows

    def __iter__(self) -> Iterator[List[int]]:
        order, batches = self.order(), len(self)
        for i in range(batches):
            end = (i + 1) * self.global_batch if i < batches - 1 else len(order)
            yield order[i * self.global_batch:end][self.rank::self.processes]


def main(argv: Optional[Sequence[str]] = None) -> int:
    from . import duplicates, prepare  # which import this module
    parser = argparse.ArgumentParser(prog='python -m timm_arl.isic.dataset', description='Make and check data sets.')
    commands = parser.add_subparsers(dest='command', required=True)
    prepare.add_arguments(commands.add_parser('prepare', help='originals to Parquet shards of a size that trains'))
    duplicates.add_arguments(commands.add_parser('check', help='find images that occur twice, across splits too'))
    args = parser.parse_args(argv)
    try:
        return prepare.prepare(args) if args.command == 'prepare' else duplicates.check(args)
    except (DataError, OSError) as error:
        parser.exit(2, f'{parser.prog} {args.command}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: the same command goes on.\n')


if __name__ == '__main__':
    sys.exit(main())
