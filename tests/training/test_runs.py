"""The output folder of a run."""
import pytest

from timm_arl.training.runs import discard_start


@pytest.fixture
def out(tmp_path):
    for folder in ('', 'seed-0/fold-0', 'seed-0/fold-1'):
        (tmp_path / 'out' / folder / 'tensorboard').mkdir(parents=True)
        (tmp_path / 'out' / folder / 'run.json').touch()
    return tmp_path / 'out'


def test_a_failed_start_of_several_runs_leaves_nothing(out):
    discard_start(out)
    assert not out.exists()


@pytest.mark.parametrize('finished', ['last', 'seed-0/fold-0/last'])
def test_a_finished_epoch_is_never_discarded(out, finished):
    (out / finished).mkdir()
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
    discard_start(tmp_path / 'other')
    assert {path.name for path in (tmp_path / 'other').iterdir()} == {'seed-0', 'tensorboard'}
