"""What a machine can do, and what it is told."""
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState

from timm_arl.training.accelerator import Bf16Convolutions, create_accelerator
from timm_arl.training.arguments import RunError


@pytest.fixture
def args():
    yield SimpleNamespace(
        tracker='none', gradient_accumulation_steps=None, mixed_precision='no', workers=1000, cpu_threads=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    Bf16Convolutions.leave()


def test_no_more_workers_than_the_machine_can_use(args, capsys):
    create_accelerator(args)
    assert 1 <= args.workers < 1000 and '--workers 1000 is too many for' in capsys.readouterr().out
    args.workers = 4
    create_accelerator(args)
    assert args.workers == 4 and not capsys.readouterr().out


def test_half_precision_needs_an_accelerator(args):
    if torch.accelerator.is_available():
        pytest.skip('has an accelerator')
    args.mixed_precision = 'fp16'
    with pytest.raises(RunError, match='fp16 does not work on a CPU: choose bf16 or no'):
        create_accelerator(args)


@pytest.mark.parametrize('kind', ['DEEPSPEED', 'FSDP', 'MEGATRON_LM'])
def test_parallelism_that_divides_the_network_is_refused(args, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, 'distributed_type', DistributedType(kind))
    with pytest.raises(RunError, match=f'configured for {kind}, .* choose plain data parallelism'):
        create_accelerator(args)


def test_bf16_convolutions_round_as_bf16_instructions_do():
    """Operands and results are rounded to bf16, sums are not: against sums in float64, forward and backward."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 64, 9, 9), torch.randn(8, 64, 3, 3), torch.randn(8)
    given = torch.randn(2, 8, 9, 9).bfloat16()

    def results(x, w, b, dtype):
        x, w, b = (t.to(dtype).requires_grad_() for t in (x, w, b))
        y = torch.nn.functional.conv2d(x, w, bias=b, padding=1)
        y.backward(given.to(y.dtype))
        return y.detach(), x.grad, w.grad, b.grad

    exact = [t.bfloat16() for t in results(*(t.bfloat16() for t in (x, w, b)), torch.float64)]
    with Bf16Convolutions(), torch.autocast('cpu', torch.bfloat16):
        y, *grads = results(x, w, b, torch.float32)
    assert y.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)
    for mine, theirs in zip((y, *grads), exact):
        assert torch.equal(mine, mine.bfloat16().to(mine.dtype))
        assert (mine.bfloat16() == theirs).float().mean() > 0.98  # the rest is one step off, by the order of the sum
        torch.testing.assert_close(mine.bfloat16(), theirs, rtol=2**-7, atol=1e-4)
    with Bf16Convolutions():  # float32 stays float32, and autocast leaves float64 alone
        y, *_ = results(x, w, b, torch.float32)
        with torch.autocast('cpu', torch.bfloat16):
            assert results(x, w, b, torch.float64)[0].dtype == torch.float64
    assert y.dtype == torch.float32 and torch.equal(y, results(x, w, b, torch.float32)[0])


def test_a_cpu_without_bf16_instructions_says_so(args, capsys):
    if torch.accelerator.is_available():
        pytest.skip('has an accelerator')
    args.mixed_precision = 'bf16'
    create_accelerator(args)
    assert ('no bf16 instructions' in capsys.readouterr().out) == Bf16Convolutions.needed()
