"""What a figure was measured on."""
import contextlib
import os
import platform
import re

import torch

__all__ = ['processor_name']

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
