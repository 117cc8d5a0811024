"""The flags of finetune_isic.py, and where their values come from: a recipe, the command line, or the run to resume."""
import argparse
import json
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import yaml

from ..isic.task import HEADS
from ..isic.transforms import AUGMENTATIONS, CROPS
from .arguments import RunError, check_not_empty, number

RECIPES = Path(__file__).with_name('recipes')
SECTIONS = ('from-scratch', 'from-weights')  # parts of a recipe that depend on the start


REQUIRED = ('epochs', 'batch-size', 'optimizer', 'lr', 'weight-decay', 'schedule', 'augmentation', 'crops')


def build_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage='%(prog)s [--data DIR] [--model NAME] [--output-dir OUT] [options] (--help lists them)',
        description=doc.split('\n\n')[0], epilog=doc.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default='demo', metavar='DIR|HUB_ID|demo',
        help="the challenge's folders, what `isic image download` wrote, a folder or Hub id of the datasets library "
             "with the splits train, validation, test, or 'demo', generated synthetic images (default: %(default)s)")
    add('--model', default='arl_cnn14', help='any timm model (default: %(default)s)')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--pretrained', action='store_true', help="start from the model's pretrained weights")
    start.add_argument(
        '--init-checkpoint', metavar='PATH', help='start from a .safetensors file or a folder of this program')
    add('--recipe', default='modern', metavar='modern|paper|FILE.yaml',
        help='where the values of the flags below marked * come from, unless given (default: %(default)s)')
    add('--img-size', type=number(int, 64),
        help="* side of the network's input in pixels; the model's own where the recipe sets none")
    add('--start-size', type=number(int, 32), help='* train on images that grow from this size to --img-size, by 32 px')
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0,
        help='seed of weights, order and augmentation (default: %(default)s)')
    add('--output-dir', help='(default: runs/MODEL-DATA-TIME)')
    add('--resume', action='store_true',
        help='go on with the run in --output-dir, with the arguments it was started with')
    add('--skip-bad-images', action='store_true', help='leave out images that do not decode instead of stopping')
    add('--streaming', action='store_true',
        help='leave the training images in their Parquet shards, in a folder or on the Hub, until they are needed; '
             'processes and workers read shards of their own')
    add('--preview', metavar='FILE.png', help='draw what the network will see, and stop')

    group = parser.add_argument_group('training', 'what is marked * is the recipe\'s unless given')
    add = group.add_argument
    add('--epochs', type=number(int, 1), help='* passes over the training images')
    add('--batch-size', type=number(int, 1), help='* images a process and step')
    add('--optimizer', choices=['adamw', 'momentum', 'sgd'], help='* sgd is with Nesterov momentum')
    add('--lr', type=number(float, 1e-12), help='* peak learning rate')
    add('--alpha-lr', type=number(float, 0), help='* peak learning rate of the alphas (default: that of the rest)')
    add('--momentum', type=number(float, 0, 1), default=0.9, help='* of SGD (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), help='* none on biases, norms and alphas')
    add('--schedule', choices=['cosine', 'step', 'constant'], help='* of the learning rate, after the warm-up')
    add('--decay-epochs', type=number(int, 1), default=30, help='* epochs of a step of the step schedule')
    add('--decay-rate', type=number(float, 0, 1), default=0.5, help='* its factor (default: %(default)s)')
    add('--warmup-epochs', type=number(float, 0), default=0, help='* linear warm-up, a fifth of the epochs at most')
    add('--clip-grad', type=number(float, 0), default=0., help='* largest norm of the gradient, 0: any')
    add('--ema', type=number(float, 0, 0.99999), default=0.,
        help='* decay of the moving average of weights, which is then what is scored and kept; 0: none')
    add('--balance', choices=['none', 'weights', 'sampler'], default='none',
        help='* against rare diagnoses: weights in the loss, or drawing each diagnosis as often as another')
    add('--head', choices=list(HEADS), default='sigmoid',
        help='* two outputs, one a label, or three, a softmax over the diagnoses (default: %(default)s)')
    add('--mask-weight', type=number(float, 0), default=0.,
        help="* weight of learning the lesion's mask beside the diagnosis, where training images have one")
    add('--mixup', type=number(float, 0), default=0., help='* alpha of mixup, 0: none')
    add('--label-smoothing', type=number(float, 0, 0.5), default=0., help='* towards chance')
    add('--keep', choices=['best', 'last'], default='best', help='* the epoch best by mean validation AUC, or the last')
    add('--patience', type=number(int, 0), default=0,
        help='* stop after so many epochs without a better mean validation AUC, 0: never')

    add('--teacher', metavar='OUT|NAME',
        help='learn from a trained network too: an output folder, or a timm name with pretrained weights')
    add('--distill-weight', type=number(float, 0, 1), default=0.5,
        help="* share of the loss that the teacher's probabilities take from the labels (default: %(default)s)")
    add('--distill-features', type=number(float, 0), default=1.,
        help="* weight of the distance to the teacher's pooled features (default: %(default)s)")

    group = parser.add_argument_group('several runs, each in a folder of its own below --output-dir')
    add = group.add_argument
    add('--folds', type=number(int, 2), default=0,
        help='cross-validation on the split train; the last epoch is kept and the test split left alone')
    add('--duplicates', metavar='LIST.csv',
        help='pairs of images that no fold may part (default: duplicates.csv in --data, where it is)')
    add('--seeds', type=number(int, 0, 2 ** 32 - 1), nargs='+', help='a run with each of these seeds')

    group = parser.add_argument_group('images')
    add = group.add_argument
    add('--augmentation', choices=AUGMENTATIONS, help='* of training images')
    add('--patches-per-image', type=number(int, 1), default=1, help='* times that an epoch shows each image')
    add('--crops', choices=CROPS, help='* crops of a validation or test image, whose probabilities are averaged')
    add('--aspect', choices=['keep', 'squash'], default='keep', help='* shape of square copies with an aspect_ratio')
    add('--grey-world', action=argparse.BooleanOptionalAction, default=False, help='* colour constancy')
    add('--lesion-crop', action=argparse.BooleanOptionalAction, default=False,
        help='* cut to the lesion where there is a mask of it')

    group = parser.add_argument_group('machine')
    add = group.add_argument
    add('--workers', type=number(int, 0), default=2, help='data loading processes (default: %(default)s)')
    add('--cpu-threads', type=number(int, 1),
        help='threads a process (default: what is set; all cores where accelerate launch set one for a lone process)')
    add('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="(default: accelerate's configuration)")
    add('--gradient-accumulation-steps', type=number(int, 1), help="batches an update (default: accelerate's, 1)")
    add('--freeze-bn', action='store_true', help='keep the batch norms at the statistics they start with')
    add('--sync-bn', action='store_true', help='batch statistics of all processes together (CUDA)')
    add('--tracker', default='tensorboard',
        help="a tracker of Accelerate's: tensorboard, wandb, mlflow, ..., or none (default: %(default)s)")
    parser.set_defaults(fold=None, train_ids=None)  # which part of a cross-validation a run is; digest of its images
    return parser


def recipe_flags(name: str, parser: argparse.ArgumentParser, from_weights: bool) -> List[str]:
    """The lines of a recipe as flags.

    Args:
        name: Of a recipe beside this program, or of a YAML file.
        parser: Knows the flags.
        from_weights: Whether the lines below from-weights count, or those below from-scratch.

    Raises:
        RunError: No such recipe, or a line that is no flag marked * or no single value.
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
    settable = {action.option_strings[0]: action for action in parser._actions if (action.help or '').startswith('*')}
    flags = []
    for key, value in lines.items():
        action = settable.get(f'--{key}')
        if action is None or not isinstance(value, str):
            raise RunError(f'The recipe {file} sets {key}: {value}, but a recipe sets one value each of '
                           f'{", ".join(flag[2:] for flag in settable)}.')
        if isinstance(action, argparse.BooleanOptionalAction):
            if value not in ('true', 'false'):
                raise RunError(f'The recipe {file} sets {key}: {value}, which must be true or false.')
            flags.append(f'--{key}' if value == 'true' else f'--no-{key}')
        else:
            flags.append(f'--{key}={value}')
    return flags


def parse_args(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line over the recipe, or over the arguments of the run that is resumed.

    Raises:
        RunError: Nothing to resume, another value than that run has, or a recipe that cannot be used.
    """
    args = parser.parse_args(argv)
    check_not_empty(args)
    if not args.resume:
        given = sys.argv[1:] if argv is None else list(argv)
        from_weights = args.pretrained or args.init_checkpoint is not None
        flags = recipe_flags(args.recipe, parser, from_weights)
        usual = parser.error
        parser.error = lambda message: usual(f'recipe {args.recipe}: {message}')  # type: ignore[method-assign]
        parser.parse_args(flags)
        parser.error = usual  # type: ignore[method-assign]
        args = parser.parse_args([*flags, *given])
        if args.seeds and len(set(args.seeds)) < len(args.seeds):
            raise RunError('--seeds names a seed twice.')
        absent = [flag for flag in REQUIRED if getattr(args, flag.replace('-', '_')) is None]
        if absent:
            raise RunError(f'Neither the recipe {args.recipe} nor a flag sets --{absent[0]}.')
        if args.mask_weight and args.augmentation == 'paper':
            raise RunError('--augmentation paper changes no masks: pass --mask-weight 0, or choose modern or plain.')
        if args.streaming and args.folds:
            raise RunError('--folds divides images that are at hand: leave out --streaming.')
        return args
    if not args.output_dir:
        raise RunError('--resume needs --output-dir, the folder of the run to go on with.')
    record = Path(args.output_dir, 'run.json')
    if not record.exists():
        raise RunError(f'There is no run to resume in {args.output_dir} (no run.json): start it without --resume.')
    try:
        saved = json.loads(record.read_text(encoding='utf-8'))['arguments']
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f'{record} is not the run.json of a run of this program.') from error
    if saved.get('fold'):
        raise RunError(f'{args.output_dir} is {saved["fold"]} of a cross-validation: resume that as a whole, with its '
                       f'own --output-dir.')
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        if getattr(args, name) != value:
            flag = '--' + name.replace('_', '-')
            raise RunError(f'The run in {args.output_dir} has {flag} {value}, not {getattr(args, name)}: resume it '
                           f'without {flag}, or start another in another --output-dir.')
    return args
