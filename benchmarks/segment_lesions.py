#!/usr/bin/env python3
"""Learn lesion masks, and copy a data set with predicted masks for its validation and test images.

    python benchmarks/segment_lesions.py --data path/to/isic2017 --output-dir SEG
    accelerate launch benchmarks/finetune_isic.py --data SEG/data --lesion-crop --model arl_cnn14

The network is DeepLabV3+ of segmentation-models-pytorch on a timm encoder. It learns from the masks of the train split,
by Dice loss and binary cross-entropy. Images are squashed to a square, so that it sees all of each. Of each predicted
mask the largest connected part is kept. Validation gives Dice and IoU, means over its images; the test split chooses
nothing. The output folder receives
    config.json, model.safetensors   the kept epoch: segmentation_models_pytorch.from_pretrained('OUT')
    summary.csv                      one row per epoch: loss, Dice, IoU, learning rate
    metrics.json                     Dice and IoU with 95 % intervals, keyed by split
    data/                            the data set again, image bytes unchanged; train keeps its own masks
    run.json                         command, arguments, versions, commit
    last/                            the state that --resume continues from
"""
import math
import shlex
import shutil
import sys
import time
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import datasets
import numpy as np
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, gather_object, set_seed
from PIL import Image
from scipy.ndimage import label as connected_parts
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from timm_arl.download import WeightsError
from timm_arl.factory import create_for_task, load_weights_file
from timm_arl.files import write_json
from timm_arl.isic.dataset import DataError, load_splits
from timm_arl.isic.dataset.masks import write_with_masks
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.dataset.splits import prepared_record
from timm_arl.isic.intervals import percentile_interval, resampled_indices
from timm_arl.isic.loading import EpochBatches, IsicSplit
from timm_arl.isic.metrics import interval_text
from timm_arl.isic.selection import kept_epoch
from timm_arl.isic.transforms import EVAL_GAP, Transform, normalisation, train_transform
from timm_arl.pretrained import check_file, check_fit
from timm_arl.training.accelerator import create_accelerator
from timm_arl.training.arguments import RunError, check_not_empty, number, program_parser
from timm_arl.training.images import check_images
from timm_arl.training.options import resumed_args
from timm_arl.training.runs import (
    FolderTaken,
    check_no_other_run,
    check_output_dir,
    discard_start,
    load_progress,
    prepare_output_dir,
    release_folders,
    save_progress,
)

STRIDE = 16  # of the encoder's last feature maps: the side of its images is a multiple of it
SETTINGS = dict(  # of finetune_isic.py, which are no flags here
    lesion_crop=True, mask_weight=1., streaming=False, tracker='none', gradient_accumulation_steps=None, folds=0,
    seeds=None)


def build_parser():
    parser = program_parser(__doc__, '--data DIR --output-dir OUT')
    add = parser.add_argument
    add('--data', metavar='DIR|HUB_ID', help='folder or Hub id with lesion masks, as for finetune_isic.py')
    add('--output-dir', metavar='OUT', help='folder for the results')
    add('--resume', action='store_true',
        help='continue the run in --output-dir with the arguments it was started with')
    add('--encoder', default='tu-tf_efficientnet_lite0', metavar='tu-NAME',
        help='timm model that computes the features, with the prefix tu- (default: %(default)s)')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--encoder-weights', default='hub', metavar='FILE.safetensors|hub|none',
                       help="the encoder starts from a file of timm's weights, from those of the Hub, or from random "
                            "ones (default: %(default)s)")
    start.add_argument('--init-checkpoint', metavar='OUT',
                       help='start from the network in the output folder of another run of this program')
    add('--epochs', type=number(int, 1), default=20,
        help='passes over the training images that have a mask (default: %(default)s)')
    add('--img-size', type=number(int, 64), default=192,
        help=f'side of the training images in pixels, a multiple of {STRIDE}; whole images get 4/3 of it '
             f'(default: %(default)s)')
    add('--batch-size', type=number(int, 2), default=16, help='images per process and step (default: %(default)s)')
    add('--lr', type=number(float, 1e-12), default=1e-3, help='peak learning rate of AdamW (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), default=0.01,
        help='weight decay, not applied to biases and norms (default: %(default)s)')
    add('--keep', choices=['best', 'last'], default='best',
        help='epoch to keep: the best by mean validation Dice, or the last (default: %(default)s)')
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0,
        help='seed of initial weights, image order and augmentation (default: %(default)s)')
    add('--skip-bad-images', action='store_true', help='leave out images that cannot be read instead of stopping')
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1), help='threads per process')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    parser.set_defaults(masked_ids=None, **SETTINGS)
    return parser


def parse_args(parser):
    args = parser.parse_args()
    check_not_empty(args)
    if args.resume:
        args = resumed_args(parser, sys.argv[1:], args.output_dir)
    for name in ('data', 'output_dir'):
        if getattr(args, name) is None:
            raise RunError(f'--{name.replace("_", "-")} is missing: it is always needed, except --data with --resume.')
    if args.img_size % STRIDE:
        raise RunError(f'--img-size must be a multiple of {STRIDE}, not {args.img_size}.')
    if not args.encoder.startswith('tu-'):
        raise RunError(f'--encoder {args.encoder} must be the name of a timm model with the prefix tu-: try '
                       f'tu-{args.encoder}.')
    return args


def create_network(args):
    """The network in its starting state, and timm's data config of its encoder."""
    set_seed(args.seed)
    name = args.encoder.removeprefix('tu-')
    model = create_for_task(name)  # an unknown one is told here
    data_config = {**resolve_model_data_config(model), 'input_size': (3, args.img_size, args.img_size)}
    try:
        network = smp.DeepLabV3Plus(args.encoder, encoder_weights=None, encoder_output_stride=STRIDE)
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, args.img_size, args.img_size))
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
        raise RunError(f'--encoder {args.encoder} gives no feature maps that DeepLabV3+ can use for images of '
                       f'{args.img_size} px: {" ".join(str(error).split())}') from error
    if args.init_checkpoint:
        file = check_file(Path(args.init_checkpoint))
        weights = safetensors.torch.load_file(file)
        check_fit(weights, network, file)
        network.load_state_dict(weights, strict=False)
    elif args.encoder_weights != 'none':
        load_encoder(network.encoder.model, name, args.encoder_weights)
    return network.to(memory_format=torch.channels_last), data_config


def load_encoder(encoder, name, weights):
    """Give an encoder the weights of the timm model that it is the body of."""
    if weights == 'hub':
        try:
            model = create_for_task(name, pretrained=True)
        except WeightsError as error:
            reason = error.cause if error.repo else str(error).partition(':')[0]
            raise RunError(f'--encoder-weights hub: {reason}; pass a .safetensors file, or none for random '
                           f'weights.') from error
    else:
        model = create_for_task(name)
        load_weights_file(model, weights)
    given = {key.replace('.', '_'): tensor for key, tensor in model.state_dict().items()}  # timm flattens some names
    own = {key: key.replace('.', '_') for key in encoder.state_dict()}
    given = {key: given[flat] for key, flat in own.items() if flat in given}
    check_fit(given, encoder, f'--encoder-weights {weights}')
    encoder.load_state_dict(given, strict=False)


class WholePicture:
    """All of a picture in a square, for IsicSplit; its mask stays as large as the picture was decoded.

    The square is larger than a training image, which shows a part: lesions then have the size that they have in those
    on average, which is 1.15 / 0.875 (zoom, and the share that a crop shows).
    """

    def __init__(self, img_size, mean, std):
        side = math.ceil(img_size * 4 / 3 / STRIDE) * STRIDE
        self.shorter_side = EVAL_GAP * side
        self.look = v2.Compose([v2.Resize((side, side)), v2.ToImage(), normalisation(mean, std)])

    def __call__(self, image, mask):
        return self.look(image), mask


def training_batches(args, masked, mean, std, accelerator):
    """Batches of all of the pictures in a square, augmented as in finetune_isic.py, and of their masks."""
    augment = train_transform(args.img_size, mean, std)
    square = v2.Resize((augment.shorter_side, augment.shorter_side))
    images = IsicSplit(masked, Transform([square, *augment.transforms], augment.shorter_side), args.seed,
                       keep_aspect=False, with_masks=True)
    batches = EpochBatches(images.labels, args.batch_size, args.seed, processes=accelerator.num_processes,
                           rank=accelerator.process_index)
    loader = DataLoader(images, batch_sampler=batches, num_workers=args.workers, persistent_workers=args.workers > 0,
                        pin_memory=torch.cuda.is_available())
    # the batches know the processes; Accelerate would show some images twice to make them even
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)


def masked_rows(split):
    """Rows of the images that have a mask."""
    if 'mask' not in split.column_names:
        return []
    return np.flatnonzero(split.select_columns('mask').with_format('arrow')[:]['mask'].is_valid()).tolist()


def check_masks(args, splits, accelerator):
    """Refuse too few images with masks."""
    # the norm behind the network's global pooling cannot learn from a batch of one image
    for name, least, why in (('train', 2 * accelerator.num_processes, 'to learn from'),
                             ('validation', 1, 'to compare with')):
        known = len(masked_rows(splits[name]))
        if known < least:
            raise DataError(f'{args.data}, split {name}, has {known} lesion masks (column mask) that can be used, but '
                            f'at least {least} are needed {why}.')


def largest_part(lesion):
    """The largest connected part of a mask: a speck elsewhere would widen the box that --lesion-crop cuts."""
    parts, count = connected_parts(lesion)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count > 1 else lesion


@torch.inference_mode()
def segment(accelerator, network, images, workers, description):
    """Find the lesion in each image of a split; each process takes its share.

    Returns:
        Masks, as large as the pictures, in the order of the split; and numbers of pixels that are true positive, false
        positive, false negative and true negative, shape (N, 4), of the N images whose mask is known.
    """
    network.eval()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(Subset(images, own), batch_size=None, num_workers=workers)
    found = []
    for image, _, row, truth in tqdm(loader, desc=description, leave=False,
                                     disable=not accelerator.is_local_main_process):
        image = image[None].to(accelerator.device).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = network(image)
        logits = interpolate(logits.float(), truth.shape[-2:], mode='bilinear')
        lesion = largest_part((logits[0, 0] > 0).cpu().numpy())
        counts = None if truth.isnan().any() else torch.cat(smp.metrics.get_stats(
            torch.from_numpy(lesion)[None, None].long(), (truth[None] > 0.5).long(), mode='binary')).flatten().tolist()
        found.append((row, Image.fromarray(lesion), counts))
    found = sorted(gather_object(found), key=lambda each: each[0])
    return [mask for _, mask, _ in found], [counts for *_, counts in found if counts]


def mean_scores(counts, seed):
    """Dice and IoU: means over the images, with bootstrap intervals."""
    scores, samples = {'images': len(counts)}, resampled_indices(len(counts), seed=seed)
    for name, score in (('dice', smp.metrics.f1_score), ('iou', smp.metrics.iou_score)):
        values = score(*torch.tensor(counts).T[..., None], reduction='none').flatten().numpy()
        scores[name] = float(values.mean())
        scores[f'{name}_ci95'] = percentile_interval(values[samples].mean(1))
    return scores


def scores_text(scores):
    return ', '.join(f'{words} {interval_text(scores[name], scores[f"{name}_ci95"])}'
                     for name, words in (('dice', 'Dice'), ('iou', 'IoU')))


def train(args, accelerator, splits, out, network, data_config):
    """Train the network, choose its epoch on validation, and write the data set with its masks."""
    start_time = time.time()
    set_seed(args.seed)
    mean_std = data_config['mean'], data_config['std']
    masked = splits['train'].select(masked_rows(splits['train']))
    loader = training_batches(args, masked, *mean_std, accelerator)
    whole = {name: IsicSplit(splits[name], WholePicture(args.img_size, *mean_std), keep_aspect=False, with_masks=True)
             for name in ('validation', 'test')}
    optimizer = create_optimizer_v2(network, 'adamw', lr=args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(model, keep_torch_compile=False)
    steps = len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', args.epochs, min_lr=args.lr * 1e-2, warmup_lr=args.lr * 1e-2,
        warmup_epochs=min(1, args.epochs / 5), step_on_epochs=False, updates_per_epoch=steps)
    dice_loss = smp.losses.DiceLoss('binary')

    summary = prepare_output_dir(args, accelerator, out, 'validation_dice')
    if summary:
        load_progress(accelerator, network, False, out)
        accelerator.print(f'Resuming after epoch {len(summary)} of {args.epochs}.')
    accelerator.print(
        f'DeepLabV3+ on {args.encoder}, {args.epochs} epochs, {args.img_size} px, {len(masked)} train images with '
        f'masks, {accelerator.num_processes} process(es) on {accelerator.device.type}, mixed precision '
        f'{accelerator.mixed_precision}, lr {args.lr:g}, seed {args.seed}\nOutput folder: {out}')

    for epoch in range(len(summary), args.epochs):
        epoch_start = time.time()
        model.train()
        loader.set_epoch(epoch)  # of its batches and its images
        total_loss = torch.zeros((), device=accelerator.device)
        bar = tqdm(loader, desc=f'epoch {epoch + 1}/{args.epochs}', leave=False,
                   disable=not accelerator.is_local_main_process)
        for step, (images, _, rows, masks) in enumerate(bar):
            update = epoch * steps + step
            scheduler.step_update(update)
            # dropout is that of the step, however many workers draw from the generator, before and after a resumption
            torch.manual_seed(args.seed + update * accelerator.num_processes + accelerator.process_index)
            logits = model(images.contiguous(memory_format=torch.channels_last)).float()
            loss = dice_loss(logits, masks) + binary_cross_entropy_with_logits(logits, masks)
            value = loss.item()
            if not math.isfinite(value):
                ids = ', '.join(masked['image_id'][row] for row in rows.tolist())
                raise RunError(f'The loss is {value} at epoch {epoch + 1}, step {step + 1}; lower --lr, or look at the '
                               f'images of this batch: {ids}')
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total_loss += loss.detach()
            bar.set_postfix(loss=f'{value:.3f}')

        # Validation chooses the epoch to keep
        if accelerator.num_processes > 1:  # each has batch statistics of its own, but one network is kept
            for buffer in network.buffers():
                buffer.copy_(broadcast(buffer))
        _, counts = segment(accelerator, network, whole['validation'], args.workers, 'validation')
        scores = mean_scores(counts, args.seed)
        train_loss = accelerator.reduce(total_loss, 'mean').item() / steps
        summary.append({
            'epoch': epoch + 1, 'train_loss': train_loss,
            **{f'validation_{name}': scores[name] for name in ('dice', 'iou')}, 'lr': optimizer.param_groups[0]['lr']})
        keep = kept_epoch(summary, args.keep, 'validation_dice') == epoch
        save_progress(accelerator, network, False, out, summary, keep, type(network).save_pretrained)
        accelerator.print(
            f'epoch {epoch + 1}/{args.epochs}  loss {train_loss:.4f}  validation {scores_text(scores)}'
            + (' (best)' if keep and args.keep == 'best' else '') + f'  {time.time() - epoch_start:.0f} s')

    # The kept epoch finds the lesions of validation and test
    network.load_state_dict(safetensors.torch.load_file(out / 'model.safetensors'))
    metrics, masks = {}, {}
    for name, images in whole.items():
        masks[name], counts = segment(accelerator, network, images, args.workers, name)
        metrics[name] = {'empty_masks': sum(not mask.getbbox() for mask in masks[name])}
        if counts:  # of test they need not be known
            metrics[name].update(mean_scores(counts, args.seed))
    if accelerator.is_main_process:
        datasets.disable_progress_bars()  # of each shard
        write_with_masks(out / 'data', splits, masks, card=(
            f'# Lesion masks by a network\n\nCopy of {Path(args.data).name}. The masks of {" and ".join(masks)} are '
            f"predicted by DeepLabV3+ on {args.encoder}; those of train are the data set's own. On validation: "
            f'{scores_text(metrics["validation"])}.\n\nMade by `{shlex.join(["python", *sys.argv])}`. The licence is '
            f'that of the source.'))
        if Path(args.data, 'duplicates.csv').is_file():  # which finetune_isic.py --folds looks for
            shutil.copy(Path(args.data, 'duplicates.csv'), out / 'data')
        if prepared_record(args.data):
            write_json(out / 'data' / 'prepare.json', prepared_record(args.data))
        write_json(out / 'metrics.json', metrics)
    kept = summary[kept_epoch(summary, args.keep, 'validation_dice')]
    choice = f'the best of {len(summary)} by validation Dice' if args.keep == 'best' else 'the last'
    accelerator.print(f'Means over the images [95 % interval] of epoch {kept["epoch"]}, {choice}')
    for name, scores in metrics.items():
        accelerator.print(f'  {name:10}  ' + (scores_text(scores) if 'dice' in scores else 'no masks to compare with')
                          + f'; {scores["empty_masks"]} of {len(masks[name])} images have an empty mask')
    accelerator.print(
        f'{time.time() - start_time:.0f} s. In {out}: model.safetensors and config.json (epoch {kept["epoch"]}), '
        f'summary.csv, metrics.json, data/, run.json, last/\n'
        f'Use it: python benchmarks/finetune_isic.py --data {shlex.quote(str(out / "data"))} --lesion-crop')
    accelerator.wait_for_everyone()


def main():
    parser, out = build_parser(), None
    try:
        args = parse_args(parser)
        folder = Path(args.output_dir)
        if args.resume and (folder / 'metrics.json').exists():
            print(f'This run is finished: {folder} holds its results.')
            return
        accelerator = create_accelerator(args)
        check_output_dir(folder)
        check_no_other_run(args, folder)
        if not args.resume and (folder / 'data').exists():
            raise FolderTaken(f'{folder} already holds a folder data, perhaps a data set: choose another --output-dir.')
        network, data_config = create_network(args)
        splits = load_splits(args.data)
        check_masks(args, splits, accelerator)
        digest = ids_digest(splits['train']['image_id'])
        if args.resume and args.masked_ids != digest:
            raise RunError(f'The run in {folder} had other training images than {args.data} has now: start another run '
                           f'in another --output-dir.')
        args.masked_ids = digest
        check_images(splits, args, accelerator)  # and their masks, as for --lesion-crop
        check_masks(args, splits, accelerator)  # of those that can be read
        out = folder
        train(args, accelerator, splits, out, network, data_config)
        accelerator.end_training()
    except Exception as error:  # whatever it is, a start that failed must not block its folder
        if out and accelerator.is_main_process and not (args.resume or isinstance(error, FolderTaken)):
            discard_start(out)
        if not isinstance(error, (RunError, DataError, WeightsError, OSError)):
            raise
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted' + (
            f': --resume --output-dir {out} continues after the last finished epoch' if out else '') + '.\n')
    finally:
        release_folders()


if __name__ == '__main__':
    main()
