"""What the loaders give: splits, and what is predicted of their images."""
import hashlib
import json
import shlex
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import datasets
import numpy as np

from ..task import ISIC2017, Task

__all__ = ['SPLITS', 'Data', 'StreamedSplit', 'content_digest', 'label_array']

SPLITS = ('train', 'validation', 'test')


class StreamedSplit(NamedTuple):
    """A split whose images arrive as they are needed, from Parquet shards.

    Attributes:
        stream: Undecoded images, and what else an image needs.
        table: image_id and labels of all of them, shard after shard.
        shards: How many each shard has.
    """
    stream: datasets.IterableDataset
    table: datasets.Dataset
    shards: Sequence[int]


class Data(NamedTuple):
    """Images, and what is predicted of them.

    Attributes:
        task: What is predicted.
        splits: By name, each with the columns image (undecoded), image_id and those of the task's labels.
        groups: Column of the patient or lesion of each image, none of which is in two splits; '': not known.
        made: How splits were made here, in words; '' for those of the data.
        division: If they were made, or told by --splits, image_id and labels of each, with images that are left out
            later.
        missed: A column that is not used, but looks like one of patients or lesions; None: the user knows of groups.
        notes: Sentences on what was found.
    """
    task: Task
    splits: Dict[str, Any]
    groups: str = ''
    made: str = ''
    division: Mapping[str, Any] = {}
    missed: Optional[str] = None
    notes: Sequence[str] = ()

    def summary(self, where: str, folds: bool = False) -> str:
        """What was found, in a line: the task and its labels, the column of groups, how splits were made.

        Args:
            where: What to call the data.
            folds: Whether the images will be divided into folds.
        """
        said = [f'Task {self.task.name}: {", ".join(self.task.labels)} ({self.task.head}).']
        if self.groups:
            said.append(f'Images of one {self.groups} stay together.')
        if self.made:
            said.append(f'{where} has no splits: {self.made}.')
        if self.missed is not None:
            if self.made or folds:
                said.append('No column of patients or lesions: images are divided one by one.')
            if self.missed:
                said.append(f'The column {self.missed} looks like one: --group-column {shlex.quote(self.missed)}.')
        return ' '.join([*said, *self.notes])

    def group_ids(self, name: str) -> Optional[List[str]]:
        """Patient or lesion of each image of a split, or None where they are not known."""
        return [str(group) for group in self.splits[name][self.groups]] if self.groups else None


def content_digest(data: Data) -> str:
    """sha256 of what a run learns and is scored by: names of the labels and, by split, ids, labels and groups."""
    task = data.task
    content: List[Any] = [task.labels, task.kind, task.rest]
    for name, split in data.splits.items():
        table = split.table if isinstance(split, StreamedSplit) else split
        groups = list(table[data.groups]) if data.groups else [''] * len(table)
        content.append([name, *sorted(zip(
            map(str, table['image_id']), label_array(table, task).tolist(), groups))])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def label_array(split: datasets.Dataset, task: Task = ISIC2017) -> np.ndarray:
    """The labels as float32, shape (N, labels), columns in the order of the task's labels."""
    return np.stack([np.asarray(list(split[label]), dtype=np.float32) for label in task.labels], axis=1)
