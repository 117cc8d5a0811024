#!/usr/bin/env python3
"""Measure the tables of the ARL-CNN paper on ISIC 2017, beside the printed figures.

    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --seeds 0 1 2
    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --row arl_cnn14
    python benchmarks/reproduce_tables.py table3 --data path/to/isic2017 --output-dir tables --check

A table is a set of rows, a row is a run of finetune_isic.py for each seed, or of evaluate_isic.py. All rows of a table
have the same budget, the recipe "tables", which was fixed before any test score was seen. A table that was stopped, at
any moment, goes on when the same command is given again. Several processes, started by hand or by `accelerate launch`,
share the runs between them. The output folder receives
    tableN.csv, tableN.md    figures with 95 % intervals over images and seeds, and paired differences; a figure that
                             was not measured is an empty cell with the reason
    predictions/             ROW-seedS.csv, the test predictions of each run, from which --check computes every figure
                             again; ROW-seedS.json, how they were made
    runs/                    the runs themselves
`masks` and `maps` measure the networks in runs/: how flat the masks of their gates are, and whether their class
activation maps lie on the lesion and stay there when hair or bubbles are drawn on the picture.
"""
import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import numpy as np
from tqdm import tqdm

from timm_arl.attention import alphas_of
from timm_arl.download import WeightsError
from timm_arl.files import make_folder, read_rows, replacing, write_json, write_rows
from timm_arl.isic.dataset import DataError, decode, label_array, load_splits
from timm_arl.isic.dataset.sources import IMAGE_SUFFIXES
from timm_arl.isic.predictions import read_predictions
from timm_arl.isic.task import DIAGNOSES, diagnoses_of, label_words
from timm_arl.isic.transforms import restore_aspect
from timm_arl.predictor import Predictor, read_picture
from timm_arl.training.arguments import RunError, check_not_empty, number
from timm_arl.training.runs import check_output_dir
from timm_arl.training.tables.architectures import table1_lines
from timm_arl.training.tables.figures import FIGURES, Shown, draw_figures
from timm_arl.training.tables.maps import GAUSSIAN, gaussian_rows, map_lines, map_rows, mask_lines, mask_rows
from timm_arl.training.tables.pages import cell, differences, write_table
from timm_arl.training.tables.rows import MASKS, PLAIN, TABLES, TITLES, pairs_of, printed_figures
from timm_arl.training.tables.scores import Scores, labels_of
from timm_arl.training.tables.t_test import table7_lines

PROGRAMS = Path(__file__).resolve().parent
# what a launcher tells its processes, which the runs must not take for themselves
LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def build_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage='%(prog)s TABLE --data DIR --output-dir O [options] (--help lists them)',
        description=__doc__.split('\n\n')[0], epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('table', choices=[*TITLES, 'figures'],
        help='; '.join(f'{name}: {title}' for name, title in TITLES.items()) + '; figures: pictures of two networks')
    add('--data', metavar='DIR|HUB_ID|demo', help='as for finetune_isic.py; table1, table7 and figures need none')
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
    if args.table == 'figures' and (len(args.model or ()) != 2 or not (args.data or args.images)):
        raise RunError('figures needs two networks and images: --model A B, and --images FOLDER or --data.')
    rows = TABLES.get(args.table, [])
    names, models = ([getattr(row, key) for row in rows if row.model] for key in ('name', 'model'))
    for flag, known in (('row', names), ('model', models)):
        for name in getattr(args, flag) or ():
            if name not in known and args.table != 'figures':
                raise RunError(f'--{flag} {name} is not in {args.table}'
                               + (f': choose {", ".join(dict.fromkeys(known))}.' if known else '.'))
    args.files = {}
    for pair in args.weights:
        name, equals, file = pair.partition('=')
        if not equals:
            raise RunError(f'--weights {pair} is not NAME=FILE, such as {PLAIN}=FILE.')
        if not Path(file).is_file():
            raise RunError(f'--weights {pair}: there is no file {file}.')
        args.files[name] = file
    return args


def budget_flags(args):
    """What the command line says about all runs, as flags of the programs."""
    return [f'--{name}={value}' for name, value in (('epochs', args.epochs), ('img-size', args.img_size)) if value]


def machine_flags(args):
    return [f'--workers={args.workers}', *[f'--cpu-threads={args.cpu_threads}'] * bool(args.cpu_threads)]


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock file that other processes started for the same folder respect. Gives None if another one holds it."""
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file


def run_program(program, arguments, lock):
    """Run one of our programs, which holds the lock too: it may outlive this process.

    Returns its exit status and the last line of its errors.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in LAUNCHER and not name.startswith(('TORCHELASTIC_', 'ACCELERATE_', 'ROLE_'))}
    devices = os.environ.get('CUDA_VISIBLE_DEVICES')
    if 'LOCAL_RANK' in os.environ and devices and ',' in devices:  # each process of a launcher has a GPU of its own
        devices = devices.split(',')
        environment['CUDA_VISIBLE_DEVICES'] = devices[int(os.environ['LOCAL_RANK']) % len(devices)]
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    print(f'$ python benchmarks/{shlex.join([program, *arguments])}', flush=True)
    tail = b''
    with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, pass_fds=[lock.fileno()]) as process:
        try:
            for text in iter(lambda: process.stderr.read1(), b''):
                sys.stderr.buffer.write(text)
                sys.stderr.flush()
                tail = (tail + text)[-4000:]
        except KeyboardInterrupt:
            process.wait()
            raise
    lines = tail.decode(errors='replace').replace('\r', '\n').strip().splitlines()
    return process.returncode, lines[-1].rpartition('error: ')[2] if lines else ''


def lesion_masks(args, out):
    """The data with lesion masks for validation and test, made once. Returns exit status, reason and folder."""
    folder = out / 'runs' / MASKS
    status, why = 0, ''
    with locked(out / 'runs' / f'{MASKS}.lock', wait=True) as lock:
        if not (folder / 'metrics.json').exists():
            status, why = run_program('segment_lesions.py', [
                '--data', args.data, '--output-dir', str(folder), '--encoder-weights', args.files.get(PLAIN, 'hub'),
                '--epochs', str(args.epochs or 8), '--img-size', '128', '--workers', str(args.workers),
                *['--resume'] * (folder / 'run.json').exists()], lock)
        if not status:
            with replacing(out / 'predictions' / f'{MASKS}.json') as temporary:
                shutil.copyfile(folder / 'metrics.json', temporary)
    return status, f'no lesion masks: {why}', folder / 'data'


def settings(args, row):
    """What the runs of a row have in common, beside the recipe."""
    return [*row.flags, *budget_flags(args), f'--mixed-precision={args.mixed_precision}']


def training_flags(args, row, seed, data):
    start = []
    if row.weights:
        start = ['--init-checkpoint', args.files[row.weights]] if row.weights in args.files else ['--pretrained']
    return ['--data', str(data), '--model', row.model, *start, '--recipe', 'tables', *settings(args, row),
            *['--lesion-crop'] * row.lesion_crop, '--seed', str(seed), '--tracker', 'none', *machine_flags(args)]


def make_run(args, out, row, seed, lock):
    """Train, or score a trained network again, and keep the predictions. Returns exit status and reason."""
    name = f'{row.name}-seed{seed}'
    folder, kept = out / 'runs' / name, out / 'predictions' / name
    trained = out / 'runs' / f'{row.alpha_zero_of}-seed{seed}' if row.alpha_zero_of else folder
    if not (folder / 'metrics.json').exists():
        status, why, data = lesion_masks(args, out) if row.lesion_crop else (0, '', args.data)
        if status:
            return status, why
        if row.alpha_zero_of:
            status, why = run_program('evaluate_isic.py', [
                '--data', str(data), '--checkpoint', str(trained), '--split', 'test', '--alpha-zero',
                f'--mixed-precision={args.mixed_precision}', *machine_flags(args), '--output-dir', str(folder)], lock)
        else:
            status, why = run_program('finetune_isic.py', [
                *training_flags(args, row, seed, data), '--output-dir', str(folder),
                *['--resume'] * (folder / 'run.json').exists()], lock)
        if status:
            return status, why
    run = json.loads((trained / 'run.json').read_text(encoding='utf-8'))
    arguments, precision = run['arguments'], run['launch']['mixed_precision']
    write_json(kept.with_name(f'{name}.json'), {
        'row': row.name, 'seed': seed, 'settings': settings(args, row),
        'image_size': arguments['img_size'], 'epochs': arguments['epochs'],
        'precision': 'fp32' if precision == 'no' else precision, 'kernels': run.get('kernels', 'torch'),
        'device': run['launch']['device'], 'commit': run['commit'], 'versions': run['versions']})
    with replacing(kept.with_name(f'{name}.csv')) as temporary:
        shutil.copyfile(folder / 'predictions_test.csv', temporary)
    shutil.rmtree(folder / 'last', ignore_errors=True)  # nothing is left to resume
    return 0, ''


def make_runs(args, out):
    """Make the runs that are missing, seed by seed, so that a stopped table has all its rows, with fewer seeds.

    Returns by row why it was not measured, and whether a run failed for another reason than its input.
    """
    rows = TABLES[args.table]
    chosen = [row for row in rows if row.model and (not args.row or row.name in args.row)
              and (not args.model or row.model in args.model)]
    reasons = {row.name: 'not run: --row or --model left it out' for row in rows if row not in chosen}
    failed = False
    jobs = [(row, seed) for seed in args.seeds for row in chosen]
    first = int(os.environ.get('RANK', 0)) * len(jobs) // int(os.environ.get('WORLD_SIZE', 1))
    for k, (row, seed) in enumerate(jobs[first:] + jobs[:first]):
        if row.name in reasons:  # as with another seed
            continue
        print(f'--- {args.table}, run {k + 1} of {len(jobs)}: {row.name}, seed {seed}', flush=True)
        with locked(out / 'runs' / f'{row.name}-seed{seed}.lock') as lock:
            record = out / 'predictions' / f'{row.name}-seed{seed}.json'
            if lock is None:
                print('Another process makes it.', flush=True)
                continue
            if record.with_suffix('.csv').exists():
                made = json.loads(record.read_text(encoding='utf-8'))['settings']
                if made != settings(args, row):
                    raise RunError(f'{record} was made with {shlex.join(made)}, not with '
                                   f'{shlex.join(settings(args, row))}: give those flags, or another --output-dir.')
                continue
            if row.alpha_zero_of and not (out / 'predictions' / f'{row.alpha_zero_of}-seed{seed}.csv').exists():
                print(f'It needs {row.alpha_zero_of}, seed {seed}, which is not there.', flush=True)
                continue
            status, why = make_run(args, out, row, seed, lock)
            if status in (130, -signal.SIGINT):
                raise KeyboardInterrupt
            if status:
                reasons[row.name] = why
                failed = failed or status != 2
            else:
                write_table(out, args.table, *table_lines(args, out, reasons))
    return reasons, failed


def row_command(args, row):
    """The command that makes one row."""
    weights = [f'{row.weights}={args.files[row.weights]}'] if row.weights in args.files else []
    return 'python benchmarks/reproduce_tables.py ' + shlex.join([
        args.table, '--data', str(args.data), '--output-dir', args.output_dir, '--seeds', *map(str, args.seeds),
        '--row', *[row.alpha_zero_of] * bool(row.alpha_zero_of), row.name,
        *(['--weights', *weights] if weights else []), *budget_flags(args),
        *(['--mixed-precision', args.mixed_precision] if args.mixed_precision != 'no' else [])])


def read_scores(args, out, table):
    """Scores of the rows whose predictions are there, and the columns that tell how they were made."""
    test = load_splits(args.data)['test']
    truth, ids = label_array(test), list(test['image_id'])
    scores, columns = {}, {}
    for row in TABLES[table]:
        paths = {seed: out / 'predictions' / f'{row.name}-seed{seed}.csv' for seed in args.seeds}
        paths = {seed: path for seed, path in paths.items() if path.exists()}
        if not paths:
            continue
        scores[row.name] = Scores(truth, {seed: read_predictions(path, ids) for seed, path in paths.items()})
        made = [json.loads(path.with_suffix('.json').read_text(encoding='utf-8')) for path in paths.values()]
        columns[row.name] = {
            'seeds': ' '.join(map(str, paths)), 'images': len(ids), 'command': row_command(args, row),
            **{key: ' '.join(dict.fromkeys(str(each[key]) for each in made))
               for key in ('image_size', 'epochs', 'precision', 'kernels', 'commit')}}
    return scores, columns


def table_lines(args, out, reasons):
    """The lines of tableN.csv, from the predictions that are there, and what each row is."""
    printed = printed_figures(args.table)
    scores, columns = read_scores(args, out, args.table)
    lines = []
    for row in TABLES[args.table]:
        note = row.about
        if row.model:
            missing = [seed for seed in args.seeds if row.name not in scores or seed not in scores[row.name].seeds]
            why = reasons.get(row.name) or reasons.get(row.alpha_zero_of) or 'not run yet, the same command makes it'
            note = f'seed {", ".join(map(str, missing))}: {why}' if missing else ''
        for label in labels_of(args.table):
            figure = scores[row.name].figure(label) if row.name in scores else None
            lines.append(cell(row.name, label, printed.get((row.name, label)), figure, note,
                              **columns.get(row.name, {})))
    path = out / 'predictions' / f'{MASKS}.json'
    if args.table == 'table6' and path.exists():
        found = json.loads(path.read_text(encoding='utf-8'))['validation']
        lines += [cell(MASKS, key, None, (found[key], *found[f'{key}_ci95']), 'on validation', images=found['images'])
                  for key in ('dice', 'iou')]
    for first, second in pairs_of(args.table):
        apart = scores[first] - scores[second] if first in scores and second in scores else None
        how = {**columns[first], 'seeds': ' '.join(map(str, apart.seeds)), 'command': ''} if apart else {}
        for label in labels_of(args.table):
            both = [printed.get((name, label)) for name in (first, second)]
            difference = None if None in both else round(both[0] - both[1], 4)
            lines.append(cell(f'{first} - {second}', label, difference, apart and apart.figure(label),
                              '' if apart else 'not both of its rows were measured', **how))
    return lines, {row.name: row.about for row in TABLES[args.table]}


def network_lines(args, out):
    """Lines of masks.csv or maps.csv: the trained networks of the other tables, on the validation images."""
    split = load_splits(args.data)['validation']
    table_rows = {row.name: row for table in ('table3', 'table5') for row in TABLES[table] if not row.alpha_zero_of}
    found = {GAUSSIAN: dict.fromkeys(args.seeds, gaussian_rows(split))} if args.table == 'maps' else {}
    for name, seed in [(name, seed) for name in table_rows for seed in args.seeds]:
        folder, path = out / 'runs' / f'{name}-seed{seed}', out / args.table / f'{name}-seed{seed}.csv'
        if not path.exists() and (folder / 'metrics.json').exists() and not args.check:
            predictor = Predictor(folder)
            if args.table == 'masks' and not alphas_of(predictor.network):
                continue
            progress = partial(tqdm, desc=f'{args.table}, {name}, seed {seed}', leave=False)
            make_folder(path.parent)
            network, prepare = predictor.network, predictor.prepare
            write_rows(path, map_rows(network, prepare, split, progress) if args.table == 'maps' else
                       mask_rows(network, prepare, map(decode, progress(split['image']))))
        if path.exists():
            found.setdefault(name, {})[seed] = read_rows(path)
    if not found.keys() - {GAUSSIAN}:
        raise RunError(f'No trained network of table3 or table5 is in {out / "runs"}: make those tables first.')
    command = 'python benchmarks/reproduce_tables.py ' + shlex.join([
        args.table, '--data', str(args.data), '--output-dir', args.output_dir, '--seeds', *map(str, args.seeds)])

    def how(name):
        return {'seeds': ' '.join(map(str, found[name])) if name != GAUSSIAN else '', 'command': command}

    about = {name: row.about for name, row in table_rows.items()}
    if args.table == 'masks':
        return mask_lines(found, how), about
    pairs = [*pairs_of('table3'), *((name, GAUSSIAN) for name in found if name != GAUSSIAN)]
    return map_lines(found, pairs, how), {**about, GAUSSIAN: 'a map that has not seen the picture'}


def picture_of(split, row):
    return restore_aspect(decode(split[row]['image']), split[row].get('aspect_ratio', 1.))


def figures(args, out):
    """The paper's pictures for two checkpoints."""
    predictors = [Predictor(name) for name in args.model]
    if args.images:
        paths = sorted(path for path in Path(args.images).rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
        images = [Shown(path.stem, partial(read_picture, path)) for path in paths]
    else:
        test = load_splits(args.data)['test']
        diagnoses = diagnoses_of(label_array(test))
        images = [Shown(test[row]['image_id'], partial(picture_of, test, row), label_words(DIAGNOSES[diagnoses[row]]))
                  for row in np.argsort(-diagnoses, kind='stable').tolist()]  # rare diagnoses first
    if not images:
        raise RunError(f'There is no image in {args.images}: name a folder with {", ".join(sorted(IMAGE_SUFFIXES))}.')
    reasons = draw_figures(out, predictors, images, args.count, partial(tqdm, desc='figures', leave=False))
    for name, what in FIGURES.items():
        print(f'{name}.png: {what}' if not reasons[name] else f'{name}.png was not drawn: {reasons[name]}.')
    print(f'In {out}')


def main():
    parser = build_parser()
    try:
        args = parse_args(parser)
        out = Path(args.output_dir)
        check_output_dir(out)
        make_folder(out)
        failed = False
        if args.table == 'figures':
            figures(args, out)
            return
        if args.table == 'table1':
            lines, about = table1_lines(args)
        elif args.table == 'table7':
            lines, about = table7_lines(args, read_scores(args, out, 'table3')[0] if args.data else {})
        elif args.table in ('masks', 'maps'):
            lines, about = network_lines(args, out)
        else:
            load_splits(args.data)  # a fault in it is told before the work
            reasons = {}
            if not args.check:
                for name in ('predictions', 'runs'):
                    make_folder(out / name)
                reasons, failed = make_runs(args, out)
            lines, about = table_lines(args, out, reasons)
        path = out / f'{args.table}.csv'
        if args.check:
            if not path.is_file():
                raise RunError(f'--check: there is no {path}: make the table first, without --check.')
            wrong = differences(path, lines)
            print('\n'.join(wrong) or f'{path}: all {len(lines)} lines are as computed again.')
            sys.exit(bool(wrong))
        write_table(out, args.table, lines, about)
        print(path.with_suffix('.md').read_text(encoding='utf-8'))
        empty = len({line['row'] for line in lines if not line['measured']})
        print(f'In {out}: {args.table}.csv, {args.table}.md'
              + f'; {empty} rows have no figures of ours, for the reasons above' * bool(empty))
        sys.exit(failed)
    except (RunError, DataError, WeightsError, OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: the same command again goes on.\n')


if __name__ == '__main__':
    main()
