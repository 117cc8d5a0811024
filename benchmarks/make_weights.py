#!/usr/bin/env python3
"""Make the weights that this project publishes: train, choose, evaluate, stage and, with --push, send them to the Hub.

    python benchmarks/make_weights.py arl_tf_efficientnet_lite0.isic2017 --data path/to/isic2017 --output-dir W
    python benchmarks/make_weights.py arl_cnn50.isic2017 --data path/to/isic2017 --output-dir W --push user/arl_cnn50

Each step is a program that can also be called by hand; its command is printed. A step that is finished is not made
again, so the same command goes on where it was stopped. Started several times at once, the processes share the runs.
    W/made_by.json what the weights are made by; another command is refused there
    W/seed-S/      finetune_isic.py with the recipe "weights", without a look at the test split
    W/average/     average_runs.py: the mean of these runs
    W/network/     average_runs.py --half: the average or the best of the runs, by validation, in half precision;
                   arl_cnn14 is trained at 96 to 128 px, and the finished network sees 160 px
    W/evaluation/  evaluate_isic.py --report: the first look at the test split
    W/alpha_zero/  evaluate_isic.py --alpha-zero, compared with it: the second
    W/staged/      what python -m timm_arl.hub stage makes of them, with its card
"""
import json
from pathlib import Path
from typing import NamedTuple, Tuple

from timm_arl.extras import require

require('train', __name__)

from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, tensors_sha256
from timm_arl.files import locked, make_folder, write_json
from timm_arl.hub import HubError, check_tag, check_target, push, stage
from timm_arl.isic.dataset import SPLITS, DataError, load_data
from timm_arl.training.arguments import RunError, check_not_empty, number, program_parser
from timm_arl.training.runs import check_output_dir
from timm_arl.training.tables.lines import read_record
from timm_arl.training.tables.processes import run_program

PROGRAMS = Path(__file__).resolve().parent


class Weights(NamedTuple):
    """How weights are made.

    Attributes:
        start: The weights that training starts from, a timm name; '' for random ones.
        teachers: What is learned from beside the labels, timm names with weights.
        seeds: Of the runs, whose average or best is taken; one where they start from random weights.
        img_size: Side of the finished network's input, where it is not that of training: chosen on held-out images.
    """
    start: str = ''
    teachers: Tuple[str, ...] = ()
    seeds: Tuple[int, ...] = (0, 1, 2)
    img_size: int = 0


WEIGHTS = {
    'arl_tf_efficientnet_lite0.isic2017': Weights('arl_tf_efficientnet_lite0.in1k'),
    'arl_cnn50.isic2017': Weights('arl_cnn50.tv_in1k'),
    'arl_cnn14.isic2017': Weights(teachers=('arl_tf_efficientnet_lite0.isic2017',), seeds=(0,), img_size=160),
}


def build_parser():
    parser = program_parser(__doc__, 'NAME --data DIR --output-dir W')
    add = parser.add_argument
    add('name', choices=list(WEIGHTS), metavar='NAME', help='which weights: ' + ', '.join(WEIGHTS))
    add('--data', required=True, metavar='DIR|HUB_ID|demo', help='as for finetune_isic.py')
    add('--output-dir', required=True, metavar='W', help='folder for the runs and what is made of them')
    add('--seeds', type=number(int, 0, 2 ** 32 - 1), nargs='+', help='a run for each (default: 0 1 2, or 0)')
    add('--init-checkpoint', metavar='FILE', help='file of the weights that training starts from (default: the Hub)')
    add('--teacher', nargs='+', metavar='OUT|NAME', help='networks to learn from, instead of those that NAME has')
    add('--recipe', default='weights', metavar='NAME|FILE.yaml', help='another recipe (default: %(default)s)')
    add('--epochs', type=number(int, 1), help='other than the recipe, to try the steps')
    add('--img-size', type=number(int, 64), help='the same for the side of the images')
    add('--tag', help='of the staged weights (default: as for python -m timm_arl.hub stage)')
    add('--note', help='what the card says about the images ("copies at 256 px", for example)')
    add('--push', metavar='REPO|FOLDER', help='send the staged weights to a repo of the Hub, or to a folder')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], default='no', help='of all steps (default: %(default)s)')
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1), help='threads of each step')
    return parser


def check_command(args, out):
    """The seeds, after refusing now what the last step would refuse, and a folder that another command has begun."""
    seeds = args.seeds or WEIGHTS[args.name].seeds
    if len(set(seeds)) < len(seeds):
        raise RunError('--seeds names a seed twice.')
    if len(seeds) > 1 and not (args.init_checkpoint or WEIGHTS[args.name].start):
        raise RunError(f'{args.name} starts from random weights, and such runs cannot be averaged: pass one seed.')
    if args.tag is not None:
        check_tag(args.tag)
    if args.push:
        check_target(args.push)
    if load_data(args.data, needed=SPLITS).division:
        raise RunError(f'{args.data} has no splits of its own, and the runs would have other images: divide it first, '
                       f'with python -m timm_arl.isic.dataset prepare.')
    for teacher in args.teacher or WEIGHTS[args.name].teachers:  # one that cannot be loaded is told now
        Checkpoint(teacher).network()
    made_by = {key: getattr(args, key) for key in (
        'name', 'data', 'init_checkpoint', 'teacher', 'recipe', 'epochs', 'img_size', 'mixed_precision')}
    made_by['seeds'] = list(seeds)
    make_folder(out)
    with locked(out / 'made_by.lock', wait=True):
        path = out / 'made_by.json'
        if not path.exists() or not (any(out.glob('*/run.json')) or is_busy(out)):  # one that made nothing is corrected
            write_json(path, made_by)
        earlier = read_record(path)
    differ = [key for key in made_by if made_by[key] != earlier.get(key)]
    if differ:
        raise RunError(f'{out} was begun with {differ[0].replace("_", "-")} {earlier.get(differ[0])}, not '
                       f'{made_by[differ[0]]}: choose another --output-dir.')
    return seeds


def validation_score(run):
    return read_record(run / 'metrics.json', 'validation', 'mean_auc')


def training_flags(args, seed):
    """Arguments of finetune_isic.py for one run."""
    how, model = WEIGHTS[args.name], args.name.partition('.')[0]
    start = []
    if args.init_checkpoint:
        start = ['--model', model, '--init-checkpoint', args.init_checkpoint]
    elif how.start:
        start = ['--model', how.start, '--pretrained']
    teachers = args.teacher or how.teachers
    return [
        '--data', args.data, *(start or ['--model', model]), *(['--teacher', *teachers] if teachers else []),
        '--recipe', args.recipe, *[f'--epochs={args.epochs}'] * bool(args.epochs),
        *[f'--img-size={args.img_size}'] * bool(args.img_size), '--seed', str(seed), '--skip-test', '--tracker', 'none']


def is_busy(out):
    """Whether another process makes one of the runs."""
    for path in out.glob('seed-*.lock'):
        with locked(path) as lock:
            if lock is None:
                return True
    return False


def is_staged(staged, network, evaluation, args):
    """Whether a folder has these weights, with their scores, and what the command line says of them."""
    try:
        results = json.loads((staged / 'results.json').read_text(encoding='utf-8'))
        scores = json.loads((evaluation / 'metrics.json').read_text(encoding='utf-8'))
        return (tensors_sha256(staged / 'model.safetensors') == tensors_sha256(network / 'model.safetensors')
                and results['metrics']['test']['mean_auc'] == scores['test']['mean_auc'] and 'home' in results
                and (args.tag is None or results['name'].endswith(f'.{args.tag}'))
                and (args.note is None or results['data']['note'] == ' '.join(args.note.split())))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_weights(args):
    check_not_empty(args)
    out = Path(args.output_dir)
    check_output_dir(out)
    seeds = check_command(args, out)
    machine = [f'--mixed-precision={args.mixed_precision}', f'--workers={args.workers}',
               *[f'--cpu-threads={args.cpu_threads}'] * bool(args.cpu_threads)]

    def step(program, folder, arguments, lock):
        """Run a program whose last file in its folder is metrics.json, unless it is there."""
        if not (folder / 'metrics.json').exists():
            status, why = run_program(PROGRAMS / program, [
                *arguments, *machine, '--output-dir', str(folder)], lock)
            if status:
                raise RunError(f'{program}: {why} (status {status})')

    # which was chosen for the size of training that the recipe has for random weights
    of_recipe = args.recipe == 'weights' and not (args.img_size or args.init_checkpoint)
    img_size = WEIGHTS[args.name].img_size if of_recipe else 0
    runs = [out / f'seed-{seed}' for seed in seeds]
    for seed, run in zip(seeds, runs):
        with locked(out / f'seed-{seed}.lock') as lock:
            if lock is None:
                print(f'Another process makes {run}.', flush=True)
                continue
            step('finetune_isic.py', run, [
                *training_flags(args, seed), *['--resume'] * (run / 'run.json').exists()], lock)
    missing = [str(run) for run in runs if not (run / 'metrics.json').exists()]
    if missing:
        print(f'Another process still makes {", ".join(missing)}, and then the rest. If it has ended, the same command '
              f'again goes on.')
        return
    with locked(out / 'network.lock', wait=True) as lock:
        average, network, evaluation, alpha_zero = (
            out / name for name in ('average', 'network', 'evaluation', 'alpha_zero'))
        chosen = best = max(runs, key=validation_score)
        if len(runs) > 1:  # runs that went far from their start have no good network between them
            step('average_runs.py', average, ['--runs', *map(str, runs), '--data', args.data], lock)
            chosen = average if validation_score(average) >= validation_score(best) else best
            print(f'Mean AUC on validation: {validation_score(average):.3f} of the average, '
                  f'{validation_score(best):.3f} of the best run. Chosen: {chosen}', flush=True)
        step('average_runs.py', network, [
            '--runs', *map(str, runs if chosen == average else [best]), '--half', '--data', args.data,
            *[f'--img-size={img_size}'] * bool(img_size)], lock)
        record = read_record(network / 'run.json')
        write_json(network / 'run.json', {**record, 'candidates': {  # which validation has compared
            run.name: validation_score(run) for run in (*runs, *[average] * (len(runs) > 1))}})
        look = ['--data', args.data, '--checkpoint', str(network), '--split', 'test']
        step('evaluate_isic.py', evaluation, [*look, '--report'], lock)
        step('evaluate_isic.py', alpha_zero, [
            *look, '--alpha-zero', '--compare', str(evaluation / 'predictions_test.csv')], lock)
        staged = out / 'staged'
        if not is_staged(staged, network, evaluation, args):  # else its card may have been edited since
            stage(network, staged, evaluation, args.tag, args.note or '', alpha_zero)
        print(f'Staged: {staged}')
        if args.push:
            changed = push(staged, args.push, yes=True)
            print(f'{staged} to {args.push}: '
                  + (', '.join(changed) + ' sent' if changed else 'everything is there already'))


def main():
    parser = build_parser()
    try:
        make_weights(parser.parse_args())
    except (RunError, DataError, HubError, WeightsError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: the same command again goes on.\n')


if __name__ == '__main__':
    main()
