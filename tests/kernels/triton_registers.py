"""python triton_registers.py CAPABILITY...: what the Triton kernels need of a GPU, which need not be there.

Calls the kernels as fused_attention_residual does, with a compiler for the GPU of each capability (80, 90) and with
nothing to launch on: all cases for the first, every sixth for the others. Prints a line of JSON for each kernel that
would have been launched.
"""
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from timm_arl.kernels import Gate, NormState
from timm_arl.kernels.triton import gate_backward, gate_forward

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
STAGES = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def cases():
    """Shape, dtype, layout, gate and whether norms train: first what ARL-CNN50 launches, then what else may come."""
    last, first = torch.channels_last, torch.contiguous_format
    for stage in STAGES:
        yield (8, *stage), torch.float32, last, Gate('spatial', relu=True), True
        yield (128, *stage), torch.bfloat16, last, Gate('spatial', relu=True), True
    for stage in STAGES[::2]:
        for attention in ('spatial', 'channel', 'mixed'):
            yield (32, *stage), torch.float16, last, Gate(attention, 'mean1', relu=True), False
            yield (32, *stage), torch.bfloat16, first, Gate(attention, relu=True), True
    for attention in ('spatial', 'channel', 'mixed'):
        yield (4, 37, 28, 28), torch.float32, last, Gate(attention, 'mean1', add_shortcut=False), True


def main(capabilities):
    label, seen, run = None, set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
                Path(file.name).write_bytes(kernel.asm['cubin'])
                usage = subprocess.run(
                    [CUOBJDUMP, '-res-usage', file.name], check=True, capture_output=True, text=True).stdout
            registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
            print(json.dumps({
                'kernel': kernel.name, **label, 'programs': grid[0], 'P': options['P'], 'Q': options['Q'],
                'warps': options['num_warps'], 'registers': registers, 'spilled': stack}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for device, capability in enumerate(capabilities):  # Triton keeps kernels by the number of the device
        triton.runtime.driver.set_active(SimpleNamespace(
            get_current_target=partial(GPUTarget, 'cuda', capability, 32), get_current_device=partial(int, device),
            get_current_stream=lambda device: 0))
        for shape, dtype, layout, gate, training in islice(cases(), 0, None, 6 if device else 1):
            label = {'capability': capability, 'shape': shape, 'dtype': str(dtype), 'layout': str(layout),
                     'gate': gate[:2]}
            f, x, grad = (torch.empty(shape, dtype=dtype, memory_format=layout) for _ in range(3))
            norm = NormState(*torch.ones(4, shape[1]), training, 1e-5)
            y, *kept = gate_forward(f, x, torch.ones(1), gate, False)
            for shortcut_norm in (norm, None) if shape[1] == 256 else (None,):  # as a stage's first block has it
                gate_backward(
                    grad, y if gate.relu else None, f, x, torch.ones(1), norm, shortcut_norm, gate, *kept)


if __name__ == '__main__':
    main([int(capability) for capability in sys.argv[1:]])
