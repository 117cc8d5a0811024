"""Runs of our programs in processes of their own, which several processes share between them."""
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Sequence, Tuple

import torch

from ...factory import tensors_sha256
from ...files import replacing
from .lines import is_stale, read_record
from .rows import Row

__all__ = ['as_begun', 'drop_stale', 'run_program', 'write_reason']

# what a launcher tells its processes, which the runs must not take for themselves
LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def run_program(program: Path, arguments: Sequence[str], lock: IO) -> Tuple[int, str]:
    """Run a program of ours. It holds the lock too, since it may outlive this process.

    Returns:
        Its exit status, and why it is not 0.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in LAUNCHER and not name.startswith(('TORCHELASTIC_', 'ACCELERATE_', 'ROLE_'))}
    if 'ACCELERATE_MIXED_PRECISION' in os.environ and environment.get('OMP_NUM_THREADS') == '1' and int(
            os.environ.get('WORLD_SIZE', 1)) == 1:
        del environment['OMP_NUM_THREADS']  # accelerate launch sets it where nobody did
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


def as_begun(folder: Path, key: str, path: str) -> str:
    """A path as the run in a folder was told it, if it is the same: as a run that goes on must be told it."""
    told = read_record(folder / 'run.json', 'arguments').get(key) if (folder / 'run.json').exists() else None
    return told if told and os.path.realpath(told) == os.path.realpath(path) else str(path)


def drop_stale(out: Path, row: Row, seed: int) -> None:
    """Remove what a row without attention has of other weights than its network has now."""
    if not row.alpha_zero_of:
        return
    folder, network = out / 'runs' / f'{row.name}-seed{seed}', out / 'runs' / f'{row.alpha_zero_of}-seed{seed}'
    scored, weights = folder / 'evaluation.json', network / 'model.safetensors'
    if is_stale(out, row, seed) or scored.is_file() and weights.is_file() and (
            read_record(scored, 'tensors_sha256') != tensors_sha256(weights)):
        print(f'{row.alpha_zero_of} was trained again, so {row.name} is scored again.', flush=True)
        old = folder.with_name(f'{folder.name}.stale')
        for there in (old, folder):
            if there.exists():
                there.replace(old)  # a folder is gone at once, or it would be taken for one that is complete
                shutil.rmtree(old)
        for ending in ('csv', 'json'):  # last, and in this order: killed before the second, they are stale still
            (out / 'predictions' / f'{folder.name}.{ending}').unlink(missing_ok=True)


def write_reason(path: Path, why: str) -> None:
    """Keep why a run was not made, for the table."""
    with replacing(path) as temporary:
        temporary.write_text(why, encoding='utf-8')
