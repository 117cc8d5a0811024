#!/usr/bin/env python3
"""Fine-tune a timm model on ISIC 2017 Part 3 (melanoma, seborrheic keratosis) with Accelerate.

    accelerate launch benchmarks/finetune_isic.py --data path/to/isic2017 --model arl_cnn14 --epochs 15
    accelerate launch benchmarks/finetune_isic.py                            # on synthetic images, no download

Two sigmoid outputs, binary cross-entropy, AdamW, one epoch of warm-up, cosine decay. The epoch with the best mean AUC
on the validation split is kept, and alone meets the test split, once. The output folder receives
    config.json, model.safetensors   the kept epoch: timm.create_model('local-dir:OUT', pretrained=True)
    summary.csv                      a row an epoch: losses, AUCs, learning rate, every alpha
    metrics.json                     scores with 95 % intervals, keyed by split
    predictions_validation.csv, predictions_test.csv
    run.json                         command, arguments, versions, commit
    last/                            what --resume goes on from
"""
import argparse
import copy
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import accelerate
import datasets
import numpy as np
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast_object_list, set_seed
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_arl
from timm_arl.isic import LABELS
from timm_arl.isic.dataset import SPLITS, DataError, IsicSplit, load_splits, unreadable_images
from timm_arl.isic.metrics import auc, auc_table, score_split
from timm_arl.isic.results import git_commit, replacing, write_json, write_predictions, write_rows
from timm_arl.isic.transforms import eval_transform, train_transform
from timm_arl.pretrained import WeightsError, create_for_task, load_weights_file


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default='demo', metavar='DIR|HUB_ID|demo',
        help="datasets folder or Hub id with the splits train, validation, test, or 'demo', generated synthetic images "
             '(default: %(default)s)')
    add('--model', default='arl_cnn14', help='any timm model (default: %(default)s)')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--pretrained', action='store_true', help="start from the model's pretrained weights")
    start.add_argument(
        '--init-checkpoint', metavar='PATH', help='start from a .safetensors file or a folder of this program')
    add('--epochs', type=number(int, 1), default=15, help='passes over the training images (default: %(default)s)')
    add('--batch-size', type=number(int, 1), default=32, help='images a process and step (default: %(default)s)')
    add('--lr', type=number(float, 1e-12), help='peak learning rate (default: 1e-3, or 1e-4 from existing weights)')
    add('--img-size', type=number(int, 64), help="side of the network's input in pixels (default: the model's own)")
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0,
        help='seed of weights, order and augmentation (default: %(default)s)')
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1),
        help='threads a process (default: what is set; all cores where accelerate launch set one for a lone process)')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    add('--skip-bad-images', action='store_true', help='leave out images that do not decode instead of stopping')
    add('--output-dir', help='(default: runs/MODEL-DATA-TIME)')
    add('--resume', action='store_true',
        help='go on with the run in --output-dir, with the arguments it was started with')
    return parser


def number(kind, low, high=math.inf):
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return kind(text)
    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


def parse_args(parser):
    args = parser.parse_args()
    if not args.resume:
        return args
    if not args.output_dir:
        raise RunError('--resume needs --output-dir, the folder of the run to go on with.')
    record = Path(args.output_dir, 'run.json')
    if not record.exists():
        raise RunError(f'There is no run to resume in {args.output_dir} (no run.json): start it without --resume.')
    saved = json.loads(record.read_text())['arguments']
    parser.set_defaults(**saved)
    args = parser.parse_args()
    for name, value in saved.items():
        if getattr(args, name) != value:
            flag = '--' + name.replace('_', '-')
            raise RunError(f'The run in {args.output_dir} has {flag} {value}, not {getattr(args, name)}: resume it '
                           f'without {flag}, or start another in another --output-dir.')
    return args


def create_accelerator(args):
    # a bare Accelerator() on a machine without an accelerator forms no process group
    on_cpu = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            cpu=on_cpu and int(os.environ.get('WORLD_SIZE', 1)) > 1,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
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
        accelerator.print(f'accelerate launch set one thread; using all {cores} cores (--cpu-threads 1 keeps to one).')
    args.cpu_threads = torch.get_num_threads()  # the sums of a resumed run must be split in the same way
    return accelerator


def check_forward(model, name, img_size):
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, img_size, img_size).contiguous(memory_format=torch.channels_last))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RunError(f'{name} does not take images of {img_size} px: {error}') from error


def check_images(splits, args, accelerator):
    """Decode every image once, so that a bad one stops the run now and not in an hour."""
    for name in SPLITS:
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


def prepare_output_dir(args, accelerator):
    """The output folder, and the summary of the epochs that are finished in it."""
    launch = {
        'processes': accelerator.num_processes,
        'mixed_precision': accelerator.mixed_precision,
        'gradient_accumulation_steps': accelerator.gradient_accumulation_steps,
        'device': accelerator.device.type,
    }
    name = f'{args.model}-{Path(args.data).name}-{time.strftime("%Y%m%d-%H%M%S")}'.replace('/', '-').replace(':', '-')
    out = Path(broadcast_object_list([args.output_dir or f'runs/{name}'])[0])
    traces = ('run.json', 'summary.csv', 'metrics.json', 'config.json', 'model.safetensors', 'last', 'last.previous')
    if not args.resume and any((out / trace).exists() for trace in traces):
        raise RunError(f'{out} already holds a run: go on with it by --resume, or choose another --output-dir.')
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f'Cannot make the output folder {out}: {error.strerror}.') from error
        if not (out / 'last').exists() and (out / 'last.previous').exists():
            (out / 'last.previous').rename(out / 'last')
        for leftover in ('last.previous', 'last.saving'):
            shutil.rmtree(out / leftover, ignore_errors=True)
        if not args.resume:
            write_json(out / 'run.json', {
                'command': shlex.join(sys.argv),
                'arguments': {k: v for k, v in vars(args).items() if k not in ('output_dir', 'resume', 'workers')},
                'launch': launch,
                'commit': git_commit(__file__),
                'versions': {m.__name__: m.__version__ for m in (timm_arl, timm, torch, accelerate, datasets)},
                'python': platform.python_version(),
            })
    accelerator.wait_for_everyone()
    if not args.resume:
        return out, []
    saved = json.loads((out / 'run.json').read_text())['launch']
    if launch != saved:
        raise RunError(f'The run in {out} was launched with {saved}, not {launch}: resume it in the same way.')
    progress = out / 'last' / 'progress.json'
    if not progress.exists():
        accelerator.print(f'No finished epoch to resume in {out}: starting with the first.')
        return out, []
    if accelerator.is_main_process:
        publish(out)
    return out, json.loads(progress.read_text())['summary']


def save_progress(accelerator, network, out, summary, best, data_config):
    """Replace last/ by the state after this epoch and the kept network; killed at any moment, one of them survives."""
    saving, last, previous = out / 'last.saving', out / 'last', out / 'last.previous'
    accelerator.save_state(saving)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if best:
            save_for_hf(
                copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format), saving / 'kept',
                safe_serialization=True, model_config=dict(label_names=list(LABELS)), data_config=data_config)
        else:
            shutil.copytree(last / 'kept', saving / 'kept')
        write_json(saving / 'progress.json', {'summary': summary})
        if last.exists():
            last.rename(previous)
        saving.rename(last)
        shutil.rmtree(previous, ignore_errors=True)
        publish(out)
    accelerator.wait_for_everyone()


def publish(out):
    """Bring the summary and the kept network, which last/ holds, into the output folder."""
    write_rows(out / 'summary.csv', json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    for file in ('model.safetensors', 'config.json'):
        with replacing(out / file) as temporary:
            shutil.copyfile(out / 'last' / 'kept' / file, temporary)


@torch.inference_mode()
def predict(accelerator, model, loader, description):
    """Logits of every image, shape (N, 2), in the order of the split."""
    model.eval()
    logits, rows = [], []
    for images, _, row in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        gathered = accelerator.gather_for_metrics((model(images.contiguous(memory_format=torch.channels_last)), row))
        logits.append(gathered[0].float().cpu())
        rows.append(gathered[1].cpu())
    return torch.cat(logits)[torch.cat(rows).argsort()]


def train(args):
    if args.resume and Path(args.output_dir, 'metrics.json').exists():
        print(f'This run is finished: {args.output_dir} holds its results.')
        return
    accelerator = create_accelerator(args)
    set_seed(args.seed)
    start_time = time.time()

    # Model
    model = create_for_task(args.model, pretrained=args.pretrained, num_classes=len(LABELS))
    if args.init_checkpoint:
        left = load_weights_file(model, args.init_checkpoint)
        accelerator.print(f'Weights from {args.init_checkpoint}' + (f', but new {" and ".join(left)}' if left else ''))
    model = model.to(memory_format=torch.channels_last)
    alphas = [name for name, _ in model.named_parameters() if name.endswith('.alpha')]
    data_config = resolve_model_data_config(model)
    img_size = args.img_size or data_config['input_size'][-1]
    data_config.update(
        input_size=(3, img_size, img_size), interpolation='bilinear', crop_pct=0.875, crop_mode='center')
    check_forward(model, args.model, img_size)
    lr = args.lr or (1e-4 if args.pretrained or args.init_checkpoint else 1e-3)

    # Data
    if args.data == 'demo':
        accelerator.print('Data: demo, generated SYNTHETIC images; scores on them say nothing about skin lesions.')
    splits = load_splits(args.data, seed=args.seed)
    check_images(splits, args, accelerator)

    # Loaders: the order is drawn from seed and epoch, the augmentation from seed, epoch and image
    mean_std = data_config['mean'], data_config['std']
    loaders = {}
    for name in SPLITS:
        transform = train_transform(img_size, *mean_std) if name == 'train' else eval_transform(img_size, *mean_std)
        loaders[name] = DataLoader(
            IsicSplit(splits[name], transform, seed=args.seed), batch_size=args.batch_size, shuffle=name == 'train',
            num_workers=args.workers, pin_memory=accelerator.device.type == 'cuda')
    truth = {name: loader.dataset.labels for name, loader in loaders.items()}
    train_set = loaders['train'].dataset

    # Optimizer: timm leaves one-dimensional parameters, the alphas among them, out of weight decay
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    model, optimizer, *prepared = accelerator.prepare(model, optimizer, *loaders.values())
    loaders = dict(zip(loaders, prepared))
    network = accelerator.unwrap_model(model, keep_torch_compile=False)
    steps = len(loaders['train'])
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs * steps, lr_min=lr * 1e-2, warmup_t=steps if args.epochs > 1 else 0,
        warmup_lr_init=lr * 1e-2, warmup_prefix=False, t_in_epochs=False)

    # Output folder, resuming
    out, summary = prepare_output_dir(args, accelerator)
    if summary:
        accelerator.load_state(out / 'last')
        accelerator.print(f'Resuming after epoch {len(summary)} of {args.epochs}.')
    counts = ', '.join(f'{len(splits[name])} {name}' for name in SPLITS)
    accelerator.print(
        f'{args.model}, {img_size} px, {counts} images, {accelerator.num_processes} process(es) on '
        f'{accelerator.device.type}, mixed precision {accelerator.mixed_precision}, lr {lr:g}, seed {args.seed}\n'
        f'Output folder: {out}')

    for epoch in range(len(summary), args.epochs):
        epoch_start = time.time()
        model.train()
        train_set.set_epoch(epoch)
        loaders['train'].set_epoch(epoch)
        total_loss = torch.zeros((), device=accelerator.device)
        bar = tqdm(loaders['train'], desc=f'epoch {epoch + 1}/{args.epochs}', leave=False,
                   disable=not accelerator.is_local_main_process)
        for step, (images, labels, rows) in enumerate(bar):
            scheduler.step_update(epoch * steps + step)
            with accelerator.accumulate(model):
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = binary_cross_entropy_with_logits(logits, labels)
                if not torch.isfinite(loss):
                    ids = ', '.join(train_set.image_ids[row] for row in rows.tolist())
                    raise RunError(f'The loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}; lower --lr, or '
                                   f'look at the images of this batch: {ids}')
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total_loss += loss.detach()
            bar.set_postfix(loss=f'{loss.item():.3f}')

        # Validation chooses the epoch that is kept
        logits = predict(accelerator, model, loaders['validation'], 'validation')
        validation_loss = binary_cross_entropy_with_logits(logits, truth['validation']).item()
        aucs = auc(truth['validation'].T.numpy(), logits.T.numpy()).tolist()
        if not np.isfinite([validation_loss, *aucs]).all():
            raise RunError(f'The validation loss is {validation_loss} after epoch {epoch + 1}: lower --lr.')
        row = {
            'epoch': epoch + 1,
            'train_loss': accelerator.reduce(total_loss, 'mean').item() / steps,
            'validation_loss': validation_loss,
            **{f'validation_auc_{label}': value for label, value in zip(LABELS, aucs)},
            'validation_mean_auc': float(np.mean(aucs)),
            'lr': optimizer.param_groups[0]['lr'],
            **{name: network.get_parameter(name).item() for name in alphas},
        }
        best = not summary or row['validation_mean_auc'] > max(r['validation_mean_auc'] for r in summary)
        summary.append(row)
        save_progress(accelerator, network, out, summary, best, data_config)
        values = [row[name] for name in alphas]
        accelerator.print(
            f'epoch {epoch + 1}/{args.epochs}  loss {row["train_loss"]:.4f} train, {validation_loss:.4f} validation  '
            f'AUC {aucs[0]:.3f} melanoma, {aucs[1]:.3f} seborrheic keratosis, {row["validation_mean_auc"]:.3f} mean'
            + ('*' if best else ' ')
            + (f'  alpha {min(values):.2g} to {max(values):.2g}' if values else '')
            + f'  {time.time() - epoch_start:.0f} s')

    # The kept epoch: validation again, and the one look at the test split
    load_weights_file(network, out)
    kept = max(summary, key=lambda r: r['validation_mean_auc'])
    metrics = {}
    for name in ('validation', 'test'):
        probabilities = predict(accelerator, model, loaders[name], name).sigmoid().numpy()
        metrics[name] = score_split(truth[name].numpy(), probabilities, seed=args.seed)
        if abs(metrics['validation']['mean_auc'] - kept['validation_mean_auc']) > 0.005:
            raise RunError(f'The weights in {out} score {metrics["validation"]["mean_auc"]:.4f} on validation, but '
                           f'epoch {kept["epoch"]} scored {kept["validation_mean_auc"]:.4f}: they are not its weights.')
        if accelerator.is_main_process:
            write_predictions(out / f'predictions_{name}.csv', loaders[name].dataset.image_ids, probabilities)
    if accelerator.is_main_process:
        write_json(out / 'metrics.json', metrics)
    synthetic = ', SYNTHETIC images' * (args.data == 'demo')
    accelerator.print(
        f'AUC [95 % interval] of epoch {kept["epoch"]}, the best of {args.epochs} by validation mean AUC{synthetic}\n'
        + auc_table(metrics))
    accelerator.print(
        f'{time.time() - start_time:.0f} s. In {out}: model.safetensors and config.json (epoch {kept["epoch"]}), '
        f'summary.csv, metrics.json, predictions_validation.csv, predictions_test.csv, run.json, last/\n'
        f"Use it: import timm, timm_arl; timm.create_model('local-dir:{out}', pretrained=True)")
    accelerator.end_training()


def main():
    parser = build_parser()
    try:
        train(parse_args(parser))
    except (RunError, DataError, WeightsError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: --output-dir with --resume goes on after the last finished epoch.\n')


if __name__ == '__main__':
    main()
