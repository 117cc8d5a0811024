#!/usr/bin/env python3
"""Score a checkpoint on ISIC 2017 Part 3 or other images: AUCs, operating points, calibration, groups, pictures.

    python benchmarks/evaluate_isic.py --data path/to/isic2017 --checkpoint OUT --split test --output-dir R --report
    python benchmarks/evaluate_isic.py --data path/to/isic2017 --checkpoint OUT --output-dir R \\
        --compare OTHER/predictions_test.csv                                 # paired, on the same images

Thresholds and calibration are chosen on the validation split, never on the test split; without a validation split
none are chosen. Data without splits are scored as a whole, but those that the checkpoint's run has divided stay divided
so (its splits.csv).

    python benchmarks/evaluate_isic.py --data OTHER --checkpoint OUT --output-dir R --report \\
        --map melanoma=MEL,mel seborrheic_keratosis=BKL                      # another clinic's labels

--map scores images of another clinic, whose words for the labels, or columns of 0 and 1, differ. Labels that are not
mapped are not scored; thresholds and calibration are those of home (home.json of the run, or of published weights).
Other data than those of the run with the same labels and no validation split are scored so without --map.

The output folder receives
    metrics.json, metrics.md  scores keyed by split; at the threshold 0.5, and a list of other operating points
    predictions_SPLIT.csv     image_id and a probability for each label
    roc_SPLIT.png, reliability_SPLIT.png; curves.png and alphas.png where the checkpoint has a summary.csv
    report.html               with --report: all of it on one page, with images and what the network sees in them;
                              one file that needs no network
    evaluation.json           what was scored and how: digest of the weights, command, versions, crops, --alpha-zero
These files replace an earlier evaluation in that folder; other files there stay. Each look at the test split is
recorded in looks.csv, in the output folder and in the folder of the checkpoint's run.
"""
import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import timm
import torch
from accelerate.utils import set_seed

import timm_arl
from timm_arl.attention import alphas_of
from timm_arl.download import WeightsError
from timm_arl.factory import Checkpoint, tensors_sha256
from timm_arl.files import git_commit, make_folder, same_place, write_json
from timm_arl.isic.calibration import calibration_scores, subgroup_table
from timm_arl.isic.dataset import DataError, add_data_arguments, check_usable, load_data, wanted_of
from timm_arl.isic.dataset.data import label_array
from timm_arl.isic.dataset.demo import DEMO_TASKS
from timm_arl.isic.dataset.duplicates import is_against, without_known, without_twins
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.html_report import Comparison, Training, html_report
from timm_arl.isic.intervals import unit_of
from timm_arl.isic.mapping import map_labels, read_map
from timm_arl.isic.metrics import auc_table, compare, interval_text, score_split
from timm_arl.isic.plots import alpha_plot, curve_plot, reliability_plot, roc_plot
from timm_arl.isic.predictions import read_predictions, write_predictions
from timm_arl.isic.report import scores_page, test_of_aucs
from timm_arl.isic.shift import (
    HOME_FILE,
    calibration_doubts,
    calibration_drift,
    chosen,
    home_of,
    home_record,
    image_statistics,
)
from timm_arl.isic.shift_page import External
from timm_arl.isic.task import Task, label_words
from timm_arl.isic.transforms import CROPS, EvalCrops
from timm_arl.training.accelerator import create_accelerator
from timm_arl.training.arguments import RunError, check_not_empty, number, program_parser
from timm_arl.training.evaluations import (
    check_free,
    epochs_of,
    is_home,
    print_drift,
    print_mapping,
    print_replaced,
    replacing_evaluation,
    seed_of_data,
    subgroups_of,
    training_names,
)
from timm_arl.training.examples import report_examples
from timm_arl.training.images import check_images, has_masks, image_loader, note_squares, predict, shown_as
from timm_arl.training.networks import config_for_size
from timm_arl.training.runs import record_look


def build_parser():
    parser = program_parser(__doc__, '--data DIR --checkpoint OUT|NAME --output-dir R')
    add = parser.add_argument
    add('--data', required=True, metavar='DIR|FILE.csv|HUB_ID|demo',
        help='CSV, folder, Hub id or demo, as for finetune_isic.py')
    add_data_arguments(parser)
    add('--checkpoint', required=True, metavar='OUT|NAME',
        help='output folder of finetune_isic.py, or a timm name whose weights have the same outputs')
    add('--split', default='test', choices=['validation', 'test'],
        help='the split to score; validation is scored too, where there is one (default: %(default)s)')
    add('--crops', choices=CROPS,
        help="crops per image, whose probabilities are averaged (default: as in the checkpoint's run, or multiscale)")
    add('--output-dir', required=True, help="where to write; not the folder of the checkpoint's run")
    add('--report', action='store_true', help='write report.html, one page that holds images of the split')
    add('--alpha-zero', action='store_true', help='set every alpha to 0: the same network without its attention')
    add('--compare', metavar='PREDICTIONS.csv',
        help="predictions of another network on the same images: paired differences, this checkpoint minus the other")
    add('--subgroups', nargs='+', metavar='COLUMN',
        help='columns of the data whose groups are scored, with counts (default: sex and age_approximate, where known)')
    add('--map', nargs='+', metavar='LABEL=WORD,WORD',
        help="external validation: which labels of the data mean which of the checkpoint's (a word with a comma: "
             '\'LABEL="WORD, MORE"\'); others are not scored, thresholds and calibration are those of home (not needed '
             'for data with the same labels and no validation split)')
    add('--other-data', action='store_true',
        help="the data are not those of the checkpoint's run, though images have the same names: score them as a whole")
    add('--drop-duplicates', metavar='LIST.csv',
        help='leave out images that are twins of training images, by this list of pairs; those with a twin in '
             'the data of the network, where check made the list --against them')
    add('--img-size', type=number(int, 64), help="side of the network's input (default: the checkpoint's)")
    add('--aspect', choices=['keep', 'squash'],
        help="shape of square copies with an aspect_ratio (default: as in the checkpoint's run, or keep)")
    add('--grey-world', action=argparse.BooleanOptionalAction,
        help="colour constancy (default: as in the checkpoint's run)")
    add('--lesion-crop', action=argparse.BooleanOptionalAction,
        help="crop images that have a mask to the lesion (default: as in the checkpoint's run)")
    add('--batch-size', type=number(int, 1), default=32, help='images per process and step (default: %(default)s)')
    add('--seed', type=number(int, 0, 2 ** 32 - 1),
        help="seed of random crops and the run's generated images (default: the run's), and of the bootstrap and other "
             'generated images (default: 0)')
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1), help='threads per process')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    add('--skip-bad-images', action='store_true', help='leave out images that do not decode instead of stopping')
    parser.set_defaults(tracker='none', gradient_accumulation_steps=None)
    return parser


def images_of_the_run(args, accelerator, checkpoint):
    """Prepare the images as in the checkpoint's own run, where the command line does not say how.

    Returns:
        The arguments of that run, and thresholds that the weights come with; empty where they are not known.
    """
    unknown = []
    try:
        saved = checkpoint.settings(unknown)
        saved.update({} if unknown else checkpoint.arguments())
    except WeightsError as error:
        saved, unknown = {}, [error]
    for error in unknown:
        accelerator.print(f'How the training images of {args.checkpoint} were prepared is not known: no {error.file}, '
                          f'{error.cause}.')
    usual = {'crops': 'multiscale', 'aspect': 'keep', 'grey_world': False, 'lesion_crop': False}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, value))
    if same_place(args.data, saved.get('data')):
        of_run = checkpoint.folder and (checkpoint.folder / 'splits.csv').is_file()  # which tells more than --splits
        for name in ('task', 'labels', 'columns', 'group_column', *['splits'] * (not of_run and not args.other_data)):
            if getattr(args, name) is None:
                setattr(args, name, saved.get(name))
    accelerator.print('Images: ' + ', '.join(f'{name.replace("_", "-")} {getattr(args, name)}' for name in usual) + (
        ' (as in training, where not given)' if usual.keys() & saved.keys() else ''))
    return saved


def load_network(args, checkpoint):
    """The network, and its task."""
    model = checkpoint.network()
    task = Task.of_network(model, checkpoint.config())
    if task is None:
        raise WeightsError(f'What the {model.num_classes} outputs of {args.checkpoint} mean is not known: fine-tune it '
                           f'first with finetune_isic.py.')
    if args.alpha_zero:
        alphas = alphas_of(model)
        if not alphas:
            raise RunError(f'--alpha-zero: {args.checkpoint} has no alphas.')
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.zero_()
    return model.to(memory_format=torch.channels_last).eval(), task


def evaluate(args):
    check_not_empty(args)
    out, start_time = Path(args.output_dir), time.time()
    check_free(out, args.compare)
    accelerator = create_accelerator(args)
    checkpoint = Checkpoint(args.checkpoint)
    model, task = load_network(args, checkpoint)
    weights = Path(model.pretrained_cfg['file'])
    folder = (checkpoint.folder or weights.parent).absolute()
    shown = (folder.name if checkpoint.folder else args.checkpoint) + ', alpha zero' * args.alpha_zero
    summary = [] if args.alpha_zero else epochs_of(folder, accelerator)
    alphas = [name for name in alphas_of(model) if summary and name in summary[0]]
    saved, bootstrap = images_of_the_run(args, accelerator, checkpoint), args.seed or 0
    division_seed = seed_of_data(args, saved)
    args.seed = saved.get('seed', 0) if args.seed is None else args.seed
    set_seed(args.seed)
    select = saved.get('select') or 'mean_auc'
    data_config = config_for_size(model, args.img_size, args.checkpoint)
    how = shown_as(args, data_config)
    usual = {**saved, 'img_size': config_for_size(model, None, args.checkpoint)['input_size'][-1]}
    as_usual = all(usual.get(name) in (None, value) for name, value in how.items())

    wanted = read_map(args.map, task, args.checkpoint) if args.map else None
    data = load_data(args.data, wanted_of(args), division_seed, needed=(args.split,), whole=args.split,
                     expected=None if args.map else task, words=sum((wanted or {}).values(), []),
                     earlier=None if args.map or args.other_data else folder / 'splits.csv',
                     given=bool(saved.get('splits')), same=same_place(args.data, saved.get('data')),
                     alone=bool(args.map), usual_groups=saved.get('group_column'), train_ids=saved.get('train_ids'))
    accelerator.print(data.summary(args.data))
    mapped, home = None, {}
    at_home = not args.other_data and is_home(args.data, args.split, folder, saved, data.splits, bool(args.map))
    if not (wanted or at_home) and data.task.labels == task.labels:
        if 'validation' in data.splits:
            accelerator.print(
                f'{args.data} has validation images, which choose thresholds and calibration. For those of the '
                f'checkpoint: --map {" ".join(shlex.quote(f"{label}={label}") for label in task.labels)}')
        else:
            wanted = {label: [label] for label in task.labels}
    if wanted:
        home = home_of(folder, saved, checkpoint.home())
        mapped = map_labels(data, task, wanted, args.split, args.data)
        data = mapped.data
        print_mapping(accelerator, mapped, home, args, how)
    elif data.task.labels != task.labels:
        raise RunError(f'{args.data} has the labels {", ".join(data.task.labels)}, but {args.checkpoint} knows '
                       f'{", ".join(task.labels)}: choose data or a checkpoint with the same, or say by --map which of '
                       f'them mean the same.')
    splits, scored = data.splits, data.task if mapped else task
    learned = training_names(folder, splits[args.split]['image_id'])
    if learned:
        accelerator.print(f'{len(learned)} of the {len(splits[args.split])} {args.split} images have names of training '
                          f'images of {args.checkpoint} ({", ".join(learned[:3])}): if they are the same images, these '
                          f'scores are too good. Look with python -m timm_arl.isic.dataset check --against.')
    same_data = 'train' in splits and ids_digest(splits['train']['image_id']) == saved.get('train_ids')
    training_labels = label_array(splits['train'], task) if same_data else None
    kept_best = saved.get('keep') == 'best' and not saved.get('fold')  # a fold has validation images of its own
    if args.drop_duplicates:
        against = 'train' not in splits or is_against(args.drop_duplicates)  # another clinic's
        splits, left_out = (without_known if against else without_twins)(splits, args.drop_duplicates)
        accelerator.print(
            f'Left out, since they have a twin in {"the data of the network" if against else "train"}: '
            + ', '.join(f'{count} {name} images' for name, count in left_out.items()) + '.')
        if not mapped:
            check_usable(splits, f'{args.data} without duplicates', task)
    splits = {name: splits[name] for name in dict.fromkeys(('validation', args.split)) if name in splits}
    if 'validation' not in splits and not mapped:
        accelerator.print(f'{args.data} has no validation split: no thresholds and no calibration are chosen.')
    for name, split in splits.items() if args.lesion_crop else ():
        if not has_masks(split):
            accelerator.print(f'The {name} images have no masks: --lesion-crop does not change them.')
    if args.compare:  # a fault in it is told before the work, not after
        try:
            read_predictions(args.compare, splits[args.split]['image_id'], scored)
        except ValueError as error:
            raise RunError(f'--compare: {error}') from error
    check_images(splits, args, accelerator, data_config, scored, chooses=not mapped)
    note_squares(splits, args, accelerator)
    parts = {name: subgroups_of(split, args, scored, name == args.split) for name, split in splits.items()}
    loaders = {name: image_loader(args, split, data_config, accelerator, task=scored, groups=data.groups)
               for name, split in splits.items()}
    truth = {name: loader.dataset.labels.numpy() for name, loader in loaders.items()}
    groups = {name: loader.dataset.groups for name, loader in loaders.items()}
    if accelerator.is_main_process:
        make_folder(out)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    predicted = {name: predict(accelerator, model, loader, name, task).numpy() for name, loader in loaders.items()}
    columns = [task.labels.index(label) for label in scored.labels]
    probabilities = {name: p[:, columns] for name, p in predicted.items()}
    if not accelerator.is_main_process:
        return

    # Chosen on validation, or at home
    choice, doubts = home, {}
    if 'validation' in truth and not mapped:
        choice = chosen(truth['validation'], probabilities['validation'], task, training_labels)
        doubts = calibration_doubts(truth['validation'], probabilities['validation'], choice, groups['validation'])
        print(*[f'{doubt}\n' for doubt in doubts.values()], sep='', end='')
        if training_labels is None:
            print(f'{args.data} does not have the training images of {args.checkpoint}: calibration is for the mix of '
                  f'its validation images.')
    points = {name.replace(' on ', ' on home ') if mapped else name: [values[label] for label in scored.labels]
              for name, values in choice.get('thresholds', {}).items()}
    calibrations = [(choice['temperatures'][label], choice['biases'][label])
                    if label in choice.get('temperatures', {}) else None for label in scored.labels]

    metrics = {}
    for name in splits:
        scores = metrics[name] = score_split(
            truth[name], probabilities[name], seed=bootstrap, operating_points=points, task=scored,
            groups=groups[name], unit=unit_of(data.groups))
        for label, t, p, calibration in zip(scored.labels, truth[name].T, probabilities[name].T, calibrations):
            scores[label]['calibration'] = calibration_scores(t, p, calibration)
            scores[label].update({'calibration_doubt': doubts[label]} if label in doubts else {})
        scores['subgroups'] = subgroup_table(truth[name], probabilities[name], parts[name], scored, groups[name])
    external = None
    if mapped:
        drift = {label: calibration_drift(t, p, calibration, groups[args.split], bootstrap)
                 for label, t, p, calibration in zip(
                     scored.labels, truth[args.split].T, probabilities[args.split].T, calibrations)}
        metrics[args.split]['external'] = {
            'map': mapped.sources, 'negative': mapped.negative, 'not_scored': mapped.not_scored,
            'home': 'temperatures' in home, 'drift': drift}
        external = External(home, image_statistics(splits[args.split]), *mapped[1:])
    other = None
    if args.compare:
        other = Comparison(args.compare, read_predictions(args.compare, loaders[args.split].dataset.image_ids, scored))
        metrics[args.split]['comparison'] = {
            'first': args.compare, 'second': shown,
            **compare(truth[args.split], other.probabilities, probabilities[args.split], seed=bootstrap, task=scored,
                      groups=groups[args.split])}

    # The look is recorded before anybody can see what it gave
    if args.split == 'test' or mapped:
        elsewhere = not at_home or bool(mapped and 'train_ids' not in saved)
        look = shown, metrics[args.split], args.data * elsewhere
        record_look(out, *look)
        if (folder / 'run.json').is_file() and os.access(folder, os.W_OK):
            record_look(folder, *look)
        elif (folder / 'run.json').is_file():
            print(f'{folder} cannot be written to: this look at the {args.split} split is recorded in {out} alone.')

    if same_data and as_usual and 'validation' in splits and not (args.alpha_zero or args.drop_duplicates) and (
            folder / 'run.json').is_file() and os.access(folder, os.W_OK) and not (folder / HOME_FILE).exists():
        write_json(folder / HOME_FILE, home_record(
            splits['validation'], truth['validation'], probabilities['validation'], task, how,
            groups['validation'], training_labels))

    record = {
        'command': shlex.join(sys.argv), 'commit': git_commit(__file__) or '', 'timm_arl': timm_arl.__version__,
        'timm': timm.__version__, 'torch': torch.__version__, **how, **({'map': args.map} if args.map else {}),
        'seed': bootstrap, 'images_seed': division_seed if args.data in DEMO_TASKS else args.seed,
        'alpha_zero': args.alpha_zero, **({'duplicates_left_out': left_out} if args.drop_duplicates else {}),
        'tensors_sha256': tensors_sha256(weights)}
    if args.report:
        images = loaders[args.split]
        examples = report_examples(
            accelerator.unwrap_model(model), images.dataset, EvalCrops(data_config['input_size'][-1], args.crops),
            images.normalise, probabilities[args.split], other and other.probabilities, task, scored)
        page = html_report(
            shown, args.data, args.split, metrics, truth, probabilities, record,
            Training(summary, alphas, kept_best, same_data, 'thresholds' in saved, select), examples, other, scored,
            groups, external)
    synthetic = ' (SYNTHETIC images)' * (args.data in DEMO_TASKS)
    print_replaced(out, record['tensors_sha256'])
    with replacing_evaluation(out) as new:
        write_json(new / 'metrics.json', metrics)
        write_json(new / 'evaluation.json', record)
        for name, scores in metrics.items():
            of = f'{Path(args.data).name}, {name}' if mapped else name
            title = f'{shown}, {of}, {len(truth[name])} images{synthetic}'
            images = loaders[name].dataset
            write_predictions(
                new / f'predictions_{name}.csv', images.image_ids, predicted[name], task, images.groups)
            roc_plot(new / f'roc_{name}.png', truth[name], probabilities[name], scores, title, task=scored,
                     groups=groups[name])
            reliability_plot(
                new / f'reliability_{name}.png', truth[name], probabilities[name], scores, title, scored)
        if summary:
            curve_plot(new / 'curves.png', summary, f'{folder.name}{synthetic}', task, select)
        if alphas:
            alpha_plot(new / 'alphas.png', summary, alphas, f'{folder.name}{synthetic}')
        if args.report:
            (new / 'report.html').write_text(page, encoding='utf-8', errors='backslashreplace')
        where = f' on {args.data}' * bool(mapped)
        (new / 'metrics.md').write_text(scores_page(f'{shown}{where}{synthetic}', metrics, scored), encoding='utf-8')
        written = sorted(path.name for path in new.iterdir())
    print(f'{shown}: AUC [95 % interval]{synthetic}\n' + auc_table(metrics, scored))
    if mapped:
        print_drift(drift)
    if args.compare:
        print(f'Scores of {shown} minus that of {args.compare}, on the same images:')
        whose = test_of_aucs(groups[args.split] is not None)
        for name in (*scored.labels, 'mean_auc', *['balanced_accuracy'] * (scored.kind == 'multiclass')):
            pair = metrics[args.split]['comparison'][name]
            print(f'  {label_words(name):22}' + interval_text(pair['difference'], pair['difference_ci95'], '+')
                  + (f", {whose} p {pair['p_value']:.3g}" if pair.get('p_value') is not None else ''))
    print(f'{time.time() - start_time:.0f} s. In {out}: {", ".join(written)}'
          + ', looks.csv' * bool(args.split == 'test' or mapped))


def main():
    parser = build_parser()
    try:
        evaluate(parser.parse_args())
    except (RunError, DataError, WeightsError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted.\n')


if __name__ == '__main__':
    main()
