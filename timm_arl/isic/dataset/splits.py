"""The splits of any data set, loaded and checked, with what is predicted."""
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import datasets

from ..task import ISIC2017, DataError, Task, words_list
from .challenges import read_challenge
from .checks import check_labels, check_learned, check_splits, check_usable
from .columns import find_task, with_ids, with_labels
from .data import SPLITS, Data, StreamedSplit, label_array
from .demo import DEMO_TASKS, demo_dataset
from .folders import read_class_folders
from .groups import (
    SHARES,
    WHOLE,
    by_split_column,
    check_groups,
    divide,
    find_groups,
    read_split_file,
    split_name,
    with_groups,
)
from .library import check_rows, load_library, with_names
from .options import Wanted, load_task
from .sources import read_folder
from .streaming import NO_SHARDS, load_streaming
from .tables import read_image_table

__all__ = ['SPLITS', 'Data', 'StreamedSplit', 'check_splits', 'check_usable', 'label_array', 'load_data', 'load_splits']

TABLES = ('.csv', '.tsv')


def load_data(
        data: str,
        wanted: Wanted = Wanted(),  # noqa: B008  # a tuple
        seed: int = 0,
        streaming: bool = False,
        needed: Sequence[str] = ('train', 'validation'),
        whole: Optional[str] = None,
        expected: Optional[Task] = None,
        earlier: Optional[Path] = None,
        same: bool = False,
        alone: bool = False,
) -> Data:
    """Load and check a data set of any kind (docs/data.md lists them), and find out what is predicted.

    Splits that are needed, but not there, are made: by the same seed the same, by group, and of each class its share.

    Args:
        data: 'demo' and the other demo sets; a CSV of image paths; a folder of a challenge, of classes, or of the
            datasets library; a Parquet file; or a Hub id.
        wanted: What the user says of it.
        seed: Of generated images, and of splits that are made here.
        streaming: Leave the images of train where they are, in Parquet shards, until they are needed.
        needed: Splits without which the caller has nothing to do.
        whole: What data without splits are; None: they are divided into train, validation and test.
        expected: Task of a network that is to be scored, taken where the data have its labels.
        earlier: The splits.csv of a run, taken where the data have no splits and it is of their images.
        same: They are the data of that run: images that were taken out since do not matter, new ones are refused.
        alone: Leave out the splits that are not needed, whatever is wrong with them.

    Returns:
        The task and the splits that there are, of train, validation and test.

    Raises:
        DataError: No such data, labels that are not what the task needs, an image that has no name of its own, groups
            that are in two splits, or a validation split that lacks a class (no AUC could choose an epoch).
    """
    asked = load_task(wanted.task) if wanted.task else None
    if asked and wanted.labels:
        raise DataError('--task names the labels: leave out --labels.')
    if streaming:
        if data in DEMO_TASKS or _is_table(data) or (Path(data).is_dir() and _read_files(Path(data))[1] is not None):
            raise DataError(NO_SHARDS.format(data))
        return load_streaming(data, wanted, asked or _prepared(data))
    known, source = _read(data, wanted, seed)
    named = {str(split_name(name)) if split_name(name) else name: split for name, split in source.items()}
    odd = [name for name in named if name not in (*SPLITS, WHOLE)]
    if odd and (set(needed) - named.keys() or not named.keys() & set(SPLITS)):
        raise DataError(f'{data} has no split {", ".join(name for name in needed if name not in named)} (it has '
                        f'{", ".join(source)}): the splits must be named {", ".join(SPLITS)}.')
    splits = with_ids({name: named[name] for name in (WHOLE, *SPLITS) if name in named})
    task, column = find_task(splits, wanted, asked or known, data, expected)
    splits = {name: with_labels(split, task, column, _where(data, name)) for name, split in splits.items()}
    groups = find_groups(splits, wanted.group, data)
    if groups:
        splits = with_groups(splits, groups)
    splits, made = _arranged(splits, task, groups, wanted, seed, needed, whole, earlier, same, data)
    if alone:
        splits = {name: split for name, split in splits.items() if name in needed} or splits
    if 'train' in needed and 'train' in splits and column:
        check_learned(splits, data, task)
    checked = check_splits(splits, data, task=task, needed=needed)
    if groups:
        check_groups(checked, groups, data)
    return Data(task, checked, groups, made, {
        name: split.select_columns('image_id') for name, split in checked.items() if made})


def load_splits(data: str, seed: int = 0, streaming: bool = False) -> Dict[str, Any]:
    """Load and check the three splits of ISIC 2017, or of data with its labels.

    Args:
        data, seed, streaming: As for load_data.

    Returns:
        The splits train, validation and test, each with the columns image (undecoded), image_id and those of LABELS,
        and whatever else the source has. When streaming, train is a StreamedSplit.

    Raises:
        DataError: As load_data, or a split that is missing.
    """
    wanted = Wanted(task=ISIC2017.name)
    if not streaming:
        return check_splits(_read(data, wanted, seed)[1], data)
    return load_data(data, wanted, seed, streaming, SPLITS).splits


def _where(data: str, name: str) -> str:
    return data if name == WHOLE else f'{data}, split {name}'


def _is_table(data: str) -> bool:
    return data.lower().endswith(TABLES) and not Path(data).is_dir()


def _read(data: str, wanted: Wanted, seed: int) -> Tuple[Optional[Task], Mapping[str, datasets.Dataset]]:
    """Splits as their source has them, under the column names that are expected here; and its task, if it has one."""
    if data in DEMO_TASKS:
        return DEMO_TASKS[data], demo_dataset(seed=seed, kind=data)
    if _is_table(data):
        return None, read_image_table(Path(data), wanted.columns)
    folder = Path(data) if data and Path(data).is_dir() else None
    known, source = _read_files(folder) if folder else (None, None)
    if source is None:
        source, known = load_library(data), _prepared(data)
        for name, split in source.items() if folder else ():
            check_rows(Path(data) / name, split)
    named = {name: with_names(split, wanted.columns, data) for name, split in source.items()}
    return known, named if len(named) > 1 else by_split_column(next(iter(named.values())), data) or named


def _read_files(folder: Path) -> Tuple[Optional[Task], Optional[Mapping[str, datasets.Dataset]]]:
    """Splits of a folder of image files; None for another."""
    source = read_folder(folder)
    if source is not None:
        return ISIC2017, source
    challenge = read_challenge(folder)
    return challenge or (None, read_class_folders(folder))


def _prepared(data: str) -> Optional[Task]:
    """The task that prepare has written beside its shards."""
    try:
        content = json.loads(Path(data, 'prepare.json').read_text(encoding='utf-8'))
        return Task.from_json(content['task'])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _arranged(
        splits: Dict[str, datasets.Dataset],
        task: Task,
        groups: str,
        wanted: Wanted,
        seed: int,
        needed: Sequence[str],
        whole: Optional[str],
        earlier: Optional[Path],
        same: bool,
        data: str,
) -> Tuple[Dict[str, datasets.Dataset], str]:
    """The splits by the user's file, or with those made that are needed; and how they were made, or ''."""
    none_given = list(splits) in ([WHOLE], ['train'], ['train', 'test'])
    file = wanted.splits or (earlier if none_given and earlier is not None and earlier.is_file() else None)
    if file:
        by_id = read_split_file(file)
        everything = datasets.concatenate_datasets(list(splits.values()))
        ids = [str(image_id) for image_id in everything['image_id']]
        for what, alone in (('no split for', set(ids) - by_id.keys()),
                            ('images that are not there:', by_id.keys() - set(ids))):
            if alone and wanted.splits:
                raise DataError(f'--splits {file} has {what} {min(alone)} ({len(alone)} such images of {data}): is it '
                                f'of these data?')
        new = set(ids) - by_id.keys()
        if new and same:
            raise DataError(f'{file} has no split for {min(new)} ({len(new)} such images of {data}), which the run did '
                            f'not have: take them out, or pass --splits FILE.csv with all of them.')
        if by_id.keys() == set(ids) or same:
            return {name: everything.select(rows) for name in SPLITS
                    for rows in [[row for row, image_id in enumerate(ids) if by_id[image_id] == name]] if rows}, ''
    if set(needed) <= splits.keys() and (WHOLE not in splits or len(splits) > 1):
        return splits, ''
    if whole and len(splits) == 1:
        return {whole: next(iter(splits.values()))}, ''
    if not none_given:
        return splits, ''
    source = splits.get(WHOLE, splits.get('train'))
    assert source is not None
    check_labels(source, data, task)
    shares = SHARES if 'test' not in splits else {name: SHARES[name] for name in ('train', 'validation')}
    parts = divide(task.strata(label_array(source, task)), list(source[groups or 'image_id']), task, shares, seed, data)
    made = {name: source.select([row for row, part in enumerate(parts) if part == name]) for name in shares}
    by = f'by {groups}, ' if groups else ''
    return {**{name: split for name, split in splits.items() if name == 'test'}, **made}, (
        f'{words_list(list(shares))} divided {by}with seed {seed}')
