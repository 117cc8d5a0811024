"""What a run leaves on disk. Every file appears whole or not at all: written under another name, then renamed."""
import contextlib
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import numpy as np

from . import LABELS

__all__ = [
    'git_commit', 'read_predictions', 'record_look', 'replacing', 'write_json', 'write_predictions', 'write_rows',
]

PathLike = Union[str, Path]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; rename it to `path` on success, remove it on an exception."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'No folder {path.parent} for {path.name}: make it first.')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, content: Dict[str, Any]) -> None:
    """Write standard JSON (NaN is refused: a score that is undefined is None)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def write_rows(path: PathLike, rows: Sequence[Dict[str, Any]], columns: Optional[Sequence[str]] = None) -> None:
    """Write a CSV with a header, from the first row's keys unless columns are given."""
    with replacing(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(path: PathLike, image_ids: Sequence[str], probabilities: Sequence[Sequence[float]]) -> None:
    """Write the challenge's columns: image_id and a probability for each label.

    Args:
        path: CSV file to write.
        image_ids: N ids.
        probabilities: Shape (N, 2), in the order of LABELS; nine digits, which give a float32 back exactly.
    """
    rows: List[Dict[str, Any]] = [
        {'image_id': image_id, **{label: f'{float(value):.9g}' for label, value in zip(LABELS, values)}}
        for image_id, values in zip(image_ids, probabilities)
    ]
    write_rows(path, rows)


def git_commit(path: PathLike) -> Optional[str]:
    """The commit of the checkout that holds `path`, marked ``-dirty`` when it was changed; None outside a checkout."""
    try:
        done = subprocess.run(
            ['git', '-C', str(Path(path).parent), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def record_look(folder: PathLike, checkpoint: PathLike, scores: Dict[str, Any]) -> None:
    """Add a row to looks.csv, which tells how often a checkpoint has met the test split, and by which command.

    Args:
        folder: Where looks.csv is, or is made.
        checkpoint: What was scored.
        scores: What score_split gave for the test split.
    """
    path = Path(folder, 'looks.csv')
    rows: List[Dict[str, Any]] = []
    if path.exists():
        with path.open(newline='', encoding='utf-8') as file:
            rows = [{key: value for key, value in row.items() if key} for row in csv.DictReader(file)]
    rows.append({
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'checkpoint': str(checkpoint), 'mean_auc': scores['mean_auc'],
        'command': shlex.join(sys.argv), 'commit': git_commit(sys.argv[0]) or ''})
    write_rows(path, rows, list(dict.fromkeys(key for row in rows for key in row)))


def read_predictions(path: PathLike, image_ids: Sequence[str]) -> np.ndarray:
    """Read what write_predictions wrote, in the order of `image_ids`.

    Args:
        path: CSV with the columns image_id (or image) and those of LABELS; a byte order mark and CRLF are fine.
        image_ids: N ids, each of which must be there; others are left out.

    Returns:
        Probabilities, shape (N, 2), float64.

    Raises:
        ValueError: No such file, a column or image missing, an image twice, or a value that is no probability.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f'{path} cannot be read as predictions: {why}.') from error
    key = 'image' if rows and 'image' in rows[0] else 'image_id'
    absent = [column for column in (key, *LABELS) if not rows or column not in rows[0]]
    if absent:
        raise ValueError(f'{path} has no column {", ".join(absent)}: predictions have image_id, {", ".join(LABELS)}.')
    found: Dict[str, List[float]] = {}
    for row in rows:
        try:
            values = [float(row[label]) for label in LABELS]
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
