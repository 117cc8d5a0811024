"""The harness, run for real on small networks: its columns, its files, and what it says of bad input."""
import resource
from argparse import Namespace

import pytest
import torch
from forked import Forked
from PIL import Image
from tqdm import tqdm

from timm_arl.files import read_rows

SPEC = dict(
    model='arl_cnn14', backend='eager', mode='infer', precision='fp32', img_size=32, batch_size=2, device='cpu',
    compile=False, compile_mode='default', channels_last=True, tf32=True, cudnn_benchmark=True, threads=0, seconds=0,
    environment='', seed=0)


@pytest.fixture
def harness(benchmarks):
    import throughput
    return throughput


@pytest.mark.slow
def test_two_processes(call, tmp_path):
    path = tmp_path / 'deep' / 'r.csv'
    arguments = ['--models', 'resnet14', 'arl_cnn14', '--mode', 'train', '--batch-size', '2', '--img-size', '32',
                 '--repetitions', '2', '--restarts', '1', '--warmup', '0', '--seconds', '0',
                 '--results-file', str(path)]
    done = Forked('throughput', *arguments, processes=2).wait()
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


@pytest.mark.parametrize('mode, side_by_side', [('infer', True), ('infer', False), ('latency', True)])
def test_order_and_ratios(harness, monkeypatch, mode, side_by_side):
    """Times that are known, so that what is made of them is too: 1 and 2 s for a warm-up, then 2, 3, 4 to 1."""
    log, made, latency = [], [], mode == 'latency'

    class Clock:
        def __init__(self, spec, index):
            self.spec, self.index, self.times, self.process = spec, index, [], None
            made.append(index)

        def answer(self):
            return {'processes': 2, 'device': 'a clock', 'steps': 5}

        def repeat(self):
            count = len(self.times)
            time = 9. if not count else 1. if self.index == 0 else 1. + count
            self.times.append([time / 2, time, time, time, 3 * time] if latency else [time])
            log.append(self.index)

        def ask(self, command):
            return {'peak_memory_mb': 5.}

        def close(self):
            pass

    monkeypatch.setattr(harness, 'Row', Clock)
    args = Namespace(warmup=1, repetitions=3, restarts=2)
    specs = [{**SPEC, 'mode': mode, 'model': model} for model in ('arl_cnn14', 'resnet14')]
    first, second = harness.measure(specs, args, tqdm(disable=True), side_by_side=side_by_side)
    assert log == ([0, 1, 1, 0] * 2 + [1, 0, 0, 1] * 2 if side_by_side else [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)
    assert made == [0, 1, 0, 1]  # new processes for each restart
    assert (first['ratio'], first['spread'], first['repetitions'], first['peak_memory_mb']) == (1, 0, 6, 5)
    assert (second['ratio'], second['spread'], second['relative_to']) == (3, 0.6667, 'arl_cnn14 eager')
    assert (second['infer_step_time'], second['infer_samples_per_sec']) == (3000, 1.33)  # of both processes
    assert second['side_by_side'] is side_by_side and second['compile_mode'] is None
    assert first['steps'] == 2 * 3 * 5
    if latency:  # of 30 single steps each: 2.5 s and less, then 3 s and more; the longest are 9, 12 and 12 s
        assert (first['latency_p50_ms'], first['latency_p95_ms']) == (1000, 3000)
        assert (second['latency_p50_ms'], second['latency_p95_ms']) == (3000, 10650)
    else:
        assert 'latency_p50_ms' not in second


def test_a_request_that_does_not_fit_is_not_made_smaller(harness, monkeypatch):
    tried = []

    class Full:
        def __init__(self, spec, index):
            tried.append(spec['batch_size'])

        def answer(self):
            raise harness.Failed('no memory', out_of_memory=True)

        def close(self):
            pass

    monkeypatch.setattr(harness, 'Row', Full)
    with pytest.raises(harness.Failed):
        harness.measure([{**SPEC, 'mode': 'latency', 'batch_size': 9}], Namespace(warmup=0, repetitions=1, restarts=1),
                        tqdm(disable=True), side_by_side=True)
    assert tried == [9]


@pytest.mark.slow
def test_latency(call, tmp_path, monkeypatch):
    monkeypatch.setenv('ONEDNN_VERBOSE', '1')  # which prints to stdout, past Python
    done = call('throughput', '--models', 'arl_cnn14', '--mode', 'latency', '--img-size', '32', '--batch-size', '1',
                '--repetitions', '2', '--restarts', '1', '--warmup', '0', '--seconds', '0',
                '--results-file', tmp_path / 'r.csv')
    assert done.returncode == 0, done.stderr
    row, = read_rows(tmp_path / 'r.csv')
    assert (row['mode'], row['infer_batch_size'], row['steps']) == ('latency', '1', '20') and row['kernels']
    assert 0 < float(row['latency_p50_ms']) <= float(row['latency_p95_ms'])
    assert float(row['infer_samples_per_sec']) == pytest.approx(1e3 / float(row['infer_step_time']), rel=0.01)
    assert '| p50 ms | p95 ms | kernels |' in (tmp_path / 'r.md').read_text()


def test_resume(harness, call, monkeypatch, tmp_path):
    """A setting is kept if it is the same in all that changes a time."""
    asked = []

    def measure(specs, args, bar, side_by_side):
        asked.append(specs[0])
        return [dict.fromkeys(harness.COLUMNS, 1) | {
            'model': s['model'], 'backend': s['backend'], 'mode': s['mode'], 'precision': s['precision'],
            'device': '', 'environment': '', 'versions': '', 'commit': '', 'compile': True,
            'compile_mode': s['compile_mode'], 'kernels': None}
            for s in specs]

    monkeypatch.setattr(harness, 'measure', measure)
    base = ['--models', 'resnet14', '--compile', '--results-file', tmp_path / 'r.csv']
    for extra, count in (((), 1), ((), 1), (('--compile-mode', 'reduce-overhead'), 2), (('--threads', 1), 3),
                         (('--no-side-by-side',), 4), (('--batch-size', 8, 16), 5), (('--mode', 'train'), 6),
                         (('--compile-mode', 'default'), 6), (('--models', 'resnet14', 'arl_cnn14'), 7),
                         (('--mode', 'latency', 'infer'), 9)):
        assert call('throughput', *base, *extra, '--resume').returncode == 0
        assert len(asked) == count, extra
    for count, (name, value) in enumerate((('TIMM_ARL_KERNELS', 'torch'), ('MALLOC_TRIM_THRESHOLD_', '9999999')), 10):
        monkeypatch.setenv(name, value)
        assert call('throughput', *base, '--resume').returncode == 0 and len(asked) == count
    assert len(read_rows(tmp_path / 'r.csv')) == 11  # those of a setting with a model more take the place of its own
    assert 'MALLOC_TRIM_THRESHOLD_=9999999' in asked[-1]['environment']
    assert asked[1]['compile_mode'] == 'reduce-overhead' and asked[4]['batch_size'] == 16
    assert [(spec['mode'], spec['batch_size']) for spec in asked[7:10]] == [
        ('latency', 1), ('latency', 9), ('infer', 8)]


@pytest.mark.parametrize('record', [
    None, '{"rows"', '[]', '{"rows": [{"model": "resnet14", "backend": "eager"}]}',
    '{"rows": [{"model": "resnet14", "backend": "eager", "setting": {"mode": "infer", "requested_batch_size": 8}}]}'])
def test_resume_refuses_what_it_cannot_compare(call, tmp_path, record):
    """An older version's rows do not say which kernels they had."""
    (tmp_path / 'r.csv').write_text('model,mode\nresnet14,infer\n')
    if record:
        (tmp_path / 'r.json').write_text(record)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    done = call('throughput', '--models', 'resnet14', '--results-file', tmp_path / 'r.csv', '--resume')
    assert done.returncode == 2 and 'r.json beside it is missing, damaged or of another version' in done.stderr
    assert 'choose another --results-file' in done.stderr and done.stderr.count('\n') == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('arguments, sentence', [
    (['--models', 'arl_cnn15'], "no model named 'arl_cnn15'"), (['--device', 'cuda'], 'finds no cuda device'),
    (['--batch-size', '0'], '--batch-size must be at least 1'), (['--results-file', 'r.txt'], 'must end in .csv'),
    (['--backend', 'onnx', '--mode', 'train'], 'are for --mode infer'),
    (['--backend', 'int8', '--compile'], '--backend onnx and int8 need'), (['--seconds', 'nan'], '--seconds must be'),
    (['--compile-mode', 'reduce-overhead'], '--compile-mode needs --compile'),
    (['--models', 'resnet14', 'resnet14'], 'names a model twice'), (['--img-size', '-4'], '--img-size must be')])
def test_bad_input(call, tmp_path, arguments, sentence):
    if 'cuda' in arguments and torch.cuda.is_available():
        arguments, sentence = ['--device', 'mps'], 'finds no mps device'
    done = call('throughput', *arguments, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('program', ['throughput', 'input_speed'])
def test_a_results_file_that_cannot_be_written_is_told_before_the_work(call, tmp_path, program):
    (tmp_path / 'file').touch()
    (tmp_path / 'd.csv').mkdir()
    for place, message in ((tmp_path / 'd.csv', 'is a folder: name a file in it'),
                           (tmp_path / 'file' / 'r.csv', 'Cannot make')):
        done = call(program, '--results-file', place)
        assert done.returncode == 2 and '--results-file: ' in done.stderr and message in done.stderr
