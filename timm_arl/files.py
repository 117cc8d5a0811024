"""Files and folders that appear whole or not at all: written under another name, then renamed; and locks on them."""
import contextlib
import csv
import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence, Union

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    'alone_in', 'check_writable', 'delimiter_of', 'git_commit', 'hold', 'locked', 'make_folder', 'parts_of',
    'read_rows', 'recover_folder', 'replacing', 'replacing_folder', 'same_place', 'swap_folder', 'write_json',
    'write_rows',
]

PathLike = Union[str, Path]


@contextlib.contextmanager
def replacing(path: PathLike, durable: bool = False) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; rename it to `path` on success, remove it on an exception.

    Args:
        path: The file.
        durable: Whether its content must be on the disk, in case of a power failure, when this returns.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise IsADirectoryError(f'{path} is a folder: name a file in it.')
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')  # another process may write the same file
    if not path.parent.is_dir():
        raise FileNotFoundError(f'No folder {path.parent} for {path.name}: make it first.')
    try:
        yield temporary
        if durable:
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, content: Dict[str, Any]) -> None:
    """Write standard JSON (NaN is refused: a score that is undefined is None)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def write_rows(path: PathLike, rows: Sequence[Dict[str, Any]], columns: Optional[Sequence[str]] = None) -> None:
    """Write a CSV with a header, from the first row's keys unless columns are given.

    Bytes of file names that are not UTF-8 are written as ``\\udcNN``.
    """
    with replacing(path) as temporary, temporary.open(
            'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def delimiter_of(text: str) -> str:
    """What divides the values of a table: comma, semicolon or tab, whichever its first line has most of."""
    head = next((line for line in text.split('\n') if line.strip(',;\t\r ')), '')
    return max(',;\t', key=head.count)


def read_rows(path: PathLike) -> List[Dict[str, str]]:
    """Rows of a CSV by its header, with commas, semicolons or tabs; a byte order mark and CRLF do not matter.

    Raises:
        OSError: No such file, or one that cannot be read.
        ValueError: Not UTF-8, or not CSV.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            text = file.read()
        head = text.partition('\n')[0]  # where it has a comma, others are in the name of a label
        delimiter = ',' if ',' in head else delimiter_of(text)
        return list(csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def alone_in(folder: PathLike) -> Iterator[None]:
    """Wait until no other process is here with the same folder, so that what one reads and writes again is not lost.

    Nothing is waited for on Windows, and on a file system without locks.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[Optional[IO]]:
    """Hold a lock file that other processes started for the same folder respect, and what is started with it holds too.

    Nobody is waited for on Windows, and on a file system without locks.

    Args:
        path: The file, which stays.
        wait: Whether to wait where another process holds it; if not, None is given.
    """
    with open(path, 'w') as file:
        held = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                held = False
            except OSError:  # a disk without locks
                pass
        yield file if held else None


def hold(path: Path, shared: bool = False) -> Optional[IO]:
    """Hold a lock file until it is closed or this process ends; processes that are forked do not hold it.

    Args:
        path: The file. Whoever holds it may remove it.
        shared: Another process of the same work holds it already.

    Returns:
        The open file, or None on Windows and on a file system without locks.

    Raises:
        BlockingIOError: Another work's process holds it.
    """
    while fcntl is not None:
        file = path.open('ab+')
        try:
            if not shared:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else is there, and from now on
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # only those of this work
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # another has removed it between the two: the next one locks a new file
        except OSError as error:
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a disk without locks
                path.unlink(missing_ok=True)
                return None
            raise BlockingIOError(error.errno, f'{path} is held by another process') from None
        file.close()
    return None


def make_folder(path: PathLike) -> Path:
    """Make a folder and those above it.

    Raises:
        OSError: It cannot be made; the message is one sentence.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'Cannot make the folder {path}: {error.strerror}.') from error
    return path


def same_place(name: str, other: Optional[str]) -> bool:
    """Whether two names of data are equal, or paths to one place."""
    return name == other or bool(name and other) and os.path.realpath(name) == os.path.realpath(str(other))


def check_writable(path: PathLike) -> None:
    """Make the folder of a file that is written later, and refuse one that could not be.

    Raises:
        OSError: The folder cannot be made or written to, or the path is that of a folder; one sentence.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise IsADirectoryError(f'{path} is a folder: name a file in it.')
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f'{path.parent} cannot be written to: choose another folder.')


def recover_folder(path: PathLike) -> None:
    """Undo what a killed :func:`swap_folder` left: the folder is there again, and nothing else of it."""
    path = Path(path)
    previous = _previous(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def swap_folder(new: Path, path: PathLike) -> None:
    """Let a finished folder take the place of `path`; killed at any moment, one of the two is there, intact."""
    path = Path(path)
    previous = _previous(path)
    try:
        if path.exists():
            path.rename(previous)
        new.rename(path)
    except BaseException:  # Ctrl-C too
        recover_folder(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(f'.{path.name}.previous')


@contextlib.contextmanager
def replacing_folder(path: PathLike) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill; it takes the place of `path` on success, and goes on an exception."""
    path = Path(path).resolve()  # what a link names is replaced, not the link
    make_folder(path.parent)
    recover_folder(path)
    new = path.with_name(f'.{path.name}.new')
    shutil.rmtree(new, ignore_errors=True)  # of one that was killed
    new.mkdir()
    try:
        yield new
        swap_folder(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def git_commit(path: PathLike) -> Optional[str]:
    """The commit of the checkout that holds `path`, marked ``-dirty`` when it was changed; None outside a checkout."""
    try:
        done = subprocess.run(
            ['git', '-C', str(Path(path).parent), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def parts_of(record: Dict[str, Any], key: str) -> str:
    """The commits or kernels that made a run, by its run.json: several where it was resumed after an update.

    Args:
        record: Content of run.json.
        key: 'commit' or 'kernels'.
    """
    return ' '.join(dict.fromkeys(filter(None, (part.get(key) for part in (record, *record.get('resumed', ()))))))
