"""A program of ours in this process, for what needs no process of its own: a tenth of the time."""
import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / 'benchmarks'


def run_here(program, *args, cwd=None):
    """What a program's main() said and returned.

    Arguments, paths, folder, threads and what Accelerate remembers are as before afterwards; random numbers are not.
    """
    import torch
    from accelerate.state import AcceleratorState

    from timm_arl.training.accelerator import Bf16Convolutions

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8', newline='', write_through=True) for _ in range(2))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, 'argv', [str(BENCHMARKS / f'{program}.py'), *map(str, args)])
        if cwd is not None:
            patch.chdir(cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = importlib.import_module(program).main()
        except SystemExit as stopped:
            status = stopped.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            Bf16Convolutions.leave()
            torch.set_num_threads(threads)
    said = (stream.buffer.getvalue().decode() for stream in (out, err))
    return SimpleNamespace(returncode=status or 0, **dict(zip(('stdout', 'stderr'), said)))
