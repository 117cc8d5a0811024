"""The splits of any data set, loaded and checked, with what is predicted."""
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import AbstractSet, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import datasets

from ..task import ISIC2017, DataError, Task, words_list
from .challenges import check_truth, read_challenge, unused_parts
from .checks import check_labels, check_learned, check_splits, check_usable, unused_splits
from .columns import find_task, further_labels, with_ids, with_labels
from .data import SPLITS, Data, StreamedSplit, label_array
from .demo import DEMO_TASKS, demo_dataset
from .folders import check_has_labels, read_class_folders
from .groups import (
    LEFT_OUT,
    SHARES,
    WHOLE,
    by_split_column,
    check_groups,
    divide,
    find_groups,
    groups_missed,
    parted_officially,
    read_split_file,
    split_name,
    with_groups,
    without_entry,
)
from .library import check_rows, load_library, with_names
from .names import TEXT, with_known_names
from .options import Wanted, load_task
from .sources import ids_digest, read_folder
from .streaming import NO_SHARDS, load_streaming
from .tables import read_image_table

__all__ = ['SPLITS', 'Data', 'StreamedSplit', 'check_splits', 'check_usable', 'label_array', 'load_data', 'load_splits']

NUMBERS = ('bool', *(f'{kind}{bits}' for kind in ('int', 'uint', 'float') for bits in (8, 16, 32, 64)))

TABLES = ('.csv', '.tsv', '.xlsx', '.xlsm', '.xls', '.ods')  # the last are refused in their words


def load_data(
        data: str,
        wanted: Wanted = Wanted(),  # noqa: B008  # a tuple
        seed: int = 0,
        streaming: bool = False,
        needed: Sequence[str] = ('train', 'validation'),
        whole: Optional[str] = None,
        expected: Optional[Task] = None,
        earlier: Optional[Path] = None,
        given: bool = False,
        same: bool = False,
        alone: bool = False,
        usual_groups: Optional[str] = None,
        train_ids: Optional[str] = None,
        words: Sequence[str] = (),
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
        earlier: The splits.csv of a run, taken where the data have no splits and it is of their images, by names and
            labels. Images that were taken out since do not matter, new ones are refused.
        given: That file is of a run with --splits, and is taken where the data have splits, too.
        same: The data are called as in that run, which counts where its file has no labels.
        alone: The images are scored, and choose nothing: leave out the splits that are not needed, whatever is wrong
            with them, and let a validation split lack a class.
        usual_groups: Column of groups of that run, taken where the data have it and the user names none.
        train_ids: ids_digest of the training images of a run without that file, staged for one. Data without splits
            are divided by the seed, if that gives these images.
        words: Of --map: where no column names the class, the columns called so are the labels.

    Returns:
        The task and the splits that there are, of train, validation and test.

    Raises:
        DataError: No such data, labels that are not what the task needs, an image that has no name of its own, groups
            that are in two splits, a validation split that lacks a class (no AUC could choose an epoch), or images of
            which it is not clear whether they are those of the run.
    """
    asked = load_task(wanted.task) if wanted.task else None
    if asked and wanted.labels:
        raise DataError('--task names the labels: leave out --labels.')
    wanted = with_known_names(wanted, (asked, expected))
    prepared = _prepared(data)
    _check_finished(data)
    if streaming:
        if data in DEMO_TASKS or _is_table(data) or (Path(data).is_dir() and _read_files(Path(data))[1] is not None):
            raise DataError(NO_SHARDS.format(data))
        return load_streaming(data, wanted, asked or prepared.get('task'), prepared.get('groups'))
    known, source, shown = _read(data, wanted, seed)
    named: Dict[str, datasets.Dataset] = {}
    for name, split in source.items():
        usual = split_name(name) or name
        if usual in named:
            raise DataError(f'{data} has two splits that mean {usual}, among {", ".join(source)}: keep one.')
        named[usual] = split
    notes = [unused_parts(Path(data), known)] if known and data not in DEMO_TASKS else []
    if list(named) != [WHOLE]:
        notes.append(unused_splits(list(named), needed, data, list(source)))
    splits = with_ids({name: named[name] for name in (WHOLE, *SPLITS) if name in named})
    known = asked or known or prepared.get('task')
    task, column = find_task(splits, wanted, known, data, expected, shown, words)
    if not (known or expected or wanted.labels or words or column):
        notes.append(further_labels(splits, task))
    called = dict(wanted.columns).get(column, column)
    splits = {name: with_labels(split, task, column, _where(data, name), called) for name, split in splits.items()}
    groups = find_groups(splits, wanted.group, data, usual_groups or prepared.get('groups'), shown)
    missed = None
    folded = list(needed) == ['train']  # of which validation and test are no part
    parted = '' if not groups or wanted.group or wanted.splits or given or alone or folded else parted_officially(
        splits, groups)
    if parted:
        notes, groups = [*notes, parted], ''
    elif groups:
        notes.append(without_entry(splits, groups))
        splits = with_groups(splits, groups)
    elif wanted.group is None:
        missed = groups_missed(splits, ['image', 'image_id', column, *task.labels])
    said = task  # by which splits.csv says what an image has
    if expected is not None and expected.labels == task.labels:
        said = dataclasses.replace(task, rest=expected.rest)
    elif expected is not None:
        earlier = None
    splits, made, how = _arranged(
        splits, said, groups, wanted, seed, needed, whole, earlier, given, same, train_ids, data)
    left_out = splits.pop(LEFT_OUT, None)
    if alone:
        splits = {name: split for name, split in splits.items() if name in needed} or splits
    if 'train' in needed and 'train' in splits and column:
        check_learned(splits, data, task)
    checked = check_splits(splits, data, task=task, needed=needed, chooses=not alone)
    if groups:
        check_groups({'train': checked['train']} if folded else checked, groups, data)
    return Data(task, checked, groups, made, {
        name: split.select_columns(['image_id', *task.labels])
        for name, split in (*checked.items(), (LEFT_OUT, left_out)) if split is not None and (made or wanted.splits)},
        missed, [*filter(None, notes), *how])


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
        _check_finished(data)
        return check_splits(_read(data, wanted, seed)[1], data)
    return load_data(data, wanted, seed, streaming, SPLITS).splits


def _where(data: str, name: str) -> str:
    return data if name == WHOLE else f'{data}, split {name}'


def _is_table(data: str) -> bool:
    return data.lower().endswith(TABLES) and not Path(data).is_dir()


def _read(
        data: str,
        wanted: Wanted,
        seed: int,
) -> Tuple[Optional[Task], Mapping[str, datasets.Dataset], Sequence[str]]:
    """The task of a source, if it has one, its splits under the column names that are expected here, and the columns
    as the user knows them."""
    if data in DEMO_TASKS:
        return DEMO_TASKS[data], demo_dataset(seed=seed, kind=data), ()
    if _is_table(data):
        return None, *read_image_table(Path(data), wanted.columns)
    folder = Path(data) if data and Path(data).is_dir() else None
    known, source = _read_files(folder) if folder else (None, None)
    if source is None:
        if folder:
            check_has_labels(folder)
        source = load_library(data)
        if folder:
            check_rows(folder, source)
    shown = next(iter(source.values())).column_names
    named = {name: with_names(split, wanted.columns, data) for name, split in source.items()}
    return known, named if len(named) > 1 else by_split_column(next(iter(named.values())), data) or named, shown


def _read_files(folder: Path) -> Tuple[Optional[Task], Optional[Mapping[str, datasets.Dataset]]]:
    """Splits of a folder of image files; None for another."""
    source = read_folder(folder)
    if source is not None:
        return ISIC2017, source
    challenge = read_challenge(folder)
    if challenge is not None:
        return challenge
    classes = read_class_folders(folder)
    if classes is not None:
        check_truth(folder)
    return None, classes


def prepared_record(data: str) -> Dict[str, Any]:
    """What prepare has written beside its shards, and a copy of them must keep: task and groups, if there are some."""
    try:
        content = json.loads(Path(data, 'prepare.json').read_text(encoding='utf-8'))
        return {key: content[key] for key in ('task', 'groups') if content.get(key)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _check_finished(data: str) -> None:
    """Refuse a folder that prepare has not finished: the shards that are there would be taken for all images."""
    try:
        plan = json.loads(Path(data, 'prepare.json').read_text(encoding='utf-8'))
        shards = {name: -(-count // plan['shard']) for name, count in plan['images'].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a copy that has its own shards
        return
    missing = [path for name, count in shards.items() for i in range(count)
               if not (path := Path(data, 'data', f'{name}-{i:05d}-of-{count:05d}.parquet')).is_file()]
    if missing:
        raise DataError(f'{data} is not finished: it has no {missing[0].name} ({len(missing)} such files). Run the '
                        f'command that makes it again (python -m timm_arl.isic.dataset prepare); it goes on. Is it a '
                        f'copy of some of the files? Then remove images from its prepare.json.')


def _prepared(data: str) -> Dict[str, Any]:
    """The task, and the column of groups if the user named one."""
    content = prepared_record(data)
    try:
        found = {'task': Task.from_json(content['task'])} if 'task' in content else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {**found, **({'groups': str(content['groups'])} if 'groups' in content else {})}


def _as_in_file(
        splits: Dict[str, datasets.Dataset],
        task: Task,
        file: Union[str, Path],
        data: str,
        of_run: bool,
        same: bool,
) -> Optional[Dict[str, datasets.Dataset]]:
    """The images divided as a file tells, or None where it is a run's and of other images."""
    labels: Dict[str, str] = {}
    by_id = read_split_file(file, labels)
    everything = datasets.concatenate_datasets(_of_equal_types(list(splits.values())))
    ids = [str(image_id) for image_id in everything['image_id']]
    known = [image_id for image_id in ids if image_id in by_id]
    new, gone = set(ids) - by_id.keys(), by_id.keys() - set(ids)
    if of_run:
        if not known and not same:
            _check_renamed(ids, by_id.keys(), data, file)
            return None
        check_labels(everything, data, task, True)
        here = dict(zip(ids, map(task.diagnosis, label_array(everything, task))))
        changed = [image_id for image_id in known if labels.get(image_id, here[image_id]) != here[image_id]]
        if changed:
            one = changed[0]
            raise DataError(f'{len(changed)} of the {len(known)} images of {data} that {file} names too have another '
                            f'label there ({one} is {labels[one]}, here {here[one]}): pass --other-data if they are '
                            f'other images of the same names, or --splits {file} if the labels were corrected.')
        if not labels and not same and (new or gone):
            raise DataError(f'{len(known)} of the {len(ids)} images of {data} have names of images in {file}, and the '
                            f'others do not fit: pass --splits FILE.csv with a split for each image, or --other-data '
                            f'if they are other images of the same names.')
        if new:
            raise DataError(f'{file} has no split for {min(new)} ({len(new)} such images of {data}), which the run did '
                            f'not have: score new images in a table of their own, pass --splits FILE.csv with a split '
                            f'for all of them, or --other-data if all are other images of the same names.')
    else:
        for what, alone in (('no split for', new), ('images that are not there:', gone)):
            if alone:
                raise DataError(f'--splits {file} has {what} {min(alone)} ({len(alone)} such images of {data}): is it '
                                f'of these data?')
    return {name: everything.select(rows) for name in (*SPLITS, LEFT_OUT)
            for rows in [[row for row, image_id in enumerate(ids) if by_id[image_id] == name]] if rows}


def _check_renamed(ids: Sequence[str], known: AbstractSet[str], data: str, file: Union[str, Path]) -> None:
    """Refuse images whose ids are those of a run but for folders in them: a table of other images has other ids."""
    def endings(image_id: str) -> Iterator[str]:  # a-b-001: b-001, 001
        while '-' in image_id:
            image_id = image_id.partition('-')[2]
            yield image_id

    longer = {ending: image_id for image_id in known for ending in endings(image_id)}
    alike = {image_id: found for image_id in ids for found in [longer.get(image_id) or next(
        (ending for ending in endings(image_id) if ending in known), None)] if found}
    if len(alike) * 2 >= len(ids):
        here, there = next(iter(alike.items()))
        raise DataError(f'{len(alike)} of the {len(ids)} images of {data} are called as images in {file}, but for '
                        f'folders ({here} here, {there} there): pass --splits FILE.csv with a split for each image, or '
                        f'--other-data if they are other images.')


def _of_equal_types(splits: Sequence[datasets.Dataset]) -> List[datasets.Dataset]:
    """Splits whose columns have one type, where a table of one has 55 and that of another 55.0, or words."""
    kinds: Dict[str, Set[str]] = {}
    for split in splits:
        for column, feature in split.features.items():
            if isinstance(feature, datasets.Value) and feature.dtype != 'null':  # which fits to all
                kinds.setdefault(column, set()).add(feature.dtype)
    differ = {column: datasets.Value('string' if found & set(TEXT) else 'float64')
              for column, found in kinds.items() if len(found) > 1 and found <= {*TEXT, *NUMBERS}}
    return [split.cast(datasets.Features({**split.features, **{
        column: kind for column, kind in differ.items() if column in split.features}})) for split in splits]


def _arranged(
        splits: Dict[str, datasets.Dataset],
        task: Task,
        groups: str,
        wanted: Wanted,
        seed: int,
        needed: Sequence[str],
        whole: Optional[str],
        earlier: Optional[Path],
        given: bool,
        same: bool,
        train_ids: Optional[str],
        data: str,
) -> Tuple[Dict[str, datasets.Dataset], str, Sequence[str]]:
    """The splits by the user's file or as a run had them, or with those made that are needed; how they were made, or
    ''; and what is to be said of it."""
    none_given = list(splits) in ([WHOLE], ['train'], ['train', 'test'])
    if wanted.splits:
        return _as_in_file(splits, task, wanted.splits, data, False, False) or {}, '', ()
    if (none_given or given) and earlier is not None and earlier.is_file():
        found = _as_in_file(splits, task, earlier, data, True, same)
        if found is not None:
            absent = [name for name in needed if name not in found]
            if absent:
                raise DataError(f'{data} has none of the {absent[0]} images of the run: {earlier} has all of its '
                                f'images in {", ".join(found)}. Choose another --split, or pass --other-data if they '
                                f'are other images of the same names.')
            return found, '', [f'Its images are those of the run: they are divided as in {earlier}.']
    if none_given and train_ids and earlier is not None and not earlier.is_file():
        with contextlib.suppress(DataError):  # too few of a class, for one: then they are not those of the run
            made, how = _divided(splits, task, groups, seed, data)
            if ids_digest(made['train']['image_id']) == train_ids:
                return made, '', [f'Its images are those of the run, and divided as there: {how}.']
        source = next(iter(splits.values()))  # all, or train
        if not set(needed) <= splits.keys() - {'train'} and ids_digest(source['image_id']) == train_ids:
            raise DataError(f'The images of {data} are training images of the run: choose others, or pass --other-data '
                            f'if they are other images of the same names.')
    there = set(needed) <= splits.keys() and (needed or whole or not none_given)  # prepare divides what it can
    if there and (WHOLE not in splits or len(splits) > 1):
        return splits, '', ()
    if whole and list(splits) in ([WHOLE], ['train']):  # one that is called validation or test says what it is
        return {whole: next(iter(splits.values()))}, '', ()
    if not none_given:
        return splits, '', ()
    return *_divided(splits, task, groups, seed, data), ()


def _divided(
        splits: Dict[str, datasets.Dataset],
        task: Task,
        groups: str,
        seed: int,
        data: str,
) -> Tuple[Dict[str, datasets.Dataset], str]:
    """All images divided, or those of train where there is a test split; and how."""
    source = next(iter(splits.values()))  # all, or train
    check_labels(source, data, task)
    shares = SHARES if 'test' not in splits else {name: SHARES[name] for name in ('train', 'validation')}
    parts = divide(task.strata(label_array(source, task)), list(source[groups or 'image_id']), task, shares, seed, data)
    made = {name: source.select([row for row, part in enumerate(parts) if part == name]) for name in shares}
    by = f'by {groups}, ' if groups else ''
    return {**{name: split for name, split in splits.items() if name == 'test'}, **made}, (
        f'{words_list(list(shares))} divided {by}with seed {seed}')
