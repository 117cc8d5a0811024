"""Rows on the disk: whole, in order, each once, whatever killed the process that wrote them."""
import contextlib
import csv
import errno
import json
import multiprocessing
import os
import random
import time
import tracemalloc

import pyarrow.parquet
import pytest

from timm_arl.image_list import InputError
from timm_arl.prediction_files import PredictionFiles

LABELS = ('melanoma', 'seborrheic_keratosis')
NAMES = [
    'plain.jpg', 'a,b.jpg', 'a\nb.jpg', '"quo"te".jpg', 'æøå 皮膚.jpg', os.fsdecode(b'\xff.jpg'), '\\udcff.jpg',
    ' \r.jpg']


def row(k, name=None):
    name = name or NAMES[k % len(NAMES)]
    if k % 5 == 3:
        return {'image': name, 'error': 'it says "no", and, why'}
    return {'image': name, 'error': '', **dict.fromkeys(LABELS, k / 1000 + 1e-9),
            'melanoma_decision': k % 2 == 1, 'seborrheic_keratosis_decision': False}


def begin(folder, form='csv'):
    folder.mkdir(exist_ok=True)
    files = PredictionFiles(folder, form, LABELS)
    files.start({'settings': {}, 'images': 0, 'folder': '.', 'complete': False})
    return files


def write(files, rows, rank=0, processes=1, first=0):
    with files.writer(rank, processes, first) as writer:
        for k in range(0, len(rows), 3):
            writer.append(rows[k:k + 3])


@pytest.fixture(params=['csv', 'jsonl'])
def form(request):
    return request.param


def content(files):
    return files.rows.read_bytes()


@pytest.fixture
def whole(tmp_path, form):
    """The file of 40 rows that one process wrote without interruption."""
    files = begin(tmp_path / 'whole', form)
    write(files, [row(k) for k in range(40)])
    assert files.join() == 40
    return content(files)


def test_what_others_read(tmp_path):
    files = begin(tmp_path)
    write(files, [row(k) for k in range(8)])
    with files.path.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['image', *LABELS, 'melanoma_decision', 'seborrheic_keratosis_decision', 'error']
    assert [r['image'] for r in rows] == [n.encode('utf-8', 'backslashreplace').decode() for n in NAMES]
    assert rows[1] == {'image': 'a,b.jpg', 'melanoma': '0.001000001', 'seborrheic_keratosis': '0.001000001',
                       'melanoma_decision': '1', 'seborrheic_keratosis_decision': '0', 'error': ''}
    assert rows[3]['error'] == 'it says "no", and, why' and rows[3]['melanoma'] == '' == rows[3]['melanoma_decision']


def test_exclusive_classes_have_a_most_probable_one(tmp_path):
    files = PredictionFiles(tmp_path, 'csv', LABELS, exclusive=True)
    files.start({'settings': {}, 'images': 0, 'folder': '.', 'complete': False})
    write(files, [{**row(0), 'most_probable': 'melanoma'}, row(3)])
    with files.path.open(newline='', encoding='utf-8') as file:
        assert next(file).rstrip() == ('image,melanoma,seborrheic_keratosis,most_probable,melanoma_decision,'
                                       'seborrheic_keratosis_decision,error')
    found = [each['most_probable'] for each in files.read()]
    assert found == ['melanoma', None]


def test_json_lines_and_parquet(tmp_path):
    lines = begin(tmp_path / 'j', 'jsonl')
    write(lines, [row(k) for k in range(8)])
    rows = [json.loads(line) for line in lines.path.read_text(encoding='utf-8').splitlines()]
    assert [r['image'] for r in rows] == NAMES  # reversible, surrogates too
    assert rows[1]['melanoma'] == 0.001000001 and rows[1]['melanoma_decision'] is True and not rows[1]['error']
    assert rows[3]['melanoma'] is None and rows[3]['melanoma_decision'] is None
    files = begin(tmp_path / 'p', 'parquet')
    write(files, [row(k) for k in range(2500)])
    files.join()
    files.finish({'complete': True})
    assert sorted(os.listdir(tmp_path / 'p')) == ['predictions.json', 'predictions.parquet']
    table = pyarrow.parquet.read_table(files.path)
    assert table.num_rows == 2500 and table.column_names == list(files.columns)
    assert str(table.schema.field('melanoma').type) == 'double' and str(table.schema.field('error').type) == 'string'
    assert table.slice(1, 1).to_pylist() == [rows[1]] and table.slice(3, 1).to_pylist() == [rows[3]]


def test_rows_read_back(tmp_path, form):
    files = begin(tmp_path, form)
    write(files, [row(k) for k in range(8)])
    found = list(files.read())
    assert found[1]['melanoma'] == 0.001000001 and found[1]['melanoma_decision'] is True
    assert found[3]['melanoma'] is None and found[3]['error'].startswith('it says') and not found[1]['error']


def test_torn_at_any_byte(tmp_path, form, whole):
    """Cut anywhere, the rows that are whole are kept, and the rest can be added."""
    files = begin(tmp_path / 'torn', form)
    header = len(content(files))
    for size in random.Random(0).sample(range(header, len(whole)), 60):
        for zeros in (0, 50):
            files.rows.write_bytes(whole[:size] + b'\0' * zeros)
            done = files.join()
            assert whole.startswith(content(files)) and len(content(files)) <= size
            write(files, [row(k) for k in range(done, 40)])
            assert content(files) == whole and files.join() == 40


def test_a_gap_that_a_power_failure_left(tmp_path, form, whole):
    """Later rows reached the disk, earlier ones did not: what follows the gap is written again."""
    files = begin(tmp_path / 'gap', form)
    middle = len(whole) // 2
    files.rows.write_bytes(whole[:middle] + b'\0' * 300 + whole[middle + 300:])
    done = files.join()
    assert 0 < done < 40 and whole.startswith(content(files))
    write(files, [row(k) for k in range(done, 40)])
    assert content(files) == whole


def test_a_header_that_a_power_failure_took(tmp_path):
    files = begin(tmp_path / 'gap', 'csv')
    files.rows.write_bytes(b'\0' * 20)
    with pytest.raises(InputError, match='is missing or empty, and the run cannot go on'):
        files.join()
    assert files.rows.read_bytes() == b'\0' * 20


def test_parts_are_joined_in_order(tmp_path, form, whole):
    files = begin(tmp_path / 'parts', form)
    for rank in range(3):
        write(files, [row(k) for k in range(rank, 40, 3)], rank, 3)
    assert files.join() == 40 and content(files) == whole and not files.parts.exists()


def test_parts_that_were_cut_off(tmp_path, form, whole):
    """Killed with some processes ahead of others, and torn rows; then other numbers of processes go on."""
    files = begin(tmp_path / 'parts', form)
    done, rng = 0, random.Random(1)
    for processes in (2, 3, 1, 4, 2, 1):
        for rank in range(processes):
            rows = [row(k) for k in range(done + rank, 40, processes)]
            rows = rows[:rng.randint(0, 5)]
            write(files, rows, rank, processes, done)
            if rows and rng.random() < 0.7:
                path = files.rows if processes == 1 else files._part(rank, processes, done)
                path.write_bytes(path.read_bytes()[:-rng.randint(1, 20)])
        done = files.join()
        assert whole.startswith(content(files)) and not files.parts.exists()
    write(files, [row(k) for k in range(done, 40)])
    assert content(files) == whole


def test_killed_while_parts_were_joined(tmp_path, form, whole):
    """Some of their rows are there already, the last of them torn: none is added twice."""
    files = begin(tmp_path / 'parts', form)
    write(files, [row(k) for k in range(7)])
    for rank in range(2):
        write(files, [row(k) for k in range(7 + rank, 40, 2)], rank, 2, 7)
    files.rows.write_bytes(whole[:len(whole) * 2 // 3])
    assert files.join() == 40 and content(files) == whole


fork = multiprocessing.get_context('fork')


def hold_until_killed(folder, shared, pipe):
    files = PredictionFiles(folder, 'csv', ())
    try:
        files.lock(shared=shared)
        pipe.send('held')
        pipe.poll(120)
    except ValueError as error:
        pipe.send(str(error))


def holder(folder, shared=False):
    """Another process that wants to hold a folder, and what it says."""
    here, there = fork.Pipe()
    process = fork.Process(target=hold_until_killed, args=(folder, shared, there), daemon=True)
    process.start()
    return process, here.recv()


def test_one_run_at_a_time(tmp_path):
    first, said = holder(tmp_path)
    assert said == 'held'
    assert holder(tmp_path)[1] == f'Another run is writing to {tmp_path}: let it finish, or end its processes.'
    mate, said = holder(tmp_path, shared=True)
    assert said == 'held'
    first.kill()
    first.join()
    assert holder(tmp_path)[1].startswith('Another run')  # an orphan of the killed run still writes
    mate.kill()
    mate.join()
    last, said = holder(tmp_path)
    assert said == 'held'
    last.kill()
    last.join()


@pytest.mark.parametrize('number, refused', [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOSYS, False),
                                             (errno.ENOLCK, False), (errno.EOPNOTSUPP, False)])
def test_a_disk_without_locks_is_not_another_run(tmp_path, monkeypatch, number, refused):
    """Some network disks have none; locks are simulated here, since this disk has them."""
    def lockf(*args):
        raise OSError(number, 'as such disks say it')
    monkeypatch.setattr('timm_arl.files.fcntl.lockf', lockf)
    with pytest.raises(InputError, match='Another run is writing') if refused else contextlib.nullcontext():
        PredictionFiles(tmp_path, 'csv', ()).lock()


def take_turns(folder):
    """Lock a folder and let go of it for a while: how often it worked."""
    turns, start = 0, time.monotonic()
    while time.monotonic() < start + (0.6 if turns else 60):
        files = PredictionFiles(folder, 'csv', ())
        with contextlib.suppress(InputError):
            files.lock()
            (folder / 'mine').mkdir()  # fails if another process is here
            (folder / 'mine').rmdir()
            files.unlock()
            turns += 1
    return turns


def test_runs_that_fail_at_the_same_moment_never_share_a_folder(tmp_path):
    """Each lets go of the folder and removes the file that is locked, while others are about to lock it."""
    with fork.Pool(3) as pool:
        assert min(pool.map(take_turns, [tmp_path] * 3, chunksize=1)) > 0


def test_folders_of_others(tmp_path):
    files = PredictionFiles(tmp_path, 'csv', LABELS)
    assert files.record() is None
    (tmp_path / 'predictions.jsonl').touch()
    with pytest.raises(InputError, match='predictions.jsonl is not from a run'):
        files.record()
    (tmp_path / 'predictions.jsonl').unlink()
    (tmp_path / 'overlays').mkdir()
    assert files.record() is None
    (tmp_path / 'overlays' / 'a.png').touch()
    with pytest.raises(InputError, match='overlays is not from a run'):
        files.record()
    for damaged in ('', '[]', '{"settings": 1}'):
        files.record_file.write_text(damaged)
        with pytest.raises(InputError, match='is damaged'):
            files.record()
    begun = begin(tmp_path)
    assert begun.record()['complete'] is False
    begun.rows.unlink()
    with pytest.raises(InputError, match='missing or empty'):
        begun.join()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for count in (2000, 20_000):
        files = begin(tmp_path / str(count), 'parquet')
        tracemalloc.start()
        for rank in range(2):
            with files.writer(rank, 2, 0) as writer:
                for k in range(rank, count, 2):
                    writer.append([row(k, 'a name.jpg')])
        assert files.join() == count and sum(1 for _ in files.read()) == count
        files.finish({})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000
