"""The gate in C: which file is used, what happens without it, and after a fork."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_attention import FORMATS, pair

from timm_arl import kernels
from timm_arl.attention import attention_residual, fused_attention_residual

ROOT = Path(__file__).parents[2]


def python(code, cwd, **env):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=300)


def test_what_a_tensor_gets(monkeypatch):
    t = torch.ones(2, 3, 4, 5)
    assert kernels.backend(t) == kernels.backend(t.bfloat16()) == 'native'
    assert kernels.backend(t.double()) == kernels.backend(t.half()) == kernels.backend(t[:0]) == 'torch'
    monkeypatch.setenv('TIMM_ARL_KERNELS', 'torch')
    assert kernels.backend(t) == 'torch'
    monkeypatch.setenv('TIMM_ARL_KERNELS', 'cuda')
    with pytest.raises(ValueError, match="is 'cuda': set it to auto, torch, native or triton"):
        kernels.backend(t)


@pytest.mark.slow
def test_without_the_library(tmp_path):
    left_out = shutil.ignore_patterns('*.so', 'weights', '__pycache__')
    shutil.copytree(ROOT / 'timm_arl', tmp_path / 'timm_arl', ignore=left_out)
    done = python(f'''
import os, shutil, sys
from pathlib import Path
import torch, timm, timm_arl
from timm_arl import kernels
from timm_arl.kernels import native

def run():
    timm.create_model('arl_cnn14').eval()(torch.zeros(1, 3, 32, 32))

def refused():
    os.environ['TIMM_ARL_KERNELS'] = 'native'
    native._library.cache_clear(), native._missing.cache_clear()
    try:
        run()
    except RuntimeError as error:
        print(error)

run()
print('quiet so far', file=sys.stderr)
print(kernels.backend(torch.ones(1, 2, 3, 3)), kernels.backend(torch.ones(1, 2, 3, 3)))
refused()
for library in Path({str(ROOT / 'timm_arl' / 'kernels')!r}).glob('*.so'):
    shutil.copy(library, 'timm_arl/kernels')
refused()
print('runs')
with open('timm_arl/kernels/native.c', 'a') as f:  # as after `git pull` in a checkout that was installed before
    f.write('/* newer */')
refused()
''', tmp_path, PYTHONPATH=str(tmp_path))
    first, second, runs, third = done.stdout.splitlines()
    assert (first, runs) == ('torch torch', 'runs')
    assert second.startswith('TIMM_ARL_KERNELS asks for native. The C kernels are missing')
    assert 'was built from another native.c' in third
    assert done.stderr.startswith('quiet so far') and done.stderr.count('UserWarning') == 1
    assert 'Install a C compiler, then timm-arl again' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('capability', [
    each for each in ('default', 'avx2') if each != torch.backends.cpu.get_cpu_capability().lower()])
def test_other_kinds_of_processors(capability):
    # this machine can do what lesser ones can; all other tests use its own kind
    done = python('''
import sys
import torch
from test_attention import FORMATS, pair
from timm_arl.kernels import native
from timm_arl.attention import ATTENTIONS, attention_residual, fused_attention_residual
print(native._library()._name)
for attention in ATTENTIONS:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for memory_format in FORMATS:
            inputs = [t.requires_grad_() for t in pair((2, 37, 9, 8), dtype, memory_format)]
            results = []
            for gate in (fused_attention_residual, attention_residual):
                y = gate(*inputs, torch.tensor([0.7]), attention)
                results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
            for a, b in zip(*results):
                assert (a - b).abs().max() <= tolerance * b.abs().max()
''', ROOT / 'tests', ATEN_CPU_CAPABILITY=capability, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == {'default': 'native.any.so', 'avx2': 'native.avx2.so'}[capability]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('memory_format', FORMATS)
def test_after_a_fork(memory_format):
    inputs = pair((4, 64, 14, 14), memory_format=memory_format)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fused_attention_residual(*inputs, torch.tensor([0.7]))  # the threads of OpenMP are there now
        child = os.fork()
        if not child:
            signal.alarm(60)  # should it wait for threads that stayed behind
            y = fused_attention_residual(*inputs, torch.tensor([0.7]))
            os._exit(0 if np.array_equal(y.numpy(), expected.numpy()) else 1)  # PyTorch's own operations would wait
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(expected, attention_residual(*inputs, torch.tensor([0.7])), rtol=1e-5, atol=1e-5)


@pytest.fixture
def compile_all(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from hatch_build import compile_all
    return compile_all


@pytest.mark.parametrize('compiler, cflags, problem', [
    ('no-such-compiler', '', 'No such file'), ('false', '', 'exit status 1'),
    ('cc', '--no-such-option', 'no-such-option'), ('cc', '"-O2', 'No closing quotation')])
def test_building_without_a_compiler(compile_all, capsys, monkeypatch, tmp_path, compiler, cflags, problem):
    for name in ('native.c', 'native.any.so', 'native.avx2.so'):
        (tmp_path / name).write_text('old')
    monkeypatch.setenv('CC', compiler)
    monkeypatch.setenv('CFLAGS', cflags)
    assert compile_all(tmp_path) == []
    said = capsys.readouterr().err
    assert f'no C kernels, since `{compiler}' in said and problem in said
    assert [path.name for path in tmp_path.iterdir()] == ['native.c']  # no library of another source stays


def test_flags_that_make_arithmetic_inexact_are_left_out(compile_all, monkeypatch, tmp_path):
    (tmp_path / 'native.c').write_text('')
    compiler = tmp_path / 'compiler'
    compiler.write_text('#!/bin/sh\necho "$@" >> args\nfor file; do :; done\ntouch "$file"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CC', str(compiler))
    monkeypatch.setenv('CFLAGS', '-g -Ofast -ffast-math -O2')
    monkeypatch.chdir(tmp_path)
    built = compile_all(Path('.'))
    calls = (tmp_path / 'args').read_text().splitlines()
    assert len(built) == len(calls) > 0 and all(
        ' -g -O2 -ffp-contract=off ' in call and 'fast' not in call for call in calls)
