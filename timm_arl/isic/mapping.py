"""Labels of another clinic's data in the words of a network: which of theirs mean which of ours."""
import csv
from typing import Dict, List, NamedTuple, Sequence

from ..extras import require

require('train', __name__)

import datasets
import numpy as np

from .dataset import Data, DataError, label_array
from .dataset.names import same_letters
from .task import Task

__all__ = ['Mapped', 'map_labels', 'read_map']


class Mapped(NamedTuple):
    """Data whose labels are those of a network, as far as they are mapped.

    Attributes:
        data: Its task has the mapped labels alone; one against the rest, unless each image has exactly one of all.
        sources: For each mapped label, the labels of the data that count as it.
        negative: Labels of the data that no label is mapped to: images with them are negative throughout.
        not_scored: Labels of the network that are not mapped.
    """
    data: Data
    sources: Dict[str, List[str]]
    negative: List[str]
    not_scored: List[str]


def read_map(entries: Sequence[str], task: Task, network: str) -> Dict[str, List[str]]:
    """What --map says: for each label of the network, words of the data, in the order of the task.

    Args:
        entries: Such as ``melanoma=MEL,mel``; a word with a comma is in double quotes.
        task: Of the network.
        network: What messages call it.

    Raises:
        DataError: An entry of another form, a label that the network lacks, a word twice for one label, or a word for
            two labels that exclude each other.
    """
    found: Dict[str, List[str]] = {}
    for entry in entries:
        label, _, words = entry.partition('=')
        sources = [word.strip() for word in next(csv.reader([words], skipinitialspace=True), None) or ['']]
        if not label or not all(sources):
            raise DataError(f'--map {entry} is not LABEL=WORD,WORD: a label of {network} ({", ".join(task.labels)}), '
                            f'and the words of the data that mean it.')
        alike = [each for each in task.labels if each.lower() == label.lower()]
        label = alike[0] if label not in task.labels and len(alike) == 1 else label
        if label not in task.labels:
            raise DataError(f'--map {entry}: {network} has no label {label}, it knows {", ".join(task.labels)}.')
        found.setdefault(label, []).extend(sources)
    for label, sources in found.items():
        twice = [word for word in sources if sources.count(word) > 1]
        if twice:
            raise DataError(f'--map gives {twice[0]} to {label} twice: give it once.')
    if task.exclusive:
        of: Dict[str, str] = {}
        for label, sources in found.items():
            for word in sources:
                if of.setdefault(word.lower(), label) != label:
                    raise DataError(f'--map gives {word} to {of[word.lower()]} and to {label}, but {network} knows one '
                                    f'diagnosis of an image: give it to one.')
    return {label: found[label] for label in task.labels if label in found}


def map_labels(data: Data, task: Task, wanted: Dict[str, List[str]], split: str, where: str) -> Mapped:
    """The split to be scored with labels of the network: 1 where the image has any of the labels that mean it.

    A word that the data write in other letter case alone is found too, so that one mapping serves ``MEL`` and ``mel``.

    Args:
        data: With their own task.
        task: Of the network.
        wanted: From read_map.
        split: Name of the split that is scored; others are left out.
        where: What messages call the data.

    Raises:
        DataError: A word that is no label of the data, or no mapped label with images of both classes.
    """
    own, images = data.task, data.splits[split]
    names = [*own.labels, *[own.rest] * bool(own.rest)]
    truth = label_array(images, own)
    values = {**dict(zip(own.labels, truth.T)), **({own.rest: truth.sum(1) == 0} if own.rest else {})}
    meaning = {**dict(own.aliases), **{name: name for name in names}}
    loose = {same_letters(word): name for word, name in reversed(list(meaning.items()))}
    sources: Dict[str, List[str]] = {}
    for label, words in wanted.items():
        here = [(word, meaning.get(word, loose.get(same_letters(word)))) for word in words]
        # MEL,mel: the data may write either
        known = {word.lower() for word, name in here if name}
        quotes = '. A word with a comma is in double quotes: \'LABEL="WORD, MORE"\'' * (len(words) > 1)
        absent = [word for word, name in here if not name and word.lower() not in known]
        if absent:
            raise DataError(f'--map {label}={",".join(words)}: {where} has no label {absent[0]}, it has '
                            f'{", ".join(names)}{quotes}.')
        sources[label] = list(dict.fromkeys(name for _, name in here if name))
    columns = {label: np.any([values[name] > 0 for name in some], axis=0).astype(np.int8)
               for label, some in sources.items()}
    counts = {label: int(column.sum()) for label, column in columns.items()}
    if not any(0 < count < len(images) for count in counts.values()):
        told = ', '.join(f'{count} of {label}' for label, count in counts.items())
        raise DataError(f'{where} has no label of which some images are positive and some negative (of {len(images)} '
                        f'{split} images: {told}), so that there is no AUC: map other labels or take other images.')
    rest = images.remove_columns([label for label in columns if label in images.column_names])
    mapped = datasets.concatenate_datasets([rest, datasets.Dataset.from_dict(columns)], axis=1)
    not_scored = [label for label in task.labels if label not in columns]
    one_each = task.kind == 'multiclass' and not not_scored and (sum(columns.values()) == 1).all()  # type: ignore
    scored = task if one_each else Task('external', tuple(columns), title=task.title)
    used = {name for some in sources.values() for name in some}
    return Mapped(data._replace(task=scored, splits={split: mapped}), sources,
                  [name for name in names if name not in used], not_scored)
