"""A CSV of image paths with their labels, as people have it."""
import csv
import io
import os
import unicodedata
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

import datasets

from ...files import delimiter_of
from ..task import DataError
from .groups import SPLIT_NAMES, WHOLE, split_name
from .names import IMAGE_COLUMNS, column_named, plain
from .sources import IMAGE_SUFFIXES, NOTHING, table_text, typed

__all__ = ['read_image_table', 'read_lines', 'renamed', 'unique_ids']

NAMED = 3  # missing files in a message


def read_lines(path: Path) -> Tuple[List[str], List[Dict[str, str]], List[int]]:
    """Columns, rows and the line of each row, of a table whose values are divided by commas, semicolons or tabs.

    A byte order mark, CRLF and spaces around values are accepted; empty rows, and empty columns without a name, as
    Excel writes them, are left out.

    Raises:
        DataError: It cannot be read, has no row, a column twice, or a row with more values than columns.
    """
    text = table_text(path)
    delimiter = delimiter_of(text)
    reader = csv.reader(io.StringIO(text, newline=''), skipinitialspace=True, delimiter=delimiter)
    columns: List[str] = []
    lines, numbers = [], []
    try:
        for values in reader:
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if not columns:
                columns = values
                continue
            if any(values[len(columns):]):
                raise DataError(f'{path}, line {reader.line_num}: it has more values than the {len(columns)} columns; '
                                f'put quotes around text that holds {delimiter!r}.')
            lines.append([*values, *[''] * len(columns)][:len(columns)])
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f'{path} cannot be read as CSV: {error}') from error
    kept = [k for k, column in enumerate(columns) if column or any(line[k] for line in lines)]
    columns = [columns[k] for k in kept]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f'{path} has the column {twice[0] or "without a name"} twice: rename or remove one.')
    if not lines:
        raise DataError(f'{path} has no rows below its header.')
    return columns, [dict(zip(columns, (line[k] for k in kept))) for line in lines], numbers


def renamed(columns: Sequence[str], wanted: Iterable[Tuple[str, str]], where: str) -> Dict[str, str]:
    """New name of each column of the data that --columns names.

    Args:
        columns: Of the data.
        wanted: Pairs of a new name and a column.
        where: What messages call the data.

    Raises:
        DataError: A column that is not there.
    """
    names = {}
    for name, column in wanted:
        found = column_named(columns, column)
        if not found:
            raise DataError(f'--columns {name}={column}: {where} has no column {column} (it has '
                            f'{", ".join(columns)}).')
        names[found] = name
    return names


def read_image_table(
        path: Path,
        columns: Sequence[Tuple[str, str]] = (),
) -> Tuple[Dict[str, datasets.Dataset], List[str]]:
    """The splits of a CSV with a row for each image, or all of it as WHOLE where it has no column split; and its
    columns as it has them.

    Paths are relative to the folder of the CSV, or all are absolute; their ending may be missing, or in other case. A
    name without a folder that is not beside the CSV is looked for in the folders below. Other columns are kept, as
    numbers where all of their values are.

    Args:
        path: The CSV.
        columns: Pairs of a name that is expected here and the column's name in the file.

    Raises:
        DataError: A table that cannot be used; the message names the line.
    """
    shown, rows, numbers = read_lines(path)
    heads = shown
    names = renamed(heads, columns, str(path))
    taken = {plain(name) for name in names.values()}
    rows = [{names.get(head, head): value for head, value in row.items() if head in names or plain(head) not in taken}
            for row in rows]
    heads = list(rows[0])
    given = next((head for head in heads if head.lower() == 'split'), '')  # its column
    image = next((head for column in IMAGE_COLUMNS for head in heads if plain(head) == plain(column)), None)
    name = next((head for head in heads if plain(head) == 'imageid' and head != image), None)
    if image is None:
        raise DataError(f'{path} has no column of image paths (it has {", ".join(shown)}): name it with --columns '
                        f'image=COLUMN.')
    files = _files(path, [row[image] for row in rows], numbers)
    if name is not None:
        ids = [row[name] for row in rows]
    else:
        paths = [(*PurePath(row[image].replace('\\', '/')).parts[:-1], file.stem) for row, file in zip(rows, files)]
        ids = unique_ids([[parts[-1], '-'.join(part for part in parts if part != '/')] for parts in paths])
    content: Dict[str, List[Any]] = {'image': [str(file) for file in files], 'image_id': ids}
    for head in heads:
        if plain(head) == 'mask':
            content.update(_masks(path, [row[head] for row in rows], numbers))
        elif head and head not in (image, name, 'image', 'image_id', given):
            content[head] = typed([row[head] for row in rows], head)
    parts = _by_split(path, [row[given] for row in rows], numbers) if given else {WHOLE: list(range(len(rows)))}
    features = datasets.Dataset.from_dict(content).features
    return {name: datasets.Dataset.from_dict(
        {head: [values[row] for row in own] for head, values in content.items()}, features=features
    ).cast_column('image', datasets.Image()) for name, own in parts.items()}, shown


def _by_split(path: Path, words: Sequence[str], numbers: Sequence[int]) -> Mapping[str, List[int]]:
    rows: Dict[str, List[int]] = {}
    for row, word in enumerate(words):
        name = split_name(word)
        if name is None:
            count = sum(other == word for other in words)
            raise DataError(f'{path}, line {numbers[row]}: the split is {word!r} ({count} such rows), which is none of '
                            f'{", ".join(SPLIT_NAMES)}: correct it.')
        rows.setdefault(name, []).append(row)
    return rows


def _masks(path: Path, names: Sequence[str], numbers: Sequence[int]) -> Dict[str, List[Any]]:
    """The column of masks, whose paths are as those of images, None where there is no mask; none without any."""
    rows = [row for row, name in enumerate(names) if name.lower() not in NOTHING]
    files = _files(path, [names[row] for row in rows], [numbers[row] for row in rows], 'mask') if rows else []
    of_row = {row: str(file) for row, file in zip(rows, files)}
    return {'mask': [of_row.get(row) for row in range(len(names))]} if rows else {}


def _files(path: Path, names: Sequence[str], numbers: Sequence[int], what: str = 'image') -> List[Path]:
    """The image files of a table whose rows are on these lines, or those of what else it names."""
    folder = path.parent.absolute()
    for name, line in zip(names, numbers):
        if not name:
            raise DataError(f'{path}, line {line}: there is no {what} path.')
        if PureWindowsPath(name).is_absolute() and not PurePath(name).is_absolute():
            raise DataError(f'{path}, line {line}: {name} is a path of a Windows machine: put the images beside the '
                            f'table, and write their paths relative to its folder.')
    absolute = [PurePath(name).is_absolute() for name in names]
    if any(absolute) and not all(absolute):
        raise DataError(f'{path} mixes relative and absolute paths ({names[absolute.index(False)]} and '
                        f'{names[absolute.index(True)]}): write all in one way.')
    beside: Dict[Path, Dict[str, List[Path]]] = {}
    files, missing = [], []
    first: Dict[str, int] = {}
    for name, line in zip(names, numbers):
        name = name if absolute[0] else name.replace('\\', '/')
        depth = 0
        for part in () if absolute[0] else PurePath(name).parts:
            depth += -1 if part == '..' else 1
            if depth < 0:
                raise DataError(f'{path}, line {line}: {name} leaves the folder of the table: move the images into '
                                f'{folder}, or write absolute paths.')
        file = folder / name
        if not file.is_file():
            found: List[Path] = []
            for within, pattern in ((file.parent, '*'), *[(folder, '*/**/*')] * ('/' not in name)):
                if not found:
                    where = within / pattern
                    beside[where] = beside[where] if where in beside else _by_name(within, pattern)
                    found = beside[where].get(_loose(PurePath(name).name), [])
            if len(found) > 1:
                raise DataError(f'{path}, line {line}: there are several files {name} ({found[0]} and {found[1]}): '
                                f'write the path of the one that is meant.')
            if not found:
                missing.append(name)
            file = found[0] if found else file
        place = os.path.normpath(file)  # a/../b is b
        if place in first and what == 'image':
            raise DataError(f'{path}, line {line}: {name} occurs twice (in line {first[place]} too): remove one.')
        first[place] = line
        files.append(file)
    if missing and what == 'image':  # masks are missed where they are used
        named = ', '.join(missing[:NAMED]) + ', ...' * (len(missing) > NAMED)
        raise DataError(f'{len(missing)} of the {len(names)} images of {path} are missing in {folder}: {named}. Put '
                        f'them there, correct the paths, or remove the rows.')
    return files


def _loose(name: str) -> str:
    """A name with the ending in small letters, if it is that of an image, and letters composed as on most systems."""
    stem, ending = os.path.splitext(unicodedata.normalize('NFC', name))
    return stem + ending.lower() if ending.lower() in IMAGE_SUFFIXES else stem + ending


def _by_name(folder: Path, pattern: str) -> Dict[str, List[Path]]:
    """Image files by name, with their ending in small letters and without it."""
    found: Dict[str, List[Path]] = {}
    for file in sorted(folder.glob(pattern)) if folder.is_dir() else ():
        if file.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(_loose(file.name), []).append(file)
            found.setdefault(_loose(file.stem), []).append(file)
    return found


def unique_ids(candidates: Sequence[Sequence[str]]) -> List[str]:
    """For each image the first of its names, or the second, ..., that makes all of them differ; the last otherwise."""
    for names in zip(*candidates):
        if len(set(names)) == len(names):
            return list(names)
    return [names[-1] for names in candidates]
