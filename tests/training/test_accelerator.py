"""What a machine can do, and what it is told."""
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from timm_arl.training.accelerator import create_accelerator
from timm_arl.training.arguments import RunError


@pytest.fixture
def args():
    yield SimpleNamespace(
        tracker='none', gradient_accumulation_steps=None, mixed_precision='no', workers=1000, cpu_threads=1)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_no_more_workers_than_the_machine_can_use(args, capsys):
    create_accelerator(args)
    assert 1 <= args.workers < 1000 and '--workers 1000 is too many for' in capsys.readouterr().out
    args.workers = 4
    create_accelerator(args)
    assert args.workers == 4 and not capsys.readouterr().out


def test_half_precision_needs_an_accelerator(args):
    import torch
    if torch.accelerator.is_available():
        pytest.skip('has an accelerator')
    args.mixed_precision = 'fp16'
    with pytest.raises(RunError, match='fp16 does not work on a CPU: choose bf16 or no'):
        create_accelerator(args)
