"""Patients and lesions that stay together, and splits made where the data have none."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import datasets
import numpy as np

from ...files import read_rows, write_rows
from ..task import DataError, Task
from .options import NO_GROUPS

__all__ = [
    'SHARES', 'SPLIT_NAMES', 'WHOLE', 'check_groups', 'divide', 'find_groups', 'read_split_file', 'split_name',
    'with_groups', 'write_split_file',
]

GROUP_COLUMNS = ('patient_id', 'lesion_id')  # a patient may have several lesions
WHOLE = 'all'  # the one split of data that have none
SHARES = {'train': 0.7, 'validation': 0.15, 'test': 0.15}
SPLIT_NAMES = {  # what people write, and what it is called here
    'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation', 'validation': 'validation',
    'dev': 'validation', 'test': 'test', 'testing': 'test'}
NAMED = 5  # offending groups in a message


def split_name(word: Optional[str]) -> Optional[str]:
    """The split that a word means ('val', 'Training'), or None."""
    return SPLIT_NAMES.get(str(word or '').strip().lower())


def find_groups(splits: Mapping[str, datasets.Dataset], wanted: Optional[str], where: str) -> str:
    """Column of patients or lesions, or '' where there is none.

    Args:
        splits: By name.
        wanted: The column, NO_GROUPS for none, or None to look for one.
        where: What messages call the data.

    Raises:
        DataError: No such column.
    """
    if wanted == NO_GROUPS:
        return ''
    columns = {column for split in splits.values() for column in split.column_names}
    if wanted is not None and wanted not in columns:
        raise DataError(f'{where} has no column {wanted} (it has {", ".join(sorted(columns))}): pass another '
                        f'--group-column.')
    return wanted or next((column for column in GROUP_COLUMNS if column in columns), '')


def with_groups(split: datasets.Dataset, column: str) -> datasets.Dataset:
    """The split with names in that column; an image whose group is not known is one by itself."""
    ids = [str(image_id) for image_id in split['image_id']]
    found: List[Any] = list(split[column]) if column in split.column_names else [None] * len(ids)
    groups = [image_id if _empty(group) else str(group) for image_id, group in zip(ids, found)]
    if groups == found:
        return split
    rest = split.remove_columns(column) if column in split.column_names else split
    return datasets.concatenate_datasets([rest, datasets.Dataset.from_dict(
        {column: groups}, features=datasets.Features({column: datasets.Value('string')}))], axis=1)


def _empty(value: object) -> bool:
    return value is None or value == '' or value != value  # NaN


def check_groups(splits: Mapping[str, datasets.Dataset], column: str, where: str) -> None:
    """Refuse splits that part a patient or lesion.

    Raises:
        DataError: There is one in two of them.
    """
    seen: Dict[str, str] = {}
    parted: Dict[str, str] = {}
    for name, split in splits.items():
        for group in split[column]:
            if seen.setdefault(group, name) != name:
                parted.setdefault(group, f'{group} ({seen[group]} and {name})')
    if parted:
        named = ', '.join(list(parted.values())[:NAMED]) + ', ...' * (len(parted) > NAMED)
        raise DataError(f'{where}: {len(parted)} of the groups in column {column} are in several splits: {named}. Put '
                        f'all images of one in one split, leave out --splits if you gave it, or pass --group-column '
                        f'{NO_GROUPS} if they may be divided.')


def divide(
        strata: np.ndarray,
        groups: Sequence[str],
        task: Task,
        shares: Mapping[str, float],
        seed: int,
        where: str,
) -> List[str]:
    """A split for each image: of every class about its share, and in each split at least one group of every class.

    A group goes by the rarest class of its images. The same arguments give the same splits.

    Args:
        strata: Number in the task's classes of each image, shape (N,).
        groups: N names, of which each goes to one split.
        task: What is predicted.
        shares: Of the images, by split.
        seed: Of the draw.
        where: What messages call the data.

    Raises:
        DataError: Fewer groups of a class than there are splits.
    """
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(strata - strata.min())
    of_group = np.full(which.max() + 1, strata[np.argmax(counts[strata - strata.min()])])
    for row in np.argsort(-counts[strata - strata.min()], kind='stable'):  # the rarest comes last
        of_group[which[row]] = strata[row]
    sizes, rng = np.bincount(which), np.random.default_rng(seed)
    found = np.empty(len(sizes), dtype=object)
    order = sorted(shares, key=lambda name: shares[name])
    for stratum in np.unique(of_group):
        members = rng.permutation(np.flatnonzero(of_group == stratum))
        rest = stratum < 0 or (task.kind == 'multilabel' and not stratum and len(task.labels) > 1)
        if len(members) < len(shares) and not rest:
            what = 'images' if len(sizes) == len(which) else 'groups'
            raise DataError(f'{where} has {len(members)} {what} of {task.classes[stratum]}, too few to divide between '
                            f'{", ".join(shares)}: add images, leave such images out, or give the splits by --splits.')
        filled = dict.fromkeys(shares, 0)
        total = sizes[members].sum()
        for k, group in enumerate(members):
            name = order[k] if k < len(order) else max(
                shares, key=lambda name: shares[name] * total - filled[name])
            found[group] = name
            filled[name] += sizes[group]
    return found[which].tolist()


def write_split_file(path: Union[str, Path], splits: Mapping[str, datasets.Dataset]) -> None:
    """Write which image is in which split, as --splits reads it."""
    write_rows(path, [{'image_id': image_id, 'split': name} for name, split in splits.items()
                      for image_id in split['image_id']], ['image_id', 'split'])


def read_split_file(path: Union[str, Path]) -> Dict[str, str]:
    """Split of each image_id.

    Raises:
        DataError: A file that cannot be read, without these columns, with another split or an image twice.
    """
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f'--splits {path} cannot be read: {why}.') from error
    if not rows or not {'image_id', 'split'} <= rows[0].keys():
        raise DataError(f'--splits {path} must have the columns image_id and split.')
    found: Dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        name = split_name(row['split'])
        if name is None:
            raise DataError(f'--splits {path}, line {number}: {row["split"]!r} is no split: write train, validation or '
                            f'test.')
        if row['image_id'] in found:
            raise DataError(f'--splits {path}, line {number}: {row["image_id"]} occurs twice; remove one.')
        found[row['image_id']] = name
    return found
