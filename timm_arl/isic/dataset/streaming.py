"""Splits whose training images stay in their Parquet shards until they are needed."""
from functools import partial
from typing import Any, Dict, List, Optional

import datasets
import pyarrow

from ..task import DataError, Task
from .checks import check_splits, unused_splits
from .columns import class_numbers, find_task, further_labels, one_hot, with_labels, words_of
from .data import SPLITS, Data, StreamedSplit
from .groups import check_groups, find_groups, groups_missed, parted_officially, with_groups, without_entry
from .library import load_library, undecoded, with_names
from .names import TEXT
from .options import Wanted
from .tables import renamed

__all__ = ['load_streaming']

NO_SHARDS = ('--streaming reads Parquet shards, and {} has none: leave out --streaming, or make shards with python -m '
             'timm_arl.isic.dataset prepare.')


def load_streaming(data: str, wanted: Wanted, known: Optional[Task], usual_groups: Optional[str] = None) -> Data:
    """As load_data, for data in Parquet that have splits; train is a StreamedSplit.

    Args:
        data: Folder or Hub id.
        wanted: What the user says of it.
        known: Task that the folder names, if it does.
        usual_groups: Column of groups that it names.

    Raises:
        DataError: No shards, or as load_data.
    """
    if wanted.splits:
        raise DataError('--splits needs all images on this disk: leave out --streaming.')
    source = load_library(data, streaming=True)
    streams: Dict[str, Any] = {}
    tables: Dict[str, datasets.Dataset] = {}
    shards: List[int] = []
    try:
        for name in [name for name in SPLITS if name in source]:
            stream = source[name]
            if stream.features is None:  # only of Parquet are they known before it is read
                raise DataError(NO_SHARDS.format(data))
            stream = with_names(stream, wanted.columns, data)
            if 'image_id' not in stream.features:
                raise DataError(f'{data}, split {name}, has no column image_id (it has {", ".join(stream.features)}), '
                                f'which --streaming needs: say what it is called (--columns image_id=COLUMN).')
            for column in ('image', 'mask'):
                if column in stream.features:
                    stream = undecoded(stream, column, f'{data}, split {name}')
            if stream.features['image_id'].dtype != 'string':
                stream = stream.cast_column('image_id', datasets.Value('string'))
            streams[name] = stream
            if name == 'train':  # the images of the others are all needed at once
                found = renamed(list(source[name].features), wanted.columns, data)
                given = {new: old for old, new in found.items()}
                about = [c for c, feature in stream.features.items() if not isinstance(feature, datasets.Image)]
                try:
                    stream = with_names(load_library(
                        data, split=name, streaming=True, columns=[given.get(c, c) for c in about]),
                        [(c, given[c]) for c in about if c in given], data)
                except DataError as error:  # images in files, say, whose reader knows no columns
                    raise DataError(NO_SHARDS.format(data)) from error
            parts = [list(stream.shard(stream.num_shards, i)) for i in range(stream.num_shards)]
            tables[name] = datasets.Dataset.from_list(sum(parts, []), features=stream.features)
            if tables[name].features['image_id'].dtype != 'string':
                tables[name] = tables[name].cast_column('image_id', datasets.Value('string'))
            shards = [len(part) for part in parts] if name == 'train' else shards
    except (TypeError, OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{data} cannot be streamed: {" ".join(str(error).split())}') from error
    if 'train' not in tables:
        raise DataError(f'{data} has no split train (it has {", ".join(source)}): the splits must be named '
                        f'{", ".join(SPLITS)}.')
    notes = [unused_splits(list(source), ('train', 'validation'), data, list(source))]
    task, column = find_task(tables, wanted, known, data)
    if not (known or wanted.task or wanted.labels or column):
        notes.append(further_labels(tables, task))
    tables = {name: with_labels(table, task, column, f'{data}, split {name}') for name, table in tables.items()}
    groups = find_groups(tables, wanted.group, data, usual_groups)
    parted = parted_officially(tables, groups) if groups and wanted.group is None else ''
    notes.append(parted or (without_entry(tables, groups) if groups else ''))
    missed = None if groups or wanted.group else groups_missed(tables, ['image_id', column, *task.labels])
    groups = '' if parted else groups
    if groups:
        tables = with_groups(tables, groups)
        check_groups(tables, groups, data)
    if 'image' not in streams['train'].features:
        raise DataError(f'{data}, split train, has no column image (it has {", ".join(streams["train"].features)}): '
                        f'rename or add it, or say what it is called (--columns image=COLUMN).')
    splits: Dict[str, Any] = check_splits(tables, data, ['train'], task, ('train', 'validation'))
    splits['train'] = StreamedSplit(_labelled(streams['train'], task, column), splits['train'], shards)
    return Data(task, splits, groups, missed=missed, notes=[*filter(None, notes)])


def _labelled(stream: datasets.IterableDataset, task: Task, column: str) -> datasets.IterableDataset:
    """The stream with a column of 0 and 1 for each label."""
    if not column:
        for label in task.labels:  # '0' and '1', as check_splits has seen
            if getattr(stream.features[label], 'dtype', '') in TEXT:
                stream = stream.cast_column(label, datasets.Value('int8'))
        return stream
    feature = stream.features[column]
    features = datasets.Features({**stream.features, **{label: datasets.Value('int8') for label in task.labels}})

    add = partial(_labels_of, task=task, column=column, feature=feature)
    return stream.map(add, batched=True, batch_size=32, features=features)


def _labels_of(rows: Dict[str, List], task: Task, column: str, feature: Any) -> Dict[str, Any]:
    table = datasets.Dataset.from_dict({column: rows[column]}, features=datasets.Features({column: feature}))
    return one_hot(class_numbers(words_of(table, column), task, rows['image_id'], column), task)
