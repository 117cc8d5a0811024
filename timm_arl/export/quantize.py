"""An ONNX file in 8 bits: static quantisation by ONNX Runtime, ranges from images."""
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Union

import numpy as np

from ..extras import require
from ..files import replacing
from ..onnx_file import ExportError, OnnxModel

__all__ = ['quantize_onnx', 'set_metadata', 'update_metadata']

# Measured on arl_cnn14.isic2017 (docs/performance.md): everything else, the mask's exponential and sum, mean over
# positions and classifier, is faster or closer in float32
QUANTIZED = ('Conv', 'Relu', 'MaxPool', 'Add')


def quantize_onnx(
        source: Union[str, Path],
        target: Union[str, Path],
        batches: Iterable[np.ndarray],
) -> Path:
    """Write a file of :func:`~timm_arl.onnx_file.export_onnx` with 8-bit convolutions and sums.

    Weights are signed, a scale for each output channel. Activations are unsigned, a scale for each tensor: from the
    least and the greatest value of each batch, averaged over the batches, so that a single odd image does not make all
    of them coarse. Pictures have 8 bits to begin with, and keep these exactly (:func:`_take_levels`).

    Args:
        source: Float file.
        target: File to write.
        batches: Normalised crops, float32 (N, 3, H, W); those of one image, best, are one batch.

    Returns:
        The target.

    Raises:
        ExportError: ONNX Runtime cannot quantise it, or what it wrote does not run or gives no finite numbers.
        ImportError: The extra `export` is missing.
    """
    require('export', __name__)
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = OnnxModel(source)
    if not {'mean', 'std'} <= model.about.keys():
        raise ExportError(f'{source} does not say how its images are normalised: write it with python -m '
                          f'timm_arl.export.')
    reader = _Reader(model.input, batches)
    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory() as folder, replacing(target) as temporary:
        levels, prepared = Path(folder) / 'levels.onnx', Path(folder) / 'prepared.onnx'
        try:
            logger.setLevel(logging.ERROR)  # advice on steps that are taken here
            network = onnx.load(source)
            tensor, span = _take_levels(network, model.about['mean'], model.about['std'])
            onnx.save(network, levels)
            quant_pre_process(levels, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared, temporary, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=list(QUANTIZED), nodes_to_exclude=['levels/shift'],
                extra_options={'CalibMovingAverage': True, 'TensorQuantOverrides': {tensor: [
                    {'rmin': np.float32(span[0]), 'rmax': np.float32(span[1])}]}})
            written = onnx.load(temporary)
            if not any(node.op_type == 'QuantizeLinear' for node in written.graph.node):
                raise ValueError('none of its operations has an 8-bit form')
            set_metadata(written, model.about)
            onnx.save(written, temporary)
            logits = OnnxModel(temporary)(reader.first)
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime's are of many kinds
            raise ExportError(f'{Path(source).name} cannot be quantised by ONNX Runtime {onnxruntime.__version__}: '
                              f'{" ".join(str(error).split())[:300] or type(error).__name__}') from error
        finally:
            logger.setLevel(level)
        if not np.isfinite(logits).all():
            raise ExportError(f'{Path(source).name} in 8 bits gives values that are not finite: export it in float32.')
    return Path(target)


def _take_levels(network: Any, mean: Sequence[float], std: Sequence[float]) -> Tuple[str, Tuple[float, float]]:
    """Let the first convolution of an ONNX model take the levels of a picture, 0 to 255, to which the input is scaled
    back: 8 bits hold these exactly, while one scale for the normalised channels rounds each of them.

    Returns:
        Name of the tensor that is to be quantised, and its range. A network that does not begin with a convolution is
        left as it is: the range of its input then spans black to white.
    """
    from onnx import helper, numpy_helper
    graph, name = network.graph, network.graph.input[0].name
    users = [node for node in graph.node if name in node.input]
    values = {i.name: i for i in graph.initializer}
    attributes = {a.name: a for a in users[0].attribute}
    scale, shift = (255 * np.array(each, np.float64)[:, None, None] for each in (std, mean))
    if (len(users) > 1 or users[0].op_type != 'Conv' or not all(key in values for key in users[0].input[1:])
            or 'pads' not in attributes):
        return name, (float((-shift / scale).min()), float(((255 - shift) / scale).max()))
    conv, pads = users[0], attributes['pads'].ints
    weight, *given = (numpy_helper.to_array(values[key]).astype(np.float64) for key in conv.input[1:])
    bias = (given[0] if given else 0) - (weight * (shift / scale)).sum((1, 2, 3))
    padding = [0, 0, *pads[:2], 0, 0, *pads[2:]]
    pads[:] = [0, 0, 0, 0]  # zero is the mean of a normalised picture, but black in levels: it is padded before
    for key, value in (
            ('padding', np.array(padding, np.int64)), ('scale', scale.astype(np.float32)),
            ('mean', shift.astype(np.float32)), ('weight', (weight / scale).astype(np.float32)),
            ('bias', bias.astype(np.float32))):
        graph.initializer.append(numpy_helper.from_array(value, f'levels/{key}'))
    for node in (helper.make_node('Add', ['levels/scaled', 'levels/mean'], ['levels/pixels'], 'levels/shift'),
                 helper.make_node('Mul', ['levels/padded', 'levels/scale'], ['levels/scaled'], 'levels/scaling'),
                 helper.make_node('Pad', [name, 'levels/padding'], ['levels/padded'], 'levels/pad')):
        graph.node.insert(0, node)
    for key in conv.input[1:]:
        if not any(key in node.input for node in graph.node if node is not conv):
            graph.initializer.remove(values[key])
    conv.input[:] = ['levels/pixels', 'levels/weight', 'levels/bias']
    return 'levels/pixels', (0., 255.)


def set_metadata(model: Any, about: Dict[str, Any]) -> None:
    """Let the metadata of an ONNX model be these alone, as JSON; what is None is left out."""
    del model.metadata_props[:]
    for key, value in about.items():
        if value is not None:
            model.metadata_props.add(key=key, value=json.dumps(value))


def update_metadata(path: Path, **about) -> None:
    """Add to the metadata of a file of this package."""
    import onnx
    model = onnx.load(path)
    set_metadata(model, {**OnnxModel(path).about, **about})
    onnx.save(model, path)


class _Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, name: str, batches: Iterable[np.ndarray]) -> None:
        self.name, self.batches = name, iter(batches)
        self.first = np.empty(0)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        batch = next(self.batches, None)
        if batch is not None and not self.first.size:
            self.first = batch
        return None if batch is None else {self.name: batch}
