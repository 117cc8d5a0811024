"""Folders of images that are named by their class, with or without a folder for each split above them."""
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import datasets

from ..task import DataError
from .groups import WHOLE, split_name
from .sources import image_files
from .tables import unique_ids

__all__ = ['read_class_folders']


def read_class_folders(folder: Path) -> Optional[Dict[str, datasets.Dataset]]:
    """The splits of FOLDER/SPLIT/CLASS/*.jpg, or all of FOLDER/CLASS/*.jpg as WHOLE; None for another layout.

    Each image has the columns image, image_id (the name of its file, with class and split before it where names occur
    twice) and diagnosis, the name of its folder.

    Raises:
        DataError: A folder beside those of the splits that is none, or images that lie beside folders of classes.
    """
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
        parts = {WHOLE: classes}
    rows: List[Tuple[str, str, Path]] = []
    for name, classes in parts.items():
        for each in classes:
            deeper = [part for part in _folders(each) if _has_images(part)]
            if deeper:
                raise DataError(f'{each} holds a folder of images, {deeper[0].name}: move them into {each}.')
            rows += [(name, each.name, file) for file in image_files(each).values()]
    ids = unique_ids([(file.stem, f'{label}-{file.stem}', f'{name}-{label}-{file.stem}') for name, label, file in rows])
    splits = {}
    for name in parts:
        own = [row for row, (of, *_) in enumerate(rows) if of == name]
        splits[name] = datasets.Dataset.from_dict({
            'image': [str(rows[row][2]) for row in own], 'image_id': [ids[row] for row in own],
            'diagnosis': [rows[row][1] for row in own]}).cast_column('image', datasets.Image())
    return splits


def _folders(folder: Path) -> List[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith('.'))


def _has_images(folder: Path) -> bool:
    return bool(image_files(folder))


def _classes(folder: Path) -> List[Path]:
    return [part for part in _folders(folder) if _has_images(part)]
