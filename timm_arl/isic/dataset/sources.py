"""Folders of image files: the challenge's zips as they unpack, and what the ISIC Archive's client writes."""
import csv
import hashlib
import io
import math
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import datasets

from ...files import delimiter_of
from ..task import DIAGNOSES, LABELS, DataError, label_words
from .names import ABOUT, CLASS_COLUMNS, NOT_KEPT, looks_like_groups, plain

__all__ = [
    'CHALLENGE_IDS', 'CHALLENGE_ZIPS', 'DataError', 'check_image_id', 'ids_digest', 'image_files', 'number',
    'read_folder', 'read_table', 'table_text', 'typed', 'years_of',
]

SPLIT_NAMES = {'train': 'Training', 'validation': 'Validation', 'test': 'Test_v2'}
CHALLENGE_ZIPS = {  # md5
    'ISIC-2017_Training_Data.zip': 'a14a7e622c67a358797ae59abb8a0b0c',
    'ISIC-2017_Validation_Data.zip': '8d6419d942112f709894c0d82f6c9038',
    'ISIC-2017_Test_v2_Data.zip': '5f6a0b5e1f2972bd1f5ea02680489f09',
}
CHALLENGE_IDS = {  # ids_digest of the official splits
    'train': '3beb9655e6718b313f2a0386ac31d0961ff14bbc8d3a20c080cb1e81c450190c',
    'validation': 'b613df27e71f83bcce1cb1c5da1451ed8501232eedd912bd0797e1fd498012cd',
    'test': '8e7a85c979aef0597511c5d99791b2af10e62f0cf064ddfad7786583d09cbc03',
}
WORKBOOKS = (b'PK\x03\x04', b'\xd0\xcf\x11\xe0')  # .xlsx and .ods are zips; .xls is older
CODE = re.compile(r'0\d')  # as a class, 007 is no number
NOTHING = ('', 'nan', 'na', 'n/a', 'null')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
FEATURES = datasets.Features({
    'image': datasets.Image(), 'image_id': datasets.Value('string'),
    **{label: datasets.Value('float32') for label in LABELS},
    'age_approximate': datasets.Value('float32'), 'sex': datasets.Value('string'), 'mask': datasets.Image(),
})


def ids_digest(image_ids: Iterable[str]) -> str:
    """sha256 of the sorted ids, one a line: by which two sets of images are known to be the same."""
    return hashlib.sha256('\n'.join(sorted(map(str, image_ids))).encode()).hexdigest()


def read_folder(folder: Path) -> Optional[datasets.DatasetDict]:
    """The splits of a folder of image files, or None if it has neither of the two layouts.

    The challenge's: ``ISIC-2017_Training_Data/ISIC_*.jpg`` beside ``ISIC-2017_Training_Part3_GroundTruth.csv``; masks
    in ``ISIC-2017_Training_Part1_GroundTruth/``, age and sex in a ``*_metadata.csv`` among the images. The same for
    ``Validation`` and ``Test_v2``.

    The archive client's (``isic image download``): ``train/``, ``validation/`` and ``test/``, each with images and a
    ``metadata.csv``; labels from the challenge's CSV beside them if it is there, else from the diagnosis columns. A
    ``metadata.csv`` with the column ``file_name`` is that of an image folder of the datasets library, and left to it.
    Other columns of the tables are kept, as lesion_id and site.

    Raises:
        DataError: A table that cannot be read, an image without labels or labels without an image.
    """
    challenge = any((folder / f'ISIC-2017_{word}_Data').is_dir() for word in SPLIT_NAMES.values())
    archive = any(_of_archive(folder / name / 'metadata.csv') for name in SPLIT_NAMES)
    if not challenge and not archive:
        if _of_archive(folder / 'metadata.csv') and image_files(folder):
            raise DataError(f'{folder} is one download of the archive, not three splits: put each split, with its '
                            f'metadata.csv, in a folder train/, validation/ or test/.')
        return None
    parts = {}
    for name, word in SPLIT_NAMES.items():
        images = folder / (f'ISIC-2017_{word}_Data' if challenge else name)
        truth = folder / f'ISIC-2017_{word}_Part3_GroundTruth.csv'
        if not images.is_dir():
            continue
        if not challenge:
            metadata = read_table(images / 'metadata.csv', ('isic_id',))
            labels = (_labels_of_table(truth) if truth.is_file()
                      else _labels_of_diagnoses(images / 'metadata.csv', metadata))
        else:
            labels = _labels_of_table(truth)
            table = next(iter(sorted([*images.glob('*_metadata.csv'), *folder.glob(f'*_{word}_*metadata.csv')])), None)
            metadata = read_table(table, ('image_id',)) if table else {}
        masks = image_files(folder / f'ISIC-2017_{word}_Part1_GroundTruth', '_segmentation')
        parts[name] = images, labels, metadata, masks
    others = _others(metadata for _, _, metadata, _ in parts.values())
    return datasets.DatasetDict({name: _split(*part, *others) for name, part in parts.items()})


def _of_archive(metadata: Path) -> bool:
    """Whether there is such a file, and it is not one of the datasets library."""
    if not metadata.is_file():
        return False
    with metadata.open(encoding='utf-8-sig', errors='replace') as file:  # what else is wrong, read_table says
        return 'file_name' not in file.readline()


def _split(
        folder: Path,
        labels: Dict[str, Tuple[float, ...]],
        metadata: Dict[str, Dict[str, str]],
        masks: Dict[str, Path],
        others: datasets.Dataset,
        rows: Dict[str, int],
) -> datasets.Dataset:
    files = image_files(folder)
    for what, alone in (('no image', labels.keys() - files.keys()), ('no row of labels', files.keys() - labels.keys())):
        if alone:
            others = sorted(path for path in folder.glob('*') if path.stem in alone and path.stem not in files)
            if others:
                raise DataError(f'{others[0]} is in a format that is not read ({len(others)} such files): convert it '
                                f'to JPEG or PNG; the endings that are read are {", ".join(IMAGE_SUFFIXES)}.')
            raise DataError(f'{folder}: there is {what} for {min(alone)} ({len(alone)} such of {len(labels)} rows and '
                            f'{len(files)} images): add what is missing, or remove what has no counterpart.')
    ids = sorted(files)
    about = [metadata.get(image_id, {}) for image_id in ids]
    known = datasets.Dataset.from_dict({
        'image': [str(files[image_id]) for image_id in ids], 'image_id': ids,
        **{label: [labels[image_id][k] for image_id in ids] for k, label in enumerate(LABELS)},
        'age_approximate': [number(row.get('age_approximate') or row.get('age_approx')) for row in about],
        'sex': [_word(row.get('sex')) for row in about],
        'mask': [str(masks[image_id]) if image_id in masks else None for image_id in ids],
    }, features=FEATURES)
    if not others.column_names:
        return known
    return datasets.concatenate_datasets([known, others.select([rows.get(image_id, 0) for image_id in ids])], axis=1)


def _others(tables: Iterable[Dict[str, Dict[str, str]]]) -> Tuple[datasets.Dataset, Dict[str, int]]:
    """Further columns of the tables of all splits, called and typed as those of the other challenges, and the row of
    each image_id; the first row is empty."""
    about = {image_id: row for table in tables for image_id, row in table.items()}
    found: Dict[str, List[Any]] = {}
    for head in dict.fromkeys(head for row in about.values() for head in row):
        name = ABOUT.get(head, head)
        cells = typed(['', *(row.get(head, '') for row in about.values())], name, ('unknown',))
        if name and head not in NOT_KEPT and name not in FEATURES and any(cell is not None for cell in cells):
            found.setdefault(name, cells)
    return datasets.Dataset.from_dict(found), {image_id: row for row, image_id in enumerate(about, 1)}


def image_files(folder: Path, suffix: str = '') -> Dict[str, Path]:
    """Image files of a folder by id, which is the name without its ending and `suffix`; superpixels are left out.

    Raises:
        DataError: Two files of one id, or a name that is not UTF-8.
    """
    found: Dict[str, Path] = {}
    for path in sorted(folder.glob('*')) if folder.is_dir() else ():
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.stem.endswith('_superpixels'):
            continue
        if not path.stem.endswith(suffix):
            continue
        image_id = path.stem[:len(path.stem) - len(suffix)]
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(f'The name {str(path)!r} is not UTF-8: rename it.') from None
        if image_id in found:
            raise DataError(
                f'{folder} has two files for {image_id}, {found[image_id].name} and {path.name}: remove one.')
        found[image_id] = path
    return found


def read_table(path: Path, required: Iterable[str]) -> Dict[str, Dict[str, str]]:
    """Rows of a CSV, with commas, semicolons or tabs, by the first required column; a byte order mark, CRLF and spaces
    around values are accepted.

    Raises:
        DataError: No such file, not CSV in UTF-8, a column missing, or an id that is empty, unusable or duplicated.
    """
    required = tuple(required)
    try:
        text = table_text(path)
        reader = csv.DictReader(
            io.StringIO(text, newline=''), skipinitialspace=True, delimiter=delimiter_of(text))
        columns = [(name or '').strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f'{path} cannot be read as CSV: {error}') from error
    absent = [column for column in required if column not in columns]
    if absent:
        raise DataError(f'{path} has no column {", ".join(absent)} (it has {", ".join(columns)}).')
    table: Dict[str, Dict[str, str]] = {}
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise DataError(f'{path} has the column {twice[0]} twice: rename or remove one.')
    for number, row in rows:
        if any(value.strip() for value in row.get(None) or ()):  # type: ignore[call-overload]  # beyond the columns
            raise DataError(f'{path}, line {number}: it has more values than the {len(columns)} columns; put quotes '
                            f'around text that holds commas.')
        if not any((value or '').strip() for key, value in row.items() if isinstance(key, str)):
            continue
        values = {key: (value or '').strip() for key, value in row.items() if isinstance(key, str)}
        image_id = values[required[0]]
        check_image_id(image_id, f'{path}, line {number}')
        if image_id in table:
            raise DataError(f'{path}, line {number}: {image_id} occurs twice; remove one.')
        table[image_id] = values
    return table


def table_text(path: Path) -> str:
    """Content of a CSV, without a byte order mark.

    Raises:
        DataError: No such file, or one that is a workbook of Excel or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f'There is no {path}: download it, or move it there.') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}.') from error
    if content.startswith(WORKBOOKS):
        raise DataError(f'{path} is a workbook (of Excel, say), not a CSV: save it as CSV UTF-8, and pass that file.')
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = '\0'
    if '\0' in text:
        raise DataError(f'{path} is not a text in UTF-8 (Excel writes CSV in other encodings too): save it as CSV '
                        f'UTF-8.')
    return text


def check_image_id(image_id: str, where: str) -> None:
    """Refuse an id that is empty or would name another place on the disk.

    Raises:
        DataError: Such an id.
    """
    if not image_id or image_id.strip('.') == '' or any(c in '/\\' or ord(c) < 32 for c in image_id):
        raise DataError(f'{where}: {image_id!r} is no usable image_id; it must be a name without path separators.')


def _labels_of_table(path: Path) -> Dict[str, Tuple[float, ...]]:
    labels = {}
    for image_id, row in read_table(path, ('image_id', *LABELS)).items():
        try:
            labels[image_id] = tuple(float(row[label]) for label in LABELS)
        except ValueError as error:
            raise DataError(f'{path}: the labels of {image_id} are not numbers ({error}).') from error
    return labels


def _labels_of_diagnoses(path: Path, metadata: Dict[str, Dict[str, str]]) -> Dict[str, Tuple[float, ...]]:
    labels: Dict[str, Tuple[float, ...]] = {}
    for image_id, row in metadata.items():
        words = ' '.join(value.lower() for key, value in row.items() if key.startswith('diagnosis'))
        found = [name for name in DIAGNOSES if label_words(name) in words]
        if len(found) != 1:
            raise DataError(f'{path}: the diagnosis of {image_id} is {words!r}, not one of '
                            f"{', '.join(map(label_words, DIAGNOSES))}; put the challenge's Part3_GroundTruth.csv "
                            f'beside the folder: its labels are used instead.')
        labels[image_id] = tuple(float(label == found[0]) for label in LABELS)
    return labels


def number(cell: Any) -> Optional[float]:
    """The number in a cell of a table; None for an empty one, a word, NaN and the like."""
    try:
        return float(cell) if math.isfinite(float(cell)) else None
    except (TypeError, ValueError):
        return None


def typed(values: Sequence[str], name: str = '', nothing: Sequence[str] = ()) -> List[Any]:
    """Whole numbers, numbers or words, as all of them are; '', NaN and the like become None, true and false 1 and 0.

    Args:
        values: As a CSV has them.
        name: Of the column; those of ids, patients and lesions stay words.
        nothing: Further words, in small letters, that become None.
    """
    known = [None if value.lower() in (*NOTHING, *nothing) else value for value in values]
    if any(known) and {value.lower() for value in known if value} <= {'true', 'false'}:
        return [None if value is None else int(value.lower() == 'true') for value in known]
    words = (name.lower().endswith('_id') or looks_like_groups(name) or any('_' in value for value in known if value)
             or (plain(name) in CLASS_COLUMNS and any(CODE.match(value) for value in known if value)))
    for kind in () if words else (int, float):  # int('1_2') is 12
        try:
            numbers = [None if value is None else kind(value) for value in known]
        except ValueError:
            continue
        if kind is int and not all(number is None or -2 ** 63 <= number < 2 ** 63 for number in numbers):
            return known  # longer numbers are names
        if all(number is None or math.isfinite(number) for number in numbers):
            return numbers
    return known


def years_of(cell: Any) -> Optional[float]:
    """The age in a cell: as number, and '85+' is 85, '62,5' 62.5."""
    return number(cell.strip().removesuffix('+').replace(',', '.') if isinstance(cell, str) else cell)


def _word(text: Optional[str]) -> Optional[str]:
    return text.lower() if text and text.lower() not in ('unknown', 'nan') else None
