"""One row of throughput.py: a model in a process of its own, which times its step and measures its memory when told.

The first argument is the row's specification as JSON. Each line of stdin is a command (`repeat` or `memory`), each line
of stdout the reply as JSON.
"""
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import accelerate
import timm
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.flop_counter import FlopCounterMode

import timm_arl
from timm_arl import kernels
from timm_arl.attention import alphas_of
from timm_arl.export import OnnxModel, export_onnx, fold_batch_norm, quantize_onnx
from timm_arl.files import git_commit
from timm_arl.machine import processor_name

ONNX = 'onnx', 'int8'  # backends of ONNX Runtime, which has an allocator of its own


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: the words of PyTorch's allocators, of CUDA's libraries and of C++."""
    return isinstance(error, MemoryError) or bool(re.search(
        r'out[ _]?of[ _]?memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|bad[_ ]alloc'
        r'|(CUBLAS|CUDNN)_STATUS_NOT_INITIALIZED', str(error), re.IGNORECASE))  # a handle needs memory too


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def seconds(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Mean seconds of a run over `times` consecutive runs; on CUDA from CUDA events."""
    synchronize(device)
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        synchronize(device)
        return start.elapsed_time(end) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def step_times(step: Callable[[], Any], times: int, spec: Dict[str, Any], device: torch.device) -> List[float]:
    """Seconds of a repetition: the mean of its steps; for latency those of each step, as the caller's clock sees it."""
    if spec['mode'] != 'latency':
        return [seconds(step, times, device)]
    step()  # not counted: another row has had the caches meanwhile
    found = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def steps_per_repetition(step: Callable[[], Any], spec: Dict[str, Any], device: torch.device) -> int:
    """Number of steps that take about the seconds asked for, 1 to 100 (latency: 10 to 100), from one after warm-up."""
    for _ in range(3 if spec['compile'] else 1):  # the first compiles, and CUDA graphs record in the second and third
        step()
    once = [seconds(step, 1, device)]
    broadcast_object_list(once)  # all processes repeat a step as often as the first
    return max(10 if spec['mode'] == 'latency' else 1, min(100, round(spec['seconds'] / once[0])))


def gate_kernels(step: Callable[[], Any], owned: List[Any], spec: Dict[str, Any]) -> Optional[str]:
    """The kernels of a model's gates, such as 'native' or 'native+torch', by one step.

    None for a model without a gate, or where a compiler or ONNX Runtime makes the gate itself.
    """
    if spec['compile'] or not owned:
        return None
    model, found = owned[0], set()
    blocks = [model.get_submodule(name.rpartition('.')[0]) for name in alphas_of(model)]
    hooks = [block.register_forward_hook(  # its output has the shape, type and memory format of F
        lambda module, inputs, output: found.add(kernels.backend(output.detach()))) for block in blocks]
    step()
    for hook in hooks:
        hook.remove()
    return '+'.join(sorted(found)) or None


def make_step(spec: Dict[str, Any], accelerator: Accelerator) -> Tuple[Callable[[], Any], List[Any]]:
    """The step to repeat, and the model and optimizer that it owns."""
    size = (spec['batch_size'], 3, spec['img_size'], spec['img_size'])
    memory_format = torch.channels_last if spec['channels_last'] else torch.contiguous_format
    latency = spec['mode'] == 'latency'
    x = torch.randn(size, device='cpu' if latency else accelerator.device).contiguous(memory_format=memory_format)
    model = timm.create_model(spec['model']).to(memory_format=memory_format)
    model.train(spec['mode'] == 'train')
    if spec['backend'] != 'eager':
        model = fold_batch_norm(model)
    if spec['backend'] in ONNX:
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(model, Path(folder, 'float.onnx'), spec['img_size'])
            if spec['backend'] == 'int8':
                noise = torch.randn(4, *size[1:]).numpy()  # speed does not depend on the ranges
                path = quantize_onnx(path, Path(folder, 'int8.onnx'), [noise])
            network = OnnxModel(path, threads=torch.get_num_threads())
        images = x.contiguous().numpy()
        return lambda: network(images), []
    if spec['mode'] != 'train':
        model = accelerator.prepare(model) if accelerator.mixed_precision != 'no' else model.to(accelerator.device)
        if spec['compile']:
            model = torch.compile(model, mode=spec['compile_mode'])

        def infer():
            with torch.inference_mode():  # latency: from the host's memory and back to it
                return model(x.to(accelerator.device)).cpu() if latency else model(x)
        return infer, [model]
    target = torch.randint(model.num_classes, size[:1], device=accelerator.device)
    if spec['compile']:
        model = torch.compile(model, mode=spec['compile_mode'])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss_fn = nn.CrossEntropyLoss()

    def train():
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        accelerator.backward(loss)
        optimizer.step()
        return loss
    return train, [model, optimizer]


def macs_and_activations(spec: Dict[str, Any]) -> Dict[str, Any]:
    """For one image, from the eager and unfolded network; throughput.py says what is counted."""
    model = timm.create_model(spec['model']).eval()
    outputs = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output.numel()))
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        model(torch.randn(1, 3, spec['img_size'], spec['img_size']))
    return {
        'param_count': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        'infer_gmacs': round(flops.get_total_flops() / 2e9, 3), 'infer_macts': round(sum(outputs) / 1e6, 3),
    }


def tensors_of(owned: List[Any]) -> List[torch.Tensor]:
    """Parameters and buffers of a model, and the state of an optimizer."""
    tensors: List[torch.Tensor] = []
    for item in owned:
        if isinstance(item, nn.Module):
            tensors += [*item.parameters(), *item.buffers()]
        else:
            tensors += [t for state in item.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return tensors


def memory(
        step: Callable[[], Any],
        owned: List[Any],
        spec: Dict[str, Any],
        accelerator: Accelerator,
) -> Dict[str, Any]:
    """Peak of PyTorch's allocator in one step, what autograd saves, peak of the process, in MB of 10^6 bytes."""
    result: Dict[str, Any] = {}
    device = accelerator.device
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        # a CUDA graph replays in a pool reserved when it was recorded, and allocates nothing
        graphs = spec['compile'] and spec['compile_mode'] != 'default'
        result['peak_memory_mb'] = (
            torch.cuda.max_memory_reserved(device) if graphs else torch.cuda.max_memory_allocated(device)) / 1e6
    elif device.type == 'mps':
        step()
        result['peak_memory_mb'] = torch.mps.driver_allocated_memory() / 1e6
    elif spec['backend'] not in ONNX:
        own = sum(t.nbytes for t in tensors_of(owned)) + sum(
            p.grad.nbytes for t in owned if isinstance(t, nn.Module) for p in t.parameters() if p.grad is not None)
        own += spec['batch_size'] * 3 * spec['img_size'] ** 2 * 4
        kernels.release_scratch()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        held = highest = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        result['peak_memory_mb'] = (own + highest) / 1e6
    if spec['mode'] == 'train' and not spec['compile']:
        parameters = {t.untyped_storage().data_ptr() for t in tensors_of(owned)}
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step()
        result['saved_memory_mb'] = sum(s.nbytes() for p, s in kept.items() if p not in parameters) / 1e6
    if os.name == 'posix':
        import resource
        unit = 1 if sys.platform == 'darwin' else 1024
        result['peak_rss_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return {k: round(v, 1) for k, v in result.items()}


def serve(spec: Dict[str, Any], reply: Callable[[Dict[str, Any]], None]) -> None:
    accelerator = Accelerator(
        cpu=spec['device'] == 'cpu', mixed_precision={'fp32': 'no'}.get(spec['precision'], spec['precision']))
    if spec['threads']:
        torch.set_num_threads(spec['threads'])
    torch.backends.cudnn.benchmark = spec['cudnn_benchmark']
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = spec['tf32']
    set_seed(spec['seed'])
    facts = macs_and_activations(spec)
    step, owned = make_step(spec, accelerator)
    gate = gate_kernels(step, owned, spec)
    times = steps_per_repetition(step, spec, accelerator.device)
    cuda = accelerator.device.type == 'cuda'
    reply(dict(
        facts, kernels=gate, steps=times, threads=torch.get_num_threads(), processes=accelerator.num_processes,
        device=processor_name(accelerator.device),
        tf32=spec['tf32'] if cuda else None, cudnn_benchmark=spec['cudnn_benchmark'] if cuda else None,
        versions=f'timm_arl {timm_arl.__version__}, timm {timm.__version__}, torch {torch.__version__}, '
                 f'accelerate {accelerate.__version__}',
        commit=git_commit(__file__)))
    for line in sys.stdin:
        if line == 'repeat\n':
            reply({'step_times': step_times(step, times, spec, accelerator.device)})
        elif line == 'memory\n':
            reply(memory(step, owned, spec, accelerator))


def main() -> None:
    replies = sys.stdout

    def reply(message: Dict[str, Any]) -> None:
        replies.write(json.dumps(message) + '\n')
        replies.flush()

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not mix with the replies
        try:
            serve(json.loads(sys.argv[1]), reply)
        except Exception as e:  # whatever it is, the process that waits for an answer has to be told
            reply({'error': f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}',
                   'out_of_memory': out_of_memory(e)})


if __name__ == '__main__':
    sys.stdout = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # libraries in C print past sys.stdout: ONEDNN_VERBOSE=1, for one
    main()
