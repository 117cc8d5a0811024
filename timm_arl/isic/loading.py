"""What a DataLoader is given: images as the network is shown them, the batches of an epoch, and streams."""
import contextlib
import itertools
import math
import time
import zlib
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Tuple, Union

from ..extras import require

require('train', __name__)

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import default_collate, get_worker_info
from torchvision import tv_tensors

from .dataset import DataError, StreamedSplit, label_array
from .images import decode, decode_mask, reason_of
from .task import ISIC2017, Task, balancing_weights
from .transforms import grey_world, lesion_crop, restore_aspect, seeded

__all__ = ['EpochBatches', 'IsicImages', 'IsicSplit', 'IsicStream']

SHUFFLE_BUFFER = 1000  # images that a stream holds, undecoded, to draw from
COPY = 'copy of the row'  # column of a stream, whose copies of a row may go to several readers
MANY_EPOCHS = 10 ** 6  # so that a second pass within an epoch has an order and changes of its own


class IsicImages:
    """What the network is shown of an image, for :class:`IsicSplit` and for streams.

    What is random about it depends on seed, epoch, image_id and how often the epoch has shown it alone: not on workers,
    processes, the order of rows or resumption.
    """

    def __init__(
            self,
            transform: Union[Callable, List[Callable]],
            seed: int = 0,
            keep_aspect: bool = True,
            colour_constancy: bool = False,
            crop_to_lesion: bool = False,
            with_masks: bool = False,
            every_epoch: bool = True,
    ) -> None:
        """
        Args:
            transform: RGB picture to tensor; with_masks, picture and mask to two tensors, as those of
                torchvision.transforms.v2 do. JPEGs are decoded no larger than its ``shorter_side`` needs, where it has
                one. A list: one for each epoch.
            seed: Seed of the random transforms.
            keep_aspect: Undo the squash of square copies.
            colour_constancy: Grey-world.
            crop_to_lesion: Cut to the lesion, where there is a mask of it.
            with_masks: Give the mask of the lesion too, changed as the picture is: float32 (1, H, W) between 0 and 1,
                NaN throughout where there is none.
            every_epoch: Whether what is random changes with the epoch; test crops should not.
        """
        self.transform = transform
        self.seed = seed
        self.columns = ['image', *['aspect_ratio'] * keep_aspect, *['mask'] * (crop_to_lesion or with_masks)]
        self.colour_constancy = colour_constancy
        self.crop_to_lesion = crop_to_lesion
        self.with_masks = with_masks
        self.every_epoch = every_epoch
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch

    @property
    def epoch(self) -> int:
        return int(self.shared_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of another epoch, for the workers of a loader too."""
        self.shared_epoch.fill_(epoch if self.every_epoch else 0)

    def epoch_transform(self) -> Callable:
        """The transform of this epoch."""
        return self.transform[self.epoch] if isinstance(self.transform, list) else self.transform

    def prepared(self, cells: Dict[str, Any]) -> Tuple[Image.Image, Optional[Image.Image]]:
        """The RGB picture that is handed to the transform, and the lesion's mask, of its size, where one is wanted.

        Raises:
            OSError: An image or mask that cannot be read.
        """
        has_mask = cells.get('mask') is not None
        shorter_side = getattr(self.epoch_transform(), 'shorter_side', None)
        if shorter_side and self.crop_to_lesion and has_mask:
            shorter_side = None  # the lesion may be a small part of the picture
        elif shorter_side and (cells.get('aspect_ratio') or 1) < 1:
            shorter_side = math.ceil(shorter_side / cells['aspect_ratio'])  # a square copy will be made narrower
        image = decode(cells['image'], shorter_side)
        size = image.size
        if 'aspect_ratio' in cells:  # first, since a square crop is no squashed copy
            image = restore_aspect(image, cells['aspect_ratio'])
        mask = None
        if has_mask:
            mask = decode_mask(cells['mask'], size).resize(image.size, Image.Resampling.BILINEAR)
            if self.crop_to_lesion:
                image, mask = lesion_crop(image, mask), lesion_crop(mask, mask)
        return (grey_world(image) if self.colour_constancy else image), mask

    def transformed(
            self,
            image: Image.Image,
            mask: Optional[Image.Image],
            image_id: str,
            occurrence: int = 0,
    ) -> Tuple[torch.Tensor, ...]:
        """What the transform makes of a picture, and of its mask where one is wanted.

        Args:
            image, mask: From prepared.
            image_id: Of the image.
            occurrence: How often the epoch has shown it before.
        """
        transform = self.epoch_transform()
        with seeded(image_id, self.seed, self.epoch, occurrence):
            if not self.with_masks:
                return transform(image),
            known = mask is not None
            pixels = torch.from_numpy(np.array(mask if known else Image.new('L', image.size)))[None]
            tensor, pixels = transform(image, tv_tensors.Mask(pixels))
            return tensor, pixels.as_subclass(torch.Tensor) / 255. if known else torch.full(pixels.shape, torch.nan)


class IsicSplit(IsicImages, torch.utils.data.Dataset):
    """One split for a DataLoader."""

    def __init__(
            self,
            split: datasets.Dataset,
            transform: Union[Callable, List[Callable]],
            seed: int = 0,
            task: Task = ISIC2017,
            groups: str = '',
            **kwargs,
    ) -> None:
        """
        Args:
            split: A split of load_splits.
            transform, seed, **kwargs: Of :class:`IsicImages`.
            task: Whose labels it has.
            groups: Its column of patients or lesions; '': none.
        """
        super().__init__(transform, seed, **kwargs)
        # only what an item needs
        self.cells = split.select_columns([c for c in self.columns if c in split.column_names])
        self.image_ids = [str(image_id) for image_id in split['image_id']]
        self.labels = torch.from_numpy(label_array(split, task))
        self.groups = [str(group) for group in split[groups]] if groups else None
        self.group_column = groups

    def __len__(self) -> int:
        return len(self.cells)

    def picture(self, row: int) -> Image.Image:
        """The RGB picture that is handed to the transform."""
        return self.prepared(self.cells[row])[0]

    def shown(self, index: int) -> Tuple[torch.Tensor, ...]:
        """What the transform makes of an image and, with_masks, of its mask.

        Args:
            index: Row number, plus the number of rows for each time that the epoch has shown the image before.

        Raises:
            OSError: An image or mask that cannot be read.
        """
        occurrence, row = divmod(index, len(self))
        return self.transformed(*self.prepared(self.cells[row]), self.image_ids[row], occurrence)

    def __getitem__(self, index: int) -> Tuple:
        """What the transform makes of an image, its labels as float32, the row number, and, with_masks, the mask."""
        row = index % len(self)
        image, *mask = self.shown(index)
        return image, self.labels[row], row, *mask


class EpochBatches(torch.utils.data.Sampler):
    """The batches of a training epoch: drawn from seed and epoch alone, each image once for any number of processes.

    A last batch that is not full is divided among the processes, or joins the batch before it where that would leave a
    process fewer than two images.
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
            task: Task = ISIC2017,
    ) -> None:
        """
        Args:
            labels: Shape (N, labels).
            batch_size: Images per process.
            seed: Seed of the order.
            patches_per_image: How often an epoch shows each image.
            balanced: Draw N * patches_per_image images with replacement instead, each diagnosis as often as another.
            processes: How many share the images.
            rank: Which of them this is.
            task: Whose labels they are.
        """
        self.diagnoses = task.strata(labels)
        self.task = task
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

    def sizes(self) -> Iterator[int]:
        """How many images each batch of this process has."""
        images, batches = len(self.diagnoses) * self.patches_per_image, len(self)
        own = self.global_batch // self.processes
        yield from [own] * (batches - 1)
        rest = images - (batches - 1) * self.global_batch
        yield len(range(self.rank, rest, self.processes))

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


@contextlib.contextmanager
def _no_wait() -> Iterator[None]:
    """datasets waits 5 s where a stream ends, for programs that end there (apache/arrow 45214); here a run goes on."""
    before = getattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', None)
    if before is None:  # an older release, which does not wait
        yield
        return
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    try:
        yield
    except Exception:  # the program ends
        time.sleep(before)
        raise
    finally:
        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = before


def _rows(stream: datasets.IterableDataset) -> Iterator[Dict[str, Any]]:
    rows = iter(stream)
    while True:
        with _no_wait():
            cells = next(rows, None)
        if cells is None:
            return
        yield cells


class IsicStream(IsicImages, torch.utils.data.IterableDataset):
    """The batches of a training epoch from Parquet shards, for a DataLoader of ``batch_size=None``.

    There are as many as EpochBatches gives, of the same sizes. Each process, and each worker of its loader, reads
    shards of its own, in an order of the epoch. Where the number of shards is no multiple of the number of processes,
    each process reads all shards and takes every n-th image. A reader that has no image left starts again, until the
    epoch is full.
    """

    def __init__(
            self,
            split: StreamedSplit,
            batches: EpochBatches,
            transform: Union[Callable, List[Callable]],
            seed: int = 0,
            skip_bad_images: bool = False,
            **kwargs,
    ) -> None:
        """
        Args:
            split: The split train of load_splits.
            batches: Number of images per process and step, and how often an epoch shows an image: if balanced, one of
                a rare diagnosis several times, and one of a frequent diagnosis not in every epoch.
            transform, seed, **kwargs: Of :class:`IsicImages`.
            skip_bad_images: Leave out an image that cannot be read, with a line that names it.
        """
        super().__init__(transform, seed, **kwargs)
        self.batches = batches
        self.skip_bad_images = skip_bad_images
        self.labels = torch.from_numpy(label_array(split.table, batches.task))
        columns = [c for c in ('image_id', *batches.task.labels, *self.columns) if c in split.stream.features]
        self.stream = split_dataset_by_node(
            split.stream.select_columns(columns), rank=batches.rank, world_size=batches.processes)
        weights = balancing_weights(self.labels, batches.task)
        self.copies = batches.patches_per_image * (weights if batches.balanced else np.ones_like(weights))
        self.shards, self.kinds = split.shards, len(set(batches.diagnoses))
        self.passes = self.rows = 0

    def __len__(self) -> int:
        return len(self.batches)

    def workers(self, wanted: int) -> int:
        """Number of workers of a loader that can have shards of their own.

        Args:
            wanted: Upper limit.

        Raises:
            DataError: The diagnoses are to be balanced by several readers, but a shard lacks one.
        """
        workers = min(wanted, self.stream.num_shards)
        readers = max(workers, 1) * self.batches.processes
        kinds = [len(set(shard)) for shard in np.split(self.batches.diagnoses, np.cumsum(self.shards)[:-1])]
        if self.batches.balanced and readers > 1 and min(kinds) < self.kinds:
            raise DataError(
                f'The shards of train do not all have every diagnosis, so that {readers} readers (processes times '
                f'--workers) cannot balance them: shuffle the images before the shards are written, use one process '
                f'with --workers 1, or choose --balance weights.')
        return workers

    def __iter__(self) -> Iterator[List]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        examples = self._examples()
        for size in itertools.islice(self.batches.sizes(), first, None, step):
            yield default_collate(list(itertools.islice(examples, size)))
        with _no_wait():
            examples.close()

    def _examples(self) -> Generator[Tuple, None, None]:
        stream = self.stream.map(self._repeat, batched=True).shuffle(self.seed, buffer_size=SHUFFLE_BUFFER)
        any_shown = False
        bad: Dict[str, str] = {}  # image_id: reason
        for self.passes in itertools.count():
            self.rows = 0
            stream.set_epoch(self.epoch + self.passes * MANY_EPOCHS)
            for cells in _rows(stream):
                image_id = str(cells['image_id'])
                try:
                    prepared = self.prepared(cells)
                except OSError as error:
                    if not self.skip_bad_images:
                        raise DataError(f'The train image {image_id} cannot be read ({reason_of(error)}): fix it, or '
                                        f'leave such images out with --skip-bad-images.') from error
                    if image_id not in bad:
                        bad[image_id] = reason_of(error)
                        print(f'Leaving out the train image {image_id}: it cannot be read ({bad[image_id]}).',
                              flush=True)
                    continue
                occurrence = cells[COPY] + self.passes * MANY_EPOCHS
                any_shown = True
                labels = torch.tensor([cells[label] for label in self.batches.task.labels], dtype=torch.float32)
                image, *mask = self.transformed(*prepared, image_id, occurrence)
                yield image, labels, image_id, *mask
            if not self.rows:
                raise DataError('There are more processes than train images to stream: start fewer processes.')
            if bad and not any_shown:
                raise DataError(f'One reader can read none of the images that it streams ({", ".join(list(bad)[:10])}: '
                                f'{next(iter(bad.values()))}): fix them, or use fewer processes and --workers 1.')

    def _repeat(self, rows: Dict[str, List]) -> Dict[str, List]:
        """Each row as often as the epoch shows it, with the number of the copy; fractions are rounded at random."""
        which: List[int] = []
        copies: List[int] = []
        labels = np.stack([np.asarray(rows[label]) for label in self.batches.task.labels], 1)
        expectations = self.batches.task.image_weights(labels, self.copies)
        for i, (image_id, expected) in enumerate(zip(rows['image_id'], expectations)):
            entropy = (self.seed, self.epoch, self.passes, zlib.crc32(str(image_id).encode()))
            count = int(expected) + int(np.random.default_rng(entropy).random() < expected % 1)
            which += [i] * count
            copies += range(count)
        self.rows += len(rows['image_id'])
        return {**{key: [column[i] for i in which] for key, column in rows.items()}, COPY: copies}
