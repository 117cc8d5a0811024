"""What finetune_isic.py and evaluate_isic.py share: the accelerator, the images, the probabilities."""
import argparse
import math
import os
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import get_available_trackers
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_arl.isic.dataset import DataError, EpochBatches, IsicSplit, unreadable_images
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


def create_accelerator(args):
    # a bare Accelerator() on a machine without an accelerator forms no process group
    on_cpu = not torch.accelerator.is_available()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.tracker not in ('none', *trackers):
        raise RunError(f'Accelerate finds no tracker {args.tracker} here (it finds {", ".join(trackers)}): install its '
                       f'package, or pass --tracker none.')
    try:
        accelerator = Accelerator(
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
        bad = unreadable_images(splits[name], partial(
            tqdm, desc=f'checking {name} images', leave=False, disable=not accelerator.is_local_main_process))
        if not bad:
            continue
        ids = [splits[name][row]['image_id'] for row in bad[:10]]
        named = ', '.join(map(str, ids)) + (f' and {len(bad) - 10} more' if len(bad) > 10 else '')
        if not args.skip_bad_images:
            raise DataError(f'{len(bad)} of {len(splits[name])} {name} images do not decode: {named}; mend them or '
                            f'leave them out with --skip-bad-images.')
        accelerator.print(f'Leaving out {len(bad)} of {len(splits[name])} {name} images that do not decode: {named}')
        splits[name] = splits[name].select(sorted(set(range(len(splits[name]))) - set(bad)))


def image_loader(args, split, data_config, accelerator, training=False):
    """A prepared DataLoader of one split, in the order of its rows; when training, in that of the epoch, augmented."""
    img_size, mean_std = data_config['input_size'][-1], (data_config['mean'], data_config['std'])
    images = IsicSplit(
        split, train_transform(img_size, *mean_std, args.augmentation) if training
        else eval_transform(img_size, *mean_std, args.crops), args.seed, keep_aspect=args.aspect == 'keep',
        colour_constancy=args.grey_world, crop_to_lesion=args.lesion_crop, every_epoch=training)
    options = dict(num_workers=args.workers, pin_memory=torch.cuda.is_available())
    if not training:
        return accelerator.prepare(DataLoader(images, args.batch_size, **options))
    batches = EpochBatches(
        images.labels, args.batch_size, args.seed, args.patches_per_image, args.balance == 'sampler',
        accelerator.num_processes, accelerator.process_index)
    # the batches know the processes; Accelerate would show some images twice to make them even
    return prepare_data_loader(
        DataLoader(images, batch_sampler=batches, **options), accelerator.device, num_processes=1, process_index=0,
        put_on_device=True)


@torch.inference_mode()
def predict(accelerator, model, loader, description):
    """Probabilities of every image, shape (N, 2), in the order of the split: the means over its crops."""
    model.eval()
    probabilities, rows = [], []
    for crops, _, row in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        logits = model(crops.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        mean = logits.sigmoid().unflatten(0, crops.shape[:2]).mean(1)
        gathered = accelerator.gather_for_metrics((mean, row))
        probabilities.append(gathered[0].cpu())
        rows.append(gathered[1].cpu())
    return torch.cat(probabilities)[torch.cat(rows).argsort()]
