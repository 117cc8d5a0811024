"""Tables and charts from results files of the harness."""
from PIL import Image

from timm_arl.files import read_rows, write_rows


def test_report_of_old_and_new_files(repo, call, tmp_path):
    """The files in benchmarks/results are of a version that had fewer columns."""
    results = repo / 'benchmarks' / 'results'
    done = call('throughput_report', results / 'arl_cnn14_sweep.csv', '--chart', tmp_path / 'c.png')
    assert done.returncode == 0 and 'Growth: 1.00 means linear' in done.stdout, done.stderr
    assert '| arl_cnn14 | train | fp32 | 16 x 320 | 0.83 | 1.00 |' in done.stdout
    assert 'kernels' not in done.stdout and 'p95' not in done.stdout
    new = [{**row, 'compile': True, 'compile_mode': 'reduce-overhead', 'tf32': True, 'cudnn_benchmark': False,
            'side_by_side': False} for row in read_rows(results / 'arl_cnn14.csv')]
    write_rows(tmp_path / 'new.csv', new)
    done = call('throughput_report', results / 'arl_cnn14.csv', results / 'arl_cnn14_compile.csv', tmp_path / 'new.csv',
                '--chart', tmp_path / 'c.png')
    assert done.returncode == 0, done.stderr
    for label in ('| arl_cnn14 |', '| arl_cnn14 (compiled) |', '| arl_cnn14 (reduce-overhead) |'):
        assert label in done.stdout
    assert 'compile_mode reduce-overhead, channels_last True, tf32 True, cudnn_benchmark False' in done.stdout
    widths = []
    for machines in ([('one', '')], [('one', ''), ('one', 'ONEDNN_MAX_CPU_ISA=AVX2')]):
        write_rows(tmp_path / 'machines.csv', [
            {**row, 'device': device, 'environment': environment} for row in new for device, environment in machines])
        assert call('throughput_report', tmp_path / 'machines.csv', '--chart', tmp_path / 'c.png').returncode == 0
        with Image.open(tmp_path / 'c.png') as picture:
            widths.append(picture.width)
    assert widths[1] == 2 * widths[0] > 800  # a panel for each machine and environment
    requests = [{**row, 'mode': 'latency', 'infer_batch_size': size, 'latency_p50_ms': 1034.5, 'latency_p95_ms': 99,
                 'kernels': 'native' if row['model'] == 'arl_cnn14' else ''}
                for row in new if row['mode'] == 'infer' for size in (1, 9)]
    write_rows(tmp_path / 'requests.csv', requests)
    done = call('throughput_report', tmp_path / 'requests.csv', '--chart', tmp_path / 'c.png')
    assert done.returncode == 0 and 'Growth' not in done.stdout, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith('| GMACs | p50 ms | p95 ms | kernels |') and lines[0].count('|') == lines[1].count('|')
    assert lines[2].startswith('| resnet14 (reduce-overhead) | latency | fp32 | 1 x 224 |')
    assert lines[2].endswith('| 1,034.5 | 99 |  |') and lines[4].endswith('| 1,034.5 | 99 | native |')
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    done = call('throughput_report', tmp_path / 'other.csv', '--chart', tmp_path / 'd.png')
    assert done.returncode == 2 and 'cannot read results' in done.stderr and not (tmp_path / 'd.png').exists()
