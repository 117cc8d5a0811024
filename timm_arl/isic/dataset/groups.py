"""Patients and lesions that stay together, and splits made where the data have none."""
import re
import unicodedata
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import datasets
import numpy as np

from ...files import read_rows, write_rows
from ..task import DataError, Task
from .data import label_array
from .names import LESION, PATIENT, column_named, looks_like_groups, plain
from .options import NO_GROUPS
from .sources import CHALLENGE_IDS, ids_digest

__all__ = [
    'SHARES', 'SPLIT_NAMES', 'WHOLE', 'by_split_column', 'check_groups', 'divide', 'find_groups', 'groups_missed',
    'parted_officially', 'read_split_file', 'split_name', 'with_groups', 'without_entry', 'write_split_file',
]

NOT_KNOWN = {'', '-', '?', 'n/a', 'na', 'nan', 'none', 'null', 'unknown'}
WHOLE = 'all'  # the one split of data that have none
LEFT_OUT = 'none'  # what --splits calls that of an image that is not used
SHARES = {'train': 0.7, 'validation': 0.15, 'test': 0.15}
SPLIT_NAMES = {  # what people write, and what it is called here
    'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation', 'validation': 'validation',
    'dev': 'validation', 'test': 'test', 'testing': 'test'}
NAMED = 5  # offending groups in a message


def split_name(word: Optional[str]) -> Optional[str]:
    """The split that a word means ('val', 'Training'), or None."""
    return SPLIT_NAMES.get(str(word or '').strip().lower())


def by_split_column(split: datasets.Dataset, where: str) -> Dict[str, datasets.Dataset]:
    """The splits that a column split tells, empty without such a column, or without an entry in it.

    Raises:
        DataError: A word that is no split.
    """
    column = next((column for column in split.column_names if column.lower() == 'split'), None)
    words = [] if column is None else list(split[column])
    if column is None or not any(map(_spelling, words)):
        return {}
    if isinstance(split.features[column], datasets.ClassLabel):
        words = [None if word is None or word < 0 else split.features[column].int2str(word) for word in words]
    names = [split_name(word) for word in words]
    for word, name in zip(words, names):
        if name is None:
            raise DataError(f'{where}: the split is {word!r} ({words.count(word)} such rows), which is none of '
                            f'{", ".join(SPLIT_NAMES)}: correct it.')
    rest = split.remove_columns(column)
    return {str(name): rest.select([row for row, other in enumerate(names) if other == name])
            for name in dict.fromkeys(names)}


def find_groups(
        splits: Mapping[str, datasets.Dataset],
        wanted: Optional[str],
        where: str,
        usual: Optional[str] = None,
        shown: Sequence[str] = (),
) -> str:
    """Column of patients or lesions, or '' where there is none, or none with an entry.

    Args:
        splits: By name.
        wanted: The column, NO_GROUPS for none, or None to look for one.
        where: What messages call the data.
        usual: The one that a run, or the command that made the data, had; taken before others where it is there.
        shown: Columns as the user's table has them, for messages; empty: those of the splits.

    Raises:
        DataError: No such column.
    """
    if wanted == NO_GROUPS:
        return ''
    columns = list(dict.fromkeys(column for split in splits.values() for column in split.column_names))
    if wanted is not None:
        found = column_named(columns, wanted)
        if not found:
            raise DataError(f'{where} has no column {wanted} (it has {", ".join(shown or sorted(columns))}): pass '
                            f'another --group-column.')
        return found
    names = [column_named(columns, usual)] if usual and usual != NO_GROUPS else []
    names += [column for known in (PATIENT, LESION) for column in sorted(columns) if plain(column) == plain(known)]
    return next((column for column in names if any(map(any, _spellings(splits, column).values()))), '')


def groups_missed(splits: Mapping[str, datasets.Dataset], used: Sequence[str]) -> str:
    """A column that is not used, but looks like one of patients or lesions with several images each; '' for none.

    Args:
        splits: By name.
        used: Columns that are known to be something else.
    """
    for column in next(iter(splits.values())).column_names:
        if column not in used and looks_like_groups(column):
            known = [word.casefold() for each in _spellings(splits, column).values() for word in each if word]
            if len(set(known)) < len(known):
                return column
    return ''


def without_entry(splits: Mapping[str, datasets.Dataset], column: str) -> str:
    """How many images have no entry in the column of groups, as a sentence; '' where all have one."""
    words = [word for each in _spellings(splits, column).values() for word in each]
    empty = len(words) - sum(map(bool, words))
    rest = f', or goes with its {LESION}' if _lesions(splits, column) else ''
    return f'{empty} of the {len(words)} images have no {column}: each is a group by itself{rest}.' if empty else ''


def with_groups(splits: Mapping[str, datasets.Dataset], column: str) -> Dict[str, datasets.Dataset]:
    """The splits with names in that column: one for all spellings of a group (12 and 12.0, P1 and p1).

    An image whose patient is not known goes with its lesion, and with the patient whom another image of that lesion
    names. One of which neither is known is a group by itself.
    """
    found, lesions = _spellings(splits, column), _spellings(splits, _lesions(splits, column))
    patients: Dict[str, str] = {}  # of lesions
    for name in splits:
        for said, lesion in zip(found[name], lesions[name]):
            if said:
                patients.setdefault(lesion.casefold(), said)
    taken = {said.casefold(): said for each in found.values() for said in each if said}

    def free(what: str, name: str) -> str:  # unlike the name of any other group
        full = f'{what} {name}'
        said = taken.setdefault(name.casefold(), full)
        return said[len(what) + 1:] if said.casefold() == full.casefold() else taken.setdefault(full.casefold(), full)

    given = {}
    for name, split in splits.items():
        groups = []
        for said, lesion, image_id in zip(found[name], lesions[name], split['image_id']):
            said = said or (patients.get(lesion.casefold(), '') if lesion else '')
            groups.append(taken[said.casefold()] if said else
                          free('lesion', lesion) if lesion else free('image', str(image_id)))
        rest = split.remove_columns([c for c in split.column_names if c == column])
        given[name] = split if groups == _cells(split, column) else datasets.concatenate_datasets([
            rest, datasets.Dataset.from_dict({column: groups}, features=datasets.Features({
                column: datasets.Value('string')}))], axis=1)
    return given


def _lesions(splits: Mapping[str, datasets.Dataset], column: str) -> str:
    """The column of lesions beside one of patients, or ''."""
    columns = sorted({c for split in splits.values() for c in split.column_names if plain(c) == plain(LESION)})
    return columns[0] if columns and plain(column) == plain(PATIENT) else ''


def _cells(split: datasets.Dataset, column: str) -> List[Any]:
    return list(split[column]) if column in split.column_names else [None] * len(split)


def _spellings(splits: Mapping[str, datasets.Dataset], column: str) -> Dict[str, List[str]]:
    """By split, the group of each image, alike but for upper and lower case; '' where it is not known."""
    return {name: [_spelling(cell) for cell in _cells(split, column)] for name, split in splits.items()}


def _spelling(cell: Any) -> str:
    words = [] if cell is None else unicodedata.normalize('NFC', str(cell)).split()
    text = re.sub(r'^(\d+)\.0*$', r'\1', ' '.join(words))
    return '' if text.casefold() in NOT_KNOWN else text


def parted_officially(splits: Mapping[str, datasets.Dataset], column: str) -> str:
    """A sentence where the splits of ISIC 2017 part a patient or lesion, as the challenge divided them; '' otherwise.

    Train may be another, since external images and twins change it.
    """
    if not all(name in splits and ids_digest(splits[name]['image_id']) == CHALLENGE_IDS[name]
               for name in ('validation', 'test')):
        return ''
    parted = _parted(with_groups(splits, column), column)
    return '' if not parted else (
        f'The official splits of ISIC 2017 are used as they are, though {len(parted)} of the groups in column {column} '
        f'are in several of them: images are divided and scored one by one.')


def check_groups(splits: Mapping[str, datasets.Dataset], column: str, where: str) -> None:
    """Refuse splits that part a patient or lesion.

    Raises:
        DataError: There is one in two of them.
    """
    parted = _parted(splits, column)
    if parted:
        named = ', '.join(list(parted.values())[:NAMED]) + ', ...' * (len(parted) > NAMED)
        raise DataError(f'{where}: {len(parted)} of the groups in column {column} are in several splits: {named}. Put '
                        f'all images of one in one split, leave out --splits if you gave it, or pass --group-column '
                        f'{NO_GROUPS} if they may be divided.')


def _parted(splits: Mapping[str, datasets.Dataset], column: str) -> Dict[str, str]:
    """The groups that are in two splits, and how messages name them."""
    seen: Dict[str, str] = {}
    parted: Dict[str, str] = {}
    for name, split in splits.items():
        for group in split[column]:
            if seen.setdefault(group, name) != name:
                parted.setdefault(group, f'{group} ({seen[group]} and {name})')
    return parted


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


def write_split_file(path: Union[str, Path], splits: Mapping[str, datasets.Dataset], task: Task) -> None:
    """Write which image is in which split, as --splits reads it, and the diagnosis, by which a run knows its images."""
    write_rows(path, [{'image_id': image_id, 'split': name, 'label': task.diagnosis(labels)}
                      for name, split in splits.items()
                      for image_id, labels in zip(split['image_id'], label_array(split, task))],
               ['image_id', 'split', 'label'])


def read_split_file(path: Union[str, Path], labels: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    """Split of each image_id.

    Args:
        path: The file.
        labels: Receives the diagnosis of each image_id, where the file has it.

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
        name = LEFT_OUT if row['split'] == LEFT_OUT else split_name(row['split'])
        if name is None:
            raise DataError(f'--splits {path}, line {number}: {row["split"]!r} is no split: write train, validation, '
                            f'test, or none to leave the image out.')
        if row['image_id'] in found:
            raise DataError(f'--splits {path}, line {number}: {row["image_id"]} occurs twice; remove one.')
        found[row['image_id']] = name
        if labels is not None and row.get('label'):
            labels[row['image_id']] = row['label']
    return found
