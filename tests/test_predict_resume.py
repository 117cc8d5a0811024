"""Predictions that were stopped, by a signal, a full disk or an error, and go on: no row is lost, none comes twice."""
import json
import os
import re
import resource
import signal
import time
from functools import partial

import numpy as np
import pytest
from forked import Forked
from in_process import run_here
from predict_program import rows, run, values

from timm_arl.files import write_json
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.prediction_files import NOT_BEGUN

PICTURES = ['p', '--crops', 'center']
predict = partial(Forked, 'timm_arl.predict')


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """80 pictures, two of them bad, and what an uninterrupted run finds in them."""
    folder = tmp_path_factory.mktemp('many')
    rng = np.random.default_rng(2)
    drawn = [draw_lesion(diagnosis, rng, 140) for diagnosis in ('melanoma', 'nevus', 'seborrheic_keratosis')]
    (folder / 'p').mkdir()
    for k in range(80):
        drawn[k % 3].rotate(k).save(folder / 'p' / f'{k:03d},\n.jpg')
    for k in (7, 65):
        (folder / 'p' / f'{k:03d},\n.jpg').write_text('bad')
    done = run_here('timm_arl.predict', *PICTURES, '--output-dir', folder / 'whole', '--workers', 0, cwd=folder)
    assert done.returncode == 1, done.stderr
    return folder, rows(folder / 'whole')


def same(found, expected):
    """The same rows; a network's last digits depend on which images share a batch."""
    assert [row['image'] for row in found] == [row['image'] for row in expected]
    assert [row['error'] for row in found] == [row['error'] for row in expected]
    good = [k for k, row in enumerate(expected) if not row['error']]
    assert np.allclose(values(found[k] for k in good), values(expected[k] for k in good), atol=1e-6)


def wait_for_rows(program, out, enough):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and program.returncode is None:
        written = sum(path.read_bytes().count(b'jpg"') for path in (
            *out.glob('predictions.csv'), *out.glob('parts/*')) if path.exists())
        if written >= enough:
            break
        time.sleep(0.01)


def kill_when(program, out, enough):
    """SIGKILL for all processes of a run once so many rows are there."""
    wait_for_rows(program, out, enough)
    program.kill()
    assert {process.exitcode for process in program.processes} == {-signal.SIGKILL}, (
        'the run was over before it could be killed')


@pytest.mark.slow
def test_killed_and_resumed(many, call, tmp_path):
    folder, expected = many
    args = [*PICTURES, '--output-dir', tmp_path / 'out', '--batch-size', 2]
    for enough in (10, 30):
        kill_when(predict(*args, *['--resume'] * (enough > 10), cwd=folder), tmp_path / 'out', enough)
        with open(tmp_path / 'out' / 'predictions.csv', 'ab') as file:
            file.write(b'"p/999,\n.jp')  # as a full disk leaves it
    done = call('timm_arl.predict', *args, '--resume', '--workers', 0, cwd=folder)
    assert done.returncode == 1 and '2 of 80 images could not be read' in done.stderr
    assert 30 <= int(re.search(r'(\d+) of 80 images were done before', done.stdout).group(1)) < 80
    same(rows(tmp_path / 'out'), expected)
    assert sorted(os.listdir(tmp_path / 'out')) == ['predictions.csv', 'predictions.json']


@pytest.mark.slow
def test_a_full_disk(many, call, tmp_path):
    """No file may grow beyond 3000 bytes: it stops in the middle of a row, and goes on when there is room."""
    folder, expected = many
    args = [*PICTURES, '--output-dir', tmp_path / 'out', '--workers', 0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        done = call('timm_arl.predict', *args, cwd=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and 'error: File too large. ' in done.stderr and '--resume goes on' in done.stderr
    assert (tmp_path / 'out' / 'predictions.csv').stat().st_size == 3000
    assert call('timm_arl.predict', *args, '--resume', cwd=folder).returncode == 1
    same(rows(tmp_path / 'out'), expected)


@pytest.mark.slow
def test_several_processes_killed_and_resumed(many, tmp_path):
    """Two processes, killed; three, from elsewhere, which relative names do not notice; joined in order."""
    folder, expected = many
    args = [*PICTURES, '--output-dir', tmp_path / 'out', '--batch-size', 2]
    kill_when(predict(*args, processes=2, cwd=folder), tmp_path / 'out', 20)
    assert len(list((tmp_path / 'out' / 'parts').iterdir())) == 2
    done = predict(*args, '--resume', processes=3, cwd=tmp_path).wait()
    assert '2 of 80 images could not be read' in done.stderr, done.stderr
    assert done.stdout.count('Written:') == 1
    same(rows(tmp_path / 'out'), expected)
    assert sorted(os.listdir(tmp_path / 'out')) == ['predictions.csv', 'predictions.json']


@pytest.mark.slow
def test_all_of_several_processes_stop_at_an_error(tmp_path):
    (tmp_path / 'predictions.csv').write_text('precious')
    done = run('.', '--output-dir', tmp_path, processes=2, cwd=tmp_path)
    assert done.returncode and done.stderr.count('is not from a run') == 1


@pytest.mark.slow
def test_interrupted(many, tmp_path):
    program = predict(*PICTURES, '--output-dir', tmp_path / 'out', '--batch-size', 1, cwd=many[0])
    wait_for_rows(program, tmp_path / 'out', 5)
    os.kill(program.processes[0].pid, signal.SIGINT)
    stderr = program.wait(60).stderr
    assert program.returncode == 130 and '--resume goes on' in stderr and 'Traceback' not in stderr, stderr


@pytest.mark.slow
def test_killed_before_its_first_row(many, call, tmp_path):
    """At the one moment when the run is recorded, and the file of its rows is not there."""
    folder, expected = many
    args = [*PICTURES, '--output-dir', tmp_path / 'late', '--batch-size', 2]
    kill_when(predict(*args, cwd=folder), tmp_path / 'late', 1)
    record = json.loads((tmp_path / 'late' / 'predictions.json').read_text())
    assert record['settings'] == json.loads((folder / 'whole' / 'predictions.json').read_text())['settings']
    (tmp_path / 'late' / 'predictions.csv').unlink()
    write_json(tmp_path / 'late' / 'predictions.json', {**record, NOT_BEGUN: True})
    done = call('timm_arl.predict', *args, '--resume', '--workers', 0, cwd=folder)
    assert done.returncode == 1, done.stderr
    same(rows(tmp_path / 'late'), expected)
    assert NOT_BEGUN not in json.loads((tmp_path / 'late' / 'predictions.json').read_text())
