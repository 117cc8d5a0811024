"""The output folder of a run."""
import subprocess
import sys
from types import SimpleNamespace

import pytest

from timm_arl.files import read_rows
from timm_arl.training import runs
from timm_arl.training.arguments import RunError
from timm_arl.training.runs import FolderTaken, discard_start, hold_folder, record_look, release_folders


@pytest.fixture
def out(tmp_path):
    for folder in ('', 'seed-0/fold-0', 'seed-0/fold-1'):
        (tmp_path / 'out' / folder / 'tensorboard').mkdir(parents=True)
        (tmp_path / 'out' / folder / 'run.json').touch()
    hold_folder(tmp_path / 'out')
    yield tmp_path / 'out'
    release_folders()


def test_a_failed_start_of_several_runs_leaves_nothing(out):
    discard_start(out)
    assert not out.exists()


@pytest.mark.parametrize('finished', ['last', 'seed-0/fold-0/last'])
def test_a_finished_epoch_is_never_discarded(out, finished):
    (out / finished).mkdir()
    before = sorted(out.rglob('*.json'))
    discard_start(out)
    assert sorted(out.rglob('*.json')) == before


def test_what_another_run_has_started_is_not_discarded(out):
    """By one that fails before it has the folder."""
    release_folders()
    before = sorted(out.rglob('*'))
    discard_start(out)
    assert sorted(out.rglob('*')) == before


def test_what_is_not_of_a_run_stays(out, tmp_path):
    for path in (out / 'notes.txt', tmp_path / 'other' / 'seed-0' / 'notes.txt'):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'other' / 'tensorboard').mkdir()
    discard_start(out)
    assert [path.name for path in out.iterdir()] == ['notes.txt']
    hold_folder(tmp_path / 'other')
    discard_start(tmp_path / 'other')
    assert {path.name for path in (tmp_path / 'other').iterdir()} == {'seed-0', 'tensorboard'}


def test_no_look_is_lost_where_two_evaluations_end_together(tmp_path):
    program = ('import sys; from timm_arl.training.runs import record_look\n'
               'for _ in range(20): record_look(sys.argv[1], sys.argv[2], {"mean_auc": 0.5}, *sys.argv[3:])')
    both = [subprocess.Popen([sys.executable, '-c', program, str(tmp_path), *of])
            for of in (['first'], ['second', 'other'])]
    assert [process.wait(120) for process in both] == [0, 0]
    looks = read_rows(tmp_path / 'looks.csv')
    assert sorted(look['checkpoint'] for look in looks) == ['first'] * 20 + ['second'] * 20
    assert [path.name for path in tmp_path.iterdir()] == ['looks.csv']


def test_a_folder_that_another_machine_cannot_see(tmp_path, monkeypatch):
    """The first machine has made it on a disk of its own: known now, and not after the last epoch."""
    monkeypatch.setattr(runs, 'PATIENCE', 0)
    second = SimpleNamespace(
        num_processes=16, mixed_precision='no', gradient_accumulation_steps=1, device=SimpleNamespace(type='cuda'),
        is_main_process=False, wait_for_everyone=lambda: None)
    args = SimpleNamespace(resume=False, seeds=None, folds=0)
    with pytest.raises(RunError, match='choose an --output-dir that all machines share'):
        runs.prepare_output_dir(args, second, tmp_path / 'out')


HOLD = """
import sys
from pathlib import Path
from timm_arl.training.runs import hold_folder
hold_folder(Path(sys.argv[1]))
print('held', flush=True)
sys.stdin.read()
"""


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Also one that is resumed while it still runs."""
    with subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(FolderTaken, match='Another run is writing to .*: let it finish'):
            hold_folder(tmp_path)
        other.kill()
    hold_folder(tmp_path)  # whatever a killed one has left
    hold_folder(tmp_path)
    done = subprocess.run([sys.executable, '-c', HOLD, str(tmp_path)], capture_output=True, text=True, input='')
    assert done.returncode and 'FolderTaken' in done.stderr
    release_folders()
    assert not list(tmp_path.iterdir())


def test_looks_that_cannot_be_read_are_not_replaced(tmp_path):
    (tmp_path / 'looks.csv').write_bytes('time,checkpoint\nnow,Stra\xdfe\n'.encode('latin-1'))
    with pytest.raises(RunError, match='looks.csv is damaged .*restore it'):
        record_look(tmp_path, 'out', {'mean_auc': 0.5})
    assert b'now' in (tmp_path / 'looks.csv').read_bytes()
