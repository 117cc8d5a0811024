"""A network as an ONNX file, checked against what it was made from; and BatchNorm folded into the convolutions."""
import contextlib
import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union, cast

import numpy as np
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.nn.utils import fuse_conv_bn_eval

from .extras import require
from .files import make_folder, replacing

__all__ = ['ExportError', 'OnnxModel', 'export_onnx', 'fold_batch_norm', 'metadata_of']


class ExportError(Exception):
    """A model could not be exported, or what was exported does not compute the same."""


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for inference in which each BatchNorm that follows a convolution has become part of it.

    Args:
        model: A network whose blocks register layers in the order they run them, as timm's ResNets do.

    Returns:
        A copy in eval mode with `nn.Identity`, or the activation alone, where the norms were.

    Raises:
        ExportError: The copy does not compute the same: the layers run in another order.
    """
    model = copy.deepcopy(model).eval()
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes <= {torch.float16, torch.bfloat16}:
        model = model.float()  # in a precision whose rounding is no difference
    folded, count = copy.deepcopy(model), 0
    for parent in folded.modules():
        previous = ''
        for name, module in list(parent.named_children()):
            holder, key = parent, previous
            while isinstance(getattr(holder, key, None), nn.Sequential):  # a deep stem ends in its convolution
                holder = getattr(holder, key)
                key = str(len(holder) - 1)
            before: Any = getattr(holder, key, None)
            if (type(module) in (nn.BatchNorm2d, BatchNormAct2d) and type(before) in (nn.Conv2d, Conv2dSame)
                    and module.track_running_stats and before.out_channels == module.num_features):
                setattr(holder, key, fuse_conv_bn_eval(cast(nn.Conv2d, before), cast(nn.BatchNorm2d, module)))
                setattr(parent, name, nn.Sequential(module.drop, module.act) if isinstance(module, BatchNormAct2d)
                        else nn.Identity())
                count += 1
            previous = name
    if count:
        x = torch.randn(2, *_input_shape(model), generator=torch.Generator().manual_seed(0))
        x = x.to(next(model.parameters()))
        with torch.inference_mode():
            _compare(folded(x), model(x), 'with folded BatchNorm the network', ': use it as it is (--no-fold)')
    return folded.to(dtypes.pop()) if len(dtypes) == 1 else folded


def _input_shape(model: Any) -> Tuple[int, int, int]:
    """Channels, height and width of images that a model takes: small ones if it can, or of its own size.

    Raises:
        ExportError: It takes neither.
    """
    if model.training:
        model = copy.deepcopy(model).eval()  # whose batch norms learn from no image
    config = getattr(model, 'pretrained_cfg', None) or {'input_size': (3, 64, 64)}
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    own = config['input_size'][-1]
    weight, reason = next(model.parameters()), ''
    for size in dict.fromkeys((64, own)):
        for channels in dict.fromkeys((first, config['input_size'][0])):  # a stem may turn space into channels first
            try:
                with torch.inference_mode():
                    model(torch.zeros(1, channels, size, size).to(weight))
                return channels, size, size
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = reason or ' '.join(str(error).split())[:200]
    raise ExportError(f'{type(model).__name__} does not take images of {own} px: {reason}')


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str, remedy: str = '') -> None:
    error = (found - expected).abs().max().item()
    allowed = 1e-3 * max(1e-2, expected.abs().max().item())
    if not error <= allowed:
        raise ExportError(f'{what} differs from the model by {error:.2g}, more than {allowed:.2g}{remedy}.')


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
        except ImportError as error:
            if find_spec('onnxruntime') is None:
                raise ImportError('ONNX Runtime is not installed: pip install onnxruntime') from error
            raise  # a broken one says what it lacks
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


def metadata_of(
        model: nn.Module,
        img_size: Optional[int] = None,
        weights: Optional[str] = None,
        settings: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """What the metadata of a file say of the model: mean, std, input_size, label_names, weights and the settings.

    Args:
        model, img_size, weights, settings: As for export_onnx.
    """
    config = cast(Any, model).pretrained_cfg
    side = img_size or config['input_size'][-1]
    about = dict(mean=config['mean'], std=config['std'], input_size=[_input_shape(model)[0], side, side],
                 label_names=config.get('label_names'), weights=weights, **(settings or {}))
    return {key: value for key, value in about.items() if value is not None}


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
        ExportError: PyTorch cannot export the model, or the file does not compute what the model computes.
        ImportError: The extra `export` is missing.
    """
    require('export', __name__)
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    about = metadata_of(model, img_size, weights, settings)
    source = fold_batch_norm(model) if fold else model
    for module in source.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # PyTorch 2.6 cannot export one after a cast that changes nothing
    images = torch.randn(2, *about['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        program: Any = torch.onnx.export(
            source.to(memory_format=torch.contiguous_format), (images,), dynamo=True, input_names=['images'],
            output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch', min=1)},), verbose=False)
    except Exception as error:  # PyTorch's are of many kinds
        raise ExportError(f'{type(model).__name__} cannot be exported by PyTorch {torch.__version__}: '
                          f'{" ".join(str(error).split())[:300] or type(error).__name__}') from error
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    make_folder(path.parent)
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
        network = OnnxModel(temporary)
        for batch in (images, images[:1], torch.cat([images, images[:1]])):
            with torch.inference_mode():
                _compare(torch.from_numpy(network(batch.numpy())), model(batch), f'{path.name} on ONNX Runtime')
    return path
