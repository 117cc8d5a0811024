"""What every split must be, or one sentence on what is wrong with it."""
import difflib
import math
from typing import Any, Dict, Mapping, Sequence, Union

import datasets
import numpy as np

from ..task import ISIC2017, DataError, Task
from .data import SPLITS, StreamedSplit, label_array
from .library import undecoded
from .sources import check_image_id

__all__ = ['check_columns', 'check_labels', 'check_learned', 'check_splits', 'check_usable', 'unused_splits']


def check_splits(
        source: Mapping[str, datasets.Dataset],
        data: str,
        streamed: Sequence[str] = (),
        task: Task = ISIC2017,
        needed: Sequence[str] = SPLITS,
        chooses: bool = True,
) -> Dict[str, datasets.Dataset]:
    """Check what load_splits promises; images and masks become undecoded cells.

    Args:
        source: Splits by name.
        data: What messages call it.
        streamed: Splits whose images are elsewhere.
        task: Whose labels they have.
        needed: Splits that must be there.
        chooses: As for check_usable.
    """
    missing = [name for name in needed if name not in source]
    if missing:
        raise DataError(f'{data} has no split {", ".join(missing)} (it has {", ".join(source)}): '
                        f'the splits must be named {", ".join(SPLITS)}.')
    splits = {}
    for name in [name for name in SPLITS if name in source]:
        split = source[name]
        if name not in streamed:
            check_columns(split, f'{data}, split {name}', task)
        if split.features['image_id'].dtype != 'string':
            split = split.cast_column('image_id', datasets.Value('string'))
        check_labels(split, f'{data}, split {name}', task, name == 'test')
        _check_aspect_ratios(split, f'{data}, split {name}')
        for column in ('image', 'mask'):
            if column in split.column_names:
                split = undecoded(split, column, f'{data}, split {name}')
        splits[name] = split
    _check_ids(splits, data)
    check_usable(splits, data, task, chooses)
    return splits


def unused_splits(names: Sequence[str], needed: Sequence[str], data: str, told: Sequence[str]) -> str:
    """A sentence on splits of other names than those that are used; '' without any.

    Args:
        names: Of all splits, as they are called here.
        needed: Those that must be there.
        data: What messages call the data.
        told: The splits as the data call them.

    Raises:
        DataError: There is one, and a needed one is missing; or one is nearly called as one that is missing.
    """
    odd = [name for name in names if name not in SPLITS]
    absent = [name for name in SPLITS if name not in names and (
        name in needed or difflib.get_close_matches(name, [other.lower() for other in odd], cutoff=0.7))]
    if odd and absent:
        raise DataError(f'{data} has no split {", ".join(absent)} (it has {", ".join(told)}): the splits must be named '
                        f'{", ".join(SPLITS)}. Rename {", ".join(odd)}, or take it out.')
    return f'Not used: {", ".join(odd)}, since the splits are {", ".join(SPLITS)}.' if odd else ''


def check_usable(splits: Mapping[str, Any], data: str, task: Task = ISIC2017, chooses: bool = True) -> None:
    """Refuse a split without images, and a validation split that lacks a class; again after images were left out.

    Args:
        splits: By name.
        data: What messages call them.
        task: Whose labels they have.
        chooses: Whether the validation images choose something, for which they need each class.

    Raises:
        DataError: There is one.
    """
    for name, split in splits.items():
        if not len(split.table if isinstance(split, StreamedSplit) else split):
            raise DataError(f'{data}, split {name}, has no images.')
    if 'validation' not in splits or not chooses:
        return
    labels = label_array(splits['validation'], task)
    for k, label in enumerate(task.labels):
        if labels[:, k].min() == labels[:, k].max():
            raise DataError(f'{data}, split validation, has {int(labels[:, k].sum())} images of {label} out of '
                            f'{len(labels)}: the AUC that chooses epochs and thresholds needs both classes.')


def check_learned(splits: Mapping[str, datasets.Dataset], data: str, task: Task) -> None:
    """Refuse a class of which other splits have images, but train has none.

    Raises:
        DataError: There is one.
    """
    counts = {name: label_array(split, task).sum(0) for name, split in splits.items()}
    for k, label in enumerate(task.labels):
        having = [f'{name} ({int(each[k])})' for name, each in counts.items() if each[k] and name != 'train']
        if having and not counts['train'][k]:
            raise DataError(f'{data} has images of {label} in {" and ".join(having)}, but none in train: move some '
                            f'there, or leave them out.')


def check_columns(
        split: Union[datasets.Dataset, datasets.IterableDataset],
        where: str,
        task: Task = ISIC2017,
) -> None:
    """Refuse a split without an image, its name or a label.

    Raises:
        DataError: Such a split.
    """
    columns = list(split.features)
    absent = [column for column in ('image', 'image_id', *task.labels) if column not in columns]
    if absent:
        raise DataError(f'{where}, has no column {", ".join(absent)} (it has {", ".join(columns)}): rename or add it.')


def check_labels(split: datasets.Dataset, where: str, task: Task, may_have_others: bool = False) -> None:
    """Refuse a label that is not 0 or 1, and images with more or fewer of them than the task allows.

    Args:
        split: With a column for each label.
        where: What messages call it.
        task: Whose labels they are.
        may_have_others: Whether an image may have none of the labels of a multiclass task that has a rest.

    Raises:
        DataError: There is one.
    """
    for label in task.labels:
        wrong = [(i, v) for i, v in zip(split['image_id'], split[label]) if v not in (0, 1)]
        if wrong:
            others = ', '.join(list(dict.fromkeys(repr(value) for _, value in wrong))[1:4])
            raise DataError(f'{where}: {label} must be 0 or 1, but is {wrong[0][1]!r} for image {wrong[0][0]} '
                            f'({len(wrong)} such images{"; others have " * bool(others)}{others}).')
    counts = label_array(split, task).sum(1)
    several = np.flatnonzero(counts > 1)
    if task.exclusive and len(several):
        row = split[int(several[0])]
        raise DataError(f'{where}: image {row["image_id"]} has more than one label '
                        f'({" and ".join(label for label in task.labels if row[label] == 1)}; {len(several)} such '
                        f'images): a lesion has one diagnosis.')
    none = np.flatnonzero(counts == 0)
    if task.kind == 'multiclass' and len(none) and not (task.rest and may_have_others):
        raise DataError(f'{where}: image {split[int(none[0])]["image_id"]} has none of the labels '
                        f'{", ".join(task.labels)} ({len(none)} such images): leave such images out.')


def _check_aspect_ratios(split: datasets.Dataset, where: str) -> None:
    if 'aspect_ratio' not in split.column_names:
        return
    for image_id, ratio in zip(split['image_id'], split['aspect_ratio']):
        usable = ratio is None or (isinstance(ratio, (int, float)) and (math.isnan(ratio) or 0.1 <= ratio <= 10))
        if not usable:
            raise DataError(f'{where}: aspect_ratio is {ratio!r} for image {image_id}; it must be the original width / '
                            f'height, between 0.1 and 10, or null.')


def _check_ids(splits: Dict[str, datasets.Dataset], data: str) -> None:
    seen: Dict[str, str] = {}
    for name, split in splits.items():
        for image_id in split['image_id']:
            check_image_id(str(image_id), f'{data}, split {name}')
            if image_id in seen:
                raise DataError(f'{data}: image_id {image_id} occurs twice (splits {seen[image_id]} and {name}): '
                                f'remove one, or it counts twice in the scores, or the test has images of training.')
            seen[image_id] = name


