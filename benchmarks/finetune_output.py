"""The output folder of finetune_isic.py: what is in it after every epoch, and how a killed run finds its way back."""
import copy
import json
import platform
import shlex
import shutil
import sys
from itertools import islice

import accelerate
import datasets
import safetensors.torch
import timm
import torch
from isic_common import RunError, make_output_dir
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from timm.models import save_for_hf
from torchvision.transforms.v2.functional import to_pil_image

import timm_arl
from timm_arl.isic.loading import IsicStream
from timm_arl.isic.outputs import HEADS
from timm_arl.isic.results import git_commit, replacing, write_json, write_rows

EMA_FILE = 'average.safetensors'
# may differ on --resume; but each worker that reads a stream has an order of its own
NOT_OF_THE_RUN = ('output_dir', 'resume', 'workers', 'tracker', 'preview')


def check_no_other_run(args, out):
    """Refuse, unless resuming, an output folder in which another run left something."""
    traces = ('run.json', 'summary.csv', 'metrics.json', 'config.json', 'model.safetensors', 'last', 'last.previous')
    if not args.resume and any((out / trace).exists() for trace in traces):
        raise RunError(f'{out} already holds a run: go on with it by --resume, or choose another --output-dir.')


def prepare_output_dir(args, accelerator, out):
    """Make the output folder, or find the summary of the epochs that are finished in it."""
    launch = {
        'processes': accelerator.num_processes,
        'mixed_precision': accelerator.mixed_precision,
        'gradient_accumulation_steps': accelerator.gradient_accumulation_steps,
        'device': accelerator.device.type,
    }
    check_no_other_run(args, out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        make_output_dir(out)
        if not (out / 'last').exists() and (out / 'last.previous').exists():
            (out / 'last.previous').rename(out / 'last')
        for leftover in ('last.previous', 'last.saving'):
            shutil.rmtree(out / leftover, ignore_errors=True)
        if not args.resume:
            write_json(out / 'run.json', {
                'command': shlex.join(sys.argv),
                'arguments': {k: v for k, v in vars(args).items()
                              if k not in NOT_OF_THE_RUN or (k == 'workers' and args.streaming)},
                'launch': launch,
                'commit': git_commit(__file__),
                'versions': {m.__name__: m.__version__ for m in (timm_arl, timm, torch, accelerate, datasets)},
                'python': platform.python_version(),
            })
    accelerator.wait_for_everyone()
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
    if accelerator.is_main_process:
        publish(out)
    return json.loads(progress.read_text())['summary']


def save_progress(accelerator, network, averaged, out, summary, keep, data_config):
    """Replace last/ by the state after this epoch and the kept network; killed at any moment, one of them survives."""
    saving, last, previous = out / 'last.saving', out / 'last', out / 'last.previous'
    try:
        accelerator.save_state(saving)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if averaged:  # network is the moving average, which Accelerate does not know
                safetensors.torch.save_file(
                    {k: v.cpu().contiguous() for k, v in network.state_dict().items()}, saving / EMA_FILE)
            if keep:
                save_for_hf(
                    copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format), saving / 'kept',
                    safe_serialization=True, data_config=data_config, model_config=dict(
                        label_names=next(list(names) for names in HEADS.values() if len(names) == network.num_classes)))
            else:
                shutil.copytree(last / 'kept', saving / 'kept')
            write_json(saving / 'progress.json', {'summary': summary})
            if last.exists():
                last.rename(previous)
            saving.rename(last)
            shutil.rmtree(previous, ignore_errors=True)
            publish(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these
        shutil.rmtree(saving, ignore_errors=True)
        done = len(summary) - 1
        raise RunError(
            f'What epoch {done + 1} left could not be written to {out} ({" ".join(str(error).split())}): make room, '
            f'then --resume; ' + (f'epoch {done} is there, whole.' if done else 'nothing was saved yet.')) from error
    accelerator.wait_for_everyone()


def publish(out):
    """Bring the summary and the kept network, which last/ holds, into the output folder."""
    write_rows(out / 'summary.csv', json.loads((out / 'last' / 'progress.json').read_text())['summary'])
    for file in ('model.safetensors', 'config.json'):
        with replacing(out / file) as temporary:
            shutil.copyfile(out / 'last' / 'kept' / file, temporary)


def preview(args, images, data_config):
    """Draw a contact sheet: a row of training images, augmented, at the final size, and crops of each other split."""
    columns, side, title, caption = 8, data_config['input_size'][-1], 18, 14
    cell = max(side, 108)  # room for the caption
    mean, std = (torch.tensor(data_config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    sheet = Image.new('RGB', (columns * cell, len(images) * (title + side + caption)), 'white')
    draw = ImageDraw.Draw(sheet)
    synthetic = ' (SYNTHETIC images)' * (args.data == 'demo')
    grown = f', the last epochs (the first have {args.start_size} px)' * (0 < (args.start_size or 0) < side)
    for number, (name, split) in enumerate(images.items()):
        top = number * (title + side + caption)
        what = f'augmentation {args.augmentation}{grown}' if name == 'train' else f'crops {args.crops}'
        draw.text((4, top + 3), f'{name}, {what}, {side} px{synthetic}', fill='black')
        for column, (image, text) in enumerate(islice(_tiles(split), columns)):
            sheet.paste(to_pil_image((image * std + mean).clamp(0, 1)), (column * cell, top + title))
            draw.text((column * cell, top + title + side), text, fill='black')
    with replacing(args.preview) as temporary:
        sheet.save(temporary, format='PNG')
    print(f'Contact sheet of what the network sees: {args.preview}')


def _tiles(split):
    """Tensors (3, H, W) of a split and their captions: the image_id, and which crop of how many."""
    if isinstance(split, IsicStream):
        for images, _, image_ids, *_ in split:
            yield from zip(images, image_ids)
        return
    for row, image_id in enumerate(split.image_ids):
        crops = split[row][0]
        if crops.ndim == 3:
            yield crops, image_id
        else:
            yield from ((crop, f'{image_id} {k}/{len(crops)}') for k, crop in enumerate(crops, 1))
