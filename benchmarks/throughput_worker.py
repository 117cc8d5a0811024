"""One row of throughput.py: a model in a process of its own, told over stdin when to run and when to weigh itself."""
import json
import os
import platform
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

import accelerate
import timm
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.flop_counter import FlopCounterMode

import timm_arl
from timm_arl import kernels
from timm_arl.export import OnnxModel, fold_batch_norm
from timm_arl.files import git_commit

SECONDS = 0.5  # a repetition takes at least about this long, by repeating its step


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'allocate memory' in str(error)


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def seconds(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds for one of ``times`` runs in a row; on CUDA by its own events."""
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


def make_step(spec: Dict[str, Any], accelerator: Accelerator) -> Tuple[Callable[[], Any], List[Any]]:
    """The step to repeat, and the model and optimizer that it owns."""
    size = (spec['batch_size'], 3, spec['img_size'], spec['img_size'])
    memory_format = torch.channels_last if spec['channels_last'] else torch.contiguous_format
    x = torch.randn(size, device=accelerator.device).contiguous(memory_format=memory_format)
    model = timm.create_model(spec['model']).to(memory_format=memory_format)
    model.train(spec['mode'] == 'train')
    if spec['backend'] != 'eager':
        model = fold_batch_norm(model)
    if spec['backend'] == 'onnx':
        network = OnnxModel.of(model, spec['img_size'], threads=torch.get_num_threads())
        images = x.contiguous().numpy()
        return lambda: network(images), []
    if spec['mode'] == 'infer':
        model = accelerator.prepare(model) if accelerator.mixed_precision != 'no' else model.to(accelerator.device)
        if spec['compile']:
            model = torch.compile(model, mode=spec['compile_mode'])

        def infer():
            with torch.inference_mode():
                return model(x)
        return infer, [model]
    if spec['compile']:
        model = torch.compile(model, mode=spec['compile_mode'])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss_fn = nn.CrossEntropyLoss()
    target = torch.randint(1000, size[:1], device=accelerator.device)

    def train():
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        accelerator.backward(loss)
        optimizer.step()
        return loss
    return train, [model, optimizer]


def macs_and_activations(spec: Dict[str, Any]) -> Dict[str, Any]:
    """Of one image, from the network as it is (eager, not folded): see the words at the top of throughput.py."""
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
    """What one step takes of PyTorch's allocator, what autograd keeps, and the peak of the process, in MB of 10^6."""
    result: Dict[str, Any] = {}
    device = accelerator.device
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        step()
        result['peak_memory_mb'] = torch.cuda.max_memory_allocated(device) / 1e6
    elif device.type == 'mps':
        step()
        result['peak_memory_mb'] = torch.mps.driver_allocated_memory() / 1e6
    elif spec['backend'] != 'onnx':  # which has an allocator of its own
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


def main() -> None:
    spec = json.loads(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the replies

    def reply(message: Dict[str, Any]) -> None:
        replies.write(json.dumps(message) + '\n')
        replies.flush()

    try:
        accelerator = Accelerator(
            cpu=spec['device'] == 'cpu', mixed_precision={'fp32': 'no'}.get(spec['precision'], spec['precision']))
        if spec['threads']:
            torch.set_num_threads(spec['threads'])
        set_seed(spec['seed'])
        facts = macs_and_activations(spec)
        step, owned = make_step(spec, accelerator)
        seconds(step, 1, accelerator.device)
        once = [seconds(step, 1, accelerator.device)]
        broadcast_object_list(once)  # all processes repeat a step as often as the first
        times = max(1, min(100, round(SECONDS / once[0])))
        device = torch.cuda.get_device_name() if accelerator.device.type == 'cuda' else cpu_name()
        reply(dict(
            facts, threads=torch.get_num_threads(), processes=accelerator.num_processes, device=device,
            versions=f'timm_arl {timm_arl.__version__}, timm {timm.__version__}, torch {torch.__version__}, '
                     f'accelerate {accelerate.__version__}',
            commit=git_commit(__file__)))
        for line in sys.stdin:
            if line == 'repeat\n':
                reply({'step_time': seconds(step, times, accelerator.device)})
            elif line == 'memory\n':
                reply(memory(step, owned, spec, accelerator))
    except Exception as e:  # whatever it is, the process that waits for an answer has to be told
        reply({'error': f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}',
               'out_of_memory': out_of_memory(e)})


def cpu_name() -> str:
    """The processor and what of it PyTorch uses, such as 'AMD EPYC (2 cores, AVX2)'."""
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo') as f:
            name = next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return f'{name} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})'


if __name__ == '__main__':
    main()
