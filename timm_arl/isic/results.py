"""What a run leaves on disk. Every file appears whole or not at all: written under another name, then renamed."""
import contextlib
import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

from . import LABELS

__all__ = ['git_commit', 'replacing', 'write_json', 'write_predictions', 'write_rows']

PathLike = Union[str, Path]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; rename it to `path` on success, remove it on an exception."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, content: Dict[str, Any]) -> None:
    """Write standard JSON (NaN is refused: a score that is undefined is None)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def write_rows(path: PathLike, rows: Sequence[Dict[str, Any]]) -> None:
    """Write a CSV with a header from the first row's keys."""
    with replacing(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
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
