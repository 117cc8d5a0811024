"""The output folder of a program that trains: what it holds after every epoch, and how a run goes on from there."""
import contextlib
import copy
import json
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Union

import accelerate
import datasets
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..download import WeightsError
from ..factory import load_weights_file
from ..files import (
    alone_in,
    git_commit,
    hold,
    make_folder,
    read_rows,
    recover_folder,
    replacing,
    swap_folder,
    write_json,
    write_rows,
)
from ..kernels import backend
from ..machine import processor_name
from .arguments import RunError

PathLike = Union[str, Path]
EMA_FILE = 'average.safetensors'
SAVING = 'last.saving'  # becomes last/
LOCK = '.lock'
_held: Dict[Path, Optional[IO]] = {}
PARTS = ('seed-[0-9]*/fold-[0-9]*/', 'seed-[0-9]*/', 'fold-[0-9]*/')  # runs of --seeds and --folds
PATIENCE = 30  # seconds in which a network disk shows new files to other machines
# may differ on --resume; but each worker that reads a stream has an order of its own
NOT_OF_THE_RUN = ('output_dir', 'resume', 'workers', 'tracker', 'preview', 'sizes_given')


class FolderTaken(RunError):
    """The output folder holds another run."""


def check_no_other_run(args, out):
    """Refuse, unless resuming, an output folder in which another run left something."""
    traces = ('run.json', 'summary.csv', 'metrics.json', 'config.json', 'model.safetensors', 'last', '.last.previous',
              'tensorboard')
    if args.resume:
        return
    if any((out / trace).exists() for trace in traces):
        raise FolderTaken(f'{out} already holds a run: continue it with --resume, or choose another --output-dir.')
    if getattr(args, 'seeds', None) or getattr(args, 'folds', 0):  # each in a folder of its own
        for pattern in PARTS:
            for other in out.glob(f'{pattern}run.json'):
                raise FolderTaken(f'{other.parent} holds a run of another command: choose another --output-dir.')


def prepare_output_dir(args, accelerator, out, score='validation_mean_auc'):
    """Make the output folder, or return the summary of the epochs that are finished in it, each with its score."""
    launch = {
        'processes': accelerator.num_processes,
        'mixed_precision': accelerator.mixed_precision,
        'gradient_accumulation_steps': accelerator.gradient_accumulation_steps,
        'device': accelerator.device.type,
    }
    check_no_other_run(args, out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        make_folder(out)
        hold_folder(out)
        recover_folder(out / 'last')
        shutil.rmtree(out / SAVING, ignore_errors=True)
        if not args.resume:
            write_json(out / 'run.json', {
                'command': shlex.join(sys.argv),
                'arguments': {k: v for k, v in vars(args).items()
                              if k not in NOT_OF_THE_RUN or (k == 'workers' and args.streaming)},
                'launch': launch,
                **_code(accelerator.device),
            })
    accelerator.wait_for_everyone()
    start = time.monotonic()
    while not (out / 'run.json').exists():
        if time.monotonic() > start + PATIENCE:
            raise RunError(f'{out} lies on a disk of the first machine alone: choose an --output-dir that all machines '
                           f'share.')
        time.sleep(0.5)
    if not args.resume:
        return []
    saved = json.loads((out / 'run.json').read_text())['launch']
    if launch != saved:
        raise RunError(f'The run in {out} was launched with {saved}, not {launch}: resume it in the same way.')
    progress = out / 'last' / 'progress.json'
    if not progress.exists():
        if not (args.folds or args.seeds):
            accelerator.print(f'No finished epoch to resume in {out}: starting with the first.')
        return []
    try:
        summary = json.loads(progress.read_text())['summary']
        if not all(isinstance(row[score], float) for row in summary):
            raise ValueError(f'a row without {score}')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(_cannot_resume(out, progress, 'is damaged')) from error
    return summary


def _code(device):
    """What a run is made by: it may be resumed after an update, or on another machine."""
    return {
        'commit': git_commit(sys.argv[0]),
        'processor': processor_name(device),
        'kernels': _kernels(device),
        'versions': {'timm_arl': __version__, **{
            m.__name__: m.__version__ for m in (timm, torch, accelerate, datasets)}},
        'python': platform.python_version(),
    }


def note_code(out, code):
    """Add to run.json what a run goes on with, if it is not what the last part of it was made by."""
    record = json.loads((out / 'run.json').read_text())
    if code != {key: (record.get('resumed') or [record])[-1].get(key) for key in code}:
        write_json(out / 'run.json', {**record, 'resumed': [*record.get('resumed', ()), code]})


def hold_folder(out):
    """Hold an output folder, until this process ends or lets go of it, so that no other run writes to it."""
    if out in _held:  # to open it again and close it would let go of it
        return
    try:
        _held[out] = hold(out / LOCK)
    except BlockingIOError:
        raise FolderTaken(f'Another run is writing to {out}: let it finish, or end its processes.') from None


def release_folders():
    """Let go of the folders that this process holds."""
    while _held:
        out, file = _held.popitem()
        if file:
            (out / LOCK).unlink(missing_ok=True)
            file.close()


def load_progress(accelerator, network, averaged, out):
    """Load the state after the last finished epoch; the kept network in the output folder is replaced after that alone.

    Args:
        accelerator: Accelerate's, with the model and optimizer to load.
        network: The moving average of the weights, if averaged.
        averaged: Whether there is one.
        out: Output folder.

    Raises:
        RunError: A damaged file, or the state of another network.
    """
    last = out / 'last'
    for path in sorted(last.rglob('*')):
        try:
            if path.suffix == '.safetensors':
                with safe_open(path, 'pt'):  # compares the header with the size
                    pass
            elif path.suffix in ('.bin', '.pkl') and not zipfile.is_zipfile(path):  # as torch.save writes them
                raise OSError
        except (OSError, SafetensorError) as error:
            raise RunError(_cannot_resume(out, path, 'is damaged')) from error
    for name in ('model.safetensors', 'optimizer.bin', f'random_states_{accelerator.process_index}.pkl',
                 *[EMA_FILE] * averaged):
        if not (last / name).is_file():
            raise RunError(_cannot_resume(out, last / name, 'is missing'))
    try:
        accelerator.load_state(last)
        if averaged:
            load_weights_file(network, last / EMA_FILE)
    except WeightsError as error:
        raise RunError(_cannot_resume(out, last / EMA_FILE, "is another network's")) from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        what = last / ('optimizer.bin' if isinstance(error, ValueError) else 'model.safetensors')
        raise RunError(_cannot_resume(out, what, "is another network's")) from error
    try:
        if accelerator.is_main_process:
            publish(out)
            note_code(out, _code(accelerator.device))
    except FileNotFoundError as error:
        raise RunError(_cannot_resume(out, last / 'kept', 'is incomplete')) from error
    accelerator.wait_for_everyone()


def _cannot_resume(out, path, what):
    return (f'{path} {what}, so the run cannot go on: restore it, or start another run from the kept epoch, with '
            f'--init-checkpoint {out} and another --output-dir.')


def discard_start(out):
    """Remove what a run left that failed before its first epoch was finished, so that a corrected command can start."""
    started = [path.parent for pattern in (*PARTS, '') for path in out.glob(f'{pattern}run.json')]
    held = out in _held  # else what is there is another's
    release_folders()
    if not held or out not in started or any((folder / 'last').exists() for folder in started):
        return
    for folder in started:
        (folder / 'run.json').unlink()
        (folder / 'splits.csv').unlink(missing_ok=True)
        shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
        for emptied in (folder, folder.parent) if folder != out else (out,):
            with contextlib.suppress(OSError):  # not empty
                emptied.rmdir()


def save_progress(accelerator, network, averaged, out, summary, keep, save):
    """Replace last/ by the state after this epoch and the kept network; killed at any moment, one of them survives.

    Args:
        accelerator, network, averaged, out: Of load_progress.
        summary: A row for each epoch.
        keep: Whether this epoch's network is the one to keep.
        save: Writes a network to a folder, as config.json and model.safetensors.

    Raises:
        RunError: A disk that is full or cannot be written to.
    """
    saving, last = out / SAVING, out / 'last'
    try:
        accelerator.save_state(saving)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if averaged:  # network is the moving average, which Accelerate does not know
                safetensors.torch.save_file(
                    {k: v.cpu().contiguous() for k, v in network.state_dict().items()}, saving / EMA_FILE)
            if keep:
                save(copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format), saving / 'kept')
            else:
                shutil.copytree(last / 'kept', saving / 'kept')
            write_json(saving / 'progress.json', {'summary': summary})
            swap_folder(saving, last)
            publish(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these
        shutil.rmtree(saving, ignore_errors=True)
        done = len(summary) - 1
        raise RunError(
            f'Epoch {done + 1} could not be saved to {out} ({" ".join(str(error).split())}): make room, then '
            + (f'--resume; epoch {done} is intact.' if done else 'start again.')) from error
    accelerator.wait_for_everyone()


def publish(out):
    """Bring the summary and the kept network, which last/ holds, into the output folder."""
    write_rows(out / 'summary.csv', json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    for file in ('model.safetensors', 'config.json'):
        with replacing(out / file) as temporary:
            shutil.copyfile(out / 'last' / 'kept' / file, temporary)


def _kernels(device: torch.device) -> str:
    """Those of gates, if the network has some; `backend` tells who asks why faster ones are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return backend(torch.ones(1, 1, 1, 1, device=device))


def record_look(folder: PathLike, checkpoint: PathLike, scores: Dict[str, Any], other_data: str = '') -> None:
    """Add a row to looks.csv, which tells how often a checkpoint has met the test split, and by which command.

    Args:
        folder: Where looks.csv is, or is made.
        checkpoint: What was scored.
        scores: What score_split gave for the test split.
        other_data: Data that are not those of the checkpoint's run: their images are not its test split.
    """
    path = Path(folder, 'looks.csv')
    look = {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'checkpoint': str(checkpoint), 'mean_auc': scores['mean_auc'],
        'command': shlex.join(sys.argv), 'commit': git_commit(sys.argv[0]) or '',
        **({'other_data': other_data} if other_data else {})}
    with alone_in(folder):
        earlier = looks_in(folder)
        rows = [*({key: value for key, value in row.items() if key} for row in earlier), look]
        write_rows(path, rows, list(dict.fromkeys(key for row in rows for key in row)))


def looks_in(folder: PathLike) -> List[Dict[str, str]]:
    """Rows of a folder's looks.csv, none where there is none.

    Raises:
        RunError: It cannot be read, and must not be replaced.
    """
    path = Path(folder, 'looks.csv')
    try:
        return read_rows(path) if path.exists() else []
    except ValueError as error:
        raise RunError(f'{path} is damaged ({error}): restore it, since it tells how often the test split was '
                       f'scored.') from error


def check_output_dir(out):
    """Refuse an output folder that cannot be made or written to, before any work is done."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f'Cannot make the output folder {out}: {there} '
                       + ('cannot be written to.' if there.is_dir() else 'is a file.'))
