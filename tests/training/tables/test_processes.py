"""Runs in processes of their own."""
import pytest
import torch

from timm_arl.files import locked
from timm_arl.training.tables.processes import run_program


@pytest.mark.parametrize('given, expected', [(None, '1'), ('4,6', '6'), ('5', '5')])
def test_each_process_of_a_launcher_gives_its_runs_a_gpu_of_its_own(tmp_path, monkeypatch, given, expected):
    """Also where the launcher leaves all GPUs to all processes: the runs would all take the first."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given or '')
    if given is None:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    (tmp_path / 'p.py').write_text('import os, sys; open(sys.argv[1], "w").write(os.environ["CUDA_VISIBLE_DEVICES"])')
    with locked(tmp_path / 'lock') as lock:
        assert run_program(tmp_path / 'p.py', [str(tmp_path / 'seen')], lock) == (0, '')
    assert (tmp_path / 'seen').read_text() == expected


@pytest.mark.parametrize('processes, threads', [('1', 'all'), ('2', '1')])
def test_the_single_thread_that_accelerate_launch_sets_is_not_passed_on(tmp_path, monkeypatch, processes, threads):
    """Unless there are several processes, which share the cores."""
    for name, value in (('ACCELERATE_MIXED_PRECISION', 'no'), ('OMP_NUM_THREADS', '1'), ('WORLD_SIZE', processes)):
        monkeypatch.setenv(name, value)
    (tmp_path / 'p.py').write_text(
        'import os, sys; open(sys.argv[1], "w").write(os.environ.get("OMP_NUM_THREADS", "all"))')
    with locked(tmp_path / 'lock') as lock:
        assert run_program(tmp_path / 'p.py', [str(tmp_path / 'seen')], lock) == (0, '')
    assert (tmp_path / 'seen').read_text() == threads
