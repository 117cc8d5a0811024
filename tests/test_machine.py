"""What is said of the machine, and how much memory a process may take."""
import psutil
import pytest
import torch

from timm_arl import machine


@pytest.mark.parametrize('files, expected', [
    ({'memory.max': '8000', 'memory.current': '5000', 'memory.stat': 'anon 1\ninactive_file 700\n'}, 3700),
    ({'memory.max': 'max', 'memory.current': '5000', 'memory.stat': ''}, 10000),
    ({'memory.limit_in_bytes': '8000', 'memory.usage_in_bytes': '9000', 'memory.stat': 'inactive_file 7\n'}, 0),
    ({}, 10000)])
def test_memory_that_a_batch_job_may_take(tmp_path, files, expected):
    """A node has more memory than a job on it: one that takes more is killed. Files that were read do not count."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert machine._below_limit(tmp_path, 10000) == expected
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize('capability, flags, described', [
    ('AVX512', 'fpu avx512f amx_bf16 amx_tile avx512_bf16', 'AVX512, AVX512-BF16, AMX)'),
    ('AVX2', 'fpu avx512f amx_bf16 amx_tile avx512_bf16', 'AVX2)'),  # as by ATEN_CPU_CAPABILITY
    ('AVX512', 'fpu avx2', 'AVX512)'), ('AVX2', None, 'AVX2)')])
def test_name_of_the_processor(monkeypatch, tmp_path, capability, flags, described):
    """Its bf16 instructions decide what the gate costs."""
    (tmp_path / 'cpuinfo').write_text(f'processor : 0\nmodel name\t: A Processor @ 2 GHz\nflags\t\t: {flags}\n')
    found = tmp_path / ('cpuinfo' if flags else 'none')
    monkeypatch.setattr(machine, 'CPUINFO', found)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    name = machine.processor_name(torch.device('cpu'))
    assert name.startswith('A Processor @ 2 GHz (') == bool(flags)
    assert name.endswith(f' cores, {described}')
