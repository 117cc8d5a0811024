"""The flags by which the programs are told what cannot be read from the data itself."""
import argparse
from typing import Any, Dict, NamedTuple, Optional, Tuple

import yaml

from ..task import KINDS, TASKS, DataError, Task

__all__ = ['NO_GROUPS', 'Wanted', 'add_data_arguments', 'load_task', 'wanted_of']

NO_GROUPS = 'none'
KEYS = ('name', 'title', 'kind', 'labels', 'rest', 'exclusive', 'column', 'aim')  # of a FILE.yaml


class Wanted(NamedTuple):
    """What the user says of the data.

    Attributes:
        task: Name of a known task, or a YAML file; None: found from the data.
        labels: Columns of 0 and 1 that are predicted; or the classes to expect, in this order; empty: found.
        columns: By the name that is expected here, the name in the data.
        group: Column of patients or lesions, 'none' for no groups; None: found.
        splits: CSV of image_id and split; None: those of the data.
    """
    task: Optional[str] = None
    labels: Tuple[str, ...] = ()
    columns: Tuple[Tuple[str, str], ...] = ()
    group: Optional[str] = None
    splits: Optional[str] = None


class Pairs(argparse.Action):
    """``NAME=COLUMN ...``, each name once."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs: Dict[str, str] = {}
        for value in values:
            name, equals, column = value.partition('=')
            if not (name and equals and column) or name in pairs:
                raise argparse.ArgumentError(self, f'{value} is not NAME=COLUMN, with each name once')
            pairs[name] = column
        setattr(namespace, self.dest, pairs)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --task, --labels, --columns, --group-column and --splits."""
    add = parser.add_argument_group('data (docs/data.md; what is not given is found from the data)').add_argument
    add('--task', metavar='NAME|FILE.yaml', help=f'what is predicted: {", ".join(TASKS)}, or a YAML file')
    add('--labels', nargs='+', metavar='LABEL',
        help='columns of 0 and 1 that are predicted; or the classes of the diagnosis column, in this order')
    add('--columns', nargs='+', action=Pairs, metavar='NAME=COLUMN',
        help='what the columns are called in the data: image=img diagnosis=dx image_id=id split=fold')
    add('--group-column', metavar='COLUMN',
        help=f'patient or lesion of each image, none of which is divided between splits or folds; {NO_GROUPS}: '
             f'there are no groups (default: patient_id or lesion_id, in any spelling, where there is one)')
    add('--splits', metavar='FILE.csv',
        help='which image is in which split: columns image_id, split (train, validation, test; none: left out)')


def wanted_of(args: Any) -> Wanted:
    """What the arguments of a program with these flags say."""
    return Wanted(args.task, tuple(args.labels or ()), tuple((args.columns or {}).items()), args.group_column,
                  args.splits)


def load_task(name: str) -> Task:
    """A known task by its name, or one that a YAML file describes.

    Args:
        name: Name or file. The file has the keys kind and labels, and may have name, title, rest, exclusive, aim and
            column (see :class:`~timm_arl.isic.task.Task`). Below labels, words that mean the same may follow each
            label: ``labels: {melanoma: [MEL, mel], nevus: [NV]}``.

    Raises:
        DataError: No such task, or a file that describes none.
    """
    if name in TASKS:
        return TASKS[name]
    if not name.lower().endswith(('.yaml', '.yml')):
        raise DataError(f'No task {name}: choose {", ".join(TASKS)}, or a YAML file that describes it.')
    try:
        with open(name, encoding='utf-8') as file:
            content = yaml.load(file, Loader=yaml.BaseLoader)  # 'no' is a word here
    except OSError as error:
        raise DataError(f'The task {name} cannot be read: {error.strerror}.') from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f'The task {name} is not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict) or not {'kind', 'labels'} <= content.keys():
        raise DataError(f'The task {name} must have the keys kind ({" or ".join(KINDS)}) and labels.')
    unknown = sorted(content.keys() - set(KEYS))
    if unknown:
        raise DataError(f'The task {name} has the unknown key {unknown[0]}: choose {", ".join(KEYS)}.')
    labels = content.pop('labels')
    exclusive = str(content.pop('exclusive', 'false')).lower()
    listed = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if exclusive not in ('true', 'false') or not (listed or isinstance(labels, dict)):
        raise DataError(f'The task {name}: exclusive must be true or false, and labels a list, or labels with the '
                        f'words that mean them.')
    words: Dict[str, Any] = labels if isinstance(labels, dict) else dict.fromkeys(labels, ())
    if len(words) < len(labels):
        raise DataError(f'The task {name} names a label twice: give each once.')
    aliases = [(word, label) for label, others in words.items() for word in ([others] if isinstance(others, str) else
                                                                             others or ())]
    if content.get('aim', 'mean_auc') not in ('mean_auc', 'balanced_accuracy'):
        raise DataError(f'The task {name}: aim must be mean_auc or balanced_accuracy.')
    try:
        return Task(**{'name': name.rpartition('/')[2].rpartition('.')[0], **content}, labels=tuple(words),
                    exclusive=exclusive == 'true', aliases=tuple(aliases))
    except DataError as error:
        raise DataError(f'The task {name}: {error}') from error
