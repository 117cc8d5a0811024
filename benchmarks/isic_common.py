"""What finetune_isic.py and evaluate_isic.py share: the accelerator, the images, the probabilities."""
import argparse
import json
import math
import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_arl.isic.dataset import DataError, StreamedSplit, check_usable, label_array, unreadable_images
from timm_arl.isic.loading import EpochBatches, IsicSplit, IsicStream
from timm_arl.isic.outputs import probabilities_of
from timm_arl.isic.transforms import eval_transform, train_transform


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def number(kind, low, high=math.inf):
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return kind(text)
    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


def check_output_dir(out):
    """Refuse, before the work, an output folder that could not be made or written to after it."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f'Cannot make the output folder {out}: {there} '
                       + ('cannot be written to.' if there.is_dir() else 'is a file.'))


def make_output_dir(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f'Cannot make the output folder {out}: {error.strerror}.') from error


def create_accelerator(args):
    # a bare Accelerator() on a machine without an accelerator forms no process group
    on_cpu = not torch.accelerator.is_available()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.tracker not in ('none', *trackers):
        raise RunError(f'Accelerate finds no tracker {args.tracker} here (it finds {", ".join(trackers)}): install its '
                       f'package, or pass --tracker none.')
    steps = args.gradient_accumulation_steps
    try:
        accelerator = Accelerator(
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps) if steps else None,
            mixed_precision=args.mixed_precision, cpu=on_cpu and int(os.environ.get('WORLD_SIZE', 1)) > 1,
            log_with=None if args.tracker == 'none' else args.tracker, project_dir='.')  # until out is known
    except ValueError as error:  # fp16 on mps, for one
        raise RunError(f'Accelerate refuses this configuration: {error}') from error
    if accelerator.num_processes != int(os.environ.get('WORLD_SIZE', 1)):
        raise RunError(f'{os.environ["WORLD_SIZE"]} processes were launched, but Accelerate sees '
                       f'{accelerator.num_processes}: launch with --multi_gpu, or with torchrun.')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    elif on_cpu and launched and accelerator.num_processes == 1 and torch.get_num_threads() == 1 < cores:
        torch.set_num_threads(cores)
        accelerator.print(f'OMP_NUM_THREADS is 1, which accelerate launch sets by itself: using all {cores} cores '
                          f'(--cpu-threads 1 keeps to one).')
    args.cpu_threads = torch.get_num_threads()  # the sums of a resumed run must be split in the same way
    return accelerator


def check_images(splits, args, accelerator):
    """Decode every image once, so that a bad one stops the run now and not in an hour."""
    for name in splits:
        if isinstance(splits[name], StreamedSplit):  # told when they arrive
            continue
        bad = unreadable_images(splits[name], partial(
            tqdm, desc=f'checking {name} images', leave=False, disable=not accelerator.is_local_main_process),
            masks=args.lesion_crop or (name == 'train' and learns_masks(args, splits[name])))
        if not bad:
            continue
        ids = [splits[name][row]['image_id'] for row in bad[:10]]
        named = ', '.join(map(str, ids)) + (f' and {len(bad) - 10} more' if len(bad) > 10 else '')
        if not args.skip_bad_images:
            masks = ', or their masks,' * (args.lesion_crop or learns_masks(args, splits[name]))
            raise DataError(f'{len(bad)} of {len(splits[name])} {name} images{masks} do not decode: {named}; mend them '
                            f'or leave them out with --skip-bad-images.')
        accelerator.print(f'Leaving out {len(bad)} of {len(splits[name])} {name} images that do not decode: {named}')
        splits[name] = splits[name].select(sorted(set(range(len(splits[name]))) - set(bad)))
    check_usable(splits, args.data)


def check_not_empty(args):
    """Refuse options given as '', as an unset variable of a shell gives them."""
    for name, value in vars(args).items():
        if value == '':
            raise RunError(f'--{name.replace("_", "-")} is empty: give it a value, or leave it out.')


def path_of(checkpoint):
    """Where a checkpoint is, if it is on this disk."""
    return Path(checkpoint[10:] if checkpoint.lower().startswith('local-dir:') else checkpoint)


def arguments_of(checkpoint):
    """The arguments of the run that a checkpoint is from, by the run.json of finetune_isic.py beside or above it."""
    path = path_of(checkpoint).absolute()
    for folder in (path, *path.parents[:3]) if path.exists() else ():  # OUT, OUT/model.safetensors, OUT/last/kept
        try:
            saved = json.loads((folder / 'run.json').read_text(encoding='utf-8'))['arguments']
        except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
            continue
        if isinstance(saved, dict) and 'train_ids' in saved:
            return saved
    return {}


def learns_masks(args, split):
    """Whether masks of the lesions are learned beside the diagnoses: where they are asked for, and there are any."""
    columns = split.stream.features if isinstance(split, StreamedSplit) else split.column_names
    return bool(getattr(args, 'mask_weight', 0)) and 'mask' in columns


def image_loader(args, split, data_config, accelerator, training=False):
    """A prepared DataLoader of one split, in the order of its rows; when training, in that of the epoch, augmented."""
    img_size, mean_std = data_config['input_size'][-1], (data_config['mean'], data_config['std'])
    shown = dict(
        transform=train_transform(img_size, *mean_std, args.augmentation) if training
        else eval_transform(img_size, *mean_std, args.crops), seed=args.seed, keep_aspect=args.aspect == 'keep',
        colour_constancy=args.grey_world, crop_to_lesion=args.lesion_crop, every_epoch=training,
        with_masks=training and learns_masks(args, split))
    options = dict(num_workers=args.workers, pin_memory=torch.cuda.is_available())
    if not training:
        return accelerator.prepare(DataLoader(IsicSplit(split, **shown), args.batch_size, **options))
    streamed = isinstance(split, StreamedSplit)
    batches = EpochBatches(
        torch.from_numpy(label_array(split.table if streamed else split)), args.batch_size, args.seed,
        args.patches_per_image, args.balance == 'sampler', accelerator.num_processes, accelerator.process_index)
    if streamed:
        images = IsicStream(split, batches, skip_bad_images=args.skip_bad_images, **shown)
        options['num_workers'] = images.workers(args.workers)
        loader = DataLoader(images, batch_size=None, **options)
    else:
        loader = DataLoader(IsicSplit(split, **shown), batch_sampler=batches, **options)
    # the batches know the processes; Accelerate would show some images twice to make them even
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
                               dispatch_batches=False)


@torch.inference_mode()
def predict(accelerator, model, loader, description):
    """Probabilities of every image, shape (N, 2), in the order of the split: the means over its crops."""
    model.eval()
    probabilities, rows = [], []
    for crops, _, row in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        logits = model(crops.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        mean = probabilities_of(logits).unflatten(0, crops.shape[:2]).mean(1)
        gathered = accelerator.gather_for_metrics((mean, row))
        probabilities.append(gathered[0].cpu())
        rows.append(gathered[1].cpu())
    return torch.cat(probabilities)[torch.cat(rows).argsort()]
