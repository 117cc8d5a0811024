"""The flags of finetune_isic.py, and where their values come from: a recipe, the command line, or the run to resume."""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import yaml

from ..isic.dataset import add_data_arguments
from ..isic.task import HEADS
from ..isic.transforms import AUGMENTATIONS, CROPS
from .arguments import ModelKwargs, RunError, check_not_empty, number, program_parser

RECIPES = Path(__file__).with_name('recipes')
SECTIONS = ('from-scratch', 'from-weights')  # parts of a recipe that depend on the start
REQUIRED = ('epochs', 'batch-size', 'optimizer', 'lr', 'weight-decay', 'schedule', 'augmentation', 'crops')


def recipe_parser(prog: Optional[str] = None) -> argparse.ArgumentParser:
    """The flags that a recipe may set.

    Args:
        prog: What its errors begin with.
    """
    parser = argparse.ArgumentParser(prog=prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group('training (the recipe sets these; a flag given here wins)').add_argument
    add('--epochs', type=number(int, 1), help='passes over the training images')
    add('--batch-size', type=number(int, 1), help='images per step and process')
    add('--optimizer', choices=['adamw', 'momentum', 'sgd'],
        help='momentum: SGD with momentum; sgd: SGD with Nesterov momentum')
    add('--lr', type=number(float, 1e-12), help='peak learning rate')
    add('--alpha-lr', type=number(float, 0), help='peak learning rate of alphas and temperatures (default: --lr)')
    add('--momentum', type=number(float, 0, 1), default=0.9, help='momentum of SGD (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), help='weight decay, not applied to biases, norms and alphas')
    add('--schedule', choices=['cosine', 'step', 'constant'], help='learning rate schedule after the warm-up')
    add('--decay-epochs', type=number(int, 1), default=30,
        help='step schedule: epochs between two steps (default: %(default)s)')
    add('--decay-rate', type=number(float, 0, 1), default=0.5,
        help='step schedule: factor at each step (default: %(default)s)')
    add('--warmup-epochs', type=number(float, 0), default=0,
        help='epochs of linear warm-up, at most a fifth of all epochs (default: %(default)s)')
    add('--clip-grad', type=number(float, 0), default=0., help='clip the gradient norm to this value; 0: no clipping')
    add('--ema', type=number(float, 0, 0.99999), default=0.,
        help='decay of the moving average of the weights, which is then scored and kept; 0: no average')
    add('--balance', choices=['none', 'weights', 'sampler'], default='none',
        help='make up for rare diagnoses: weights in the loss, or a sampler that draws all diagnoses equally often')
    add('--head', choices=HEADS,
        help='sigmoid: one output per label; softmax: one output per diagnosis (default: softmax where an image has '
             'one of the labels, sigmoid where it may have several or none, as in ISIC 2017)')
    add('--mask-weight', type=number(float, 0), default=0.,
        help='weight of the loss that predicts the lesion mask, if the training images have masks; 0: no such loss')
    add('--mixup', type=number(float, 0), default=0., help='alpha of mixup; 0: no mixup')
    add('--label-smoothing', type=number(float, 0, 0.5), default=0., help='label smoothing (default: %(default)s)')
    add('--keep', choices=['best', 'last'], default='best',
        help='epoch to keep: the best on validation (--select), or the last (default: %(default)s)')
    add('--select', metavar='mean_auc|balanced_accuracy|auc:LABEL',
        help='the validation score that chooses the best epoch (default: mean_auc, but balanced_accuracy for ISIC 2018 '
             'and 2019, whose aim it is)')
    add('--patience', type=number(int, 0), default=0,
        help='stop after this many epochs without a better score on validation; 0: never')
    add('--distill-weight', type=number(float, 0, 1), default=0.5,
        help="with --teacher: share of the loss taken by the teachers' probabilities (default: %(default)s)")
    add('--distill-features', type=number(float, 0), default=1.,
        help="with --teacher: weight of the distance to the teachers' pooled features (default: %(default)s)")

    add = parser.add_argument_group('images (the recipe sets these too)').add_argument
    add('--img-size', type=number(int, 64),
        help="side of the network's input in pixels (default: the model's own, unless the recipe sets one)")
    add('--start-size', type=number(int, 32),
        help='begin with images of this size and grow to --img-size in steps of 32 pixels (default: no growth)')
    add('--augmentation', choices=AUGMENTATIONS, help='augmentation of the training images')
    add('--patches-per-image', type=number(int, 1), default=1,
        help='how often an epoch shows each image (default: %(default)s)')
    add('--crops', choices=CROPS, help='crops of a validation or test image; their probabilities are averaged')
    add('--aspect', choices=['keep', 'squash'], default='keep',
        help='square copies with an aspect_ratio: restore the original shape, or leave them (default: %(default)s)')
    add('--grey-world', action=argparse.BooleanOptionalAction, default=False, help='grey-world colour constancy')
    add('--lesion-crop', action=argparse.BooleanOptionalAction, default=False,
        help='crop each image to its lesion mask; images without a mask stay whole')
    return parser


def build_parser(doc: str) -> argparse.ArgumentParser:
    """All flags.

    Args:
        doc: Docstring of the program.
    """
    parser = program_parser(doc, '[--data DIR] [--model NAME] [--output-dir OUT]', parents=[recipe_parser()])
    add = parser.add_argument
    add('--data', default='demo', metavar='DIR|FILE.csv|HUB_ID|demo',
        help="a CSV of image paths, a folder for each class, the folders of a challenge or of HAM10000, what `isic "
             "image download` wrote, a folder or Hub id of the datasets library, or 'demo', 'demo-7' or "
             "'demo-groups': generated synthetic images (default: %(default)s)")
    add_data_arguments(parser)
    add('--model', default='arl_cnn14', help='any timm model (default: %(default)s)')
    add('--model-kwargs', nargs='+', default={}, action=ModelKwargs, metavar='KEY=VALUE',
        help='arguments for timm.create_model, such as mask_scale=mean1 alpha_init=0.01; saved in config.json')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--pretrained', action='store_true', help="start from the model's pretrained weights")
    start.add_argument(
        '--init-checkpoint', metavar='PATH',
        help='start from a .safetensors file or from the output folder of another run')
    add('--teacher', nargs='+', metavar='OUT|NAME',
        help='learn from trained networks too: output folders, or timm names with pretrained weights. They are shown '
             'the images of the run, and the mean of their probabilities and their features are learned; of one with '
             'other labels, such as those of ImageNet, the features alone')
    add('--recipe', default='modern', metavar='modern|paper|tables|weights|FILE.yaml',
        help='sets the flags under "training" and "images" that are not given (default: %(default)s)')
    add('--output-dir', help='folder for the results (default: runs/MODEL-DATA-TIME)')
    add('--resume', action='store_true',
        help='continue the run in --output-dir with the arguments it was started with')
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0,
        help='seed of initial weights, image order and augmentation (default: %(default)s)')
    add('--skip-bad-images', action='store_true', help='leave out images that cannot be read instead of stopping')
    add('--streaming', action='store_true',
        help='read the training images from their Parquet shards, on disk or on the Hub, as they are needed')
    add('--skip-test', action='store_true', help='do not score the test split')
    add('--preview', metavar='FILE.png', help='draw what the network will see, then stop')

    add = parser.add_argument_group('several runs, each in its own folder below --output-dir').add_argument
    add('--folds', type=number(int, 2), default=0,
        help='cross-validate on the split train, keeping the last epoch; the test split is not used')
    add('--duplicates', metavar='LIST.csv',
        help='pairs of images that stay in the same fold (default: duplicates.csv in --data, if there is one)')
    add('--seeds', type=number(int, 0, 2 ** 32 - 1), nargs='+', help='one run for each of these seeds')

    add = parser.add_argument_group('machine').add_argument
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1),
        help='threads per process (default: as set; all cores if accelerate launch set one for a single process)')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    add('--gradient-accumulation-steps', type=number(int, 1),
        help="batches per optimizer step (default: accelerate's configuration, or 1)")
    add('--freeze-bn', action='store_true', help='keep the statistics that the batch norms start with')
    add('--sync-bn', action='store_true', help='compute batch statistics over all processes (CUDA)')
    add('--tracker', default='tensorboard',
        help='a tracker of Accelerate: tensorboard, wandb, mlflow, ..., or none (default: %(default)s)')
    # the part of a cross-validation that a run is; digests of its images and labels; the seed by which they were
    # divided; sizes not left to the recipe
    parser.set_defaults(
        fold=None, train_ids=None, content=None, division_seed=None, sizes_given=['img_size', 'start_size'])
    return parser


def recipe_flags(name: str, from_weights: bool, prog: str) -> List[str]:
    """The lines of a recipe as flags. A value that its flag does not take exits as on the command line.

    Args:
        name: Of a recipe of this package, or of a YAML file.
        from_weights: Whether the lines below from-weights count, or those below from-scratch.
        prog: Name of the program.

    Raises:
        RunError: No such recipe, or a line that no recipe may have.
    """
    file = RECIPES / f'{name}.yaml'
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        known = ', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))
        raise RunError(f'No recipe {name}: choose {known}, or a YAML file of flags.')
    try:
        lines = yaml.load(file.read_text(encoding='utf-8'), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f'The recipe {file} cannot be read: {" ".join(str(error).split())}') from error
    if not isinstance(lines, dict):
        raise RunError(f'The recipe {file} must hold lines of the form "flag: value".')
    lines = dict(lines)
    sections = {key: lines.pop(key, None) or {} for key in SECTIONS}
    if not all(isinstance(section, dict) for section in sections.values()):
        raise RunError(f'The recipe {file} must hold lines of the form "flag: value" below {" and ".join(SECTIONS)}.')
    lines.update(sections[SECTIONS[from_weights]])
    parser = recipe_parser(f'{prog}: recipe {name}')
    settable = {flag.replace('_', '-'): default for flag, default in vars(parser.parse_args([])).items()}
    flags = []
    for key, value in lines.items():
        if key not in settable or not isinstance(value, str):
            raise RunError(f'The recipe {file} sets {key}: {value}, but a recipe sets one value each of '
                           f'{", ".join(settable)}.')
        if not isinstance(settable[key], bool):
            flags.append(f'--{key}={value}')
        elif value in ('true', 'false'):
            flags.append(f'--{key}' if value == 'true' else f'--no-{key}')
        else:
            raise RunError(f'The recipe {file} sets {key}: {value}, which must be true or false.')
    parser.parse_args(flags)
    return flags


def parse_args(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line over the recipe, or over the arguments of the run that is resumed.

    Raises:
        RunError: Nothing to resume, another value than that run has, or a recipe that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    check_not_empty(args)
    if args.resume:
        return resumed_args(parser, argv, args.output_dir)
    given = [name for name in args.sizes_given if getattr(args, name) is not None]
    from_weights = args.pretrained or args.init_checkpoint is not None
    args = parser.parse_args([*recipe_flags(args.recipe, from_weights, parser.prog), *argv])
    args.sizes_given = given
    missing = [flag for flag in REQUIRED if getattr(args, flag.replace('-', '_')) is None]
    if missing:
        raise RunError(f'Neither the recipe {args.recipe} nor a flag sets --{missing[0]}.')
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise RunError('--seeds names a seed twice.')
    if args.teacher and len({os.path.realpath(name) for name in args.teacher}) < len(args.teacher):
        raise RunError('--teacher names a network twice.')
    if args.mask_weight and args.augmentation == 'paper':
        raise RunError('--augmentation paper does not transform masks: pass --mask-weight 0, or choose modern or '
                       'plain.')
    by_hand = parser.parse_args(argv)
    if by_hand.start_size and by_hand.img_size and by_hand.start_size > by_hand.img_size:
        raise RunError(f'--start-size {args.start_size} is more than --img-size {args.img_size}: images only grow.')
    for flag in ('distill_weight', 'distill_features'):
        if getattr(by_hand, flag) != parser.get_default(flag) and not args.teacher:
            raise RunError(f'--{flag.replace("_", "-")} is of no use without --teacher: leave it out, or name one.')
    if by_hand.patience and args.folds:
        raise RunError('--folds keeps the last epoch of each fold: leave out --patience.')
    if args.duplicates and not args.folds:
        raise RunError('--duplicates belongs to --folds: leave it out, or pass --folds too.')
    if args.streaming and args.folds:
        raise RunError('--folds needs all images on this disk: leave out --streaming.')
    return args


def resumed_args(
        parser: argparse.ArgumentParser,
        argv: Sequence[str],
        output_dir: Optional[str],
) -> argparse.Namespace:
    """Parse the command line over the arguments of the run in a folder.

    Raises:
        RunError: No such run, or a flag with another value than it has.
    """
    if not output_dir:
        raise RunError('--resume needs --output-dir, the folder of the run to continue.')
    record = Path(output_dir, 'run.json')
    if not record.exists():
        raise RunError(f'There is no run to resume in {output_dir} (no run.json): start it without --resume.')
    try:
        saved = dict(json.loads(record.read_text(encoding='utf-8'))['arguments'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'{record} is damaged or not from this program: restore it, or start another run in another '
                       f'--output-dir.') from error
    if saved.get('fold'):
        raise RunError(f'{output_dir} is {saved["fold"]} of a cross-validation: resume that as a whole, with its '
                       f'own --output-dir.')
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        if getattr(args, name) != value:
            flag = '--' + name.replace('_', '-')
            raise RunError(f'The run in {output_dir} has {flag} {value}, not {getattr(args, name)}: resume it '
                           f'without {flag}, or start another in another --output-dir.')
    return args
