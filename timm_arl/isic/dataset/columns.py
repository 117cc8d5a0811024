"""From the columns that data have to a task and a column of 0 and 1 for each of its labels."""
import re
import shlex
from pathlib import PurePath
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import datasets
import numpy as np

from ..task import TASKS, DataError, Task
from .names import ABOUT, CLASS_COLUMNS, COLUMNS, TEXT, column_named, looks_like_groups, plain, same_letters
from .options import Wanted

__all__ = ['find_task', 'further_labels', 'with_ids', 'with_labels', 'words_of']

MOST_CLASSES = 1000
BINARY = (0, 1, '0', '1')
NEARLY_ALL = 0.95  # of the images: the others are slips
NAMED = 3  # images in a message


def words_of(split: datasets.Dataset, column: str) -> List[Optional[str]]:
    """The class of each image as the data name it, None where it is missing."""
    feature = split.features[column]
    values = list(split[column])
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return [None if value is None or value != value or value == '' else
            str(int(value)) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else
            str(value) for value in values]


def find_task(
        splits: Mapping[str, datasets.Dataset],
        wanted: Wanted,
        known: Optional[Task],
        data: str,
        expected: Optional[Task] = None,
        shown: Sequence[str] = (),
        words: Sequence[str] = (),
) -> Tuple[Task, str]:
    """What is predicted, and the column that names the class of each image; '' for a column of 0 and 1 for each label.

    Args:
        splits: By name, any columns.
        wanted: What the user says.
        known: The task that the user names, or that of the source, if there is one.
        data: What the user calls the data.
        expected: Task of a network that is to be scored, taken where the data have its labels.
        shown: Columns as the user's table has them, for messages; empty: those of the splits.
        words: Of --map: where no column names the class, the columns called so, in any case, are the labels.

    Raises:
        DataError: The data do not tell, or not what the user says; or nearly all images, but not all, have one of the
            labels.
    """
    first = next(iter(splits.values()))
    columns = first.column_names
    shown = shown or columns
    task = known if wanted.task or not wanted.labels else None
    if task is None and not wanted.labels:
        task = max((each for each in TASKS.values() if len(each.labels) > 1 and set(each.labels) <= set(columns)),
                   key=lambda each: len(each.labels), default=None)
    if task is None and not wanted.labels and expected is not None and (
            set(expected.labels) <= set(columns) or _class_column(first, data, expected)):
        task = expected
    if task is not None:
        if not task.column and set(task.labels) <= set(columns):
            return task, ''
        column = column_named(columns, task.column) if task.column else ''
        if not column and (not task.column or task.name in TASKS):  # a file of the user's names its column
            column = _class_column(first, data, task)
        if column or task.column:
            if not column:
                raise DataError(_lacks(data, [task.column], shown))
            return task, column
        raise DataError(_lacks(data, [label for label in task.labels if label not in columns], shown))
    name = re.sub('[^a-z0-9]+', '-', PurePath(data).name.lower().rpartition('.csv')[0] or PurePath(data).name.lower())
    name = name.strip('-') or 'own'
    if name in TASKS:
        name += '-own'
    if wanted.labels and set(wanted.labels) <= set(columns):
        decided = bool(words) or (expected is not None and expected.labels == wanted.labels)  # by a network
        one_each = len(wanted.labels) > 1 and _one_each(splits, wanted.labels, data, decided)
        return Task(name, wanted.labels, 'multiclass' if one_each else 'multilabel'), ''
    column = _class_column(first, data)
    if not column:
        if wanted.labels:
            raise DataError(_lacks(data, [label for label in wanted.labels if label not in columns], shown))
        meant = {word.lower() for word in words} - {'image', 'image_id'}
        if meant & {label.lower() for label in columns}:
            return Task(name, tuple(label for label in columns if label.lower() in meant)), ''
        raise DataError(f'{data} has no column that tells the diagnosis (it has {", ".join(shown)}): name one with '
                        f'--columns diagnosis=COLUMN, or columns of 0 and 1 with --labels.')
    found = {word for split in splits.values() for word in words_of(split, column)} - {None}
    feature = first.features[column]
    if found <= {'0', '1'} and not isinstance(feature, datasets.ClassLabel) and not wanted.labels:
        return Task(name, (column,)), ''
    if len(found) > MOST_CLASSES:
        raise DataError(f'{data} has {len(found)} different words in column {column}, which cannot be diagnoses: name '
                        f'another with --columns diagnosis=COLUMN.')
    if not wanted.labels:
        spelled: Dict[str, str] = {}
        for word in sorted(str(word) for word in found):
            other = spelled.setdefault(' '.join(same_letters(word).split()), word)
            if other != word:
                raise DataError(f'{data}: column {column} has {other} and {word}, which differ in spelling alone: '
                                f'write one of them throughout, or name the classes with --labels or a --task '
                                f'FILE.yaml.')
    labels: Sequence[str] = wanted.labels or (
        feature.names if isinstance(feature, datasets.ClassLabel) else sorted(str(word) for word in found))
    if not wanted.labels:
        for each in TASKS.values():
            if each.kind == 'multiclass' and set(each.labels) <= set(labels) <= {*each.labels, each.rest}:
                return each, column
    return Task(name, tuple(labels), 'multiclass'), column


def _lacks(data: str, absent: Sequence[str], columns: Sequence[str]) -> str:
    comma = ',' * (', split ' in data)
    return (f'{data}{comma} has no column {", ".join(absent)} (it has {", ".join(columns)}): rename or add it, or say '
            f'what it is called (--columns NAME=COLUMN).')


def _class_column(split: datasets.Dataset, data: str, task: Optional[Task] = None) -> str:
    """The column that names the class, '' where there is none."""
    columns = split.column_names
    if 'diagnosis' in columns:
        found = ['diagnosis']
    else:
        found = [column for column, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
        found = found or [column for column in columns if plain(column) in CLASS_COLUMNS]
    if task is not None:  # only one that holds its words
        words = {word.lower() for word in (*task.classes, *(word for word, _ in task.aliases))}
        found = [column for column in found if words & {str(word).lower() for word in words_of(split, column)}]
    if len(found) > 1:
        raise DataError(f'{data} has several columns that could be the diagnosis ({", ".join(found)}): name it with '
                        f'--columns diagnosis=COLUMN.')
    return found[0] if found else ''


def _ones(split: datasets.Dataset, labels: Sequence[str]) -> np.ndarray:
    return sum(np.array([value in (1, '1') for value in split[label]], int) for label in labels)  # type: ignore[return-value]


def _one_each(splits: Mapping[str, datasets.Dataset], labels: Sequence[str], data: str, decided: bool) -> bool:
    """Whether each image has exactly one of the labels.

    Raises:
        DataError: Nearly all have, and nothing else decides what the task is.
    """
    counts = [(str(image_id), count) for split in splits.values()
              for image_id, count in zip(split['image_id'], _ones(split, labels).tolist())]
    odd = [f'{image_id} has {count or "none"}' for image_id, count in counts if count != 1]
    told = all(value in BINARY for split in splits.values() for label in labels for value in split[label])
    if odd and told and not decided and len(odd) <= len(counts) * (1 - NEARLY_ALL):
        raise DataError(
            f'{data}: {len(counts) - len(odd)} of {len(counts)} images have exactly one of the labels '
            f'{", ".join(labels)}, but {", ".join(odd[:NAMED])}{", ..." * (len(odd) > NAMED)}: correct these rows or '
            f'take them out, for classes of which an image has one; or, where images may have several labels or none, '
            f'write kind: multilabel and the labels in a --task FILE.yaml.')
    return not odd


def further_labels(splits: Mapping[str, datasets.Dataset], task: Task) -> str:
    """A sentence on columns of 0 and 1 that look like further labels, of images that have none; '' without any.

    Args:
        splits: With columns of 0 and 1 for the labels.
        task: What is predicted, found by these columns alone.
    """
    usual = {plain(name) for name in (*COLUMNS, *ABOUT, *task.labels, task.rest)}
    first = next(iter(splits.values()))
    found = [column for column in first.column_names if plain(column) not in usual and not looks_like_groups(column)
             and all(column in split.column_names and isinstance(split.features[column], datasets.Value)
                     and all(value in BINARY for value in split[column]) for split in splits.values())]
    none = np.concatenate([_ones(split, task.labels) == 0 for split in splits.values()])
    ones = {column: np.concatenate([_ones(split, [column]) > 0 for split in splits.values()]) for column in found}
    found = [column for column in found if ones[column].any() and not (ones[column] & ~none).any()]
    if not found or task.kind == 'multiclass':
        return ''
    count = np.any([ones[column] for column in found], axis=0).sum()
    labels = [*task.labels, *found, *[task.rest] * (task.rest in first.column_names)]
    return (f'{count} images that count as {task.diagnosis([0] * len(task.labels))} have 1 in {", ".join(found)}: if '
            f'these are diagnoses too, pass --labels {shlex.join(labels)}.')


def with_labels(
        split: datasets.Dataset,
        task: Task,
        column: str,
        where: str,
        called: str = '',
) -> datasets.Dataset:
    """The split with a column of 0 and 1 for each label.

    Args:
        split: It.
        task: What is predicted.
        column: The one that names the class of each image; '' where the columns of 0 and 1 are there, as numbers or
            words.
        where: What messages call the split.
        called: What they call the column; '': as it is.

    Raises:
        DataError: An image without a class, or of one that is no label.
    """
    if not column:
        for label in task.labels:  # '0' and '1' are numbers too
            if getattr(split.features[label], 'dtype', '') in TEXT and set(split[label]) <= {'0', '1'}:
                split = split.cast_column(label, datasets.Value('int8'))
        return split
    ids = [str(image_id) for image_id in split['image_id']]
    numbers = class_numbers(words_of(split, column), task, ids, f'{where}: {called or column}')
    return datasets.concatenate_datasets([
        split.remove_columns([label for label in task.labels if label in split.column_names]),
        datasets.Dataset.from_dict(one_hot(numbers, task))], axis=1)


def class_numbers(words: Sequence[Optional[str]], task: Task, image_ids: Sequence[str], where: str) -> np.ndarray:
    """For each word the number of its label, -1 for the rest.

    Raises:
        DataError: A word that is missing or no label.
    """
    meaning: Dict[str, int] = {}
    for word, label in [*task.aliases, *zip(task.labels, task.labels), *[(task.rest, task.rest)] * bool(task.rest)]:
        meaning[word] = task.labels.index(label) if label in task.labels else -1
    loose = {same_letters(word): number for word, number in meaning.items()}
    numbers: List[Optional[int]] = []
    wrong: List[Tuple[str, Optional[str]]] = []
    for image_id, said in zip(image_ids, words):
        number = None if said is None else meaning.get(said, loose.get(same_letters(said)))
        if number is None:
            wrong.append((image_id, said))
        numbers.append(number)
    if wrong:
        image_id, odd = wrong[0]
        count = sum(other == odd for _, other in wrong)
        if odd is None:
            raise DataError(f'{where} is missing for image {image_id} ({count} such images): fill it in, or leave the '
                            f'images out.')
        raise DataError(f'{where} is {odd!r} for image {image_id} ({count} such images), which is no label of '
                        f'{task.name} ({", ".join([*task.labels, *[task.rest] * bool(task.rest)])}): leave such images '
                        f'out, or say which label it means in a --task FILE.yaml.')
    return np.array(numbers)


def one_hot(numbers: np.ndarray, task: Task) -> Dict[str, Any]:
    """A column of 0 and 1 for each label."""
    return {label: (numbers == k).astype(np.int8) for k, label in enumerate(task.labels)}


def with_ids(splits: Mapping[str, datasets.Dataset]) -> Dict[str, datasets.Dataset]:
    """The splits, with an image_id where they have none: the names of the files or, where those are not known or not
    all different, split and row number."""
    if all('image_id' in split.column_names for split in splits.values()):
        return dict(splits)
    stems: Dict[str, List[str]] = {}
    for name, split in splits.items():
        paths: List[Optional[str]] = []
        if isinstance(split.features.get('image'), datasets.Image):
            for table in split.select_columns('image').with_format('arrow').iter(1000):
                for chunk in table['image'].chunks:
                    paths += chunk.field('path').to_pylist()
        else:  # told elsewhere
            paths = [None] * len(split)
        stems[name] = [PurePath(path).stem if path else '' for path in paths]
    everything = [stem for each in stems.values() for stem in each]
    good = all(everything) and len(set(everything)) == len(everything)
    given = {}
    for name, split in splits.items():
        ids = stems[name] if good else [f'{name}-{row:06d}' for row in range(len(split))]
        rest = split.remove_columns('image_id') if 'image_id' in split.column_names else split
        given[name] = datasets.concatenate_datasets([rest, datasets.Dataset.from_dict({'image_id': ids})], axis=1)
    return given
