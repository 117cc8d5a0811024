"""A row's own process, run in this one: what it answers."""
import io
import json
import time

import pytest
import torch
import torch.nn as nn
from test_throughput import SPEC
from timm.models import register_model

from timm_arl import kernels

pytestmark = pytest.mark.usefixtures('benchmarks')


@pytest.fixture
def work(call, monkeypatch):
    """A row's program in this process: its replies at the start, to one repetition and to the question of memory."""
    flags = [(torch.backends.cudnn, 'benchmark'), (torch.backends.cudnn, 'allow_tf32'),
             (torch.backends.cuda.matmul, 'allow_tf32')]
    before = [getattr(module, name) for module, name in flags]

    def run(**changes):
        monkeypatch.setattr('sys.stdin', io.StringIO('repeat\nmemory\n'))
        done = call('throughput_worker', json.dumps({**SPEC, **changes}))
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield run
    for (module, name), value in zip(flags, before):
        setattr(module, name, value)


@pytest.mark.slow
def test_work_that_trains(work):
    saved = {}
    for name, batch_size in (('resnet14', 4), ('arl_cnn14', 4), ('arl_cnn14', 8)):
        facts, step, memory = work(model=name, mode='train', batch_size=batch_size, img_size=64)
        assert facts['device'] and facts['threads'] == torch.get_num_threads() and step['step_times'][0] > 0
        saved[name, batch_size] = memory['saved_memory_mb']
    assert saved['arl_cnn14', 4] <= 1.05 * saved['resnet14', 4]  # nothing but the batch norms' own inputs
    assert saved['arl_cnn14', 8] == pytest.approx(2 * saved['arl_cnn14', 4], rel=0.1)


@pytest.mark.parametrize('backend', ['eager', 'folded', *(
    pytest.param(backend, marks=pytest.mark.slow) for backend in ('onnx', 'int8'))])
def test_work_of_a_backend(work, backend):
    small = {'model': 'test_resnet'} if backend in ('onnx', 'int8') else {}  # which takes long to export
    facts, step, memory = work(backend=backend, tf32=False, cudnn_benchmark=True, **small)
    (seconds,) = step['step_times']
    assert seconds > 0 and 'saved_memory_mb' not in memory and ('peak_memory_mb' in memory) != (
        backend in ('onnx', 'int8'))
    assert facts['tf32'] is None and facts['cudnn_benchmark'] is None  # of CUDA, but set
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.slow
def test_work_that_is_folded_compiled_and_autocast(work):
    @register_model
    def one_convolution(pretrained=False, **kwargs):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    compiled = torch._dynamo.utils.counters['stats']['unique_graphs']
    facts, step, memory = work(model='one_convolution', backend='folded', precision='bf16', compile=True)
    (seconds,) = step['step_times']
    assert seconds > 0 and memory['peak_memory_mb'] > 0 and facts['param_count'] == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > compiled


@pytest.mark.parametrize('changes, expected', [
    (dict(), [(2, 256, 8, 8), (2, 512, 4, 4), (2, 1024, 2, 2), (2, 2048, 1, 1)]), (dict(model='resnet14'), []),
    (dict(backend='folded', precision='bf16', mode='latency'), None), (dict(mode='train'), None)])
def test_kernels_are_asked_for_the_maps_of_the_gates(work, monkeypatch, changes, expected):
    asked = []

    def backend(tensor):
        asked.append(tensor)
        return 'native' if tensor.shape[-1] > 4 else 'torch'

    monkeypatch.setattr(kernels, 'backend', backend)
    facts, *_ = work(**changes)
    shapes = [tuple(tensor.shape) for tensor in asked]
    assert shapes == expected if expected is not None else len(shapes) == 4
    assert facts['kernels'] == ('native+torch' if shapes else None)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in asked)
    assert {t.dtype for t in asked} <= {torch.bfloat16 if 'precision' in changes else torch.float32}


def test_kernels_of_this_machine(work):
    facts, *_ = work()
    assert set(facts['kernels'].split('+')) <= {'torch', 'native'}


def test_latency_times_each_step(work):
    facts, step, memory = work(mode='latency', batch_size=1)
    assert facts['steps'] == len(step['step_times']) == 10 and min(step['step_times']) > 0
    assert memory['peak_memory_mb'] > 0 and 'saved_memory_mb' not in memory


def test_work_that_fails_says_so(work):
    (reply,) = work(model='arl_cnn15')
    assert 'arl_cnn15' in reply['error'] and not reply['out_of_memory']


@pytest.mark.parametrize('error, short', [
    (MemoryError(), True), (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), True),
    (RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported'), True),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), True),
    (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), True), (RuntimeError('std::bad_alloc'), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), True),
    (RuntimeError('MPS backend out of memory (MPS allocated: 1 GB)'), True),
    (RuntimeError('CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY'), True),
    (RuntimeError('CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`'), True),
    (RuntimeError('out of resource: shared memory, Required: 262144, Hardware limit: 232448'), False),
    (RuntimeError('CUDA error: an illegal memory access was encountered'), False), (ValueError(''), False)])
def test_what_is_short_memory(error, short):
    from throughput_worker import out_of_memory
    assert out_of_memory(error) is short


@pytest.mark.parametrize('compile', [pytest.param(True, marks=pytest.mark.slow), False])
def test_steps_of_a_repetition(compile):
    """Counted from a step after compiling and recording are over."""
    from accelerate import PartialState
    from throughput_worker import steps_per_repetition
    PartialState(cpu=True)
    durations = [0.1] * (3 if compile else 1)
    steps = steps_per_repetition(
        lambda: time.sleep(durations.pop() if durations else 0), dict(SPEC, compile=compile, seconds=1.),
        torch.device('cpu'))
    assert steps == 100
