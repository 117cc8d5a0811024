#!/usr/bin/env python3
"""Measure the tables of the ARL-CNN paper on ISIC 2017, beside the printed figures.

    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --seeds 0 1 2
    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --row arl_cnn14
    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --check
    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --drop-duplicates TWINS.csv

A table is a set of rows, a row is a run of finetune_isic.py for each seed, or of evaluate_isic.py. All rows of a table
have the same budget, the recipe "tables", which was fixed before any test score of its runs was seen. A table that was
stopped, at any moment, goes on when the same command is given again. Several processes, started by hand or by
`accelerate launch`, share the runs between them. The output folder receives
    tableN.csv, tableN.md    figures with 95 % intervals over images and seeds, and paired differences; a figure that
                             was not measured is an empty cell with the reason
    predictions/             ROW-seedS.csv, the test predictions of each run, from which --check computes every figure
                             again; ROW-seedS.json, how they were made
    runs/                    the runs themselves
    tableN_without_duplicates.csv, .md   with --drop-duplicates: the same runs, scored on fewer images
`masks` and `maps` measure the networks in runs/: how flat the masks of their gates are, and whether their class
activation maps lie on the lesion and stay there when hair or bubbles are drawn on the picture.
"""
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import numpy as np
import torch
from tqdm import tqdm

from timm_arl.download import WeightsError
from timm_arl.factory import tensors_sha256
from timm_arl.files import locked, make_folder, parts_of, replacing, write_json
from timm_arl.isic.dataset import DataError, label_array, load_splits
from timm_arl.isic.dataset.duplicates import twins_of_training
from timm_arl.isic.dataset.sources import IMAGE_SUFFIXES, ids_digest
from timm_arl.isic.predictions import read_predictions
from timm_arl.isic.task import ISIC2017, label_words
from timm_arl.kernels import backend
from timm_arl.predictor import Predictor, read_picture
from timm_arl.training.arguments import RunError, check_not_empty, number, program_parser
from timm_arl.training.runs import check_output_dir
from timm_arl.training.tables.architectures import table1_lines
from timm_arl.training.tables.figures import FIGURES, Shown, draw_figures
from timm_arl.training.tables.lines import (
    check_flags,
    check_record,
    origin,
    read_record,
    read_scores,
    recorded_sizes,
    settings,
    stored_sizes,
    table_lines,
)
from timm_arl.training.tables.networks import network_lines, picture_of
from timm_arl.training.tables.pages import WITHOUT_DUPLICATES, differences, write_table
from timm_arl.training.tables.processes import as_begun, drop_stale, run_program, write_reason
from timm_arl.training.tables.rows import MASKS, PLAIN, TABLES, TITLES
from timm_arl.training.tables.t_test import table7_lines

PROGRAMS = Path(__file__).resolve().parent


def build_parser():
    parser = program_parser(__doc__, 'TABLE --data DIR --output-dir O')
    add = parser.add_argument
    add('table', choices=[*TITLES, 'figures'],
        help='; '.join(f'{name}: {title}' for name, title in TITLES.items()) + '; figures: pictures of two networks')
    add('--data', metavar='DIR|HUB_ID|demo', help='as for finetune_isic.py; table1, figures and table7 alone need none')
    add('--output-dir', required=True, metavar='O', help='folder for tables, predictions and runs')
    add('--seeds', type=number(int, 0, 2 ** 32 - 1), nargs='+', default=[0, 1, 2],
        help='a run for each (default: 0 1 2)')
    add('--row', nargs='+', metavar='ROW', help='make only the runs of these rows (default: all)')
    add('--model', nargs='+', metavar='NAME',
        help='make only the runs of these networks (default: all); for figures, two checkpoints')
    add('--images', metavar='FOLDER', help='for figures: the images that are shown (default: test images of --data)')
    add('--count', type=number(int, 1), default=4, help='for figures: images in each (default: %(default)s)')
    add('--weights', nargs='+', default=[], metavar='NAME=FILE',
        help=f'ImageNet weights of a network as a .safetensors file, such as {PLAIN}=FILE (default: from the Hub)')
    add('--check', action='store_true', help='run nothing: compute every figure again and compare it with the table')
    add('--drop-duplicates', metavar='LIST.csv', help='run nothing: score the finished runs without the test images '
        'that are twins of training images, by this list of pairs')
    add('--epochs', type=number(int, 1), help='another budget than that of the recipe, for all rows')
    add('--img-size', type=number(int, 64), help='the same for the side of the images that the networks see')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], default='no', help='of all runs (default: %(default)s)')
    add('--workers', type=number(int, 0), default=2, help='data loading processes of a run (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1), help='threads of a run')
    return parser


def parse_args(parser):
    args = parser.parse_args()
    check_not_empty(args)
    if len(set(args.seeds)) < len(args.seeds):
        raise RunError('--seeds names a seed twice.')
    if not args.data and args.table not in ('table1', 'table7', 'figures'):
        raise RunError(f'{args.table} needs --data.')
    if args.table == 'table7' and not args.data and any(
            Path(args.output_dir, 'predictions').glob('*-seed*.csv')):
        raise RunError(f'table7 needs --data here: its labels score the predictions in {args.output_dir}.')
    if args.table == 'figures' and (len(args.model or ()) != 2 or not (args.data or args.images)):
        raise RunError('figures needs two networks and images: --model A B, and --images FOLDER or --data.')
    rows = TABLES.get(args.table, [])
    names, models = ([getattr(row, key) for row in rows if row.model] for key in ('name', 'model'))
    for flag, known in (('row', names), ('model', models)):
        for name in getattr(args, flag) or ():
            if name not in known and args.table != 'figures':
                raise RunError(f'--{flag} {name} is not in {args.table}'
                               + (f': choose {", ".join(dict.fromkeys(known))}.' if known else '.'))
    if args.drop_duplicates and args.table not in TABLES:
        raise RunError(f'--drop-duplicates is for the tables of test scores, {", ".join(TABLES)}: leave it out.')
    args.seeds = sorted(args.seeds)
    args.files, args.about_images, args.left_out = {}, '', set()
    for pair in args.weights:
        name, equals, file = pair.partition('=')
        if not equals:
            raise RunError(f'--weights {pair} is not NAME=FILE, such as {PLAIN}=FILE.')
        known = dict.fromkeys(row.weights for rows in TABLES.values() for row in rows if row.weights)
        if name not in known:
            raise RunError(f'--weights {pair}: no row starts from weights of {name}: choose {", ".join(known)}.')
        if not Path(file).is_file():
            raise RunError(f'--weights {pair}: there is no file {file}.')
        args.files[name] = file
    return args


def machine_flags(args):
    return [f'--workers={args.workers}', *[f'--cpu-threads={args.cpu_threads}'] * bool(args.cpu_threads)]


def lesion_masks(args, out):
    """The data with lesion masks for validation and test, made once. Returns exit status, reason and folder."""
    folder = out / 'runs' / MASKS
    status, why = 0, ''
    flags = {'epochs': args.epochs or 8, 'img_size': 128}
    data, ids = args.data, ids_digest(args.splits['train']['image_id'])
    with locked(out / 'runs' / f'{MASKS}.lock', wait=True) as lock:
        if (folder / 'run.json').exists():
            made = read_record(folder / 'run.json', 'arguments')
            if {key: made.get(key) for key in flags} != flags or made['masked_ids'] != ids:
                raise RunError(f'The lesion masks in {folder} were made with other flags ({made["data"]}, '
                               f'{made["epochs"]} epochs): give another --output-dir.')
            data = as_begun(folder, 'data', data)
        if not (folder / 'metrics.json').exists():
            status, why = run_program(PROGRAMS / 'segment_lesions.py', [
                '--data', str(data), *(f'--{key.replace("_", "-")}={value}' for key, value in flags.items()),
                '--output-dir', str(folder),
                '--encoder-weights', args.files.get(PLAIN, 'hub'), *machine_flags(args),
                *['--resume'] * (folder / 'run.json').exists()], lock)
        if not status:
            with replacing(out / 'predictions' / f'{MASKS}.json') as temporary:
                shutil.copyfile(folder / 'metrics.json', temporary)
    return status, f'no lesion masks: {why}', folder / 'data'


def training_flags(args, row, seed, data, folder):
    start = []
    if row.weights:
        start = ['--init-checkpoint', as_begun(folder, 'init_checkpoint', args.files[row.weights])
                 ] if row.weights in args.files else ['--pretrained']
    return ['--data', as_begun(folder, 'data', data), '--model', row.model, *start, '--recipe', 'tables',
            *settings(args, row), *['--lesion-crop'] * row.lesion_crop, '--seed', str(seed), '--tracker', 'none',
            *machine_flags(args)]


def kernels_of(row, used):
    """Which kernels the gates of a row use, of those that its run used; '' without gates."""
    if any(flag.startswith('mask_temperature=') for flag in row.flags):
        return 'torch'  # a gate with a temperature has no others
    return used if row.model.startswith('arl_') else ''


def make_run(args, out, row, seed, lock):
    """Train, or score a trained network again, and keep the predictions. Returns exit status and reason."""
    name = f'{row.name}-seed{seed}'
    folder, kept = out / 'runs' / name, out / 'predictions' / name
    trained = out / 'runs' / f'{row.alpha_zero_of}-seed{seed}' if row.alpha_zero_of else folder
    begun = folder.with_name(f'{name}.json')  # the command that records a run may not be the one that began it
    how = {'settings': settings(args, row), 'origin': origin(args, row)}
    if not begun.exists() or not any((folder / file).exists() for file in ('run.json', 'metrics.json')):
        write_json(begun, how)
    check_record(args, row, begun)
    if not (folder / 'metrics.json').exists():
        status, why, data = lesion_masks(args, out) if row.lesion_crop else (0, '', args.data)
        if status:
            return status, why
        if row.alpha_zero_of:
            status, why = run_program(PROGRAMS / 'evaluate_isic.py', [
                '--data', str(data), '--checkpoint', str(trained), '--split', 'test', '--alpha-zero',
                f'--mixed-precision={args.mixed_precision}', *machine_flags(args), '--output-dir', str(folder)], lock)
        else:
            status, why = run_program(PROGRAMS / 'finetune_isic.py', [
                *training_flags(args, row, seed, data, folder), '--output-dir', str(folder),
                *['--resume'] * (folder / 'run.json').exists()], lock)
        if status:
            return status, why
    content, arguments, launch, versions = (
        read_record(trained / 'run.json', *key) for key in ((), ('arguments',), ('launch',), ('versions',)))
    processor = content.get('processor', launch['device'])  # the first runs had none
    used = parts_of(content, 'kernels') or backend(torch.ones(1, 1, 1, 1, device=launch['device']))
    if arguments['train_ids'] != ids_digest(args.splits['train']['image_id']):
        raise RunError(f'The run in {trained} has other training images than {args.data}: give another --output-dir.')
    precision = launch['mixed_precision']
    write_json(kept.with_name(f'{name}.json'), {
        'row': row.name, 'seed': seed, **how,
        'columns': {
            'image_size': arguments['img_size'], 'epochs': arguments['epochs'],
            'precision': 'fp32' if precision == 'no' else precision, 'commit': parts_of(content, 'commit'),
            'kernels': kernels_of(row, used)},
        'processor': processor, 'versions': versions, 'tensors': tensors_sha256(trained / 'model.safetensors')})
    with replacing(kept.with_name(f'{name}.csv')) as temporary:
        shutil.copyfile(folder / 'predictions_test.csv', temporary)
    shutil.rmtree(folder / 'last', ignore_errors=True)  # nothing is left to resume
    return 0, ''


def make_runs(args, out):
    """Make the runs that are missing, seed by seed, so that a stopped table has all its rows, with fewer seeds.

    Returns whether a run failed after it had begun.
    """
    chosen = [row for row in TABLES[args.table] if row.model and (not args.row or row.name in args.row)
              and (not args.model or row.model in args.model)]
    starts, ids = {row.weights for row in chosen}, list(args.splits['test']['image_id'])
    for row in TABLES[args.table]:  # what could not be compared with them is not made
        for record in sorted((out / 'predictions').glob(f'{row.name}-seed*.json')):
            check_record(args, row, record, images_alone=row.weights not in starts)
            check_flags(args, row, record)
            if record.with_suffix('.csv').exists():
                read_predictions(record.with_suffix('.csv'), ids)
    failed, refused = False, {}
    jobs = [(row, seed) for seed in args.seeds for row in chosen]
    first = int(os.environ.get('RANK', 0)) * len(jobs) // int(os.environ.get('WORLD_SIZE', 1))
    for k, (row, seed) in enumerate(jobs[first:] + jobs[:first]):
        name = f'{row.name}-seed{seed}'
        reason = out / 'runs' / f'{name}.reason'
        if row.name in refused:  # as with another seed
            if not (out / 'predictions' / f'{name}.csv').exists():
                write_reason(reason, refused[row.name])
            continue
        print(f'--- {args.table}, run {k + 1} of {len(jobs)}: {row.name}, seed {seed}', flush=True)
        with locked(out / 'runs' / f'{name}.lock') as lock:
            record = out / 'predictions' / f'{name}.json'
            if lock is None:
                print('Another process makes it.', flush=True)
                continue
            drop_stale(out, row, seed)
            if record.with_suffix('.csv').exists():
                check_record(args, row, record)
                continue
            if row.alpha_zero_of and not (out / 'predictions' / f'{row.alpha_zero_of}-seed{seed}.csv').exists():
                print(f'It needs {row.alpha_zero_of}, seed {seed}, which is not there.', flush=True)
                continue
            for ending in ('.reason', '.refused'):  # of an earlier attempt
                reason.with_suffix(ending).unlink(missing_ok=True)
            status, why = make_run(args, out, row, seed, lock)
            if status in (130, -signal.SIGINT):
                raise KeyboardInterrupt
            if status:
                write_reason(reason, why)
            if status == 2 and 'could not be loaded from' in why:  # weights on the Hub, as with any seed
                refused[row.name] = why
                reason.with_suffix('.refused').touch()
            elif status:
                failed = True
        write_scores(args, out)
    return failed


def share_runs(args, out):
    """Make the runs, as one of the processes of a launcher, which ends all of them at the first status 1.

    Returns whether a run failed after it had begun.
    """
    with locked(out / 'runs' / f'process-{os.environ.get("RANK", 0)}.lock'):
        failed = make_runs(args, out)
    world = int(os.environ.get('WORLD_SIZE', 1))
    for rank in range(world if failed and world > 1 else 0):
        with locked(out / 'runs' / f'process-{rank}.lock', wait=True):
            pass
    return failed


def page_of(args):
    """The name of the table's files."""
    return args.table + WITHOUT_DUPLICATES * bool(args.drop_duplicates)


def write_scores(args, out):
    """Write the table from the predictions that are there; one process at a time, so that the last sees them all."""
    make_folder(out / 'runs')  # which results copied from elsewhere lack
    with locked(out / 'runs' / 'tables.lock', wait=True):
        lines, about = table_lines(args, out)
        write_table(out, page_of(args), lines, about, args.about_images)
    return lines


def figures(args, out):
    """The paper's pictures for two checkpoints."""
    predictors = [Predictor(name) for name in args.model]
    for name, predictor in zip(args.model, predictors):
        if predictor.network is None:
            raise RunError(f'{name} is an ONNX file, which has no maps: name the checkpoint that it was made from.')
    first, second = (predictor.labels for predictor in predictors)
    if first != second:
        raise RunError(f'{args.model[0]} has the labels {", ".join(first)}, and {args.model[1]} has '
                       f'{", ".join(second)}: name two networks of the same labels.')
    if args.images:
        paths = sorted(path for path in Path(args.images).rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
        images = [Shown(path.stem, partial(read_picture, path)) for path in paths]
    else:
        test = args.splits['test']
        diagnoses = ISIC2017.class_numbers(label_array(test))
        words = [label_words(name) for name in ISIC2017.classes]
        images = [Shown(test[row]['image_id'], partial(picture_of, test, row), words[diagnoses[row]])
                  for row in np.argsort(-diagnoses, kind='stable').tolist()]  # rare diagnoses first
    if not images:
        raise RunError(f'There is no image in {args.images}: name a folder with {", ".join(sorted(IMAGE_SUFFIXES))}.')
    reasons = draw_figures(out, predictors, images, args.count, partial(tqdm, desc='figures', leave=False))
    for name, what in FIGURES.items():
        print(f'{name}.png: {what}' if not reasons[name] else f'{name}.png was not drawn: {reasons[name]}.')
    print(f'In {out}')


def load_data(args):
    """The splits, what tells them from others, and what a reader must know of them."""
    args.splits = load_splits(args.data)
    used = [args.splits[name] for name in ('train', 'test')]
    args.digest = ids_digest(f'{image_id} {labels}' for split in used for image_id, labels in zip(
        split['image_id'], label_array(split).tolist()))
    args.stored = recorded_sizes(args) or stored_sizes(used)
    name = 'the demo set, SYNTHETIC' if args.data == 'demo' else Path(args.data).name
    args.about_images = f'{name}, stored at {args.stored}'
    if args.drop_duplicates:
        args.left_out = twins_of_training(args.splits, args.drop_duplicates) & set(args.splits['test']['image_id'])
        args.about_images += (f', without the {len(args.left_out)} that have a twin among the training images '
                              f'({Path(args.drop_duplicates).name})')


def main():
    parser = build_parser()
    try:
        args = parse_args(parser)
        out = Path(args.output_dir)
        makes_runs = args.table in TABLES and not args.check and not args.drop_duplicates
        for folder in [*[out] * (not args.check), *[out / 'predictions', out / 'runs'] * makes_runs]:
            check_output_dir(folder)
        path = out / f'{page_of(args)}.csv'
        if args.check and not path.is_file():
            raise RunError(f'--check: there is no {path}: make the table first, without --check.')
        if args.data:
            load_data(args)  # a fault in it is told before the work
        if not args.check:
            make_folder(out)
        failed = False
        if args.table == 'figures':
            figures(args, out)
            return
        if args.table == 'table1':
            lines, about = table1_lines(args)
        elif args.table == 'table7':
            lines, about = table7_lines(args, *(read_scores(args, out, 'table3') if args.data else ({}, {})))
        elif args.table in ('masks', 'maps'):
            lines, about = network_lines(args, out, Predictor)
        else:
            for name in ('predictions', 'runs') * makes_runs:
                make_folder(out / name)
            failed = share_runs(args, out) if makes_runs else False
            lines, about = table_lines(args, out)
            if args.drop_duplicates and not any(line['measured'] for line in lines):
                raise RunError(f'No run of {args.table} is finished in {out}: make the table first, without '
                               f'--drop-duplicates.')
        if args.check:
            wrong = differences(path, lines, about, args.about_images)
            print('\n'.join(wrong) or f'{path}: all {len(lines)} lines are as computed again.')
            sys.exit(bool(wrong))
        if args.table in TABLES:
            lines = write_scores(args, out)
        else:
            write_table(out, page_of(args), lines, about, args.about_images)
        print(path.with_suffix('.md').read_text(encoding='utf-8'))
        empty = len({line['row'] for line in lines if not line['measured'] and ' - ' not in line['row']})
        print(f'In {out}: {path.name}, {path.stem}.md'
              + f'; {empty} rows have no figures of ours, for the reasons above' * bool(empty))
        sys.exit(failed)
    except (RunError, DataError, WeightsError, OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: the same command again goes on.\n')


if __name__ == '__main__':
    main()
