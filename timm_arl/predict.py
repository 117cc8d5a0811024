"""Probabilities for image files, folders and lists, by the weights that come with the package or any checkpoint.

    python -m timm_arl.predict lesion.jpg photographs/ --output-dir O --overlays
    find /data -name '*.dcm' | python -m timm_arl.predict - --model OUT --output-dir O --format jsonl
    torchrun --nproc-per-node 2 -m timm_arl.predict photographs/ --output-dir O --resume

IMAGE is a file, a folder (with all folders below it), a quoted pattern, or - for a list on standard input, a name on
each line. The output folder receives
    predictions.csv       a row for each image, in order: image, a probability for each label (melanoma, ...), of labels
                          that exclude each other most_probable, a decision for each (melanoma_decision, ...: 1 above
                          the threshold), error
    predictions.json      what was predicted and how: network, crops, thresholds, command
    overlays/NAME.png     with --overlays: what in the picture speaks for each label
An image that cannot be read is a row with its reason in `error`, and the others are done.
Exit status: 0; 1 if images could not be read; 2 if the program cannot start or go on; 130 after Ctrl-C.

Not a medical device: for research only.
"""
import argparse
import io
import itertools
import math
import os
import shlex
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm  # of the core: it comes with timm
from PIL import Image
from torch.utils.data import DataLoader

from . import __version__
from .arguments import not_empty, number, program_parser
from .download import WeightsError
from .files import make_folder, replacing
from .image_list import InputError, OwnImages, standard_input, write_image_list
from .isic.transforms import CROPS
from .kernels import problem
from .overlays import panel
from .pictures import REMARKS, Pictures, Seen, collate
from .prediction_files import FORMATS, MOST_PROBABLE, NOT_BEGUN, PredictionFiles
from .prediction_words import CAVEATS, NAMED, captions, report, say, thresholds_shown
from .predictor import DEFAULT_MODEL, Predictor

__all__ = ['main']


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__, 'IMAGE... --output-dir O', prog='python -m timm_arl.predict')
    add = parser.add_argument
    add('images', metavar='IMAGE', nargs='+', help='file, folder, quoted pattern, or - for a list on standard input')
    add('--output-dir', type=not_empty, metavar='O', required=True, help='folder for all that is written')
    network = parser.add_mutually_exclusive_group()
    network.add_argument('--model', type=not_empty, metavar='NAME|DIR', default=DEFAULT_MODEL,
                         help='weights by name, or output folder of a training run (default: %(default)s)')
    network.add_argument('--onnx', type=not_empty, metavar='FILE',
                         help='file of python -m timm_arl.export, by ONNX Runtime')
    add('--overlays', action='store_true', help='also a picture for each image: class activation maps laid over it')
    add('--format', choices=FORMATS, default='csv', help='of the predictions (default: %(default)s)')
    add('--crops', choices=CROPS, help='crops per image, whose probabilities are averaged (default: those that the '
                                       'network was evaluated with)')
    add('--restore-aspect', type=_ratio, metavar='W/H',
        help='stretch pictures that are exactly square to this width / height, that of their originals: 1.5 or 4/3, '
             'for copies that were squashed')
    add('--threshold-name', type=not_empty, metavar='NAME',
        help="thresholds of the decisions, by the beginning of their name: youden, sensitivity, official (default: "
             "Youden's where validation chose one, else the official 0.5)")
    add('--calibrated', action='store_true',
        help="calibrated probabilities, for the prevalence of the training images; decisions stay the same")
    add('--resume', action='store_true', help='go on with a run that was interrupted')
    add('--batch-size', type=number(int, 1), default=16, metavar='N', help='images at a time (default: %(default)s)')
    add('--workers', type=number(int, 0), default=2, metavar='N', help='processes that read images (default: 2)')
    add('--cpu-threads', type=number(int, 1), metavar='N', help='threads of the network on a CPU (default: all cores)')
    add('--device', type=not_empty, help='cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)')
    add('--seed', type=number(int, 0), default=0, metavar='N', help='of random crops (default: 0)')
    return parser


def sentence_of(error: Exception) -> str:
    """What an error says, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}{f": {error.filename}" if error.filename else ""}.'
    return str(error)


def _ratio(text: str) -> float:
    """A width / height such as 1.5 or 4/3."""
    width, _, height = text.partition('/')
    try:
        ratio = float(width) / (float(height or 1) or math.inf)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be width / height, such as 1.5 or 3/2, not {text}') from None
    if not 0.2 <= ratio <= 5:
        raise argparse.ArgumentTypeError(f'must be between 0.2 and 5, not {text}')
    return ratio


def start_of(error: Exception) -> str:
    """The beginning of an error's text, on one line, without a full stop."""
    return ' '.join(str(error).split())[:200].rstrip('.')


def place() -> Tuple[int, int]:
    """Rank of this process and number of processes, as torchrun tells them."""
    processes = int(os.environ.get('WORLD_SIZE') or 1)
    return int(os.environ.get('RANK') or 0) if processes > 1 else 0, processes


def on_first(work: Callable[[], Any]) -> Any:
    """Let the first process do something for all: its result, or its error, in each of them."""
    box: List[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box = [work()]
        except (InputError, OSError) as error:
            box = [InputError(sentence_of(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], InputError):
        raise box[0]
    return box[0]


def load_predictor(args: argparse.Namespace) -> Predictor:
    device = args.device
    if device is None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        device = f'{kind.type}:{int(os.environ.get("LOCAL_RANK") or 0) % torch.accelerator.device_count()}'
    if str(device).startswith('meta'):
        raise InputError('--device meta computes nothing: choose cpu, cuda or mps.')
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    if args.onnx and not args.onnx.lower().endswith('.onnx'):
        raise InputError(f'--onnx {args.onnx}: the name of an ONNX file ends in .onnx.')
    if (args.onnx or args.model).lower().endswith('.onnx') and args.device not in (None, 'cpu'):
        raise InputError(f'--device {args.device}: an ONNX file runs on the CPU: leave --device out.')
    if problem():
        raise InputError(problem())
    try:
        predictor = Predictor(args.onnx or args.model, device or 'cpu', args.crops, args.seed, args.cpu_threads or 0)
        if predictor.network is not None:  # a GPU or an operator that PyTorch has no code for
            predictor.probabilities(torch.zeros(1, 3, predictor.img_size, predictor.img_size))
        return predictor
    except (WeightsError, ImportError) as error:
        raise InputError(str(error)) from error
    except (AssertionError, RuntimeError) as error:  # as PyTorch refuses a device
        what = f'--device {args.device}' if args.device else f'The device {device or "cpu"}'
        remedy = '' if str(device or 'cpu').startswith('cpu') else '. --device cpu works on every machine'
        raise InputError(f'{what} cannot be used: {start_of(error)}{remedy}.') from error


def is_exclusive(predictor: Predictor) -> bool:
    """Whether an image has one of the labels, so that the most probable one is what it is called."""
    return predictor.task.kind == 'multiclass'


def settings_of(args: argparse.Namespace, predictor: Predictor) -> Dict[str, Any]:
    """All that decides what is in the rows: a resumed run must have the same."""
    point = predictor.operating_point(args.threshold_name) if args.threshold_name else predictor.point
    if not point:
        raise InputError(f'--threshold-name {args.threshold_name}: {predictor.name} has '
                         f'{", ".join(map(repr, predictor.thresholds))}.')
    if args.calibrated and not predictor.temperatures:
        raise InputError(f'--calibrated: {predictor.name} has no calibration. Score it on its own data with '
                         f'evaluate_isic.py, which writes home.json (remove one that was written for other crops).')
    if args.overlays:
        try:
            predictor.explain(Image.new('RGB', (predictor.img_size, predictor.img_size)), gates=False)
        except ValueError as error:
            raise InputError(f'--overlays: {error}') from error
    return {
        'images': args.images, 'model': predictor.name, 'sha256': predictor.sha256, 'img_size': predictor.img_size,
        'crops': predictor.crops, 'grey_world': predictor.cutter.colour_constancy, 'seed': args.seed,
        'labels': list(predictor.labels), 'threshold_name': point, 'thresholds': predictor.thresholds[point],
        'calibrated': args.calibrated, 'temperatures': predictor.temperatures, 'biases': predictor.biases,
        'format': args.format,
        'overlays': args.overlays, 'restore_aspect': args.restore_aspect,
        **({MOST_PROBABLE: True} if is_exclusive(predictor) else {}),
    }


def prepare(
        args: argparse.Namespace,
        files: PredictionFiles,
        settings: Dict[str, Any],
        remarks: Sequence[str],
) -> Tuple[Dict[str, Any], int]:
    """The record of the run, and how many rows are done: of a new run, or of one that goes on."""
    if files.record() is not None and not args.resume:
        raise InputError(f'{files.folder} already holds predictions: go on with them by --resume, or choose another '
                         f'--output-dir.')
    new = not files.folder.exists()
    make_folder(files.folder)
    files.lock()
    try:
        return begin_or_go_on(args, files, settings, remarks)
    except (InputError, OSError):
        files.unlock()
        if new:
            with suppress(OSError):  # another run has begun in it
                files.folder.rmdir()
        raise


def begin_or_go_on(
        args: argparse.Namespace,
        files: PredictionFiles,
        settings: Dict[str, Any],
        remarks: Sequence[str],
) -> Tuple[Dict[str, Any], int]:
    """As prepare, in a folder that no other run writes to."""
    record = files.record()
    if record is None:
        count = write_image_list(files.list, args.images, standard_input(), files.folder, args.overlays)
        record = {
            'settings': settings, 'images': count, 'folder': os.getcwd(), 'complete': False, 'timm_arl': __version__,
            'torch': str(torch.__version__), 'command': shlex.join(['python', '-m', 'timm_arl.predict', *sys.argv[1:]]),
            'remarks': remarks, 'caveats': CAVEATS}
        files.start(record)
        return record, 0
    for key, value in settings.items():
        earlier = record['settings'].get(key)
        if earlier != value:
            if key == 'images' and isinstance(earlier, list):  # a shell may have written out a pattern
                odd = next(iter({*earlier} ^ {*value}), 'another order')
                earlier, value = f'{len(earlier)} names', f'{len(value)} ({odd})'
            raise InputError(f'The run in {files.folder} was started with other settings ({key} {earlier!r}, not '
                             f'{value!r}): resume it with the same ones, or choose another --output-dir.')
    if record.pop(NOT_BEGUN, False):  # killed before its first row
        files.start(record)
    if record['complete']:
        if not files.path.exists():
            raise InputError(f'The run in {files.folder} is complete, but its {files.path.name} was removed: put it '
                             f'back, or choose another --output-dir.')
        files.tidy()
        return record, record['images']
    if not files.list.exists():
        raise InputError(f'{files.list} is missing, and the run cannot go on: choose another --output-dir.')
    return record, files.join()


def finish(files: PredictionFiles, record: Dict[str, Any]) -> Dict[str, Any]:
    """Join the parts, count the images that could not be read, and mark the run as complete."""
    rows = files.join()
    if rows != record['images']:
        raise InputError(f'{files.folder} has {rows} of {record["images"]} rows, although all processes are done: is '
                         f'it on a disk that all of them share?')
    count, first = 0, []
    for row in files.read():
        if row['error']:
            count += 1
            first += [f'{row["image"]}: {row["error"]}'] if count <= NAMED else []
    record = {**record, 'complete': True, 'failed': count, 'first_failed': first}
    files.finish(record)
    return record


def predict(args: argparse.Namespace) -> int:
    rank, processes = place()
    if args.format == 'parquet' and find_spec('pyarrow') is None:
        raise InputError('--format parquet needs pyarrow: pip install pyarrow, or choose csv or jsonl.')
    predictor = load_predictor(args)
    if processes > 1:
        try:
            dist.init_process_group('gloo', timeout=timedelta(days=7))  # how long one waits for the others at the end
        except (ValueError, RuntimeError) as error:
            raise InputError(f'The {processes} processes (WORLD_SIZE) cannot be joined: {start_of(error)}. Start them '
                             f'with torchrun, or unset WORLD_SIZE and RANK.') from error
    files = PredictionFiles(Path(args.output_dir), args.format, predictor.labels, is_exclusive(predictor))
    settings = settings_of(args, predictor)
    predictor.remarks += predictor.doubts if args.calibrated else []
    record, done = on_first(lambda: prepare(args, files, settings, predictor.remarks))
    for remark in predictor.remarks if rank == 0 else ():
        say(f'note: {remark}', file=sys.stderr)
    if done and rank == 0:
        say(f'{done} of {record["images"]} images were done before. (The list of images is that of the first command.)')
    seconds = 0.
    if not record['complete']:
        if rank:
            files.lock(shared=True)
        start = time.monotonic()
        predict_rows(args, predictor, files, record, done, rank, processes)
        if processes > 1:
            dist.barrier()
        seconds = time.monotonic() - start
        record = on_first(lambda: finish(files, record))
    if rank == 0:
        report(files, record, (record['images'] - done) / seconds if seconds else 0.)
    return 1 if record['failed'] else 0


def keep_quiet(worker: int) -> None:
    """In a reading process: errors are told by the program; the hook hears of threads whose reader has stopped."""
    sys.excepthook = lambda *error: None


def predict_rows(
        args: argparse.Namespace,
        predictor: Predictor,
        files: PredictionFiles,
        record: Dict[str, Any],
        done: int,
        rank: int,
        processes: int,
) -> None:
    """Read the images of this process that are not done, ask the network, and append the rows."""
    settings, unsaid = record['settings'], set() if rank else set(REMARKS)
    own = OwnImages(files.list, record['images'], done + rank, processes)
    loader: DataLoader = DataLoader(
        Pictures(predictor.cutter, record['folder'], args.overlays, args.restore_aspect, settings['images']),
        args.batch_size, sampler=own, num_workers=min(args.workers, -(-len(own) // args.batch_size)),
        collate_fn=collate, worker_init_fn=keep_quiet, pin_memory=predictor.device.type == 'cuda')
    with files.writer(rank, processes, done) as writer, tqdm(
            total=record['images'] - done, unit=' images', disable=True if rank else None) as bar:
        for seen, crops in loader if len(own) else ():
            for image in seen:
                if image.stop:
                    raise OSError(f'{image.name} cannot be read now ({image.reason}). {image.stop}')
            rows = [{'image': image.name, 'error': image.reason} for image in seen]
            readable = [i for i, image in enumerate(seen) if not image.reason]
            if readable:
                probabilities = torch.cat([
                    predictor.probabilities(predictor.normalise(part.to(predictor.device))) for part in crops])
                written = predictor.calibrated(probabilities) if args.calibrated else probabilities.numpy()
                for i, p, values, cut in zip(readable, probabilities, written.tolist(), itertools.chain(*crops)):
                    rows[i].update(zip(files.labels, values))
                    rows[i][MOST_PROBABLE] = predictor.most_probable(p)
                    rows[i].update(zip(files.decisions, predictor.decide(p, settings['threshold_name']).values()))
                    if args.overlays:
                        texts = captions(files, rows[i], thresholds_shown(settings))
                        draw(predictor, seen[i], predictor.normalise(cut), files.overlays, texts)
                    if seen[i].remark in unsaid:
                        unsaid.remove(seen[i].remark)
                        remark = REMARKS[seen[i].remark].format(side=predictor.img_size)
                        remark += ' (--restore-aspect)' * (seen[i].remark == 'square')
                        say(f'note: {seen[i].name} {remark}. Others like it are not named.', file=sys.stderr)
            writer.append(rows)  # after the pictures: where there is a row, its picture is complete
            bar.update(len(seen) * processes)


def draw(predictor: Predictor, image: Seen, crops: torch.Tensor, folder: Path, captions: Sequence[str]) -> None:
    """Write an image and, beside it, its class activation maps with what was found."""
    assert image.picture is not None
    maps = predictor.explain_crops(image.picture, crops, image.boxes, ())
    with replacing(make_folder(folder) / f'{image.stem}.png') as temporary:
        panel([(image.picture, image.stem), *zip(maps.values(), captions)], 1 + len(maps)).save(temporary, 'PNG')


def main(argv: Optional[Sequence[str]] = None) -> int:
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, 'w', errors='backslashreplace'))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a name that its encoding lacks, as on stderr
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    again = f'{args.output_dir} keeps what is done: the same command with --resume goes on.'
    try:
        return predict(args)
    except InputError as error:
        if place()[0] == 0:  # the same error of several processes is told once
            say(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, for one
        say(f'{parser.prog}: error: {sentence_of(error)} {again}', file=sys.stderr)
        return 2
    except Exception as error:  # status 1 would mean that the run is complete
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'DefaultCPUAllocator' in str(error):
            what = 'There is too little memory for the batch: choose a smaller --batch-size.'
        elif 'DataLoader worker' in str(error):
            what = (f'A process that reads images died ({" ".join(str(error).split())}): there is too little memory '
                    f'(choose a smaller --batch-size), or an image makes its decoder crash (--workers 0 reads them one '
                    f'by one).')
        else:
            traceback.print_exc()
            what = 'This was not foreseen.'
        say(f'{parser.prog}: error: {what} {again}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # below what the terminal shows for Ctrl-C
        say(f'Interrupted. {again}', file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    sys.exit(main())
