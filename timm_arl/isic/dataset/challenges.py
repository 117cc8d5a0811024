"""The challenges of 2018, 2019, 2020 and 2024 as their zips unpack, and HAM10000 as the Dataverse has it."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import datasets

from ..task import TASKS, DataError, Task
from .groups import WHOLE
from .names import ABOUT, NOT_KEPT
from .sources import image_files, typed
from .tables import read_lines

__all__ = ['check_truth', 'read_challenge', 'unused_parts']


class _Part(NamedTuple):
    """Where one split of a challenge lies; the first of several places that is there counts."""
    images: Sequence[str]
    truth: Sequence[str]
    about: Sequence[str] = ()  # tables of further columns, all that are there


CHALLENGES: Dict[str, Dict[str, _Part]] = {
    'isic2018': {
        name: _Part(
            [f'ISIC2018_Task3_{word}_Input', f'ISIC2018_Task3_{word}_Images'],
            [f'ISIC2018_Task3_{word}_GroundTruth/ISIC2018_Task3_{word}_GroundTruth.csv',
             f'ISIC2018_Task3_{word}_GroundTruth.csv'],
            [f'ISIC2018_Task3_{word}_LesionGroupings.csv'])
        for name, word in (('train', 'Training'), ('validation', 'Validation'), ('test', 'Test'))},
    'isic2019': {
        name: _Part(
            [f'ISIC_2019_{word}_Input'], [f'ISIC_2019_{word}_GroundTruth.csv'], [f'ISIC_2019_{word}_Metadata.csv'])
        for name, word in (('train', 'Training'), ('test', 'Test'))},
    'isic2020': {'train': _Part(
        ['ISIC_2020_Training_JPEG/train', 'ISIC_2020_Training_JPEG', 'ISIC_2020_Training_Input', 'jpeg/train', 'train'],
        ['ISIC_2020_Training_GroundTruth_v2.csv', 'ISIC_2020_Training_GroundTruth.csv',
         'jpeg/../train.csv'])},  # Kaggle's
    'isic2024': {'train': _Part(
        ['ISIC_2024_Training_Input', 'ISIC_2024_Permissive_Training_Input', 'train-image/image'],
        ['ISIC_2024_Training_GroundTruth.csv', 'ISIC_2024_Permissive_Training_GroundTruth.csv', 'train-metadata.csv'],
        ['ISIC_2024_Training_Input/metadata.csv', 'ISIC_2024_Permissive_Training_Input/metadata.csv',
         'ISIC_2024_Training_Supplement.csv', 'ISIC_2024_Permissive_Training_Supplement.csv'])},
    'ham10000': {'train': _Part(
        ['HAM10000_images_part_1', 'ham10000_images_part_1', 'HAM10000_images'],
        ['HAM10000_metadata.csv', 'HAM10000_metadata.tab', 'HAM10000_metadata'])},
}
SECOND_PARTS = ('HAM10000_images_part_2', 'ham10000_images_part_2')


def read_challenge(folder: Path) -> Optional[Tuple[Task, Dict[str, datasets.Dataset]]]:
    """The task and the splits of a folder with one of these data sets, or None for another layout.

    A part whose ground truth is not there is left out, as the test images of 2020 are, for which there is none. Where
    only training images have one, they are given as WHOLE. Columns: image, image_id, those of the labels, patient_id,
    lesion_id, age_approximate, sex and site where they are known, and all others of the tables.

    Raises:
        DataError: A table that cannot be used, an image without a row, or a row without an image.
    """
    kinds = _kinds(folder)
    if not kinds:
        return None
    name, found = kinds[0]
    task, parts, splits = TASKS[name], CHALLENGES[name], {}
    for split, (images, truth) in found.items():
        if images is None:
            raise DataError(f'{folder} has {truth.name} but no {parts[split].images[0]}: unpack the images beside it.')
        about = [file for table in parts[split].about for file in [folder / table] if file.is_file()]
        second = _images(folder, SECOND_PARTS) if name == 'ham10000' else None
        folders = [images, *([second] if second else [])]
        splits[split] = _split(folders, truth, about, task)
    return task, {WHOLE: splits['train']} if list(splits) == ['train'] else splits


def unused_parts(folder: Path, task: Task) -> str:
    """A sentence on images of challenges in a folder, where they were not read with those of one; '' without any.

    Args:
        folder: It.
        task: Of the one that was read.
    """
    unused = []
    for name, found in _kinds(folder):
        if name == task.name:
            unused += [f'{images.name}, whose ground truth is not there' for split, part in CHALLENGES[name].items()
                       if split not in found for images in [_first(folder, part.images)] if images]
        else:
            unused += [f'{images.name}, which is of {TASKS[name].title} (to have both, write a CSV of all images with '
                       f'a column split)' for images, _ in found.values() if images]
    return f'Not used: {"; ".join(unused)}.' if unused else ''


def _kinds(folder: Path) -> List[Tuple[str, Dict[str, Tuple[Optional[Path], Path]]]]:
    """The challenges of which a folder has images and a ground truth, the one that is read first: by split the images
    and the table."""
    kinds = []
    for name, parts in CHALLENGES.items():
        found = {split: (_images(folder, part.images), truth) for split, part in parts.items()
                 for truth in [_first(folder, part.truth)] if truth}
        if any(images for images, _ in found.values()):
            kinds.append((name, found))
    # the Dataverse has a test set of 2018 beside HAM10000
    return sorted(kinds, key=lambda kind: 'train' not in kind[1])


def check_truth(folder: Path) -> None:
    """Refuse images of a challenge without any ground truth: the names of their folders are no diagnoses.

    Raises:
        DataError: Such a folder.
    """
    for name, parts in CHALLENGES.items():
        for part in parts.values():
            called = TASKS[name].title.split()[0].lower()  # which 'train' is not
            place = _first(folder, [place for place in part.images if called in place.lower()])
            if place:
                raise DataError(f'{folder} has {place.name}, but none of {", ".join(part.truth)}: put the ground truth '
                                f'beside it.')


def _images(folder: Path, places: Iterable[str]) -> Optional[Path]:
    """The first of several folders that is there, or the one of the same name in it, as some programs unpack zips."""
    place = _first(folder, places)
    return place / place.name if place and (place / place.name).is_dir() else place


def _first(folder: Path, places: Iterable[str]) -> Optional[Path]:
    return next((folder / place for place in places if (folder / place).exists()), None)


def _rows(path: Path) -> Dict[str, Dict[str, str]]:
    """Rows of a table by image_id, its columns called as they are here."""
    heads, lines, _ = read_lines(path)
    names = {head: ABOUT.get(head, head) for head in heads if head not in NOT_KEPT}
    if 'image_id' not in names.values():
        raise DataError(f'{path} has no column image, image_name, image_id or isic_id (it has {", ".join(heads)}).')
    rows: Dict[str, Dict[str, str]] = {}
    for line in lines:
        row = {name: line[head] for head, name in names.items()}
        if row['image_id'] in rows:
            raise DataError(f'{path}: {row["image_id"]} occurs twice; remove one.')
        rows[row.pop('image_id')] = row
    return rows


def _split(folders: Sequence[Path], truth: Path, tables: Sequence[Path], task: Task) -> datasets.Dataset:
    files: Dict[str, Path] = {}
    for folder in folders:
        for image_id, file in image_files(folder).items():
            if image_id in files:
                raise DataError(f'{image_id} is in {files[image_id].parent} and in {folder}: remove one.')
            files[image_id] = file
    rows = _rows(truth)
    labels = [task.column] if task.column else [label for label in (*task.labels, task.rest) if label]
    absent = [label for label in labels if label not in next(iter(rows.values())) and label != task.rest]
    if absent:
        raise DataError(f'{truth} has no column {", ".join(absent)}: is it the table of {task.title}?')
    for what, alone in (('image', rows.keys() - files.keys()), ('row', files.keys() - rows.keys())):
        if alone:
            raise DataError(f'{truth} and {folders[0]} do not fit: there is no {what} for {min(alone)} ({len(alone)} '
                            f'such of {len(rows)} rows and {len(files)} images). Unpack all of them, or remove what '
                            f'has no counterpart.')
    others: List[Mapping[str, Mapping[str, str]]] = [rows, *map(_rows, tables)]
    ids = sorted(rows)
    columns = dict.fromkeys(column for table in others for row in [next(iter(table.values()))] for column in row)
    content: Dict[str, Any] = {'image': [str(files[image_id]) for image_id in ids], 'image_id': ids}
    for column in columns:
        table = next(table for table in others if column in next(iter(table.values())))
        content[column] = typed([table.get(image_id, {}).get(column, '') for image_id in ids], column, ('unknown',))
    return datasets.Dataset.from_dict(content).cast_column('image', datasets.Image())
