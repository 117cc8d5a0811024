"""Speed and memory of timm models beside their peers, in inference and training.

    python benchmarks/throughput.py --models resnet50 arl_cnn50 seresnet50 --mode infer train --results-file F.csv

Each row is a process of its own, so that none inherits the memory or the caches of another. The rows of one setting run
side by side: one repetition of the first model, one of the second, and so on, then again, in an order that turns round
each time; and all of it again in `--restarts` fresh sets of processes, since where a process finds its memory is luck
that can outweigh what is measured. A row's `ratio` is the median, over the repetitions, of its time divided by that of
the first model in the same repetition; its `spread` is the distance between the quartiles of its own times, divided by
their median.

Autocast is used for bf16 and fp16. `infer_gmacs` are those of torch.utils.flop_counter: convolutions and matrix
products; normalisations, activations, pooling and the gate's own arithmetic are not in it. `infer_macts` are the
outputs of convolutions and linear layers. `peak_memory_mb` is the most that PyTorch's allocator held during one step,
weights included; `saved_memory_mb` is what autograd keeps for the backward pass (eager mode), `peak_rss_mb` the peak of
the whole process. With `accelerate launch` each process drives a device: samples are those of all, times those of the
first.
"""
import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

from timm_arl.extras import missing, require

require('train', __name__)

from throughput_report import bar_chart, growth_table, markdown_table
from tqdm import tqdm

from timm_arl.files import replacing, write_json

COLUMNS = [
    'model', 'mode', 'infer_samples_per_sec', 'infer_step_time', 'infer_batch_size', 'infer_img_size', 'infer_gmacs',
    'infer_macts', 'train_samples_per_sec', 'train_step_time', 'train_batch_size', 'train_img_size', 'param_count',
    'spread', 'relative_to', 'ratio', 'peak_memory_mb', 'saved_memory_mb', 'peak_rss_mb', 'precision', 'backend',
    'compile', 'channels_last', 'repetitions', 'threads', 'processes', 'device', 'versions', 'commit',
]


class Failed(Exception):
    """A row that could not be measured; ``out_of_memory`` if less of it might be."""

    def __init__(self, message: str, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Row:
    """A model in a process of its own, which runs a repetition when told to."""

    def __init__(self, spec: Dict[str, Any], index: int):
        port = int(os.environ.get('MASTER_PORT', 29500)) + 1 + index
        env = dict(  # the processes of a row meet at a port of their own; the profiler's messages are not ours
            os.environ, TORCHELASTIC_USE_AGENT_STORE='False', MASTER_PORT=str(port), KINETO_LOG_LEVEL='99',
            TORCH_CPP_LOG_LEVEL='ERROR')
        self.spec = spec
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('throughput_worker.py')), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.times: List[float] = []

    def answer(self) -> Dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise Failed(f'{self.spec["model"]}: its process ended with status {status}.', out_of_memory=status == -9)
        message = json.loads(line)
        if 'error' in message:
            raise Failed(f'{self.spec["model"]}: {message["error"]}', message['out_of_memory'])
        return message

    def repeat(self) -> None:
        self.process.stdin.write('repeat\n')
        self.process.stdin.flush()
        self.times.append(self.answer()['step_time'])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'arl_cnn50', 'seresnet50'], metavar='NAME',
                        help='timm models; ratios are to the first')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda', 'mps'], help='where to run')
    parser.add_argument('--mode', nargs='+', default=['infer'], choices=['infer', 'train'],
                        help='inference; or a training step: forward, loss, backward and SGD')
    parser.add_argument('--precision', nargs='+', default=['fp32'], choices=['fp32', 'bf16', 'fp16'],
                        help='fp32, or autocast to bf16 or fp16')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[8], metavar='N', help='images a step')
    parser.add_argument('--img-size', nargs='+', type=int, default=[224], metavar='PX', help='side of the images')
    parser.add_argument('--backend', nargs='+', default=['eager'], choices=['eager', 'folded', 'onnx'],
                        help='inference: as it is, with BatchNorm folded into the convolutions, or by ONNX Runtime '
                             '(folded; needs the extra `export`; CPU)')
    parser.add_argument('--compile', action='store_true', help='torch.compile (needs a C++ compiler on a CPU)')
    parser.add_argument('--compile-mode', default='default', choices=['default', 'reduce-overhead', 'max-autotune'],
                        help='mode of torch.compile; reduce-overhead uses CUDA graphs')
    parser.add_argument('--channels-last', action=argparse.BooleanOptionalAction, default=True,
                        help='memory format of weights and images')
    parser.add_argument('--repetitions', type=int, default=5, help='measured rounds of a set of processes')
    parser.add_argument('--restarts', type=int, default=3, help='fresh sets of processes')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before those')
    parser.add_argument('--threads', type=int, default=0, help='threads of PyTorch on a CPU, 0 for its default')
    parser.add_argument('--seed', type=int, default=0, help='of weights and images')
    parser.add_argument('--resume', action='store_true', help='keep the settings that the results file already holds')
    parser.add_argument('--results-file', default='throughput.csv',
                        help='CSV to write; the same name with .json, .md and .png holds the rest')
    args = parser.parse_args()
    for name in ('batch_size', 'img_size'):
        if min(getattr(args, name)) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1.')
    if min(args.repetitions, args.restarts) < 1 or args.warmup < 0 or args.threads < 0:
        parser.error('--repetitions and --restarts must be at least 1, --warmup and --threads at least 0.')
    if Path(args.results_file).suffix != '.csv':
        parser.error(f'--results-file must end in .csv: {args.results_file}')
    if len(set(args.models)) < len(args.models):
        parser.error('--models names a model twice.')
    if args.backend != ['eager'] and ('train' in args.mode or args.compile):
        parser.error('--backend folded and onnx are for --mode infer, without --compile.')
    if 'onnx' in args.backend and (args.device != 'cpu' or args.precision != ['fp32']):
        parser.error('--backend onnx runs with --device cpu --precision fp32.')
    return args


def refusal(args: argparse.Namespace) -> str:
    """Why this machine cannot run what was asked for, or ''."""
    import timm
    import torch

    import timm_arl  # noqa: F401 (registers the models)
    for name in args.models:
        if not timm.is_model(name):
            return f'timm has no model named {name!r}; timm.list_models() lists those it has.'
    available = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available, 'cpu': lambda: True}
    if not available[args.device]():
        return f'PyTorch finds no {args.device} device here; --device cpu always runs.'
    return missing('export') if 'onnx' in args.backend else ''


def measure(specs: List[Dict[str, Any]], args: argparse.Namespace, bar: tqdm) -> List[Dict[str, Any]]:
    """The rows of one setting, side by side; a smaller batch for all of them where memory is short."""
    from timm.utils import decay_batch_step
    rows: List[Row] = []
    series: List[List[float]] = [[] for _ in specs]
    try:
        for restart in range(args.restarts):
            bar.set_postfix_str('{mode} {precision} {batch_size} x {img_size}'.format(**specs[0]))
            rows = [Row(spec, index) for index, spec in enumerate(specs)]
            facts = [row.answer() for row in rows]
            for repetition in range(args.warmup + args.repetitions):
                for row in rows if (restart + repetition) % 2 == 0 else rows[::-1]:
                    row.repeat()
            for row, fact, times in zip(rows, facts, series):
                times += row.times[args.warmup:]
                if restart == args.restarts - 1:
                    row.process.stdin.write('memory\n')
                    row.process.stdin.flush()
                    fact.update(row.answer())
                row.close()
    except Failed as e:
        batch_size = decay_batch_step(specs[0]['batch_size'])
        if not e.out_of_memory or not batch_size or int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise
        tqdm.write(f'{e} Trying all models of this setting with a batch of {batch_size}.')
        for row in rows:
            row.close()
        return measure([dict(spec, batch_size=batch_size) for spec in specs], args, bar)
    finally:
        for row in rows:
            row.close()
    results = []
    reference = series[0]
    for spec, fact, times in zip(specs, facts, series):
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times * 3)
        mode = spec['mode']
        results.append({
            'model': spec['model'], 'mode': mode,
            f'{mode}_samples_per_sec': round(spec['batch_size'] * fact['processes'] / median, 2),
            f'{mode}_step_time': round(median * 1e3, 3), f'{mode}_batch_size': spec['batch_size'],
            f'{mode}_img_size': spec['img_size'], 'spread': round((high - low) / median, 4),
            'relative_to': f'{specs[0]["model"]} {specs[0]["backend"]}',
            'ratio': round(statistics.median(a / b for a, b in zip(times, reference)), 4),
            'precision': spec['precision'], 'backend': spec['backend'], 'compile': spec['compile'],
            'channels_last': spec['channels_last'], 'repetitions': len(times), **fact,
        })
    return results


def write_results(path: Path, rows: List[Dict[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, 'w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    write_json(path.with_suffix('.json'), {'command': [Path(sys.argv[0]).name, *sys.argv[1:]], 'rows': rows})
    with replacing(path.with_suffix('.md')) as temporary:
        temporary.write_text(markdown_table(rows) + growth_table(rows))
    bar_chart(rows, path.with_suffix('.png'))


def main() -> int:
    args = parse_args()
    message = refusal(args)
    if message:
        print(f'throughput.py: error: {message}', file=sys.stderr)
        return 2
    main_process = int(os.environ.get('RANK', 0)) == 0
    path = Path(args.results_file)
    results: List[Dict[str, Any]] = []
    if args.resume and path.with_suffix('.json').exists():
        results = json.loads(path.with_suffix('.json').read_text())['rows']
    path.parent.mkdir(parents=True, exist_ok=True)

    settings = list(itertools.product(args.mode, args.precision, args.img_size, args.batch_size))
    bar = tqdm(settings, unit='setting', disable=not main_process)
    for mode, precision, img_size, batch_size in bar:
        specs = [dict(
            model=model, backend=backend, mode=mode, precision=precision, img_size=img_size, batch_size=batch_size,
            device=args.device, compile=args.compile, compile_mode=args.compile_mode, threads=args.threads,
            channels_last=args.channels_last, seed=args.seed,
        ) for model in args.models for backend in args.backend]
        names = {(s['model'], s['backend']) for s in specs}
        key = {'mode': mode, 'precision': precision, 'device_type': args.device, 'compile': args.compile,
               'channels_last': args.channels_last, 'repetitions': args.repetitions, 'restarts': args.restarts,
               'requested_batch_size': batch_size, f'{mode}_img_size': img_size}
        known = [r for r in results if all(r['setting'].get(k) == v for k, v in key.items())]
        if names <= {(r['model'], r['backend']) for r in known}:
            continue
        try:
            rows = measure(specs, args, bar)
        except Failed as e:
            bar.close()
            print(f'throughput.py: error: {e}', file=sys.stderr)
            return 2
        results += [dict(row, setting=key) for row in rows]
        if main_process:
            write_results(path, results)
    if main_process:
        print(markdown_table(results) + growth_table(results))
        print(f'written: {", ".join(str(path.with_suffix(s)) for s in (".csv", ".json", ".md", ".png"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
