"""The output folder of a run."""
import json
import multiprocessing
from types import SimpleNamespace

import pytest

from timm_arl.files import read_rows, write_json
from timm_arl.training import runs
from timm_arl.training.arguments import RunError
from timm_arl.training.runs import FolderTaken, discard_start, hold_folder, note_code, record_look, release_folders

fork = multiprocessing.get_context('fork')


@pytest.fixture
def out(tmp_path):
    for folder in ('', 'seed-0/fold-0', 'seed-0/fold-1'):
        (tmp_path / 'out' / folder / 'tensorboard').mkdir(parents=True)
        (tmp_path / 'out' / folder / 'run.json').touch()
    hold_folder(tmp_path / 'out')
    yield tmp_path / 'out'
    release_folders()


def test_what_a_run_goes_on_with_after_an_update_is_noted(tmp_path):
    old, new = ({'commit': name, 'kernels': 'native'} for name in ('a', 'b'))
    write_json(tmp_path / 'run.json', {'command': 'x', **old})
    for code, resumed in ((old, []), (new, [new]), (new, [new]), (old, [new, old])):
        note_code(tmp_path, code)
        record = json.loads((tmp_path / 'run.json').read_text())
        assert record == {'command': 'x', **old, **({'resumed': resumed} if resumed else {})}


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


def look_often(together, folder, checkpoint, *of):
    together.wait()
    for _ in range(20):
        record_look(folder, checkpoint, {'mean_auc': 0.5}, *of)


def test_no_look_is_lost_where_two_evaluations_end_together(tmp_path):
    together = fork.Barrier(2)
    both = [fork.Process(target=look_often, args=(together, tmp_path, *of)) for of in (['first'], ['second', 'other'])]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
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


def hold_until_killed(folder, pipe):
    runs._held.clear()  # what this process was forked from holds is not its own
    try:
        hold_folder(folder)
        pipe.send('held')
        pipe.poll(120)
    except FolderTaken as error:
        pipe.send(str(error))


def holder(folder):
    """Another process that wants to hold a folder, and what it says."""
    here, there = fork.Pipe()
    process = fork.Process(target=hold_until_killed, args=(folder, there), daemon=True)
    process.start()
    return process, here.recv()


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Also one that is resumed while it still runs."""
    other, said = holder(tmp_path)
    assert said == 'held'
    with pytest.raises(FolderTaken, match='Another run is writing to .*: let it finish'):
        hold_folder(tmp_path)
    other.kill()
    other.join()
    hold_folder(tmp_path)  # whatever a killed one has left
    hold_folder(tmp_path)
    other, said = holder(tmp_path)
    assert 'Another run is writing to' in said
    other.join()
    release_folders()
    assert not list(tmp_path.iterdir())


def test_looks_that_cannot_be_read_are_not_replaced(tmp_path):
    (tmp_path / 'looks.csv').write_bytes('time,checkpoint\nnow,Stra\xdfe\n'.encode('latin-1'))
    with pytest.raises(RunError, match='looks.csv is damaged .*restore it'):
        record_look(tmp_path, 'out', {'mean_auc': 0.5})
    assert b'now' in (tmp_path / 'looks.csv').read_bytes()
