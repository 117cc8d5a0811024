"""Runs in processes of their own, and what is kept of them."""
import json

import pytest
import safetensors.torch
import torch

from timm_arl.factory import tensors_sha256
from timm_arl.files import locked, write_json
from timm_arl.training.tables.processes import as_begun, drop_stale, run_program
from timm_arl.training.tables.rows import TABLES

ALPHA_ZERO, = [row for row in TABLES['table5'] if row.name == 'arl_cnn14_alpha_zero']


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


@pytest.mark.parametrize('recorded', [True, False])  # else killed before, or removed since
def test_what_was_scored_of_other_weights_is_removed(tmp_path, recorded):
    trained, scored = (tmp_path / 'runs' / f'{name}-seed0' for name in ('arl_cnn14', ALPHA_ZERO.name))
    predictions = [tmp_path / 'predictions' / f'{ALPHA_ZERO.name}-seed0.{ending}' for ending in ('csv', 'json')]
    for folder in (trained, scored, tmp_path / 'predictions'):
        folder.mkdir(parents=True)
    for path in predictions if recorded else ():
        write_json(path, {})
    for k in range(2):
        safetensors.torch.save_file({'a': torch.full((1,), float(k))}, trained / 'model.safetensors')
        if k == 0:
            write_json(scored / 'evaluation.json', {'tensors_sha256': tensors_sha256(trained / 'model.safetensors')})
        drop_stale(tmp_path, ALPHA_ZERO, 0)
        assert [path.exists() for path in (scored, *predictions)] == [k == 0, *[k == 0 and recorded] * 2]
    assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['arl_cnn14-seed0']


def test_a_run_that_goes_on_is_told_the_same_path(tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run.json').write_text(json.dumps({'arguments': {'data': 'data'}}))
    assert as_begun(tmp_path, 'data', str(tmp_path / 'data')) == 'data'
    assert as_begun(tmp_path, 'data', '/elsewhere') == '/elsewhere' == as_begun(tmp_path / 'new', 'data', '/elsewhere')
