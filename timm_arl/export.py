"""A model as an ONNX file, checked against what it was made from; and BatchNorm folded into the convolutions.

    python -m timm_arl.export --model OUT --output arl_cnn50.onnx

Needs the extra `export`. The file takes `images`, float32 (N, 3, H, W), normalised as the model's data config says, any
N and the H and W it was exported for, and gives `logits`, (N, classes). Its metadata hold, as JSON, mean, std,
input_size, label_names where the model knows them, and weights: where they are from, or "random"; of a trained
checkpoint also its thresholds, temperatures and crops: `python -m timm_arl.predict --onnx FILE` needs nothing else.
"""
import argparse
import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union, cast

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils import fuse_conv_bn_eval

from .download import WeightsError
from .extras import require
from .factory import Checkpoint, create_for_task

__all__ = ['ExportError', 'OnnxModel', 'export_onnx', 'fold_batch_norm']


class ExportError(Exception):
    """A model could not be exported, or what was exported does not compute the same."""


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for inference in which each BatchNorm that follows a convolution has become part of it.

    Args:
        model: A network whose blocks register layers in the order they run them, as timm's ResNets do.

    Returns:
        A copy in eval mode with `nn.Identity` where the norms were.

    Raises:
        ExportError: The copy does not compute the same: the layers run in another order.
    """
    model = copy.deepcopy(model).eval()
    folded = copy.deepcopy(model)
    for parent in folded.modules():
        previous = ''
        for name, module in list(parent.named_children()):
            holder, key = parent, previous
            while isinstance(getattr(holder, key, None), nn.Sequential):  # a deep stem ends in its convolution
                holder = getattr(holder, key)
                key = str(len(holder) - 1)
            before = getattr(holder, key, None)
            if (type(module) is nn.BatchNorm2d and type(before) is nn.Conv2d and module.track_running_stats
                    and before.out_channels == module.num_features):
                setattr(holder, key, fuse_conv_bn_eval(before, module))
                setattr(parent, name, nn.Identity())
            previous = name
    weight = next(model.parameters())
    x = torch.randn(2, _in_channels(model), 64, 64, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.inference_mode():
        _compare(folded(x), model(x), 'the network with folded BatchNorm')
    return folded


def _in_channels(model: nn.Module) -> int:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (found - expected).abs().max().item()
    allowed = 1e-3 * max(1., expected.abs().max().item())
    if not error <= allowed:
        raise ExportError(f'{what} differs from the model by {error:.2g}, more than {allowed:.2g}.')


class OnnxModel:
    """An ONNX file on the CPU by ONNX Runtime.

    Attributes:
        about: What the metadata of a file of :func:`export_onnx` say.
    """

    def __init__(self, path: Union[str, Path], threads: int = 0):
        """
        Args:
            path: The file.
            threads: Threads for a batch; 0 for one per core.
        """
        try:
            import onnxruntime  # of the extra, all that running a file needs
        except ImportError:
            require('export', __name__)
            raise
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        self.input = self.session.get_inputs()[0].name
        self.about = {}
        for key, value in self.session.get_modelmeta().custom_metadata_map.items():
            with contextlib.suppress(ValueError):  # what others write need not be JSON
                self.about[key] = json.loads(value)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits, shape (N, classes), of images, float32 of shape (N, 3, H, W)."""
        return self.session.run(None, {self.input: images})[0]

    @classmethod
    def of(cls, model: nn.Module, img_size: Optional[int] = None, threads: int = 0) -> 'OnnxModel':
        """Export a model to a temporary file and load it."""
        with tempfile.TemporaryDirectory() as folder:
            return cls(export_onnx(model, Path(folder) / 'model.onnx', img_size), threads)


def export_onnx(
        model: nn.Module,
        path: Union[str, Path],
        img_size: Optional[int] = None,
        fold: bool = True,
        weights: Optional[str] = None,
        settings: Optional[Dict[str, Any]] = None,
) -> Path:
    """Write a model as ONNX by torch.export, any batch size, and check it against eager on ONNX Runtime.

    Args:
        model: A timm model.
        path: File to write; it appears complete, and only when the check has passed.
        img_size: Side of the images, by default that of the model's config.
        fold: Whether to fold BatchNorm into the convolutions first.
        weights: Where the weights are from, for the metadata of the file.
        settings: Further metadata, as `Checkpoint.settings` gives them.

    Returns:
        The path.

    Raises:
        ExportError: The file does not compute what the model computes.
        ImportError: The extra `export` is missing.
    """
    require('export', __name__)
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    side = img_size or cast(Any, model).pretrained_cfg['input_size'][-1]
    source = fold_batch_norm(model) if fold else model
    for module in source.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # PyTorch 2.6 cannot export one after a cast that changes nothing
    images = torch.randn(2, _in_channels(model), side, side, generator=torch.Generator().manual_seed(0))
    program: Any = torch.onnx.export(
        source.to(memory_format=torch.contiguous_format), (images,), dynamo=True, input_names=['images'],
        output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch', min=1)},), verbose=False)
    config = cast(Any, model).pretrained_cfg
    about = dict(mean=config['mean'], std=config['std'], input_size=[images.shape[1], side, side],
                 label_names=config.get('label_names'), weights=weights, **(settings or {}))
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items() if value is not None})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        program.save(temporary, external_data=False)
        network = OnnxModel(temporary)
        for batch in (images, images[:1], torch.cat([images, images[:1]])):
            with torch.inference_mode():
                _compare(torch.from_numpy(network(batch.numpy())), model(batch), f'{path.name} on ONNX Runtime')
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m timm_arl.export', description='Write a model as an ONNX file and check it against the model.')
    parser.add_argument('--model', required=True, metavar='NAME|DIR',
                        help='a timm model, or the output folder of a training run')
    parser.add_argument('--pretrained', action='store_true',
                        help='load the default weights of a NAME; those of a DIR or a NAME.TAG are always loaded')
    parser.add_argument('--img-size', type=int, metavar='PX', help="side of the images (default: the model's own)")
    parser.add_argument('--fold', action=argparse.BooleanOptionalAction, default=True,
                        help='fold BatchNorm into the convolutions (default: yes)')
    parser.add_argument('--output', required=True, metavar='FILE.onnx', help='file to write')
    args = parser.parse_args(argv)
    if args.img_size is not None and args.img_size < 32:
        parser.error(f'--img-size must be at least 32, not {args.img_size}.')
    if Path(args.output).is_dir():
        parser.error(f'--output {args.output} is a folder: name a file in it.')
    require('export', __name__)  # before weights are downloaded
    try:
        trained = args.pretrained or ':' in args.model or '.' in args.model or Path(args.model).exists()
        checkpoint = Checkpoint(args.model) if trained else None
        model = checkpoint.network() if checkpoint else create_for_task(args.model)
        settings = checkpoint.settings() if checkpoint else None
        path = export_onnx(
            model, args.output, args.img_size, args.fold, args.model if trained else 'random', settings)
    except (ExportError, WeightsError, OSError) as error:
        print(f'python -m timm_arl.export: error: {error}', file=sys.stderr)
        return 2
    print(f'written: {path} ({path.stat().st_size / 1e6:.1f} MB), same logits as the model in eager mode')
    if not trained:
        print(f'WARNING: {args.model} has RANDOM WEIGHTS, and so has {path}: --pretrained, a NAME.TAG or the output '
              f'folder of a training run loads trained ones.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
