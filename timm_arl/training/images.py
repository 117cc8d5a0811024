"""The images of a run: checked, loaded, and what a network says of them."""
import weakref
from functools import partial
from typing import Any, Dict, Iterator, List, MutableMapping, Tuple

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..isic.dataset import DataError, StreamedSplit, check_usable, label_array
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.images import readings, stored_size, unreadable_images
from ..isic.loading import EpochBatches, IsicSplit, IsicStream
from ..isic.task import ISIC2017, Task, label_words
from ..isic.transforms import EvalCrops, eval_transform, normalisation, train_transform
from ..machine import available_memory

__all__ = [
    'CropLoader', 'check_images', 'check_learnable', 'epoch_sides', 'has_masks', 'image_loader', 'learns_masks',
    'note_squares', 'predict', 'shown_as',
]

SQUARES = 16  # images that are looked at for their shape
MEMORY_SHARE = 1 / 8  # of the available memory, which the crops of a split may take

# of splits that still exist: the settings that crops were cut with, and the crops by image_id
_kept: MutableMapping[Any, Tuple[Tuple, Dict[str, torch.Tensor]]] = weakref.WeakKeyDictionary()


def check_images(splits, args, accelerator, data_config=None, task: Task = ISIC2017, chooses: bool = True):
    """Read every image once, so that a bad one stops the run now and not in an hour; each process reads its share.

    Args:
        splits: By name; one with bad images is replaced, if such images may be left out.
        args: Of the program.
        accelerator: Accelerate's.
        data_config: Of the network: keep the crops of validation and test images, which need not be read again then.
        task: Whose labels the splits have.
        chooses: Whether the validation images choose something, for which they need each class.
    """
    for name, split in splits.items():
        if isinstance(split, StreamedSplit):  # told when they arrive
            continue
        bar = partial(tqdm, desc=f'checking {name} images', leave=False, disable=not accelerator.is_local_main_process)
        rows = list(dict.fromkeys(_own_rows(len(split), accelerator)))
        masks = args.lesion_crop or (name == 'train' and learns_masks(args, split))
        if name == 'train' or data_config is None:
            bad = unreadable_images(split, bar, masks, rows, args.workers)
        else:
            images, bad = _Crops(split, args, data_config['input_size'][-1], task), {}
            for row, cut, reason in bar(readings(images.cut, rows, args.workers)):
                if reason:
                    bad[row] = reason
                else:
                    images.keep(row, cut)
        bad = dict(sorted(item for each in gather_object([bad]) for item in each.items()))
        if not bad:
            continue
        ids = [str(split[row]['image_id']) for row in list(bad)[:10]]
        named = ', '.join(ids) + (f' and {len(bad) - 10} more' if len(bad) > 10 else '')
        named += f' ({ids[0]}: {next(iter(bad.values()))})'
        if not args.skip_bad_images:
            raise DataError(f'{len(bad)} of {len(split)} {name} images{", or their masks," * masks} cannot be read: '
                            f'{named}. Fix them, or leave them out with --skip-bad-images.')
        accelerator.print(f'Leaving out {len(bad)} of {len(split)} {name} images that cannot be read: {named}')
        splits[name] = split.select([row for row in range(len(split)) if row not in bad])
        if split in _kept:
            _kept[splits[name]] = _kept[split]
    check_usable(splits, args.data, task, chooses)


def note_squares(splits, args, accelerator):
    """Say so where images may have been squashed: the first ones are exactly square, and no aspect_ratio is there."""
    name, split = next(iter(splits.items()))
    if args.data in DEMO_TASKS or args.aspect == 'squash' or (
            isinstance(split, StreamedSplit) or 'aspect_ratio' in split.column_names):
        return
    sizes = [stored_size(cell) for cell in split.select(range(min(len(split), SQUARES)))['image']]
    if all(width == height for width, height in sizes):
        accelerator.print(f'The first {len(sizes)} {name} images of {args.data} are exactly square. If they were '
                          f'squashed, add a column aspect_ratio, the width / height of the originals: their shape is '
                          f'restored then.')


def has_masks(split):
    """Whether any image of a split has a mask of its lesion; of a stream only the column is known."""
    if isinstance(split, StreamedSplit):
        return 'mask' in split.stream.features
    return 'mask' in split.column_names and any(
        table['mask'].null_count < len(table) for table in split.select_columns('mask').with_format('arrow').iter(100))


def learns_masks(args, split):
    """Whether lesion masks are learned beside the diagnoses: if they are asked for, and there are any."""
    return bool(getattr(args, 'mask_weight', 0)) and has_masks(split)


def check_learnable(args, splits, accelerator, task: Task = ISIC2017):
    """Refuse a training split without one of the classes, or with too few images for the processes, and --lesion-crop
    without masks to crop to.

    Raises:
        DataError: Any of these.
    """
    train = splits['train']
    labels = label_array(train.table if isinstance(train, StreamedSplit) else train, task)
    of_a_fold = len(labels) * (args.folds - 1) // args.folds if args.folds else len(labels)
    processes = accelerator.num_processes
    if of_a_fold * args.patches_per_image < 2 * processes:
        fold = ' in a fold' * bool(args.folds)
        raise DataError(f'{args.data} has {of_a_fold} images to train on{fold}, and each process needs two (there are '
                        f'{processes}): add images, or start fewer processes.')
    for label, column in zip(task.labels, labels.T):
        if column.min() == column.max():
            raise DataError(f'{args.data}, split train, has {int(column.sum())} images of {label_words(label)} out of '
                            f'{len(column)}: training needs images with it and images without it.')
    without = [name for name, split in splits.items() if not has_masks(split)] if args.lesion_crop else []
    if 'train' in without:
        raise DataError(f'--lesion-crop needs lesion masks, but the train images of {args.data} have none: leave it '
                        f'out, or pass --no-lesion-crop where the recipe sets it.')
    if without:
        accelerator.print(f'The {" and ".join(without)} images have no masks: --lesion-crop leaves them whole.')


def epoch_sides(args, img_size) -> List[int]:
    """Side of the training images in each epoch: from --start-size to img_size in steps of 32 px."""
    start, last = args.start_size or img_size, args.epochs - 1
    sides = [start + 32 * round((img_size - start) * epoch / max(last, 1) / 32) for epoch in range(last)]
    return [*(img_size if img_size - side < 32 else side for side in sides), img_size]


def image_loader(args, split, data_config, accelerator, training=False, task: Task = ISIC2017, groups=''):
    """Batches of one split: its crops in the order of its rows or, when training, augmented in the epoch's order."""
    if not training:
        return CropLoader(args, split, data_config, accelerator, task, groups)
    mean_std = data_config['mean'], data_config['std']
    sides = epoch_sides(args, data_config['input_size'][-1])
    transforms = {side: train_transform(side, *mean_std, args.augmentation) for side in set(sides)}
    shown = dict(transform=[transforms[side] for side in sides], with_masks=learns_masks(args, split), **_look(args))
    streamed = isinstance(split, StreamedSplit)
    batches = EpochBatches(
        torch.from_numpy(label_array(split.table if streamed else split, task)), args.batch_size, args.seed,
        args.patches_per_image, args.balance == 'sampler', accelerator.num_processes, accelerator.process_index,
        task)
    if streamed:
        images = IsicStream(split, batches, skip_bad_images=args.skip_bad_images, **shown)
        loader = DataLoader(images, batch_size=None, **_workers(images.workers(args.workers)))
    else:
        loader = DataLoader(IsicSplit(split, task=task, **shown), batch_sampler=batches, **_workers(args.workers))
    # the batches know the processes; Accelerate would show some images twice to make them even
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
                               dispatch_batches=False, non_blocking=torch.cuda.is_available())


class CropLoader:
    """Batches of a validation or test split: crops, shape (B, K, 3, H, W), and row numbers, for one process.

    The crops are kept as 8 bits, so that images are read once, where those of the split take at most MEMORY_SHARE of
    the available memory. They are normalised on the device.
    """

    def __init__(self, args, split, data_config, accelerator, task: Task = ISIC2017, groups: str = '') -> None:
        img_size, mean_std = data_config['input_size'][-1], (data_config['mean'], data_config['std'])
        transform = eval_transform(img_size, *mean_std, args.crops)
        self.dataset = IsicSplit(split, transform, task=task, groups=groups, every_epoch=False, **_look(args))
        self.images = _Crops(split, args, img_size, task)
        self.rows = _own_rows(len(split), accelerator)
        self.normalise, self.device, self.batch_size = normalisation(*mean_std), accelerator.device, args.batch_size
        self.loader = self._loader(args.workers)

    def _loader(self, workers: int) -> DataLoader:
        return DataLoader(self.images, self.batch_size, sampler=self.rows, **_workers(workers))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        read = [row for row in self.rows if not self.images.has(row)]
        if not read and self.loader.num_workers:
            self.loader = self._loader(0)
        for crops, rows in self.loader:
            if read:
                for row, cut in zip(rows.tolist(), crops):
                    self.images.keep(row, cut)
            crops, rows = (t.to(self.device, non_blocking=torch.cuda.is_available()) for t in (crops, rows))
            yield self.normalise(crops), rows


@torch.inference_mode()
def predict(accelerator, model, loader, description, task: Task = ISIC2017):
    """Probabilities of every image, shape (N, labels), in the order of the split: the means over its crops.

    The task is that of the network, its head included.
    """
    model.eval()
    probabilities, rows = [], []
    for crops, row in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        with accelerator.autocast():
            logits = model(crops.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        mean = task.probabilities(logits).unflatten(0, crops.shape[:2]).mean(1)
        gathered = accelerator.gather((mean, row))
        probabilities.append(gathered[0])
        rows.append(gathered[1])
    _, first = np.unique(torch.cat(rows).cpu(), return_index=True)  # each row once, in order
    return torch.cat(probabilities).cpu()[first]


class _Crops(IsicSplit):
    """The crops of a split as 8 bits: (K, 3, H, W) and the row number; from memory, where they are kept."""

    def __init__(self, split, args, img_size, task: Task) -> None:
        super().__init__(split, EvalCrops(img_size, args.crops), task=task, every_epoch=False, **_look(args))
        look = {**_look(args), 'seed': args.seed if args.crops == 'paper' else None}  # which alone draws its crops
        settings = img_size, args.crops, *look.values()
        if split not in _kept or _kept[split][0] != settings:
            _kept[split] = settings, {}
        self.kept = _kept[split][1]

    def __getitem__(self, row: int) -> Tuple[torch.Tensor, int]:
        return self.kept[self.image_ids[row]] if self.has(row) else self.cut(row), row

    def has(self, row: int) -> bool:
        return self.image_ids[row] in self.kept

    def cut(self, row: int) -> torch.Tensor:
        return self.shown(row)[0]

    def keep(self, row: int, crops: torch.Tensor) -> None:
        """Keep the crops of an image, if those of all images fit."""
        if self.kept or crops.nbytes * len(self) <= available_memory() * MEMORY_SHARE:
            self.kept[self.image_ids[row]] = crops.clone()  # not in memory that is shared with a worker


def shown_as(args, data_config) -> Dict[str, Any]:
    """How images were shown to a network when its thresholds were chosen, as home.json keeps it."""
    return {'img_size': data_config['input_size'][-1],
            **{name: getattr(args, name) for name in ('crops', 'aspect', 'grey_world', 'lesion_crop')}}


def _look(args) -> Dict[str, Any]:
    return dict(seed=args.seed, keep_aspect=args.aspect == 'keep', colour_constancy=args.grey_world,
                crop_to_lesion=args.lesion_crop)


def _workers(count: int) -> Dict[str, Any]:
    # a generator of its own: each pass that starts draws a number, and dropout must not depend on how many did
    return dict(num_workers=count, persistent_workers=count > 0, pin_memory=torch.cuda.is_available(),
                generator=torch.Generator())


def _own_rows(count: int, accelerator) -> List[int]:
    """Every n-th row, for the n-th process; as many for each process, for which some begin again at the first row."""
    n = accelerator.num_processes
    return [row % count for row in range(accelerator.process_index, -(-count // n) * n, n)]
