"""What a figure was measured on, and how much memory there is."""
import contextlib
import os
import platform
import re
from pathlib import Path

import torch

__all__ = ['available_memory', 'processor_name']

CPUINFO = '/proc/cpuinfo'
BF16 = {'avx512_bf16': 'AVX512-BF16', 'amx_bf16': 'AMX'}  # by its flags


def processor_name(device: torch.device) -> str:
    """The GPU; or the CPU and what of it PyTorch uses: 'AMD EPYC (2 cores, AVX2)', with its bf16 instructions.

    Of other devices the kind, and the CPU: 'mps, arm (8 cores, DEFAULT)'.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name, abilities = platform.processor() or platform.machine(), [torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError), open(CPUINFO) as f:
        about = f.read()
        name = next(iter(re.findall(r'^model name\s*: (.*)$', about, re.MULTILINE)), name)
        if abilities == ['AVX512']:  # and not told to use less
            abilities += [word for flag, word in BF16.items() if re.search(rf'\b{flag}\b', about)]
    if device.type != 'cpu':
        name = f'{device.type}, {name}'
    return f'{name} ({os.cpu_count()} cores, {", ".join(abilities)})'


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container or batch job if that has a limit."""
    import psutil  # of the extra train

    found = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():  # control groups of Linux
            _, controllers, group = line.split(':', 2)
            if controllers and 'memory' not in controllers.split(','):
                continue
            root = f'/sys/fs/cgroup{"/memory" * bool(controllers)}{group}'
            for folder in (Path(root), *Path(root).parents):
                found = min(found, _below_limit(folder, found))
    return found


def _below_limit(folder: Path, otherwise: int) -> int:
    for limit, used, cache in (('memory.max', 'memory.current', 'inactive_file'),
                               ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')):
        with contextlib.suppress(OSError, ValueError):  # there is no such group, or 'max', which is no limit
            most = int((folder / limit).read_text())
            given_back = re.search(rf'^{cache} (\d+)$', (folder / 'memory.stat').read_text(), re.MULTILINE)
            return max(most - int((folder / used).read_text()) + int(given_back[1] if given_back else 0), 0)
    return otherwise
