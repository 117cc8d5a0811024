#!/usr/bin/env python3
"""Fine-tune a timm model on ISIC 2017 Part 3, or on any labelled images of skin lesions, with Accelerate.

    accelerate launch benchmarks/finetune_isic.py --data path/to/isic2017 --model arl_cnn14
    accelerate launch benchmarks/finetune_isic.py --data path/to/isic2017 --model arl_cnn50 --pretrained --img-size 224
    accelerate launch benchmarks/finetune_isic.py --data mine.csv            # columns image, label; docs/data.md
    accelerate launch benchmarks/finetune_isic.py                            # on synthetic images, no download

The labels are those of the data. One sigmoid output per label, trained with binary cross-entropy, or a softmax with
cross-entropy where an image has one of the labels (--head). Most settings come from a recipe
(timm_arl/training/recipes). The epoch with the best mean AUC on the validation split (or what --select names) is kept
and scored once on the test split. The output folder receives
    config.json, model.safetensors   the kept epoch: timm.create_model('local-dir:OUT', pretrained=True)
    summary.csv, tensorboard/        one row per epoch: losses, AUCs, learning rate, every alpha
    metrics.json                     scores with 95 % intervals, keyed by split
    predictions_validation.csv, predictions_test.csv
    home.json                        what validation chose, and statistics of its images, for other clinics' data
    splits.csv                       if the data had no splits: those that were made, or came by --splits
    run.json                         command, arguments, versions, commit, processor
    looks.csv                        one row for each time that the test split was scored
    last/                            the state that --resume continues from
"""
import math
import time
from functools import partial
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy, nll_loss
from tqdm import tqdm

from timm_arl.attention import alphas_of, temperatures_of
from timm_arl.download import WeightsError
from timm_arl.factory import load_weights_file, save_network
from timm_arl.files import write_json
from timm_arl.isic.classes import balanced_accuracy
from timm_arl.isic.dataset import DataError, load_data, wanted_of
from timm_arl.isic.dataset.data import content_digest
from timm_arl.isic.dataset.demo import DEMO_TASKS
from timm_arl.isic.dataset.duplicates import pairs_among, read_pairs
from timm_arl.isic.dataset.groups import write_split_file
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.intervals import unit_of
from timm_arl.isic.metrics import auc, auc_table, score_split
from timm_arl.isic.predictions import write_predictions
from timm_arl.isic.selection import check_selection, kept_epoch, selection_column, selection_words
from timm_arl.isic.shift import HOME_FILE, home_record
from timm_arl.isic.task import balancing_weights, label_words
from timm_arl.training.accelerator import create_accelerator
from timm_arl.training.arguments import RunError
from timm_arl.training.distillation import Student, mask_loss
from timm_arl.training.folds import check_start, check_unseen, rows_of_folds, run_each
from timm_arl.training.images import (
    check_images,
    check_learnable,
    epoch_sides,
    image_loader,
    learns_masks,
    note_squares,
    predict,
    shown_as,
)
from timm_arl.training.networks import create_networks, parameter_groups
from timm_arl.training.options import build_parser, parse_args
from timm_arl.training.preview import preview
from timm_arl.training.runs import (
    FolderTaken,
    check_no_other_run,
    check_output_dir,
    discard_start,
    load_progress,
    prepare_output_dir,
    record_look,
    release_folders,
    save_progress,
)

LOSS_EVERY = 10  # steps between two looks at the losses, each of which waits for the device


def stopped_early(summary, patience, score):
    return bool(patience and summary) and len(summary) - 1 - kept_epoch(summary, 'best', score) >= patience


def batch_loss(task, logits, labels, smoothing, weights):
    """Mean cross-entropy over the images, each weighted by its class; that of the labels' sigmoids is averaged."""
    if task.is_softmax:
        loss = cross_entropy(logits, task.class_numbers(labels), reduction='none', label_smoothing=smoothing)
    else:
        targets = labels * (1 - smoothing) + 0.5 * smoothing
        loss = binary_cross_entropy_with_logits(logits, targets, reduction='none').mean(1)
    return (loss * task.image_weights(labels, weights)).mean()


def train(args, accelerator, data, out, networks=None):
    """Train one network on the split train, choose its epoch on validation, and score that on test, if there is one."""
    start_time, task, splits = time.time(), data.task, data.splits
    model, teachers, data_config = networks or create_networks(args, accelerator, task)
    set_seed(args.seed)
    alphas, temperatures = list(alphas_of(model)), list(temperatures_of(model))
    img_size = data_config['input_size'][-1]
    lr, score = args.lr, selection_column(args.select)  # which chooses the epoch

    # Loaders: the order is drawn from seed and epoch, the augmentation from seed, epoch and image
    loaders = {name: image_loader(args, split, data_config, accelerator, name == 'train', task, data.groups)
               for name, split in splits.items()}
    if args.preview:
        loaders['train'].dataset.set_epoch(args.epochs - 1)  # the final size
        preview(args, {name: loader.dataset for name, loader in loaders.items()}, data_config, task)
        return
    truth = {name: loader.dataset.labels for name, loader in loaders.items()}
    train_set = loaders['train'].dataset
    weights = balancing_weights(truth['train'], task)
    weights = torch.tensor(
        weights if args.balance == 'weights' else np.ones_like(weights), dtype=torch.float32, device=accelerator.device)
    with_masks = learns_masks(args, splits['train'])
    if args.mask_weight:
        accelerator.print("The lesions' masks are learned too." if with_masks else
                          'The training images have no lesion masks: the network learns from the diagnoses alone.')
    student = teachers is not None or with_masks
    if student:
        model = Student(model, img_size, teachers and teachers.width, with_masks)
    if teachers:
        teachers = teachers.to(accelerator.device)

    # Optimizer, schedule, moving average
    optimizer = create_optimizer_v2(parameter_groups(model, args, lr), opt=args.optimizer, lr=lr, weight_decay=0.,
                                    **({} if args.optimizer == 'adamw' else dict(momentum=args.momentum)))
    if args.sync_bn:
        model = convert_sync_batchnorm(model)  # torch's own would drop the activations of timm's BatchNormAct2d
    model, optimizer = accelerator.prepare(model, optimizer)
    network = accelerator.unwrap_model(model, keep_torch_compile=False)
    network = network.model if student else network
    steps = len(loaders['train'])
    constant = args.schedule == 'constant'  # timm < 1.0.31 has none: steps that change nothing
    scheduler, _ = create_scheduler_v2(
        optimizer, 'step' if constant else args.schedule, args.epochs, min_lr=lr * 1e-2, warmup_lr=lr * 1e-2,
        decay_epochs=args.decay_epochs, decay_rate=1. if constant else args.decay_rate,
        warmup_epochs=min(args.warmup_epochs, args.epochs / 5), step_on_epochs=False, updates_per_epoch=steps)
    ema = ModelEmaV3(network, args.ema, use_warmup=True) if args.ema else None
    kept_network = ema.module if ema else network  # which is what is scored, too

    # Output folder, resuming
    summary = prepare_output_dir(args, accelerator, out, score)
    if data.division and accelerator.is_main_process:
        write_split_file(out / 'splits.csv', data.division, task)
    if summary:
        load_progress(accelerator, kept_network, ema is not None, out)
        accelerator.print(f'Resuming after epoch {len(summary)} of {args.epochs}.')
    counts = ', '.join(f'{len(truth[name])} {name}' for name in splits)
    start = args.init_checkpoint or ('its pretrained weights' if args.pretrained else 'random weights')
    sizes = f'{args.start_size} to {img_size}' if args.start_size and args.start_size < img_size else img_size
    accelerator.print(
        f'{args.model} from {start}, {args.epochs} epochs, {sizes} px, {counts} images, '
        f'{accelerator.num_processes} process(es) on {accelerator.device.type}, mixed precision '
        f'{accelerator.mixed_precision}, recipe {args.recipe}, lr {lr:g}, seed {args.seed}\nOutput folder: {out}')
    if args.tracker != 'none':
        accelerator.project_configuration.logging_dir = str(out)
        accelerator.init_trackers('tensorboard' if args.tracker == 'tensorboard' else 'timm-arl')

    for epoch in range(len(summary), args.epochs):
        if stopped_early(summary, args.patience, score):
            break
        epoch_start = time.time()
        model.train()
        if args.freeze_bn:
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        loaders['train'].set_epoch(epoch)  # of its batches and its images
        total_loss, total_mask_loss = torch.zeros(2, device=accelerator.device)
        recent = []  # losses and images since the last look
        bar = tqdm(loaders['train'], desc=f'epoch {epoch + 1}/{args.epochs}', leave=False,
                   disable=not accelerator.is_local_main_process)
        for step, (images, labels, which, *masks) in enumerate(bar):
            update = epoch * steps + step
            scheduler.step_update(update)
            with accelerator.accumulate(model):
                share = 1.
                if args.mixup:
                    share = np.random.default_rng((args.seed, update, accelerator.process_index)).beta(
                        args.mixup, args.mixup)
                    images = images.lerp(images.flip(0), 1 - share)
                images = images.contiguous(memory_format=torch.channels_last)
                logits, features, mask_logits = model(images) if student else (model(images), None, None)
                loss = share * batch_loss(task, logits, labels, args.label_smoothing, weights)
                if args.mixup:
                    loss = loss + (1 - share) * batch_loss(task, logits, labels.flip(0), args.label_smoothing, weights)
                if teachers:
                    with accelerator.autocast():
                        theirs = teachers(images)
                    loss = teachers.loss(loss, logits, features, theirs)
                if with_masks:
                    mask = masks[0].lerp(masks[0].flip(0), 1 - share) if args.mixup else masks[0]
                    of_masks = mask_loss(mask_logits, mask)
                    total_mask_loss += of_masks.detach()
                    loss = loss + args.mask_weight * of_masks
                accelerator.backward(loss)
                if args.clip_grad and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            if ema and accelerator.sync_gradients:
                ema.update(network, step=update // accelerator.gradient_accumulation_steps)
            total_loss += loss.detach()
            recent.append((loss.detach(), step, which))
            if len(recent) < LOSS_EVERY and step + 1 < steps:
                continue
            values = torch.stack([loss for loss, *_ in recent]).tolist()
            for value, (_, k, which) in zip(values, recent):
                if not math.isfinite(value):
                    ids = ', '.join(which if args.streaming else [train_set.image_ids[row] for row in which.tolist()])
                    raise RunError(f'The loss is {value} at epoch {epoch + 1}, step {k + 1}; lower --lr, or look at '
                                   f'the images of this batch: {ids}')
            bar.set_postfix(loss=f'{values[-1]:.3f}')
            recent.clear()

        # Validation chooses the epoch to keep
        if accelerator.num_processes > 1:  # each has batch statistics of its own, but one network is kept
            for buffer in kept_network.buffers():
                buffer.copy_(broadcast(buffer))
        probabilities = predict(accelerator, kept_network, loaders['validation'], 'validation', task)
        if not torch.isfinite(probabilities).all():
            raise RunError(f'Probabilities of validation images are not numbers after epoch {epoch + 1}: lower --lr.')
        validation_loss = (
            nll_loss(probabilities.clamp(min=1e-12).log(), task.class_numbers(truth['validation']))
            if task.kind == 'multiclass' and task.is_softmax else
            binary_cross_entropy(probabilities, truth['validation'])).item()
        aucs = auc(truth['validation'].T.numpy(), probabilities.T.numpy()).tolist()
        row = {
            'epoch': epoch + 1,
            'train_loss': accelerator.reduce(total_loss, 'mean').item() / steps,
            **({'train_mask_loss': accelerator.reduce(total_mask_loss, 'mean').item() / steps} if with_masks else {}),
            'validation_loss': validation_loss,
            **{f'validation_auc_{label}': value for label, value in zip(task.labels, aucs)},
            'validation_mean_auc': float(np.mean(aucs)),
            **({'validation_balanced_accuracy': balanced_accuracy(
                truth['validation'].numpy(), probabilities.numpy(), task)} if task.kind == 'multiclass' else {}),
            'lr': optimizer.param_groups[0]['lr'],
            'img_size': epoch_sides(args, img_size)[epoch],
            **{name: kept_network.get_parameter(name).item() for name in (*alphas, *temperatures)},
        }
        accelerator.log(row, step=epoch + 1)
        summary.append(row)
        keep = kept_epoch(summary, args.keep, score) == epoch
        save_progress(accelerator, kept_network, ema is not None, out, summary, keep, partial(
            save_network, label_names=task.outputs, data_config=data_config, task=task.config(), **args.model_kwargs))
        values = [row[name] for name in alphas]
        of_masks = f" ({args.mask_weight * row['train_mask_loss']:.4f} of it the masks')" if with_masks else ''
        accelerator.print(
            f'epoch {epoch + 1}/{args.epochs}  loss {row["train_loss"]:.4f} train{of_masks}, {validation_loss:.4f} '
            f'validation  '
            'AUC ' + ''.join(f'{value:.3f} {label_words(label)}, ' for label, value in zip(task.labels, aucs))
            + f'{row["validation_mean_auc"]:.3f} mean'
            + (f', balanced accuracy {row["validation_balanced_accuracy"]:.3f}' if task.kind == 'multiclass' else '')
            + (' (best)' if keep and args.keep == 'best' else '')
            + (f'  alpha {min(values):.2g} to {max(values):.2g}' if values else '')
            + f'  {time.time() - epoch_start:.0f} s')

    # The kept epoch is scored on validation again, and once on test
    load_weights_file(kept_network, out)
    kept = summary[kept_epoch(summary, args.keep, score)]
    metrics = {}
    for name in ('validation', 'test'):
        if name not in splits:
            continue
        probabilities = predict(accelerator, kept_network, loaders[name], name, task).numpy()
        metrics[name] = score_split(truth[name].numpy(), probabilities, seed=args.seed, task=task,
                                    groups=loaders[name].dataset.groups, unit=unit_of(data.groups))
        if abs(metrics['validation']['mean_auc'] - kept['validation_mean_auc']) > 0.005:
            raise RunError(f'The weights in {out} score {metrics["validation"]["mean_auc"]:.4f} on validation, but '
                           f'epoch {kept["epoch"]} scored {kept["validation_mean_auc"]:.4f}: they are not its weights.')
        if accelerator.is_main_process:
            if name == 'test':  # before anybody can see the scores
                record_look(out, out, metrics['test'])
            write_predictions(out / f'predictions_{name}.csv', loaders[name].dataset.image_ids, probabilities, task,
                              loaders[name].dataset.groups)
        if accelerator.is_main_process and name == 'validation':
            write_json(out / HOME_FILE, home_record(
                splits[name], truth[name].numpy(), probabilities, task, shown_as(args, data_config),
                loaders[name].dataset.groups, truth['train'].numpy()))
    if accelerator.is_main_process:
        write_json(out / 'metrics.json', metrics)
    synthetic = ', SYNTHETIC images' * (args.data in DEMO_TASKS)
    best = f'the best of {len(summary)} by validation {selection_words(args.select)}'
    choice = best if args.keep == 'best' else 'the last'
    accelerator.print(
        f'AUC [95 % interval] of epoch {kept["epoch"]}, {choice}{synthetic}\n' + auc_table(metrics, task))
    accelerator.print(
        f'{time.time() - start_time:.0f} s. In {out}: model.safetensors and config.json (epoch {kept["epoch"]}), '
        f'summary.csv, metrics.json, predictions, run.json, last/\n'
        f'Use it: python -m timm_arl.predict IMAGES --model {out} --output-dir O\n'
        f"    or in Python: import timm, timm_arl; timm.create_model('local-dir:{out}', pretrained=True)")
    accelerator.wait_for_everyone()  # or another process reads metrics.json before it is there


def main():
    parser, out = build_parser(__doc__), None
    try:
        args = parse_args(parser)
        if args.resume and Path(args.output_dir, 'metrics.json').exists():
            print(f'This run is finished: {args.output_dir} holds its results.')
            return
        accelerator = create_accelerator(args)
        if args.sync_bn and accelerator.device.type != 'cuda':
            raise RunError(f'--sync-bn works on CUDA devices, not on {accelerator.device.type}: leave it out.')
        if args.output_dir and not args.preview:
            check_output_dir(Path(args.output_dir))
            check_no_other_run(args, Path(args.output_dir))
        if args.data in DEMO_TASKS:
            accelerator.print(f'Data: {args.data}, generated SYNTHETIC images; scores on them say nothing about skin '
                              f'lesions.')
        args.division_seed = args.seed if args.division_seed is None else args.division_seed  # one for all of --seeds
        data = load_data(args.data, wanted_of(args), args.division_seed, args.streaming,
                         *((('train',), 'train') if args.folds else ()))
        data = data._replace(task=data.task.with_head(args.head), splits={
            name: split for name, split in data.splits.items() if not (args.skip_test and name == 'test')})
        task, splits, args.head = data.task, data.splits, data.task.head
        args.group_column, args.select = data.groups or args.group_column, args.select or task.aim
        args.select = check_selection(args.select, task)
        accelerator.print(data.summary(args.data, bool(args.folds)))
        # what is wrong with the network is told before any image is read
        networks = model, teachers, data_config = create_networks(args, accelerator, task)
        ids = splits['train'].table['image_id'] if args.streaming else splits['train']['image_id']
        digest = ids_digest(ids)
        if args.resume and args.train_ids != digest:
            raise RunError(f'The run in {args.output_dir} had other training images than {args.data} has now: start '
                           f'another run in another --output-dir.')
        args.train_ids, args.train_images = digest, len(ids)
        digest = content_digest(data)
        if args.resume and args.content not in (None, digest):
            raise RunError(f'The run in {args.output_dir} had other labels, groups, or validation or test images than '
                           f'{args.data} has now: start another run in another --output-dir.')
        args.content = digest
        if args.folds:
            check_start(args, task)
        check_unseen(args, splits)
        check_learnable(args, splits, accelerator, task)
        # refuses a network that cannot learn what it is to learn
        Student(model, data_config['input_size'][-1], teachers and teachers.width, learns_masks(args, splits['train']))
        if args.folds and args.duplicates and not args.resume:  # that of another data set would do nothing
            read_pairs(args.duplicates, {image_id for split in splits.values() for image_id in split['image_id']})
        if args.folds and not (args.duplicates or args.resume) and Path(args.data, 'duplicates.csv').is_file():
            args.duplicates = str(Path(args.data, 'duplicates.csv'))
        if args.folds:
            rows_of_folds(args, data)  # a fault in them is told before the work
            if args.duplicates:
                pairs = pairs_among(args.duplicates, splits['train']['image_id'])
                accelerator.print(f'Pairs of {args.duplicates} that stay in the same fold: {len(pairs)}.')
        check_images(splits, args, accelerator, None if args.folds else data_config, task)
        note_squares(splits, args, accelerator)
        name = f'{args.model}-{Path(args.data).name}-{time.strftime("%Y%m%d-%H%M%S")}'
        name = name.replace('/', '-').replace(':', '-')
        out = Path(broadcast_object_list([args.output_dir or f'runs/{name}'])[0])
        if (args.folds or args.seeds) and not args.preview:
            prepare_output_dir(args, accelerator, out)
            run_each(args, accelerator, data, out, train)
        else:
            train(args, accelerator, data, out, networks)
        accelerator.end_training()
    except Exception as error:  # whatever it is, a start that failed must not block its folder
        if out and accelerator.is_main_process and not (
                args.resume or args.preview or isinstance(error, FolderTaken)):
            discard_start(out)
        if not isinstance(error, (RunError, DataError, WeightsError, OSError)):
            raise
        message = str(error).rpartition('DataError: ')[2].strip()  # of a worker's error, without its traceback
        parser.exit(2, f'{parser.prog}: error: {message}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted' + (
            f': --resume --output-dir {out} continues after the last finished epoch' if out else '') + '.\n')
    finally:
        release_folders()


if __name__ == '__main__':
    main()
