#!/usr/bin/env python3
"""Average the weights of several runs of finetune_isic.py into one network, which costs no more than one of them.

    python benchmarks/average_runs.py --runs RUN0 RUN1 RUN2 --data path/to/isic2017 --output-dir OUT
    python benchmarks/average_runs.py --runs RUN0 --half --img-size 160 --data path/to/isic2017 --output-dir OUT

Wortsman et al., `Model soups` - https://arxiv.org/abs/2203.05482
Touvron et al., `Fixing the train-test resolution discrepancy` - https://arxiv.org/abs/1906.06423

The runs differ in their seeds alone and started from the same weights, but for a new classifier, which each seed draws.
Networks from random weights cannot be averaged.
The statistics of batch norms are measured again on the training images (not those that --freeze-bn has kept). The
validation split is scored, the test split is not. With one run as well, --half stores the weights in half precision,
and --img-size shows the network images of another size from now on: random crops in training enlarge what is in them,
so it can score higher on images somewhat larger than those it was trained on.
The output folder is like that of a run:
    config.json, model.safetensors   timm.create_model('local-dir:OUT', pretrained=True)
    metrics.json, predictions_validation.csv, home.json, run.json
    splits.csv, summary.csv          where the runs have the one, and of a single run
It can be evaluated, used for predictions and staged as any other run.
"""
import json
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import safetensors.torch
import torch
from accelerate.utils import set_seed
from timm.data import resolve_model_data_config
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, load_weights_file, save_network
from timm_arl.files import git_commit, parts_of, read_rows, replacing_folder, same_place, write_json, write_rows
from timm_arl.isic.dataset import DataError, load_data, wanted_of
from timm_arl.isic.dataset.data import label_array
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.intervals import unit_of
from timm_arl.isic.metrics import auc_table, score_split
from timm_arl.isic.predictions import write_predictions
from timm_arl.isic.selection import kept_row
from timm_arl.isic.shift import HOME_FILE, home_record
from timm_arl.isic.task import Task
from timm_arl.training.accelerator import create_accelerator
from timm_arl.training.arguments import RunError, check_not_empty, number, program_parser
from timm_arl.training.images import check_images, image_loader, predict, shown_as
from timm_arl.training.networks import config_for_size
from timm_arl.training.options import build_parser as training_parser
from timm_arl.training.runs import check_output_dir, looks_in

# data: the training images are compared; content: with or without a test split
MAY_DIFFER = {
    'seed', 'seeds', 'division_seed', 'data', 'splits', 'content', 'skip_test', 'workers', 'cpu_threads', 'tracker'}


def build_parser():
    parser = program_parser(__doc__, '--runs RUN [RUN ...] --data DIR --output-dir OUT')
    add = parser.add_argument
    add('--runs', required=True, nargs='+', metavar='RUN', help='output folders of finetune_isic.py')
    add('--data', required=True, metavar='DIR|FILE.csv|HUB_ID|demo', help='the data of these runs')
    add('--output-dir', required=True, metavar='OUT', help='folder for the network; it must not exist')
    add('--half', action='store_true', help='store the weights in half precision (norms, biases and alphas stay)')
    add('--img-size', type=number(int, 64), help="side of the network's input from now on (default: as in training)")
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1), help='threads per process')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    return parser


def read_runs(folders):
    """The records of the runs, run.json, after checking that they can be averaged."""
    records, defaults = [], vars(training_parser(__doc__).parse_args([]))
    for folder in folders:
        try:
            record = json.loads(Path(folder, 'run.json').read_text(encoding='utf-8'))
            if not {'train_ids', 'model', 'model_kwargs'} <= record['arguments'].keys():
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f'{folder} is no run of finetune_isic.py: its run.json is missing or unreadable.') from None
        record['arguments'] = {**defaults, **record['arguments']}  # of a version that had fewer
        if not Path(folder, 'metrics.json').is_file():
            raise RunError(f'The run in {folder} is not finished: go on with --resume --output-dir {folder}.')
        if record.get('averaged'):
            raise RunError(f'{folder} is an average already: name the runs that it was made of.')
        if record['arguments']['fold']:
            raise RunError(f'{folder} is {record["arguments"]["fold"]} of a cross-validation, and folds have other '
                           f'training images than each other: average runs of --seeds.')
        records.append(record)
    first = records[0]['arguments']
    for folder, record in zip(folders[1:], records[1:]):
        other = record['arguments']
        differ = sorted(key for key in first.keys() | other.keys() if key not in MAY_DIFFER
                        and first.get(key) != other.get(key))
        if differ:
            key = differ[0]
            if key == 'train_ids':
                raise RunError(f'{folder} has other training images than {folders[0]}. Data without splits are divided '
                               f'by each seed: pass --splits {folders[0]}/splits.csv to the other runs.')
            raise RunError(f'{folder} has other arguments than {folders[0]} ({key} {other.get(key)}, not '
                           f'{first.get(key)}): runs that are averaged differ in their seeds alone.')
    if len(records) > 1 and not (first.get('pretrained') or first.get('init_checkpoint')):
        raise RunError(f'{folders[0]} started from random weights. Such networks cannot be averaged: their channels '
                       f'have no common order. Start the runs with --pretrained or --init-checkpoint.')
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise RunError('--runs names a folder twice.')
    return records


def kept_epoch_of(folder, arguments):
    """The row of a run's summary.csv whose network was kept."""
    try:
        return kept_row(read_rows(Path(folder, 'summary.csv')), arguments['keep'], arguments['select'])
    except (ValueError, LookupError) as error:
        raise RunError(f'{folder}/summary.csv is damaged: restore it, or train the run again.') from error


def average(networks):
    """The mean of the tensors of networks, in the first of them; counts are those of the first."""
    states = [network.state_dict() for network in networks]
    means = {name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
             for name, tensor in states[0].items()}
    networks[0].load_state_dict(means)
    return networks[0]


def store_in_half(path):
    """Rewrite a safetensors file: matrices and kernels in half precision, vectors and scalars as they are."""
    tensors = safetensors.torch.load_file(path)
    small = {name: t.half() if t.ndim > 1 and t.is_floating_point() else t for name, t in tensors.items()}
    if not all(t.isfinite().all() for t in small.values()):
        raise RunError('Half precision cannot hold weights above 65,504: leave out --half.')
    path.unlink()  # for the usual permissions, which save_file does not give
    path.write_bytes(safetensors.torch.save(small, {'format': 'pt'}))


def average_runs(args):
    check_not_empty(args)
    out = Path(args.output_dir)
    check_output_dir(out)
    if out.exists():
        raise RunError(f'{out} exists already: choose another --output-dir.')
    records = read_runs(args.runs)
    kept = [kept_epoch_of(folder, record['arguments']) for folder, record in zip(args.runs, records)]
    saved = Namespace(**{**records[0]['arguments'], 'data': args.data, 'workers': args.workers, 'tracker': 'none',
                         'cpu_threads': args.cpu_threads, 'mixed_precision': args.mixed_precision, 'epochs': 1,
                         'start_size': None, 'output_dir': args.output_dir, 'skip_test': True})
    accelerator = create_accelerator(saved)
    if accelerator.num_processes > 1:
        raise RunError('This program works in one process: start it with python.')
    set_seed(saved.seed)
    networks = [Checkpoint(folder).network() for folder in args.runs]
    network = average(networks).to(memory_format=torch.channels_last)
    task = Task.of_network(network, Checkpoint(args.runs[0]).config())
    own_config = resolve_model_data_config(network)
    data_config = config_for_size(network, args.img_size, 'The network')

    seed = saved.seed if saved.division_seed is None else saved.division_seed
    data = load_data(args.data, wanted_of(saved)._replace(splits=None), seed, expected=task,
                     earlier=Path(args.runs[0], 'splits.csv'), given=bool(saved.splits),
                     same=same_place(args.data, records[0]['arguments']['data']))
    data = data._replace(task=task, splits={name: data.splits[name] for name in ('train', 'validation')})
    if ids_digest(data.splits['train']['image_id']) != saved.train_ids:
        raise RunError(f'{args.data} has other training images than {args.runs[0]}: pass the data of these runs.')
    check_images(data.splits, saved, accelerator, data_config, task)
    loaders = {name: image_loader(saved, data.splits[name], config, accelerator, name == 'train', task, data.groups)
               for name, config in (('train', own_config), ('validation', data_config))}
    loaders['train'].set_epoch(0)
    network = network.to(accelerator.device)
    measured = len(args.runs) > 1 and not saved.freeze_bn
    if measured:
        with accelerator.autocast():
            update_bn(tqdm(loaders['train'], desc='statistics of batch norms', leave=False), network)
    network.cpu().eval()

    truth = loaders['validation'].dataset.labels.numpy()
    groups = loaders['validation'].dataset.groups
    with replacing_folder(out) as new:
        save_network(network.to(memory_format=torch.contiguous_format), new, label_names=task.outputs,
                     data_config=data_config, task=task.config(), **saved.model_kwargs)
        if args.half:
            store_in_half(new / 'model.safetensors')
            load_weights_file(network, new)  # what is scored is what is stored
        network = network.to(accelerator.device, memory_format=torch.channels_last)
        probabilities = predict(accelerator, network, loaders['validation'], 'validation', task).numpy()
        metrics = {'validation': score_split(
            truth, probabilities, seed=saved.seed, task=task, groups=groups, unit=unit_of(data.groups))}
        if len(args.runs) == 1:
            shutil.copyfile(Path(args.runs[0], 'summary.csv'), new / 'summary.csv')
        looks = [row for folder in args.runs for row in looks_in(folder)]
        if looks:  # at the test split, by the runs
            write_rows(new / 'looks.csv', looks, list(dict.fromkeys(key for row in looks for key in row)))
        write_predictions(new / 'predictions_validation.csv', loaders['validation'].dataset.image_ids, probabilities,
                          task, groups)
        write_json(new / HOME_FILE, home_record(
            data.splits['validation'], truth, probabilities, task, shown_as(saved, data_config), groups,
            label_array(data.splits['train'], task)))
        write_json(new / 'run.json', {
            **{key: value for key, value in records[0].items() if key != 'resumed'},
            'command': shlex.join(sys.argv), 'commit': git_commit(sys.argv[0]),
            'arguments': {**records[0]['arguments'], 'half': args.half, 'trained_at': own_config['input_size'][-1]},
            'statistics_measured': measured,
            'averaged': [{
                'run': Path(folder).name, 'seed': record['arguments']['seed'], 'command': record['command'],
                'commit': parts_of(record, 'commit'), 'epoch': int(row['epoch']),
                'learned_masks': 'train_mask_loss' in row,
            } for folder, record, row in zip(args.runs, records, kept)]})
        write_json(new / 'metrics.json', metrics)
        division = Path(args.runs[0], 'splits.csv')
        if division.is_file():
            shutil.copyfile(division, new / 'splits.csv')

    for folder in args.runs:
        alone = json.loads(Path(folder, 'metrics.json').read_text(encoding='utf-8'))['validation']
        print(f'{folder}: validation mean AUC {alone["mean_auc"]:.3f}')
    print(f'{len(args.runs)} runs averaged, ' * (len(args.runs) > 1) + 'AUC [95 % interval]\n'
          + auc_table(metrics, task))
    print(f'In {out}: ' + ', '.join(sorted(path.name for path in out.iterdir())))


def main():
    parser = build_parser()
    try:
        average_runs(parser.parse_args())
    except (RunError, DataError, WeightsError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted.\n')


if __name__ == '__main__':
    main()
