"""Speed and memory of timm models beside their peers, in inference and training.

    python benchmarks/throughput.py --models resnet50 arl_cnn50 seresnet50 --mode infer train --results-file F.csv

`--mode latency` times single requests: one image, and the nine crops of one image, from the pixels in the host's memory
to the logits there. `latency_p50_ms` and `latency_p95_ms` are over the single steps of all repetitions.

Each row runs in its own process and shares no memory or caches with another. The rows of one setting run side by side:
one repetition of the first model, one of the second, and so on, in an order that reverses each time. All of it is
repeated in `--restarts` new sets of processes, because where a process's memory lies can change its speed by more than
what is measured. `ratio` is the median over the repetitions of a row's time divided by the first row's time in the same
repetition. `spread` is the distance between the quartiles of a row's own times, divided by their median.

Where the rows do not fit in memory together, they are measured one at a time (`side_by_side` is then False). Where one
alone does not fit, all rows of the setting use a smaller batch.

bf16 and fp16 use autocast. fp32 on CUDA uses TF32 and cuDNN's autotuner, as timm's benchmark does; --no-tf32 and
--no-cudnn-benchmark turn them off. `kernels` are those of the gate, as timm_arl.kernels.backend says; empty without a
gate, and where torch.compile or ONNX Runtime makes the gate itself. `environment` has the environment variables that
PyTorch, OpenMP, the C library's allocator and the kernels look at.

`infer_gmacs` are those of torch.utils.flop_counter: convolutions and matrix products, without normalization,
activations, pooling and the gate's own arithmetic. `infer_macts` are the outputs of convolutions and linear layers.
`peak_memory_mb` is the peak of PyTorch's allocator during one step, weights included; with CUDA graphs (--compile-mode
reduce-overhead or max-autotune) it is what the allocator has reserved, because a graph replays in memory that was
reserved when it was recorded. `saved_memory_mb` is what autograd saves for the backward pass (not with --compile),
`peak_rss_mb` the peak of the whole process. With `accelerate launch` each process drives one device: samples are those
of all processes, times those of the first.
"""
import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Set

from timm_arl.extras import missing, require

require('train', __name__)

from throughput_report import bar_chart, columns_of, growth_table, markdown_table
from tqdm import tqdm

from timm_arl.files import check_writable, replacing, write_json, write_rows

COLUMNS = [
    'model', 'mode', 'infer_samples_per_sec', 'infer_step_time', 'infer_batch_size', 'infer_img_size', 'infer_gmacs',
    'infer_macts', 'train_samples_per_sec', 'train_step_time', 'train_batch_size', 'train_img_size', 'param_count',
    'spread', 'relative_to', 'ratio', 'peak_memory_mb', 'saved_memory_mb', 'peak_rss_mb', 'precision', 'backend',
    'compile', 'compile_mode', 'channels_last', 'tf32', 'cudnn_benchmark', 'side_by_side', 'repetitions', 'threads',
    'processes', 'device', 'versions', 'commit', 'kernels', 'latency_p50_ms', 'latency_p95_ms', 'steps',
    'environment',
]
ONNX = 'onnx', 'int8'  # backends of ONNX Runtime
# how the names of environment variables begin that change times
HEEDED = ('ATEN_', 'DNNL_', 'GOMP_', 'KMP_', 'LD_PRELOAD', 'MALLOC_', 'MKL_', 'OMP_', 'ONEDNN_', 'PYTORCH_',
          'TIMM_ARL_')


class Failed(Exception):
    """A row that could not be measured; `out_of_memory` if a smaller batch might be."""

    def __init__(self, message: str, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Row:
    """A model in its own process, which runs a repetition when told to."""

    def __init__(self, spec: Dict[str, Any], index: int):
        port = int(os.environ.get('MASTER_PORT', 29500)) + 1 + index
        env = dict(  # each row's process group has its own port; the profiler's messages are silenced
            os.environ, TORCHELASTIC_USE_AGENT_STORE='False', MASTER_PORT=str(port), KINETO_LOG_LEVEL='99',
            TORCH_CPP_LOG_LEVEL='ERROR')
        self.spec = spec
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('throughput_worker.py')), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.times: List[List[float]] = []

    def answer(self) -> Dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise Failed(f'{self.spec["model"]}: its process ended with status {status}.', out_of_memory=status == -9)
        message = json.loads(line)
        if 'error' in message:
            raise Failed(f'{self.spec["model"]}: {message["error"]}', message['out_of_memory'])
        return message

    def ask(self, command: str) -> Dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # the process has ended: answer() reports how
            self.process.stdin.write(command + '\n')
            self.process.stdin.flush()
        return self.answer()

    def repeat(self) -> None:
        self.times.append(self.ask('repeat')['step_times'])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'arl_cnn50', 'seresnet50'], metavar='NAME',
                        help='timm models; ratios are to the first')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda', 'mps'], help='device to run on')
    parser.add_argument('--mode', nargs='+', default=['infer'], choices=['infer', 'train', 'latency'],
                        help='inference; training steps: forward, loss, backward and SGD; or single requests, each '
                             'timed alone')
    parser.add_argument('--precision', nargs='+', default=['fp32'], choices=['fp32', 'bf16', 'fp16'],
                        help='fp32, or autocast to bf16 or fp16')
    parser.add_argument('--batch-size', nargs='+', type=int, default=argparse.SUPPRESS, metavar='N',
                        help='images a step (default: 8; latency: 1, and 9 for the crops of an image)')
    parser.add_argument('--img-size', nargs='+', type=int, default=[224], metavar='PX', help='side of the images')
    parser.add_argument('--backend', nargs='+', default=['eager'], choices=['eager', 'folded', *ONNX],
                        help='inference only: the model unchanged, with BatchNorm folded into the convolutions, or '
                             'folded and run by ONNX Runtime in float32 (onnx) or 8 bits, with ranges from noise '
                             '(int8); both for a CPU, with the extra `export`')
    parser.add_argument('--compile', action='store_true', help='torch.compile (needs a C++ compiler on a CPU)')
    parser.add_argument('--compile-mode', default='default', choices=['default', 'reduce-overhead', 'max-autotune'],
                        help='mode of torch.compile; on CUDA the last two use CUDA graphs')
    parser.add_argument('--tf32', action=argparse.BooleanOptionalAction, default=True,
                        help='TF32 for convolutions and matrix products in fp32 (CUDA)')
    parser.add_argument('--cudnn-benchmark', action=argparse.BooleanOptionalAction, default=True,
                        help="cuDNN's autotuner chooses the convolutions (CUDA)")
    parser.add_argument('--channels-last', action=argparse.BooleanOptionalAction, default=True,
                        help='memory format of weights and images')
    parser.add_argument('--side-by-side', action=argparse.BooleanOptionalAction, default=True,
                        help='alternate the rows of a setting, all in memory together; otherwise one after another')
    parser.add_argument('--repetitions', type=int, default=5, help='measured repetitions per set of processes')
    parser.add_argument('--restarts', type=int, default=3, help='new sets of processes')
    parser.add_argument('--warmup', type=int, default=2, help='unmeasured repetitions before those')
    parser.add_argument('--seconds', type=float, default=0.5,
                        help='approximate length of a repetition, of 1 to 100 steps (latency: at least 10)')
    parser.add_argument('--threads', type=int, default=0, help="PyTorch's threads on a CPU, 0 for its default")
    parser.add_argument('--seed', type=int, default=0, help='seed of weights and images')
    parser.add_argument('--resume', action='store_true', help='skip settings that the results file already has')
    parser.add_argument('--results-file', default='throughput.csv',
                        help='CSV to write; .json, .md and .png files are written beside it')
    args = parser.parse_args()
    given = vars(args).get('batch_size')
    args.batch_sizes = {mode: given or ([1, 9] if mode == 'latency' else [8]) for mode in args.mode}
    for name, values in (('--batch-size', given or [8]), ('--img-size', args.img_size)):
        if min(values) < 1:
            parser.error(f'{name} must be at least 1.')
    if min(args.repetitions, args.restarts) < 1 or args.warmup < 0 or args.threads < 0:
        parser.error('--repetitions and --restarts must be at least 1, --warmup and --threads at least 0.')
    if not 0 <= args.seconds <= 60:
        parser.error('--seconds must be between 0 and 60.')
    if Path(args.results_file).suffix != '.csv':
        parser.error(f'--results-file must end in .csv: {args.results_file}')
    if len(set(args.models)) < len(args.models):
        parser.error('--models names a model twice.')
    if args.compile_mode != 'default' and not args.compile:
        parser.error('--compile-mode needs --compile.')
    if args.backend != ['eager'] and 'train' in args.mode:
        parser.error('--backend folded, onnx and int8 are for --mode infer and latency.')
    if needs_onnx(args) and (args.device != 'cpu' or args.precision != ['fp32'] or args.compile):
        parser.error('--backend onnx and int8 need --device cpu and --precision fp32, without --compile.')
    return args


def needs_onnx(args: argparse.Namespace) -> bool:
    return any(backend in ONNX for backend in args.backend)


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
    return missing('export') if needs_onnx(args) else ''


def measure(
        specs: List[Dict[str, Any]],
        args: argparse.Namespace,
        bar: tqdm,
        side_by_side: bool,
) -> List[Dict[str, Any]]:
    """The rows of one setting; one at a time, then with a smaller batch for all, where memory is short."""
    from timm.utils import decay_batch_step
    rows: List[Row] = []
    series: List[List[List[float]]] = [[] for _ in specs]
    facts: List[Dict[str, Any]] = [{} for _ in specs]
    steps = [0] * len(specs)
    try:
        for restart, group in itertools.product(
                range(args.restarts), [range(len(specs))] if side_by_side else [[i] for i in range(len(specs))]):
            bar.set_postfix_str('{mode} {precision} {batch_size} x {img_size}'.format(**specs[0]))
            rows = [Row(specs[i], i) for i in group]
            for i, row in zip(group, rows):
                facts[i].update(row.answer())
            for repetition in range(args.warmup + args.repetitions):
                for row in rows if (restart + repetition) % 2 == 0 else rows[::-1]:
                    row.repeat()
            for i, row in zip(group, rows):
                series[i] += row.times[args.warmup:]
                steps[i] += facts[i]['steps'] * args.repetitions
                if restart == args.restarts - 1:
                    facts[i].update(row.ask('memory'))
                row.close()
    except Failed as e:
        if not e.out_of_memory or int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise
        batch_size = specs[0]['batch_size']
        if side_by_side and len(specs) > 1:
            remedy = 'Measuring the rows of this setting one at a time.'
        elif specs[0]['mode'] != 'latency' and (batch_size := decay_batch_step(batch_size)):
            remedy = f'Trying all models of this setting with a batch of {batch_size}.'
        else:
            raise
        tqdm.write(f'{e} {remedy}')
        for row in rows:
            row.close()
        return measure([dict(spec, batch_size=batch_size) for spec in specs], args, bar, side_by_side=False)
    finally:
        for row in rows:
            row.close()
    results = []
    medians = [[statistics.median(repetition) for repetition in repetitions] for repetitions in series]
    for spec, fact, times, repetitions, count in zip(specs, facts, medians, series, steps):
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times * 3)
        mode, kind = spec['mode'], columns_of(spec)
        row = {
            'model': spec['model'], 'mode': mode,
            f'{kind}_samples_per_sec': round(spec['batch_size'] * fact['processes'] / median, 2),
            f'{kind}_step_time': round(median * 1e3, 3), f'{kind}_batch_size': spec['batch_size'],
            f'{kind}_img_size': spec['img_size'], 'spread': round((high - low) / median, 4),
            'relative_to': f'{specs[0]["model"]} {specs[0]["backend"]}',
            'ratio': round(statistics.median(a / b for a, b in zip(times, medians[0])), 4),
            'precision': spec['precision'], 'backend': spec['backend'], 'compile': spec['compile'],
            'compile_mode': spec['compile_mode'] if spec['compile'] else None, 'channels_last': spec['channels_last'],
            'side_by_side': side_by_side, 'repetitions': len(times), **fact, 'steps': count,
            'environment': spec['environment'],
        }
        if mode == 'latency':
            single = list(itertools.chain(*repetitions))
            row['latency_p50_ms'] = round(statistics.median(single) * 1e3, 3)
            row['latency_p95_ms'] = round(statistics.quantiles(single, n=20, method='inclusive')[-1] * 1e3, 3)
        results.append(row)
    return results


def earlier_rows(path: Path, compared: Set[str]) -> List[Dict[str, Any]]:
    """The rows that --resume finds in the .json file beside a results file.

    Raises:
        Failed: It is missing, damaged, or of another version, whose rows do not say all that is to be compared.
    """
    record = path.with_suffix('.json')
    if not record.exists() and not path.exists():
        return []
    try:
        rows = json.loads(record.read_text())['rows']
        if all(set(row['setting']) == compared and row['model'] and row['backend'] for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Failed(f'--resume cannot continue {path}, since {record.name} beside it is missing, damaged or of another '
                 f'version: choose another --results-file (throughput_report.py still reads this one).')


def write_results(path: Path, rows: List[Dict[str, Any]]) -> None:
    write_json(path.with_suffix('.json'), {'command': [Path(sys.argv[0]).name, *sys.argv[1:]], 'rows': rows})
    write_rows(path, [{column: row.get(column) for column in COLUMNS} for row in rows], COLUMNS)
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
    environment = ' '.join(f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith(HEEDED))
    settings = [dict(
        mode=mode, precision=precision, img_size=img_size, batch_size=batch_size, device=args.device,
        compile=args.compile, compile_mode=args.compile_mode, channels_last=args.channels_last, tf32=args.tf32,
        cudnn_benchmark=args.cudnn_benchmark, threads=args.threads, side_by_side=args.side_by_side,
        repetitions=args.repetitions, restarts=args.restarts, environment=environment,
    ) for mode in args.mode for precision, img_size, batch_size in itertools.product(
        args.precision, args.img_size, args.batch_sizes[mode])]
    try:
        results = earlier_rows(path, set(settings[0])) if args.resume else []
    except Failed as e:
        print(f'throughput.py: error: {e}', file=sys.stderr)
        return 2
    try:
        check_writable(path)
    except OSError as e:
        print(f'throughput.py: error: --results-file: {e}', file=sys.stderr)
        return 2

    bar = tqdm(settings, unit='setting', disable=not main_process)
    for setting in bar:
        specs = [dict(setting, model=model, backend=backend, seconds=args.seconds, seed=args.seed)
                 for model in args.models for backend in args.backend]
        names = {(s['model'], s['backend']) for s in specs}
        known = [r for r in results if r['setting'] == setting]
        if names <= {(r['model'], r['backend']) for r in known}:
            continue
        try:
            rows = measure(specs, args, bar, args.side_by_side)
        except Failed as e:
            bar.close()
            print(f'throughput.py: error: {e}', file=sys.stderr)
            return 2
        results = [row for row in results if row not in known] + [dict(row, setting=setting) for row in rows]
        if main_process:
            write_results(path, results)
    if main_process:
        print(markdown_table(results) + growth_table(results))
        print(f'written: {", ".join(str(path.with_suffix(s)) for s in (".csv", ".json", ".md", ".png"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
