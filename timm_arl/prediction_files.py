"""Predictions on the disk: rows that are appended whole, joined in the order of the images, and never lost."""
import contextlib
import csv
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any, BinaryIO, Dict, Iterator, List, Optional, Sequence

from .files import hold, make_folder, replacing, write_json
from .image_list import OVERLAYS, RECORD, InputError

__all__ = ['FORMATS', 'MOST_PROBABLE', 'NOT_BEGUN', 'PredictionFiles', 'RowWriter']

FORMATS = ('csv', 'jsonl', 'parquet')
MOST_PROBABLE = 'most_probable'  # column of networks whose labels exclude each other
NOT_BEGUN = 'not_begun'  # in a record whose rows have no header yet
SYNC_SECONDS = 1.  # what a power failure may cost; a killed process costs nothing that was written
CHUNK = 1000  # rows that are held when a file is converted


class PredictionFiles:
    """The files of one run in its output folder.

    ``predictions.csv`` or ``predictions.jsonl`` grows while a single process predicts. Several processes write a part
    each, which are joined to it. A row that a kill or a power failure has torn is cut off before anything is added.
    For Parquet, ``predictions.jsonl`` is converted at the end.

    Attributes:
        path: Where the predictions are in the end.
        list: The list of images, until the run is complete.
        overlays: Folder of the pictures.
    """

    def __init__(self, folder: Path, form: str, labels: Sequence[str], exclusive: bool = False) -> None:
        """
        Args:
            folder: Output folder.
            form: One of FORMATS.
            labels: What is predicted.
            exclusive: Whether an image has one of them, so that rows say which is the most probable.
        """
        self.folder, self.form, self.labels = folder, form, tuple(labels)
        self.path = folder / f'predictions.{form}'
        self.rows = folder / f'predictions.{"csv" if form == "csv" else "jsonl"}'
        self.list, self.overlays = folder / 'predictions.list.jsonl', folder / OVERLAYS
        self.parts, self.record_file = folder / 'parts', folder / RECORD
        self._lock_file = folder / '.predictions.lock'
        self.decisions = tuple(f'{label}_decision' for label in labels)
        self.columns = ('image', *self.labels, *[MOST_PROBABLE] * exclusive, *self.decisions, 'error')
        self._lock: Optional[IO] = None

    def record(self) -> Optional[Dict[str, Any]]:
        """What is recorded of a run in this folder, or None where nothing of any run is there.

        Raises:
            InputError: Predictions or pictures without a record, or a record that cannot be read.
        """
        if not self.record_file.exists():
            theirs = [path for path in (*(self.folder / f'predictions.{form}' for form in FORMATS), self.parts)
                      if path.exists()]
            if theirs or self.overlays.is_dir() and any(self.overlays.iterdir()):
                raise InputError(f'{theirs[0] if theirs else self.overlays} is not from a run that is recorded in '
                                 f'{self.record_file.name}: choose another --output-dir.')
            return None
        try:
            record = json.loads(self.record_file.read_text(encoding='utf-8'))
            if {'settings', 'images', 'folder', 'complete'} <= record.keys():
                return record
        except (AttributeError, ValueError):
            pass
        raise InputError(f'{self.record_file} is damaged: choose another --output-dir.')

    def lock(self, shared: bool = False) -> None:
        """Hold the folder until this process ends, so that no other run writes to it. Not on a disk without locks.

        Args:
            shared: Another process of this run has called this before.

        Raises:
            InputError: Another run holds it.
        """
        try:
            self._lock = hold(self._lock_file, shared)
        except BlockingIOError:
            raise InputError(
                f'Another run is writing to {self.folder}: let it finish, or end its processes.') from None

    def unlock(self) -> None:
        """Let go of the folder, before anything was written."""
        self._lock_file.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        if self._lock:
            self._lock.close()

    def start(self, record: Dict[str, Any]) -> None:
        """Record a new run, and begin its rows."""
        write_json(self.record_file, {**record, NOT_BEGUN: True})
        with replacing(self.rows) as temporary:
            temporary.write_bytes(self.header())
        write_json(self.record_file, record)

    def join(self) -> int:
        """Cut off what is torn, and add the parts as far as no row is missing between them.

        Returns:
            How many rows there are now: those of the first images, each once.

        Raises:
            InputError: The file of the rows is gone.
        """
        gone = f'{self.rows} is missing or empty, and the run cannot go on: choose another --output-dir.'
        if not self.rows.exists():
            raise InputError(gone)
        count = 0
        with self.rows.open('rb+') as file:
            size = 0
            for record in self._whole(file):
                size, count = size + len(record), count + 1
            if self.form == 'csv' and not count:  # not even its header
                raise InputError(gone)
            file.truncate(size)
            file.seek(size)
            if self.form == 'csv':
                count -= 1  # its header
            for record in self._parts_from(count):
                file.write(record)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.parts, ignore_errors=True)
        return count

    def _parts_from(self, row: int) -> Iterator[bytes]:
        """Rows of the parts from a row on, in order, until one is missing."""
        names = [path.stem.split('-') for path in self.parts.glob('*-of-*-from-*')]
        if not names:
            return
        processes, first = (int(names[0][k]) for k in (2, 4))
        with contextlib.ExitStack() as stack:
            parts: List[Iterator[bytes]] = [iter(()) for _ in range(processes)]
            for rank in range(processes):
                path = self._part(rank, processes, first)
                if path.exists():
                    parts[rank] = self._whole(stack.enter_context(path.open('rb')))
            for k in range(first, 1 << 62):
                record = next(parts[(k - first) % processes], None)
                if record is None:
                    return
                if k >= row:
                    yield record

    def _part(self, rank: int, processes: int, first: int) -> Path:
        return self.parts / f'{rank}-of-{processes}-from-{first}{self.rows.suffix}'

    def _whole(self, file: BinaryIO) -> Iterator[bytes]:
        """The whole records of a file; a name may hold line breaks, inside quotes."""
        record, quoted = b'', False
        for line in file:
            if b'\0' in line:  # as a power failure leaves what was not yet on the disk
                return
            record += line
            quoted ^= self.form == 'csv' and line.count(b'"') % 2 == 1
            if line.endswith(b'\n') and not quoted:
                yield record
                record = b''

    def writer(self, rank: int, processes: int, first: int) -> 'RowWriter':
        """For the rows of one process.

        Args:
            rank: Which process.
            processes: How many there are.
            first: Row at which they begin.
        """
        if processes == 1:
            return RowWriter(self.rows, self)
        make_folder(self.parts)
        return RowWriter(self._part(rank, processes, first), self)

    def header(self) -> bytes:
        """What the file of rows begins with."""
        return _csv_line(self.columns) if self.form == 'csv' else b''

    def encode(self, row: Dict[str, Any]) -> bytes:
        """A row as bytes.

        Args:
            row: image, and either error or, for each label, a probability and a decision (and the most probable).
        """
        cells = {column: row.get(column) for column in self.columns}
        cells.update((label, float(f'{cells[label]:.9g}')) for label in self.labels if cells[label] is not None)
        if self.form != 'csv':
            return (json.dumps(cells, ensure_ascii=False) + '\n').encode('utf-8', 'backslashreplace')
        return _csv_line([int(value) if isinstance(value, bool) else
                          f'{value:.9g}' if isinstance(value, float) else value for value in cells.values()])

    def read(self) -> Iterator[Dict[str, Any]]:
        """The rows, as dicts of the columns; None where a cell is empty."""
        with self.rows.open(newline='', encoding='utf-8') as file:
            if self.form != 'csv':
                yield from map(json.loads, file)
                return
            for row in csv.DictReader(file):
                yield {key: None if value == '' else float(value) if key in self.labels else
                       value == '1' if key in self.decisions else value for key, value in row.items()}

    def finish(self, record: Dict[str, Any]) -> None:
        """Convert to Parquet if that is the format, and record that the run is complete."""
        if self.form == 'parquet' and self.rows.exists():
            self._to_parquet()
        write_json(self.record_file, record)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a complete run needs no more."""
        for path in (self.list, self._lock_file, *[self.rows] * (self.rows != self.path)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _to_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        kinds = {**dict.fromkeys(self.labels, pyarrow.float64()), **dict.fromkeys(self.decisions, pyarrow.bool_())}
        schema = pyarrow.schema([(column, kinds.get(column, pyarrow.string())) for column in self.columns])
        with (replacing(self.path, durable=True) as temporary,
              pyarrow.parquet.ParquetWriter(temporary, schema) as writer):
            rows: List[Dict[str, Any]] = []
            for row in self.read():
                # a name that is not UTF-8, as the other formats show it
                rows.append({**row, 'image': row['image'].encode('utf-8', 'backslashreplace').decode()})
                if len(rows) == CHUNK:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


class RowWriter:
    """Appends whole rows to a file."""

    def __init__(self, path: Path, files: PredictionFiles) -> None:
        """
        Args:
            path: The file.
            files: Of the run.
        """
        self.file, self.files, self.synced = path.open('ab', buffering=0), files, time.monotonic()

    def __enter__(self) -> 'RowWriter':
        return self

    def __exit__(self, *exception: Any) -> None:
        with self.file:
            os.fsync(self.file.fileno())

    def append(self, rows: Sequence[Dict[str, Any]]) -> None:
        """Hand rows to the system, which keeps them if this process is killed, and once a second to the disk."""
        data = memoryview(b''.join(map(self.files.encode, rows)))
        while data:
            data = data[self.file.write(data):]
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()


def _csv_line(cells: Sequence[Any]) -> bytes:
    buffer = io.StringIO(newline='')
    csv.writer(buffer, lineterminator='\r\n').writerow(cells)  # of which both are quoted in a cell
    return (buffer.getvalue()[:-2] + '\n').encode('utf-8', 'backslashreplace')


