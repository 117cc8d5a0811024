"""The harness, run for real on small networks: its columns, its files, and what it says of bad input."""
import csv
import json
import resource
import subprocess
import sys

import pytest
from PIL import Image

SMALL = ['--models', 'resnet14', 'arl_cnn14', '--img-size', '32', '--repetitions', '2', '--restarts', '1',
         '--warmup', '1']


def run(repo, *arguments, program='throughput.py', launch=(), **kwargs):
    return subprocess.run(
        [sys.executable, *launch, str(repo / 'benchmarks' / program), *map(str, arguments)],
        capture_output=True, text=True, timeout=280, **kwargs)


def rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_training_with_a_sweep(repo, tmp_path):
    path = tmp_path / 'deep' / 'r.csv'
    arguments = [*SMALL, '--mode', 'train', '--batch-size', '2', '4', '--results-file', path]
    done = run(repo, *arguments)
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [(r['model'], r['mode'], r['train_batch_size']) for r in table] == [
        (m, 'train', b) for b in ('2', '4') for m in ('resnet14', 'arl_cnn14')]
    for row in table:
        # timm's benchmark.py: samples a second, milliseconds a step, millions of parameters, GMACs, millions of outputs
        speed, time = float(row['train_samples_per_sec']), float(row['train_step_time'])
        assert speed == pytest.approx(int(row['train_batch_size']) / time * 1e3, rel=0.01)
        assert float(row['param_count']) == pytest.approx(8.02 + 2.04, abs=0.02)  # 1000 outputs
        assert float(row['peak_memory_mb']) > 40 and float(row['peak_rss_mb']) > float(row['peak_memory_mb'])
        assert float(row['ratio']) > 0 and 'torch' in row['versions'] and row['device']
        if row['model'] == 'resnet14':
            assert float(row['ratio']) == 1
    train = {(r['model'], r['train_batch_size']): float(r['saved_memory_mb']) for r in table}
    assert train['arl_cnn14', '4'] <= 1.05 * train['resnet14', '4']  # nothing but the batch norms' own inputs
    assert train['arl_cnn14', '4'] == pytest.approx(2 * train['arl_cnn14', '2'], rel=0.1)
    assert {r['infer_gmacs'] for r in table} == {table[0]['infer_gmacs']}
    assert '| arl_cnn14 | train' in path.with_suffix('.md').read_text() and 'Growth' in done.stdout
    with Image.open(path.with_suffix('.png')) as picture:
        assert picture.width > 400

    before = json.loads(path.with_suffix('.json').read_text())['rows']
    done = run(repo, *arguments, '--resume')
    assert done.returncode == 0 and json.loads(path.with_suffix('.json').read_text())['rows'] == before
    assert sorted(p.suffix for p in path.parent.iterdir()) == ['.csv', '.json', '.md', '.png']

    done = run(repo, path, '--chart', tmp_path / 'c.png', program='throughput_report.py')
    assert done.returncode == 0 and done.stdout.startswith(path.with_suffix('.md').read_text()), done.stderr
    with Image.open(tmp_path / 'c.png') as picture:
        assert picture.width > 400


def test_backends(repo, tmp_path):
    done = run(repo, '--models', 'arl_cnn14', '--backend', 'eager', 'folded', 'onnx', '--img-size', '32',
               '--batch-size', '2', '--repetitions', '1', '--restarts', '2', '--warmup', '0',
               '--results-file', tmp_path / 'r.csv')
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / 'r.csv')
    assert [r['backend'] for r in table] == ['eager', 'folded', 'onnx']
    assert all(float(r['infer_samples_per_sec']) > 0 and not r['saved_memory_mb'] for r in table)


def test_compile_and_autocast(repo, tmp_path):
    done = run(repo, '--models', 'arl_cnn14', '--precision', 'bf16', '--batch-size', '2', '--compile', '--img-size',
               '32', '--repetitions', '1', '--restarts', '1', '--results-file', tmp_path / 'r.csv')
    assert done.returncode == 0, done.stderr
    assert [(r['precision'], r['compile']) for r in rows(tmp_path / 'r.csv')] == [('bf16', 'True')]


def test_two_processes(repo, tmp_path):
    done = run(repo, *SMALL, '--mode', 'train', '--batch-size', '2', '--results-file', tmp_path / 'r.csv',
               launch=['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines',
                       '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '29611'])
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / 'r.csv'):
        assert row['processes'] == '2'
        assert float(row['train_samples_per_sec']) == pytest.approx(4e3 / float(row['train_step_time']), rel=0.01)


def test_smaller_batch_where_memory_is_short(repo, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (5 * 2 ** 28, 5 * 2 ** 28))

    batch_size = 2 ** 12  # 4096 x 64 channels x 16 x 16 positions x 4 bytes: 0.27 GB for one map of the stem
    done = run(repo, '--models', 'resnet14', '--img-size', '32', '--batch-size', batch_size, '--repetitions', '1',
               '--restarts', '1', '--warmup', '0', '--results-file', tmp_path / 'r.csv', preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert 'Trying all models of this setting with a batch of' in done.stderr + done.stdout
    assert int(rows(tmp_path / 'r.csv')[0]['infer_batch_size']) < batch_size


@pytest.mark.parametrize('arguments, sentence', [
    (['--models', 'arl_cnn15'], "no model named 'arl_cnn15'"), (['--device', 'cuda'], 'finds no cuda device'),
    (['--batch-size', '0'], '--batch-size must be at least 1'), (['--results-file', 'r.txt'], 'must end in .csv'),
    (['--backend', 'onnx', '--mode', 'train'], 'are for --mode infer'),
    (['--models', 'resnet14', 'resnet14'], 'names a model twice'), (['--img-size', '-4'], '--img-size must be')])
def test_bad_input(call, tmp_path, arguments, sentence):
    import torch
    if 'cuda' in arguments and torch.cuda.is_available():
        arguments, sentence = ['--device', 'mps'], 'finds no mps device'
    done = call('throughput', *arguments, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_input_speed(call, repo, tmp_path):
    Image.new('RGB', (2500, 1900), (200, 150, 120)).save(tmp_path / 'i.jpg')
    done = run(repo, '--image', tmp_path / 'i.jpg', '--workers', '1', '--images', '2', '--batch-size', '2', '--steps',
               '1', '--img-size', '64', '--results-file', tmp_path / 'r.csv', program='input_speed.py')
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / 'r.csv')
    assert [r['decoding'] for r in table] == ['full', 'reduced'] and '2500 x 1900' in table[0]['image']
    assert all(float(r['patches_per_sec']) > 0 and float(r['train_samples_per_sec']) > 0 for r in table)
    (tmp_path / 'no.jpg').write_bytes(b'no picture')
    done = call('input_speed', '--image', tmp_path / 'no.jpg', cwd=tmp_path)
    assert done.returncode == 2 and 'is not a picture' in done.stderr
