import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState

REPO = Path(__file__).resolve().parents[1]

if 'PYTEST_XDIST_WORKER' in os.environ:  # `make test` runs two workers, which would else wait for each other's threads
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def repo() -> Path:
    return REPO


@pytest.fixture
def call(repo, monkeypatch, capsys):
    """Run a program in this process, for what needs no process of its own: a tenth of the time."""
    def run(program, *args, cwd=None):
        monkeypatch.syspath_prepend(repo / 'benchmarks')
        monkeypatch.setattr(sys, 'argv', [f'{program}.py', *map(str, args)])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        try:
            status = importlib.import_module(program).main()
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status or 0, stdout=captured.out, stderr=captured.err)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope='session')
def isic_sample() -> str:
    """A sixteenth of ISIC 2017 (96/24/48 images), which lies beside the checkout."""
    folder = Path(os.environ.get('ISIC2017_SAMPLE', REPO.parent / 'shared' / 'isic2017-sample'))
    if not folder.is_dir():
        pytest.skip(f'no ISIC 2017 sample at {folder} (set ISIC2017_SAMPLE)')
    return str(folder)


@pytest.fixture(scope='session')
def resnet50_file(tmp_path_factory) -> Path:
    """A checkpoint as timm/resnet50.a1_in1k holds it, with random weights."""
    torch.manual_seed(0)
    model = timm.create_model('resnet50', zero_init_last=False)
    path = tmp_path_factory.mktemp('resnet50') / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path
