"""A program of ours in processes of its own, for what is killed or is several, without the seconds that imports take.

Python's server of forks imports what the programs need and computes nothing, so that whatever it forks may compute.
"""
import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from pathlib import Path

import psutil

BENCHMARKS = Path(__file__).resolve().parents[1] / 'benchmarks'
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload([
    'timm_arl.predict', 'timm_arl.training.images', 'timm_arl.training.networks', 'timm_arl.training.runs'])


def main(program, args, cwd, environment, files):
    import torch

    multiprocessing.set_start_method(None, force=True)  # what it starts itself is started as usual
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = [f'{program}.py', *args]
    sys.exit(importlib.import_module(program).main())


def end(folder, processes):
    for process in processes:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


class Forked:
    """A program that has been started, as one process or, as torchrun does it, as several."""

    def __init__(self, program, *args, cwd='.', processes=1):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            several = dict(WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=free.getsockname()[1])
        folder, self._files, self.processes = tempfile.mkdtemp(), [], []
        weakref.finalize(self, end, folder, self.processes)  # also where a test failed
        for rank in range(processes):
            files = [Path(folder, f'{name}-{rank}') for name in ('stdout', 'stderr')]
            for file in files:
                file.touch()
            environment = dict(several, RANK=rank, LOCAL_RANK=rank) if processes > 1 else {}
            self._files.append(files)
            process = server.Process(target=main, args=(
                program, list(map(str, args)), str(cwd), {name: str(value) for name, value in environment.items()},
                files))
            process.start()
            self.processes.append(process)

    @property
    def stdout(self):
        """What it has said so far."""
        return ''.join(out.read_text() for out, _ in self._files)

    @property
    def stderr(self):
        return ''.join(err.read_text() for _, err in self._files)

    @property
    def returncode(self):
        """None while it runs; of several processes, that of the first that failed."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout=200):
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(self.stderr)
        return self

    def kill(self):
        """SIGKILL for all processes, those that they have started too."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in psutil.Process(process.pid).children(recursive=True):
                    each.kill()
            process.kill()
        for process in self.processes:
            process.join()
