"""Devices, processes, precision and trackers, by Accelerate."""
import os
import threading

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin
from torch.overrides import TorchFunctionMode

from ..kernels import problem
from .arguments import RunError

__all__ = ['Bf16Convolutions', 'create_accelerator']


class Bf16Convolutions(TorchFunctionMode):
    """2-d bf16 convolutions of autocast on a CPU, computed as CPUs with bf16 instructions do it.

    Operands are rounded to bf16, products are summed in float32, and the sum is rounded once, forward and backward.
    Without such instructions PyTorch's own kernels do the same many times more slowly (docs/performance.md). A mode is
    not active during backward: do not use it with gradient checkpointing.
    """

    _entered = threading.local()

    @staticmethod
    def needed():
        return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @classmethod
    def enter(cls):
        """Use them from here on, in this thread."""
        if not getattr(cls._entered, 'mode', None):
            cls._entered.mode = cls()
            cls._entered.mode.__enter__()

    @classmethod
    def leave(cls):
        """Undo enter."""
        if getattr(cls._entered, 'mode', None):
            cls._entered.mode.__exit__(None, None, None)
            cls._entered.mode = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (func is not torch.conv2d or not torch.is_autocast_enabled('cpu')
                or torch.get_autocast_dtype('cpu') != torch.bfloat16
                or any(torch.is_tensor(value) and value.dtype not in (torch.float32, torch.bfloat16)
                       for value in (*args, *kwargs.values()))):
            return func(*args, **kwargs)

        def rounded(value):
            return value.bfloat16().float() if torch.is_tensor(value) else value
        with torch.autocast('cpu', enabled=False):
            return func(*map(rounded, args), **{name: rounded(value) for name, value in kwargs.items()}).bfloat16()


def create_accelerator(args):
    """The Accelerator of a program; args.workers and args.cpu_threads become what this machine can use.

    Raises:
        RunError: A configuration that does not work here.
    """
    # a bare Accelerator() on a machine without an accelerator forms no process group
    on_cpu = not torch.accelerator.is_available()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.tracker not in ('none', *trackers):
        raise RunError(f'Accelerate has no tracker {args.tracker} here (it has {", ".join(trackers)}): install its '
                       f'package, or pass --tracker none.')
    if problem():
        raise RunError(problem())
    steps = args.gradient_accumulation_steps
    try:
        accelerator = Accelerator(
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps) if steps else None,
            mixed_precision=args.mixed_precision, cpu=on_cpu and int(os.environ.get('WORLD_SIZE', 1)) > 1,
            log_with=None if args.tracker == 'none' else args.tracker, project_dir='.')  # until out is known
    except ValueError as error:  # fp16 on mps, for one
        raise RunError(f'Accelerate refuses this configuration: {error}') from error
    if accelerator.num_processes != int(os.environ.get('WORLD_SIZE', 1)):
        raise RunError(f'{os.environ["WORLD_SIZE"]} processes were launched, but Accelerate sees '
                       f'{accelerator.num_processes}: launch with --multi_gpu, or with torchrun.')
    kind = accelerator.distributed_type.value
    if kind != 'NO' and not kind.startswith('MULTI_'):
        raise RunError(f'Accelerate is configured for {kind}, which this program does not support: choose plain data '
                       f'parallelism (accelerate config), or pass --config_file to accelerate launch.')
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':  # Accelerate would use float32
        raise RunError('Mixed precision fp16 does not work on a CPU: choose bf16 or no.')
    if accelerator.mixed_precision == 'bf16' and accelerator.device.type == 'cpu' and Bf16Convolutions.needed():
        Bf16Convolutions.enter()
        accelerator.print('This CPU has no bf16 instructions: its convolutions round to bf16 and sum in float32. '
                          'Expect no gain over --mixed-precision no.')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    most = max(2 * cores, 8)
    if args.workers > most:
        accelerator.print(f'--workers {args.workers} is too many for {cores} cores: starting {most}.')
        args.workers = most
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    elif on_cpu and launched and accelerator.num_processes == 1 and torch.get_num_threads() == 1 < cores:
        torch.set_num_threads(cores)
        accelerator.print(f'OMP_NUM_THREADS is 1, which accelerate launch sets where nobody did: using all {cores} '
                          f'cores instead (--cpu-threads 1 keeps one).')
    args.cpu_threads = torch.get_num_threads()  # the sums of a resumed run must be split in the same way
    return accelerator
