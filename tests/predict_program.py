"""The predict program as a user starts it, and what it writes: for tests."""
import csv
import os
import signal
import subprocess
import sys

import numpy as np

from timm_arl.isic import LABELS


def rows(out):
    with open(out / 'predictions.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def values(found):
    return np.array([[float(row[label]) for label in LABELS] for row in found])


def env(**changes):
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), **changes}


def hears_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job ignores


def start(*args, processes=0, **kwargs):
    """The program as a user starts it, alone or as several processes."""
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)] if processes else []
    kwargs.setdefault('preexec_fn', hears_ctrl_c)
    return subprocess.Popen(
        [sys.executable, *several, '-m', 'timm_arl.predict', *map(str, args)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=env(OMP_NUM_THREADS='1'), **kwargs)


def run(*args, processes=0, stdin=None, **kwargs):
    process = start(*args, processes=processes, stdin=subprocess.PIPE, **kwargs)
    stdout, stderr = process.communicate(stdin, timeout=280)
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)
