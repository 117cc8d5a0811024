"""Folders of images that are named by their class, with or without a folder for each split above them."""
import re
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import datasets

from ..task import DataError
from .groups import WHOLE, split_name
from .library import is_metadata
from .names import CLASS_COLUMNS, IMAGE_COLUMNS, plain
from .sources import IMAGE_SUFFIXES, image_files
from .tables import unique_ids

__all__ = ['check_has_labels', 'read_class_folders']

TABLES = ('.csv', '.tsv', '.xlsx', '.xls')
NOT_READ = ('.heic', '.heif', '.avif', '.gif', '.jfif', '.jp2', '.dcm', '.dicom')  # pictures all the same
BESIDE = ('', '.txt', '.md', '.pdf', '.ini', '.db')  # which say nothing of the kind of data


def read_class_folders(folder: Path) -> Optional[Dict[str, datasets.Dataset]]:
    """The splits of FOLDER/SPLIT/CLASS/*.jpg, or all of FOLDER/CLASS/*.jpg as WHOLE; None for another layout.

    Each image has the columns image, image_id (the name of its file, with class and split before it where names occur
    twice) and diagnosis, the name of its folder.

    Raises:
        DataError: A folder beside those of the splits that is none, a table beside folders of classes without splits,
            or a picture that is in no folder of a class, or that is not read.
    """
    if any(map(is_metadata, folder.rglob('metadata.*'))):  # of the datasets library
        return None
    inside = {part: _classes(part) for part in _folders(folder)}
    by_split = {part: split_name(part.name) for part, classes in inside.items() if classes}
    if any(by_split.values()):
        odd = [part.name for part, name in by_split.items() if name is None]
        if odd:
            raise DataError(f'{folder / odd[0]} is beside the splits but is none: rename it to train, validation (or '
                            f'val) or test, or move it away.')
        parts = {}
        for part, name in by_split.items():
            if name in parts:
                raise DataError(f'{folder} has two folders for the split {name}: keep one.')
            parts[str(name)] = inside[part]
    else:
        classes = [part for part in _folders(folder) if _has_images(part)]
        if len(classes) < 2 or any(split_name(part.name) for part in classes):
            return None
        files = [file for part in (folder, *classes) for file in sorted(part.iterdir())]
        table = next(filter(_names_classes, files), None)
        if table:
            raise DataError(f'{folder} has {len(classes)} folders of images and a table: pass --data {table} if the '
                            f'table tells the labels, or move it away if the names of the folders do.')
        parts = {WHOLE: classes}
    rows: List[Tuple[str, str, Path]] = []
    for name, classes in parts.items():
        for each in classes:
            deeper = [part for part in _folders(each) if _has_images(part)]
            if deeper:
                raise DataError(f'{each} holds a folder of images, {deeper[0].name}: move them into {each}.')
            rows += [(name, each.name, file) for file in image_files(each).values()]
    used = {file for _, _, file in rows}
    unused = [file for file in sorted(folder.rglob('*'))
              if file.suffix.lower() in (*IMAGE_SUFFIXES, *NOT_READ) and file not in used
              and not file.stem.endswith('_superpixels')
              and not any(part.startswith('.') for part in file.relative_to(folder).parts)]
    if unused:
        raise DataError(f'{unused[0]} would be left out ({len(unused)} such pictures): ' + (
            f'convert it to one of {", ".join(IMAGE_SUFFIXES)}' if unused[0].suffix.lower() in NOT_READ else
            'move it into the folder of its class') + f', or out of {folder}.')
    ids = unique_ids([(file.stem, f'{label}-{file.stem}', f'{name}-{label}-{file.stem}') for name, label, file in rows])
    splits = {}
    for name in parts:
        own = [row for row, (of, *_) in enumerate(rows) if of == name]
        splits[name] = datasets.Dataset.from_dict({
            'image': [str(rows[row][2]) for row in own], 'image_id': [ids[row] for row in own],
            'diagnosis': [rows[row][1] for row in own]}).cast_column('image', datasets.Image())
    return splits


def check_has_labels(folder: Path) -> None:
    """Refuse a folder of images alone, or with a table that is to be passed itself; others are left to the datasets
    library.

    Raises:
        DataError: Such a folder.
    """
    files = [file for file in sorted(folder.rglob('*')) if file.is_file() and not file.name.startswith('.')]
    endings = {file.suffix.lower() for file in files} - set(BESIDE)
    if not files or not endings <= {*TABLES, *IMAGE_SUFFIXES} or any(map(is_metadata, files)):
        return
    tables = [str(file) for file in files if file.suffix.lower() in TABLES]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if tables:
        raise DataError(f'{folder} is not laid out as any data set that is known, but has a table: pass '
                        f'{"one of them, " * (len(tables) > 1)}--data {" or ".join(tables[:3])}.')
    if images:
        raise DataError(f'{folder} has {len(images)} images, and nothing that tells their labels: pass a CSV of their '
                        f'paths and labels, or put them in a folder for each class.')


def _names_classes(file: Path) -> bool:
    """Whether it is a table of images and their classes."""
    if file.suffix.lower() not in ('.csv', '.tsv') or file.name.startswith('.') or file.name == 'splits.csv':
        return False
    with file.open(encoding='utf-8-sig', errors='replace') as lines:
        columns = {plain(word) for word in re.split('[,;\t]', lines.readline())}
    return all(columns & set(map(plain, names)) for names in (IMAGE_COLUMNS, CLASS_COLUMNS))


def _folders(folder: Path) -> List[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith('.'))


def _has_images(folder: Path) -> bool:
    return bool(image_files(folder))


def _classes(folder: Path) -> List[Path]:
    return [part for part in _folders(folder) if _has_images(part)]
