"""Predictions as the challenge's CSV has them: image_id and a probability for each label."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np

from ..files import read_rows, write_rows
from .task import ISIC2017, Task

__all__ = ['read_predictions', 'write_predictions']

PathLike = Union[str, Path]


def write_predictions(
        path: PathLike,
        image_ids: Sequence[str],
        probabilities: Any,
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
) -> None:
    """Write the challenge's columns: image_id and a probability for each label.

    Args:
        path: CSV file to write.
        image_ids: N ids.
        probabilities: Shape (N, labels); nine digits are written, which give a float32 back exactly.
        task: Whose labels they are.
        groups: N names of patients or lesions, for a column group; None: no such column.
    """
    rows: List[Dict[str, Any]] = [
        {'image_id': image_id, **{label: f'{float(value):.9g}' for label, value in zip(task.labels, values)},
         **({} if groups is None else {'group': groups[row]})}
        for row, (image_id, values) in enumerate(zip(image_ids, probabilities))
    ]
    write_rows(path, rows)


def read_predictions(path: PathLike, image_ids: Sequence[str], task: Task = ISIC2017) -> np.ndarray:
    """Read what write_predictions wrote, in the order of `image_ids`.

    Args:
        path: CSV with the columns image_id (or image) and those of the labels; a byte order mark and CRLF are fine.
        image_ids: N ids, each of which must be there; others are left out.
        task: Whose labels they are.

    Returns:
        Probabilities, shape (N, labels), float64.

    Raises:
        ValueError: No such file, a column or image missing, an image twice, or a value that is no probability.
    """
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f'{path} cannot be read as predictions: {why}.') from error
    key = 'image' if rows and 'image' in rows[0] else 'image_id'
    absent = [column for column in (key, *task.labels) if not rows or column not in rows[0]]
    if absent:
        raise ValueError(f'{path} has no column {", ".join(absent)}: predictions have image_id, '
                         f'{", ".join(task.labels)}.')
    found: Dict[str, List[float]] = {}
    for row in rows:
        try:
            values = [float(row[label]) for label in task.labels]
        except (TypeError, ValueError):
            values = [float('nan')]
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f'{path}: the probabilities of image {row[key]} are not numbers between 0 and 1.')
        if row[key] in found:
            raise ValueError(f'{path}: image {row[key]} occurs twice.')
        found[row[key]] = values
    missing = [image_id for image_id in image_ids if image_id not in found]
    if missing:
        raise ValueError(f'{path} has no prediction for {len(missing)} of {len(image_ids)} images, {missing[0]} among '
                         f'them.')
    return np.array([found[image_id] for image_id in image_ids])
