"""How columns are called: what people and the challenges write, and what it is called here."""
import re
import unicodedata
from typing import Iterable, Optional, Sequence

from ..task import TASKS, DataError, Task
from .options import NO_GROUPS, Wanted

__all__ = [
    'ABOUT', 'CLASS_COLUMNS', 'COLUMNS', 'IMAGE_COLUMNS', 'LESION', 'NOT_KEPT', 'PATIENT', 'TEXT', 'column_named',
    'looks_like_groups', 'plain', 'same_letters', 'with_known_names',
]

TEXT = ('string', 'large_string')  # types of columns of words
PATIENT, LESION = 'patient_id', 'lesion_id'  # a patient may have several lesions
CLASS_COLUMNS = ('diagnosis', 'dx', 'label', 'class', 'target', 'diagnostic', 'category')
IMAGE_COLUMNS = (
    'image', 'image_path', 'path', 'file_name', 'filename', 'filepath', 'file', 'img', 'image_name', 'img_id',
    'image_id', 'isic_id')
COLUMNS = (
    'image', 'image_id', 'diagnosis', 'split', PATIENT, LESION, 'age_approximate', 'sex', 'site', 'skin_type', 'mask',
    'aspect_ratio')
ABOUT = {  # columns of the challenges' tables
    'image': 'image_id', 'image_name': 'image_id', 'isic_id': 'image_id', 'patient': PATIENT,
    'age': 'age_approximate', 'age_approx': 'age_approximate',
    'anatom_site_general': 'site', 'anatom_site_general_challenge': 'site',
    'localization': 'site', 'target': 'malignant'}
NOT_KEPT = {  # of these tables, which tell nothing of a lesion, or the class in other words
    'score_weight', 'validation_weight', 'copyright_license', 'attribution', 'benign_malignant'}
GROUP_WORDS = {'patient', 'patients', 'lesion', 'lesions', 'case', 'cases', 'subject', 'subjects'}
NOT_OF_GROUPS = {  # words of columns that tell something else of a patient or lesion
    'age', 'area', 'class', 'count', 'date', 'diagnosis', 'diameter', 'gender', 'height', 'location', 'sex', 'site',
    'size', 'status', 'type', 'width', 'year', 'years'}


def same_letters(word: str) -> str:
    """A word without regard to case, or to how a system composes accents."""
    return unicodedata.normalize('NFC', word).casefold()


def plain(name: str) -> str:
    """The name without regard to case, spaces, underscores and the like."""
    return re.sub(r'[\W_]+', '', same_letters(name))


def column_named(columns: Iterable[str], name: str) -> str:
    """The column that a name means: of this name, of one that differs in case, spaces or underscores alone, or of
    another name for the same, as 'age' for age_approximate and 'patient' for patient_id. '' for none, or for several.
    """
    columns = list(columns)
    for key in (str, plain, _meaning):
        found = [column for column in columns if key(column) == key(name)]
        if found:
            return found[0] if len(found) == 1 else ''
    return ''


def _meaning(name: str) -> str:
    return plain(ABOUT.get(name.lower(), name)).removesuffix('id')


def looks_like_groups(column: str) -> bool:
    """Whether a column is called as one of patients or lesions may be: 'Patient', 'ID_case', 'studySubject'."""
    words = {word.lower() for word in re.findall(r'[A-Z]?[a-z]+|[A-Z]+', column)}
    return bool(words & GROUP_WORDS) and not words & NOT_OF_GROUPS


def with_known_names(wanted: Wanted, tasks: Sequence[Optional[Task]] = ()) -> Wanted:
    """What the user says, with --columns of the names that are known here: 'age' becomes age_approximate.

    Args:
        wanted: It.
        tasks: Further ones whose labels may be named.

    Raises:
        DataError: A name that nothing here is called.
    """
    labels = [label for task in (*TASKS.values(), *tasks) if task
              for label in (*task.labels, task.rest, task.column) if label]
    other = [*CLASS_COLUMNS, *labels, *wanted.labels, *[wanted.group or ''] * (wanted.group != NO_GROUPS)]
    pairs = []
    for name, column in wanted.columns:
        known = name if name in other else column_named(COLUMNS, name)
        if not known:
            raise DataError(f'--columns {name}={column}: {name} is not one of {", ".join(COLUMNS)}, nor a label.')
        pairs.append((known, column))
    return wanted._replace(columns=tuple(pairs))
