"""Which images: files, folders, patterns and lists become one list on the disk, in order, however many they are."""
import codecs
import contextlib
import glob
import heapq
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence, Set, Tuple

from .files import replacing
from .isic.dicom import SUFFIXES as DICOM_SUFFIXES
from .isic.dicom import is_dicom

__all__ = ['OVERLAYS', 'RECORD', 'SUFFIXES', 'InputError', 'OwnImages', 'standard_input', 'write_image_list']

# HEIC too, which Pillow alone does not read: better a row with the reason than a photograph that is left out
SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.jp2', '.j2k', '.jpx',
            '.ppm', '.pgm', '.tga', '.avif', '.heic', '.heif', *DICOM_SUFFIXES)
NO_PICTURES = ('_superpixels.png', '_segmentation.png')  # which the challenge's zips hold beside the images
RECORD, OVERLAYS = 'predictions.json', 'overlays'  # a file in an output folder, and a folder beside it
AT_ONCE = 50_000  # names that are sorted in memory
LONGEST_STEM = 200  # bytes; file systems allow 255 for a name
LONGEST_LINE = 32_767  # characters, above the longest path of any system


class InputError(ValueError):
    """What was asked for cannot be done; the message says why and what to do."""


def standard_input() -> Iterator[str]:
    """Lines of standard input, decoded as names of files are."""
    with open(0, encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors(), closefd=False) as file:
        yield from file


def write_image_list(
        path: Path,
        arguments: Sequence[str],
        lines: Iterable[str],
        leave_out: Path,
        pictures: bool = False,
) -> int:
    """Write the list; it appears complete or not at all.

    Args:
        path: File to write: a line for each image, in JSON: its name and the stem of its picture.
        arguments: Files, folders (with all below them), patterns of files, and - for `lines`.
            A folder that a pattern finds under several names, by links, counts once.
        lines: A file, folder or pattern on each line. One that does not exist is listed, and fails when it is read.
        leave_out: A folder that is not looked into: where the output goes.
        pictures: Whether each image gets a picture: then no two have the same stem, whatever the capitals.

    Returns:
        Number of images.

    Raises:
        InputError: An argument that does not exist or gives no image, a folder that cannot be read or is `leave_out`,
            or lines that are not names.
    """
    output, count = os.path.realpath(leave_out), 0
    taken: Set[int] = set()
    with replacing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
        for argument in arguments:
            before = count
            names = (itertools.chain.from_iterable(_images(line, output) for line in _lines(lines)) if argument == '-'
                     else _images(argument, output, must_exist=True))
            for name in names:
                file.write(json.dumps([name, _own_stem(name, count, taken) if pictures else '']) + '\n')
                count += 1
            if count == before:
                raise InputError(
                    'The list on standard input is empty.' if argument == '-' else
                    f'{argument} holds no images: it is searched, with all folders below it, for names that end in '
                    f'{", ".join(SUFFIXES)} (evaluate_isic.py reads images in Parquet files).'
                    if os.path.isdir(argument) else f'No file matches {argument}.')
    return count


def _lines(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        line = line.removeprefix('\ufeff').rstrip('\r\n')
        if '\0' in line:
            if os.fsencode(line).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError('The list on standard input is in UTF-16: save the list as UTF-8.')
            raise InputError('The names on standard input are separated by NUL: give one on each line (find -print, '
                             'not -print0).')
        if len(line) > LONGEST_LINE:
            raise InputError(f'A line on standard input has {len(line)} characters: give one name on each line.')
        if line.strip():
            yield line


def _images(argument: str, leave_out: str, must_exist: bool = False) -> Iterator[str]:
    """The images that one argument names."""
    if os.path.isdir(argument):
        if os.path.realpath(argument) == leave_out:
            raise InputError(f'{argument} is also the output folder, which is not searched for images: choose another '
                             f'--output-dir.')
        yield from _below(argument, leave_out)
    elif os.path.lexists(argument) or not glob.has_magic(argument) and not must_exist:
        yield argument
    elif glob.has_magic(argument):
        found = False
        folders: Dict[str, Tuple[bool, int, str]] = {}  # by where each is: the name that is taken, of several by links
        places: Dict[str, str] = {}  # where each folder is
        for name in _sorted(_noted(glob.iglob(argument, recursive=True), folders, places)):
            folder = os.path.dirname(name)
            if folders[places[folder]][-1] == folder and not os.path.isdir(name):
                found = True
                yield name
        if not found and not must_exist:
            yield argument
    else:
        raise InputError(f'No file or folder {argument or "with an empty name"}: give the path of an image, or of a '
                         f'folder of images.')


def _noted(names: Iterable[str], folders: Dict[str, Tuple[bool, int, str]], places: Dict[str, str]) -> Iterator[str]:
    """The names, while their folders are noted: of a folder with several names one without links, or the shortest."""
    for name in names:
        folder = os.path.dirname(name)
        if folder not in places:
            place = places[folder] = os.path.realpath(folder)
            called = os.path.abspath(folder) != place, len(folder), folder
            folders[place] = min(called, folders.get(place, called))
        yield name


def _below(folder: str, leave_out: str) -> Iterator[str]:
    """Images of a folder and of those below it, but hidden ones, links to folders and what an earlier run has drawn."""
    opened = [_entries(folder)]  # this folder, the one below it that is being read, and so on
    while opened:
        path = next(opened[-1], None)
        if path is None:
            opened.pop()
        elif not path.endswith('/'):
            yield path
        elif os.path.realpath(path) != leave_out:
            opened.append(_entries(path[:-1]))


def _entries(folder: str) -> Iterator[str]:
    """Images and, with / at the end, folders of a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            kept = (entry.name + '/' * entry.is_dir(follow_symlinks=False) for entry in entries
                    if not entry.name.startswith('.') and (
                        not _is_drawn(entry) if entry.is_dir(follow_symlinks=False) else _is_image(entry)))
            names = _sorted(kept)
            first = next(names, None)  # the folder is read before it is left
    except OSError as error:
        raise InputError(f'The folder {folder} cannot be read: {error.strerror}.') from error
    return (os.path.join(folder, name) for name in itertools.chain([] if first is None else [first], names))


def _is_drawn(entry: os.DirEntry) -> bool:
    """Whether a folder holds the overlays of an earlier run."""
    return entry.name == OVERLAYS and os.path.exists(os.path.join(os.path.dirname(entry.path), RECORD))


def _is_image(entry: os.DirEntry) -> bool:
    name = entry.name.lower()
    if name == 'dicomdir':  # an index of the DICOM files beside it, and DICOM itself
        return False
    if name.endswith(SUFFIXES):
        return not name.endswith(NO_PICTURES)
    ending = os.path.splitext(name)[1][1:]
    if ending and not ending.isdigit():  # scanners name DICOM files IM0001, or by numbers with dots
        return False
    with contextlib.suppress(OSError):
        return entry.is_file() and is_dicom(entry.path)
    return False


def _sorted(names: Iterable[str]) -> Iterator[str]:
    """Names in the order of their characters, sorted on the disk: a folder can hold a million."""
    names = iter(names)
    with contextlib.ExitStack() as stack:
        runs: List[Iterable[str]] = []
        while chunk := sorted(itertools.islice(names, AT_ONCE)):
            if len(chunk) < AT_ONCE:  # the last, which can stay in memory
                runs.append(chunk)
                break
            file = stack.enter_context(tempfile.TemporaryFile('w+', encoding='ascii'))
            file.writelines(json.dumps(name) + '\n' for name in chunk)
            file.seek(0)
            runs.append(map(json.loads, file))
        yield from heapq.merge(*runs)


def _own_stem(name: str, row: int, taken: Set[int]) -> str:
    """Stem of an image's picture, followed by the number of its row where an image before it has the same."""
    usual = os.fsencode(Path(name).stem)[:LONGEST_STEM].decode(errors='ignore') or 'image'
    stem = usual
    while hash(stem.casefold()) in taken:
        stem = f'{stem}-{row}'
    taken.add(hash(stem.casefold()))
    return stem


class OwnImages:
    """The images of one of several processes, read from the list as they are needed: a sampler for a DataLoader."""

    def __init__(self, path: Path, count: int, start: int = 0, step: int = 1) -> None:
        """
        Args:
            path: The list.
            count: Number of images in it.
            start: The first of this process.
            step: From each to the next: number of processes.
        """
        self.path, self.which = path, range(start, count, step)

    def __len__(self) -> int:
        return len(self.which)

    def __iter__(self) -> Iterator[Tuple[str, str]]:
        with self.path.open(encoding='utf-8') as file:
            for line in itertools.islice(file, self.which.start, None, self.which.step):
                name, stem = json.loads(line)
                yield name, stem


