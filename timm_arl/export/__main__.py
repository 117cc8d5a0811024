"""A model as an ONNX file, checked against what it was made from.

    python -m timm_arl.export --model OUT --output arl_cnn50.onnx
    python -m timm_arl.export --model OUT --output arl_cnn50.onnx --int8 --calibration path/to/isic2017
    python -m timm_arl.export --model OUT --output arl_cnn50.onnx --with-preprocessing

Needs the extra `export`. The file takes `images`, float32 (N, 3, H, W), normalised as the model's data config says, any
N and the H and W it was exported for, and gives `logits`, (N, classes). Its metadata hold, as JSON, mean, std,
input_size, label_names where the model knows them, and weights: where they are from, or "random"; of a trained
checkpoint also its thresholds, calibration and crops: `python -m timm_arl.predict --onnx FILE` needs nothing else.

--with-preprocessing: the file takes `pictures`, uint8 (N, H, W, 3), RGB, any N, H and W, cuts and normalises them as an
evaluation does, and gives `probabilities`, (N, labels), means over the crops. Where the checkpoint is calibrated it
gives `calibrated` too. Thresholds are those of `probabilities`.

--int8: convolutions and sums in 8 bits. Ranges are from the train images of a data set, or the pictures of a folder.
The AUC on the validation split is compared with that in float32. Thresholds stay those of the float network.
Exit status: 0; 1 if the file was written, but its AUC is lower by more than 0.003; 2 if it could not be written.
"""
import argparse
import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from huggingface_hub import constants

from ..arguments import number, program_parser
from ..download import WeightsError
from ..extras import require
from ..factory import Checkpoint, create_for_task
from ..files import check_writable, replacing
from ..isic.task import OFFICIAL_THRESHOLD, Task, label_words
from ..kernels import problem
from ..onnx_file import ExportError, OnnxModel, export_onnx, metadata_of
from .calibration import FEWEST, TOLERANCE, USUAL, CalibrationImages, Loss, measure_loss
from .preprocessing import add_preprocessing
from .quantize import quantize_onnx, update_metadata


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__, prog='python -m timm_arl.export')
    add = parser.add_argument
    add('--model', required=True, metavar='NAME|DIR', help='a timm model, or the output folder of a training run')
    add('--pretrained', action='store_true',
        help='load the default weights of a NAME; those of a DIR or a NAME.TAG are always loaded')
    add('--img-size', type=number(int, 32), metavar='PX', help="side of the images (default: the model's own)")
    add('--fold', action=argparse.BooleanOptionalAction, default=True,
        help='fold BatchNorm into the convolutions (default: yes)')
    add('--with-preprocessing', action='store_true',
        help='cropping, normalisation and probabilities in the file too: raw RGB goes in')
    add('--int8', action='store_true', help='convolutions and sums in 8 bits; needs --calibration')
    add('--calibration', metavar='DIR',
        help='of --int8: a folder of pictures, or a data set as for finetune_isic.py --data')
    add('--calibration-images', type=number(int, FEWEST), default=USUAL, metavar='N',
        help=f'images to find ranges from, at least {FEWEST} (default: %(default)s)')
    add('--output', required=True, metavar='FILE.onnx', help='file to write')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if Path(args.output).is_dir():
        parser.error(f'--output {args.output} is a folder: name a file in it.')
    if not args.output.lower().endswith('.onnx'):
        parser.error(f'--output {args.output}: the name of an ONNX file ends in .onnx.')
    if args.int8 and not args.calibration:
        parser.error(f'--int8 needs --calibration: a folder of {FEWEST}, better {USUAL} pictures like those that the '
                     f'network will see, or the data set of its training.')
    if args.calibration and not args.int8:
        parser.error('--calibration is for --int8: add it, or leave out --calibration.')
    require('export', __name__)  # before weights are downloaded
    if problem():
        parser.error(problem())
    try:
        return export(args)
    except (ExportError, WeightsError, ImportError, OSError, ValueError) as error:
        print(f'python -m timm_arl.export: error: {error}', file=sys.stderr)
        return 2
    except Exception:  # status 1 would mean that the file is written
        traceback.print_exc()
        print('python -m timm_arl.export: error: this was not foreseen; nothing was written', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('Interrupted: nothing was written.', file=sys.stderr)
        return 130


def export(args: argparse.Namespace) -> int:
    check_writable(args.output)
    trained = args.pretrained or ':' in args.model or '.' in args.model or Path(args.model).exists()
    checkpoint = Checkpoint(args.model) if trained else None
    model: Any = checkpoint.network() if checkpoint else create_for_task(args.model)
    # offline, the weights alone may be in the cache
    settings = checkpoint.settings([] if constants.HF_HUB_OFFLINE else None) if checkpoint else None
    if settings is not None and 'crops' not in settings:
        print(f'How {args.model} was evaluated is not known (no run.json or results.json): the file does not say it.')
    if settings and args.img_size not in (None, model.pretrained_cfg['input_size'][-1]):
        if any([settings.pop(key, None) for key in ('thresholds', 'temperatures', 'biases')]):
            print(f'Thresholds and calibration of {args.model} were chosen with images of '
                  f'{model.pretrained_cfg["input_size"][-1]} px: they are left out of the file.')
    config = checkpoint.config() if checkpoint else {}
    task = Task.of_network(model, config) if checkpoint else None
    assumed = task and task.assumption(args.model, model, config)
    if task and assumed:
        print(assumed)
        model.pretrained_cfg['label_names'] = task.outputs  # which the file keeps
    if args.with_preprocessing and task is None:
        raise ExportError(f'--with-preprocessing: what the {model.num_classes} outputs of {args.model} mean is not '
                          f'known: export a network that finetune_isic.py trained.')
    probabilities, labels = (task.probabilities, task.labels) if task else (partial(torch.softmax, dim=1), ())
    weights = args.model if trained else 'random'
    images = loss = None
    if args.int8:  # before the rest, which takes longer
        images = CalibrationImages(args.calibration, metadata_of(model, args.img_size, weights, settings),
                                   args.calibration_images, checkpoint)
        print(f'calibrating on {images.what}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / 'float.onnx', args.img_size, args.fold, weights, settings)
        if images:
            path, loss = to_int8(path, Path(folder) / 'int8.onnx', images, probabilities, labels)
        if args.with_preprocessing:
            path = add_preprocessing(path, Path(folder) / 'whole.onnx', probabilities, labels)
        with replacing(args.output) as temporary:
            shutil.copyfile(path, temporary)
    output = Path(args.output)
    same = 'the same logits as the model in eager mode' if not args.with_preprocessing else (
        'takes RGB pictures, gives probabilities')
    print(f'written: {output} ({output.stat().st_size / 1e6:.1f} MB), {"in 8 bits" if loss else same}')
    if not trained:
        print(f'WARNING: {args.model} has RANDOM WEIGHTS, and so has {output}: --pretrained, a NAME.TAG or the output '
              f'folder of a training run loads trained ones.')
    if loss and loss.worse():
        print(f'WARNING: the AUC of {output} is lower than in float32 by more than {TOLERANCE} ({loss.worse()}): '
              f'calibrate on more images like those it will see, or use the file in float32.', file=sys.stderr)
        return 1
    return 0


def to_int8(
        source: Path,
        target: Path,
        images: CalibrationImages,
        probabilities: Callable[[torch.Tensor], torch.Tensor],
        labels: Sequence[str],
) -> Tuple[Path, Loss]:
    """Write the 8-bit file, say what it costs, and keep that in its metadata."""
    before = OnnxModel(source)
    quantize_onnx(source, target, images.batches())
    points: Dict[str, Any] = before.about.get('thresholds') or {}
    point: Dict[str, float] = next((point for name, point in points.items() if name.startswith('youden')), {})
    thresholds = [point.get(label, OFFICIAL_THRESHOLD) for label in labels] or [OFFICIAL_THRESHOLD]
    loss = measure_loss(before, OnnxModel(target), images, probabilities, labels, thresholds)
    update_metadata(target, int8={
        'calibration_images': len(images.crops), 'compared_images': loss.images, 'auc': loss.aucs,
        'largest_difference': loss.largest, 'mean_difference': loss.mean, 'worse': loss.worse()})

    where = 'validation images' if loss.aucs else 'images of the calibration'
    for label, (one, other) in loss.aucs.items():
        print(f'{label_words(label)}: AUC {one:.4f} in float32, {other:.4f} in 8 bits ({other - one:+.4f})')
    of_one_class = [label for label in labels if images.validation is not None and label not in loss.aucs]
    if of_one_class:
        print(f'no AUC of {", ".join(map(label_words, of_one_class))}: all validation images are of one class')
    if loss.aucs:
        print(f'no AUC is lower by more than {TOLERANCE}: {"no, " + loss.worse() if loss.worse() else "yes"}')
    else:
        print('no AUC was compared: the images have no labels, or not those of the network')
    print(f'{loss.images} {where}: probabilities differ by {loss.mean:.4f} on average and {loss.largest:.4f} at most, '
          f'{loss.decisions[0]} of {loss.decisions[1]} decisions differ')
    return target, loss


if __name__ == '__main__':
    sys.exit(main())
