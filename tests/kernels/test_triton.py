"""The Triton kernels: interpreted everywhere, compiled for GPUs that need not be there, run on one that is."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_arl.attention import ATTENTIONS
from timm_arl.kernels import triton

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(triton.triton is None, reason='needs Triton, which PyTorch brings on Linux')


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *args], text=True, capture_output=True, cwd=HERE.parents[1],
        env={**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': os.pathsep.join(sys.path), **environment})


def check(*arguments, **environment):
    result = python(
        '-m', 'pytest', '-q', '--noconftest', '-p', 'no:cacheprovider', HERE / 'triton_checks.py', *arguments,
        **environment)
    assert result.returncode == 0 and ' passed' in result.stdout, result.stdout + result.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)  # each kernel runs in Python
def test_in_the_interpreter():
    check(TRITON_INTERPRET='1')


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.slow
@pytest.mark.timeout(1200)  # hundreds of kernels are compiled
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_on_the_gpu(attention):
    check('-k', attention)


@needs_triton
@pytest.mark.slow
def test_compiled_kernels_fit_the_registers():
    result = python(HERE / 'triton_registers.py', '80', '90')
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    for capability in (80, 90):
        assert {k['kernel'] for k in kernels if k['capability'] == capability} == {
            'softmax_forward', 'softmax_backward', 'mixed_sums', 'mixed_forward', 'mixed_backward'}
    # ptxas may spill two registers, rather than use more, for the sake of programs that run at the same time
    assert not [k for k in kernels if k['spilled'] > (0 if k['layout'] == 'torch.channels_last' else 8)]


def test_why_it_is_unavailable(monkeypatch):
    if triton.triton is not None:
        assert triton.unavailable() == (None if torch.cuda.is_available() else 'PyTorch sees no NVIDIA GPU.')
    monkeypatch.setitem(sys.modules, 'triton', None)
    spec = importlib.util.spec_from_file_location('timm_arl.kernels.without_triton', triton.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert without.unavailable() == 'Triton is not installed.'  # but the module is imported


def test_a_processor_is_not_its_business():
    f = torch.ones(1, 2, 3, 3)
    assert not triton.takes(f, f)
