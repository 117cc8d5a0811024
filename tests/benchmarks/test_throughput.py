"""The harness, run for real on small networks: its columns, its files, and what it says of bad input."""
import io
import json
import resource
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
import torch.nn as nn
from PIL import Image
from timm.models import register_model
from tqdm import tqdm

from timm_arl.files import read_rows, write_rows

SPEC = dict(
    model='arl_cnn14', backend='eager', mode='infer', precision='fp32', img_size=32, batch_size=2, device='cpu',
    compile=False, compile_mode='default', channels_last=True, tf32=True, cudnn_benchmark=True, threads=0, seconds=0,
    seed=0)


@pytest.fixture
def benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / 'benchmarks')


@pytest.fixture
def harness(benchmarks):
    import throughput
    return throughput


@pytest.fixture
def work(benchmarks, call, monkeypatch):
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
def test_two_processes(repo, call, tmp_path):
    path = tmp_path / 'deep' / 'r.csv'
    arguments = ['--models', 'resnet14', 'arl_cnn14', '--mode', 'train', '--batch-size', '2', '--img-size', '32',
                 '--repetitions', '2', '--restarts', '1', '--warmup', '0', '--seconds', '0',
                 '--results-file', str(path)]
    done = subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines',
         '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '29611',
         str(repo / 'benchmarks' / 'throughput.py'), *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    table = read_rows(path)
    assert [(r['model'], r['mode'], r['train_batch_size']) for r in table] == [
        (m, 'train', '2') for m in ('resnet14', 'arl_cnn14')]
    for row in table:
        # timm's benchmark.py: samples a second, milliseconds a step, millions of parameters, GMACs, millions of outputs
        assert float(row['train_samples_per_sec']) == pytest.approx(4e3 / float(row['train_step_time']), rel=0.01)
        assert float(row['param_count']) == pytest.approx(8.02 + 2.04, abs=0.02)  # 1000 outputs
        assert float(row['peak_memory_mb']) > 40 and float(row['peak_rss_mb']) > float(row['peak_memory_mb'])
        assert float(row['ratio']) > 0 and 'torch' in row['versions'] and row['device']
        assert row['processes'] == '2' and row['repetitions'] == '2' and row['side_by_side'] == 'True'
        assert row['tf32'] == row['cudnn_benchmark'] == ''  # a CPU has neither
    assert float(table[0]['ratio']) == 1
    assert table[0]['infer_gmacs'] == table[1]['infer_gmacs']
    assert '| arl_cnn14 | train' in path.with_suffix('.md').read_text()
    with Image.open(path.with_suffix('.png')) as picture:
        assert picture.width > 400
    assert sorted(p.suffix for p in path.parent.iterdir()) == ['.csv', '.json', '.md', '.png']

    done = call('throughput_report', path, '--chart', tmp_path / 'c.png')
    assert done.returncode == 0 and done.stdout.startswith(path.with_suffix('.md').read_text()), done.stderr
    with Image.open(tmp_path / 'c.png') as picture:
        assert picture.width > 400


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='limits memory as Linux does')
def test_memory_is_short(harness, call, monkeypatch, tmp_path):
    """Too little for two processes, then too little for the batch in one of them; both really end for want of it."""
    alive = []

    class Short(harness.Row):
        def __init__(self, spec, index):
            super().__init__(spec, index)
            alive.append(self)
            if len(alive) == 2:
                alive[0].process.kill()

        def repeat(self):
            if self.spec['batch_size'] == 128:  # whose first map is of 67 MB
                with open(f'/proc/{self.process.pid}/status') as status:
                    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmData'))
                resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (now + 2 ** 20, now + 2 ** 20))
            super().repeat()

        def close(self):
            super().close()
            if self in alive:
                alive.remove(self)

    monkeypatch.setattr(harness, 'Row', Short)
    path = tmp_path / 'r.csv'
    done = call('throughput', '--models', 'test_resnet', 'test_byobnet', '--img-size', '128', '--batch-size', '128',
                '--repetitions', '1', '--restarts', '1', '--warmup', '0', '--seconds', '0', '--results-file', path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert 'test_resnet: its process ended with status -9. Measuring the rows of this setting one at a time.' in said
    assert 'test_resnet: RuntimeError' in said
    assert 'Trying all models of this setting with a batch of 96.' in said
    table = read_rows(path)
    assert [(r['model'], r['infer_batch_size'], r['side_by_side']) for r in table] == [
        ('test_resnet', '96', 'False'), ('test_byobnet', '96', 'False')]
    assert all(float(r['infer_samples_per_sec']) > 0 and float(r['ratio']) > 0 for r in table)
    assert not alive


def test_a_row_killed_while_idle(harness):
    row = harness.Row(SPEC, 0)
    row.process.kill()
    row.process.wait()
    with pytest.raises(harness.Failed, match='ended with status -9') as failed:
        row.repeat()
    assert failed.value.out_of_memory
    row.close()


@pytest.mark.parametrize('side_by_side', [True, False])
def test_order_and_ratios(harness, monkeypatch, side_by_side):
    """Times that are known, so that what is made of them is too: 1 and 2 s for a warm-up, then 2, 3, 4 to 1."""
    log, made = [], []

    class Clock:
        def __init__(self, spec, index):
            self.spec, self.index, self.times, self.process = spec, index, [], None
            made.append(index)

        def answer(self):
            return {'processes': 2, 'device': 'a clock'}

        def repeat(self):
            count = len(self.times)
            self.times.append(9. if not count else 1. if self.index == 0 else 1. + count)
            log.append(self.index)

        def ask(self, command):
            return {'peak_memory_mb': 5.}

        def close(self):
            pass

    monkeypatch.setattr(harness, 'Row', Clock)
    args = Namespace(warmup=1, repetitions=3, restarts=2)
    first, second = harness.measure(
        [SPEC, {**SPEC, 'model': 'resnet14'}], args, tqdm(disable=True), side_by_side=side_by_side)
    assert log == ([0, 1, 1, 0] * 2 + [1, 0, 0, 1] * 2 if side_by_side else [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)
    assert made == [0, 1, 0, 1]  # new processes for each restart
    assert (first['ratio'], first['spread'], first['repetitions'], first['peak_memory_mb']) == (1, 0, 6, 5)
    assert (second['ratio'], second['spread'], second['relative_to']) == (3, 0.6667, 'arl_cnn14 eager')
    assert (second['infer_step_time'], second['infer_samples_per_sec']) == (3000, 1.33)  # of both processes
    assert second['side_by_side'] is side_by_side and second['compile_mode'] is None


def test_resume(harness, call, monkeypatch, tmp_path):
    """A setting is kept if it is the same in all that changes a time."""
    asked = []

    def measure(specs, args, bar, side_by_side):
        asked.append(specs[0])
        return [dict.fromkeys(harness.COLUMNS, 1) | {
            'model': s['model'], 'backend': s['backend'], 'mode': s['mode'], 'precision': s['precision'],
            'device': '', 'versions': '', 'commit': '', 'compile': True, 'compile_mode': s['compile_mode']}
            for s in specs]

    monkeypatch.setattr(harness, 'measure', measure)
    base = ['--models', 'resnet14', '--compile', '--results-file', tmp_path / 'r.csv']
    for extra, count in (((), 1), ((), 1), (('--compile-mode', 'reduce-overhead'), 2), (('--threads', 1), 3),
                         (('--no-side-by-side',), 4), (('--batch-size', 8, 16), 5), (('--mode', 'train'), 6),
                         (('--compile-mode', 'default'), 6), (('--models', 'resnet14', 'arl_cnn14'), 7)):
        assert call('throughput', *base, *extra, '--resume').returncode == 0
        assert len(asked) == count, extra
    assert len(read_rows(tmp_path / 'r.csv')) == 8
    assert asked[1]['compile_mode'] == 'reduce-overhead' and asked[4]['batch_size'] == 16


@pytest.mark.slow
def test_work_that_trains(work):
    saved = {}
    for name, batch_size in (('resnet14', 4), ('arl_cnn14', 4), ('arl_cnn14', 8)):
        facts, step, memory = work(model=name, mode='train', batch_size=batch_size, img_size=64)
        assert facts['device'] and facts['threads'] == torch.get_num_threads() and step['step_time'] > 0
        saved[name, batch_size] = memory['saved_memory_mb']
    assert saved['arl_cnn14', 4] <= 1.05 * saved['resnet14', 4]  # nothing but the batch norms' own inputs
    assert saved['arl_cnn14', 8] == pytest.approx(2 * saved['arl_cnn14', 4], rel=0.1)


@pytest.mark.parametrize('backend', ['eager', 'folded', pytest.param('onnx', marks=pytest.mark.slow)])
def test_work_of_a_backend(work, backend):
    facts, step, memory = work(backend=backend, tf32=False, cudnn_benchmark=True)
    assert step['step_time'] > 0 and 'saved_memory_mb' not in memory and ('peak_memory_mb' in memory) != (
        backend == 'onnx')
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
    assert step['step_time'] > 0 and memory['peak_memory_mb'] > 0 and facts['param_count'] == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > compiled


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
    (RuntimeError('CUDA error: an illegal memory access was encountered'), False), (ValueError(''), False)])
def test_what_is_short_memory(benchmarks, error, short):
    from throughput_worker import out_of_memory
    assert out_of_memory(error) is short


@pytest.mark.parametrize('compile', [pytest.param(True, marks=pytest.mark.slow), False])
def test_steps_of_a_repetition(benchmarks, compile):
    """Counted from a step after compiling and recording are over."""
    from accelerate import PartialState
    from throughput_worker import steps_per_repetition
    PartialState(cpu=True)
    durations = [0.5] * (3 if compile else 1)
    steps = steps_per_repetition(
        lambda: time.sleep(durations.pop() if durations else 0), dict(SPEC, compile=compile, seconds=1.),
        torch.device('cpu'))
    assert steps == 100


@pytest.mark.parametrize('arguments, sentence', [
    (['--models', 'arl_cnn15'], "no model named 'arl_cnn15'"), (['--device', 'cuda'], 'finds no cuda device'),
    (['--batch-size', '0'], '--batch-size must be at least 1'), (['--results-file', 'r.txt'], 'must end in .csv'),
    (['--backend', 'onnx', '--mode', 'train'], 'are for --mode infer'),
    (['--backend', 'onnx', '--compile'], '--backend onnx needs'), (['--seconds', 'nan'], '--seconds must be'),
    (['--models', 'resnet14', 'resnet14'], 'names a model twice'), (['--img-size', '-4'], '--img-size must be')])
def test_bad_input(call, tmp_path, arguments, sentence):
    if 'cuda' in arguments and torch.cuda.is_available():
        arguments, sentence = ['--device', 'mps'], 'finds no mps device'
    done = call('throughput', *arguments, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_report_of_old_and_new_files(repo, call, tmp_path):
    """The files in benchmarks/results are of a version that had fewer columns."""
    results = repo / 'benchmarks' / 'results'
    done = call('throughput_report', results / 'arl_cnn14_sweep.csv', '--chart', tmp_path / 'c.png')
    assert done.returncode == 0 and 'Growth: 1.00 means linear' in done.stdout, done.stderr
    assert '| arl_cnn14 | train | fp32 | 16 x 320 | 0.83 | 1.00 |' in done.stdout
    new = [{**row, 'compile': True, 'compile_mode': 'reduce-overhead', 'tf32': True, 'cudnn_benchmark': False,
            'side_by_side': False} for row in read_rows(results / 'arl_cnn14.csv')]
    write_rows(tmp_path / 'new.csv', new)
    done = call('throughput_report', results / 'arl_cnn14.csv', results / 'arl_cnn14_compile.csv', tmp_path / 'new.csv',
                '--chart', tmp_path / 'c.png')
    assert done.returncode == 0, done.stderr
    for label in ('| arl_cnn14 |', '| arl_cnn14 (compiled) |', '| arl_cnn14 (reduce-overhead) |'):
        assert label in done.stdout
    assert 'compile_mode reduce-overhead, channels_last True, tf32 True, cudnn_benchmark False' in done.stdout
    with Image.open(tmp_path / 'c.png') as picture:
        assert picture.width > 400
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    done = call('throughput_report', tmp_path / 'other.csv', '--chart', tmp_path / 'd.png')
    assert done.returncode == 2 and 'cannot read results' in done.stderr and not (tmp_path / 'd.png').exists()


def test_input_speed(call, tmp_path):
    Image.new('RGB', (2500, 1900), (200, 150, 120)).save(tmp_path / 'i.jpg')
    done = call('input_speed', '--image', tmp_path / 'i.jpg', '--workers', '1', '--images', '2', '--batch-size', '2',
                '--steps', '1', '--img-size', '64', '--results-file', tmp_path / 'r.csv')
    assert done.returncode == 0, done.stderr
    table = read_rows(tmp_path / 'r.csv')
    assert [(r['path'], r['decoded']) for r in table] == [
        ('training, modern', '2500 x 1900'), ('training, modern', '313 x 238'),
        ('evaluation, multiscale', '2500 x 1900'), ('evaluation, multiscale', '313 x 238')]
    assert all(float(r['images_per_sec']) > 0 and float(r['train_samples_per_sec']) > 0 for r in table)
    (tmp_path / 'no.jpg').write_bytes(b'no picture')
    done = call('input_speed', '--image', tmp_path / 'no.jpg', cwd=tmp_path)
    assert done.returncode == 2 and 'is not a picture' in done.stderr
