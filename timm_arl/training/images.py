"""The images of a run: checked, loaded, and what a network says of them."""
from functools import partial

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..isic.dataset import DataError, StreamedSplit, check_usable, label_array
from ..isic.images import unreadable_images
from ..isic.loading import EpochBatches, IsicSplit, IsicStream
from ..isic.task import probabilities_of
from ..isic.transforms import eval_transform, train_transform

__all__ = ['check_images', 'image_loader', 'learns_masks', 'predict']


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
