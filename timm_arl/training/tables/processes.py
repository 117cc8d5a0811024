"""Runs of our programs in processes of their own, which several processes share between them."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Sequence, Tuple

import torch

__all__ = ['run_program']

# what a launcher tells its processes, which the runs must not take for themselves
LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def run_program(program: Path, arguments: Sequence[str], lock: IO) -> Tuple[int, str]:
    """Run a program of ours. It holds the lock too, since it may outlive this process.

    Returns:
        Its exit status, and why it is not 0.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in LAUNCHER and not name.startswith(('TORCHELASTIC_', 'ACCELERATE_', 'ROLE_'))}
    given = os.environ.get('CUDA_VISIBLE_DEVICES')  # without it, a process sees all that there are
    devices = list(map(str, range(torch.cuda.device_count()))) if given is None else given.split(',')
    if 'LOCAL_RANK' in os.environ and len(devices) > 1:  # each process of a launcher has a GPU of its own
        environment['CUDA_VISIBLE_DEVICES'] = devices[int(os.environ['LOCAL_RANK']) % len(devices)]
    print(f'$ python benchmarks/{shlex.join([program.name, *arguments])}', flush=True)
    tail = b''
    with subprocess.Popen([sys.executable, str(program), *arguments], env=environment, stderr=subprocess.PIPE,
                          pass_fds=[lock.fileno()] * (os.name == 'posix')) as process:
        errors = process.stderr
        assert errors is not None
        try:
            for text in iter(lambda: os.read(errors.fileno(), 65536), b''):
                os.write(sys.__stderr__.fileno(), text)  # type: ignore[union-attr]
                tail = (tail + text)[-4000:]
        except KeyboardInterrupt:
            process.wait()
            raise
    if process.returncode < 0:
        return process.returncode, f'{program.name} was killed by {signal.Signals(-process.returncode).name}'
    lines = tail.decode(errors='replace').replace('\r', '\n').strip().splitlines()
    return process.returncode, lines[-1].rpartition('error: ')[2] if lines else ''
