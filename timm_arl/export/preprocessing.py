"""What surrounds a network in an ONNX file that takes pictures: cutting and normalising before, probabilities after.

The crops are those of :class:`~timm_arl.isic.transforms.EvalCrops`. Pillow resizes by a triangle filter that is as wide
as the reduction, along the rows and then along the columns, and rounds to 8 bits each time: here that is a product with
one matrix, a rounding, a product with another and a rounding. ONNX's own Resize cannot start at a fraction of a pixel.
"""
import math
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from ..extras import require
from ..files import replacing
from ..isic.crops import MULTISCALE
from ..isic.transforms import CROP_PCT, EvalCrops, grey_world, normalisation
from ..onnx_file import ExportError, OnnxModel
from .quantize import set_metadata

__all__ = ['CROPS_INSIDE', 'Preprocessing', 'Probabilities', 'add_preprocessing']

CROPS_INSIDE = ('multiscale', 'center')  # the paper's are drawn at random, from the name of the image
LEVELS = 2  # of 255, by which a pixel of a crop may differ from Pillow's: two roundings, where it falls on a half


class Preprocessing(nn.Module):
    """Pictures to normalised crops, those of each picture together.

    Shape:
        - Input: (N, H, W, 3), uint8.
        - Output: (N * K, 3, img_size, img_size), float32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
            self,
            img_size: int,
            crops: str,
            mean: Sequence[float],
            std: Sequence[float],
            colour_constancy: bool = False,
    ) -> None:
        """
        Args:
            img_size: Side of the crops.
            crops: One of CROPS_INSIDE.
            mean, std: Of the normalisation.
            colour_constancy: Grey-world, as in training.
        """
        super().__init__()
        self.img_size, self.crops, self.colour_constancy = img_size, crops, colour_constancy
        self.count = 5 if crops == 'multiscale' else 1
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        if self.colour_constancy:
            means = pixels.mean((2, 3), keepdim=True)
            scale = means.mean(1, keepdim=True) / torch.where(means > 0, means, torch.ones_like(means))
            pixels = (pixels * scale).round().clamp(0, 255)
        # all in double: a float32 has too few digits for a place among thousands of pixels
        xs = torch.arange(images.shape[2], dtype=torch.float64, device=images.device)
        ys = torch.arange(images.shape[1], dtype=torch.float64, device=images.device)
        width, height = xs[-1:] + 1, ys[-1:] + 1
        boxes = self._multiscale(width, height) if self.crops == 'multiscale' else [self._center(width, height)]
        cut = [self._resize(self._resize(pixels, xs, *x).transpose(2, 3), ys, *y).transpose(2, 3) for x, y in boxes]
        return ((torch.stack(cut, 1).flatten(0, 1) / 255) - self.mean) / self.std

    def _multiscale(self, width: torch.Tensor, height: torch.Tensor) -> List[Tuple[Any, Any]]:
        """Of each of multiscale_boxes, where its first pixel starts and how wide a pixel is, in x and in y."""
        shorter = torch.minimum(width, height)
        squares = [(width / 2 - share * shorter / 2, height / 2 - share * shorter / 2, share * shorter)
                   for share in MULTISCALE]
        squares += [(0 * width, 0 * height, shorter), (width - shorter, height - shorter, shorter)]
        return [((left, side / self.img_size), (top, side / self.img_size)) for left, top, side in squares]

    def _center(self, width: torch.Tensor, height: torch.Tensor) -> Tuple[Any, Any]:
        """The same of a centre crop; torchvision rounds the size of the picture that it is cut from, and its place."""
        resized, shorter = math.floor(self.img_size / CROP_PCT), torch.minimum(width, height)
        found = []
        for side in (width, height):
            length = torch.floor(resized * side / shorter)
            found.append((torch.round((length - self.img_size) / 2) * side / length, side / length))
        return found[0], found[1]

    def _resize(self, pixels: torch.Tensor, places: torch.Tensor, start: Any, step: Any) -> torch.Tensor:
        """Resize the last dimension as Pillow does."""
        centers = start + (torch.arange(self.img_size, dtype=torch.float64, device=pixels.device) + 0.5) * step
        weights = (1 - (places[:, None] + 0.5 - centers).abs() / step.clamp(min=1)).clamp(min=0)
        weights = weights / weights.sum(0, keepdim=True)
        return (pixels @ weights.float() + 0.5).floor().clamp(0, 255)


class Probabilities(nn.Module):
    """Logits of all crops to the probabilities of each picture: means over its crops and, beside them, calibrated.

    Shape:
        - Input: (N * K, outputs), float32.
        - Output: (N, labels), float32; where it is calibrated, two such tensors.
    """

    temperatures: Optional[torch.Tensor]
    biases: torch.Tensor

    def __init__(
            self,
            probabilities: Callable[[torch.Tensor], torch.Tensor],
            crops: int,
            temperatures: Optional[Sequence[float]] = None,
            biases: Optional[Sequence[float]] = None,
    ) -> None:
        """
        Args:
            probabilities: From logits (B, outputs) to probabilities (B, labels).
            crops: K.
            temperatures, biases: One of each label; None where none were fitted.
        """
        super().__init__()
        self.probabilities, self.crops = probabilities, crops
        self.register_buffer('temperatures', None if temperatures is None else torch.tensor(temperatures).double())
        self.register_buffer('biases', torch.tensor(biases or [0.]).double())

    def forward(self, logits: torch.Tensor) -> Any:
        means = self.probabilities(logits).unflatten(0, (-1, self.crops)).mean(1)
        if self.temperatures is None:
            return means
        p = means.double().clamp(1e-12, 1 - 1e-12)  # isic.task.calibrate
        yes, no = p ** (1 / self.temperatures) * self.biases.exp(), (1 - p) ** (1 / self.temperatures)
        return means, (yes / (yes + no)).float()


def add_preprocessing(
        source: Union[str, Path],
        target: Union[str, Path],
        probabilities: Callable[[torch.Tensor], torch.Tensor],
        labels: Sequence[str],
        crops: str = 'multiscale',
) -> Path:
    """Put what surrounds a network into its ONNX file: `pictures` in, `probabilities` out.

    The new file takes uint8 (N, H, W, 3), RGB, upright, any N, H and W, and gives probabilities (N, labels), to which
    the thresholds in its metadata belong, and, where these hold a calibration, `calibrated`, (N, labels).

    Args:
        source: File of :func:`~timm_arl.onnx_file.export_onnx` or
            :func:`~timm_arl.export.quantize.quantize_onnx`.
        target: File to write.
        probabilities: From logits (B, outputs) to probabilities (B, labels), in operations that torch.export knows.
        labels: What they are of.
        crops: One of CROPS_INSIDE, where the metadata of the source do not say.

    Returns:
        The target.

    Raises:
        ExportError: Crops that are drawn at random, or crops or probabilities that are not those of Pillow and PyTorch.
        ImportError: The extra `export` is missing.
    """
    require('export', __name__)
    import onnx
    from onnx import compose

    network = OnnxModel(source)
    outputs = network.session.get_outputs()[0].shape[-1]
    about = {'crops': crops, **network.about, 'with_preprocessing': True, 'outputs': outputs}
    if about['crops'] not in CROPS_INSIDE:
        raise ExportError(f"The network was evaluated with crops {about['crops']!r}, which are drawn at random and "
                          f'cannot be part of a file: leave out --with-preprocessing; predict --onnx cuts them '
                          f'itself.')
    side, grey = about['input_size'][-1], bool(about.get('grey_world'))
    before = Preprocessing(side, about['crops'], about['mean'], about['std'], grey)
    calibration = [about.get(name) or {} for name in ('temperatures', 'biases')]
    known = all(set(labels) <= values.keys() for values in calibration)
    after = Probabilities(
        probabilities, before.count,
        *([values[label] for label in labels] if known else None for values in calibration))
    names = ['probabilities', 'calibrated'][:1 if after.temperatures is None else 2]
    logits = torch.zeros(2 * before.count, outputs)
    dim: Any = torch.export.Dim
    first = _exported(before, torch.zeros(2, 48, 64, 3, dtype=torch.uint8), ['pictures'], ['crops'], {
        0: dim('pictures', min=1), 1: dim('height', min=2), 2: dim('width', min=2)})
    last = _exported(after, logits, ['logits'], names, {0: before.count * dim('pictures', min=1)})
    middle = onnx.load(source)
    for part, prefix in ((first, 'before/'), (middle, 'network/'), (last, 'after/')):
        del part.metadata_props[:]
        del part.graph.value_info[:]  # its names of sizes are not those of the whole
        part.ir_version = middle.ir_version
        part.CopyFrom(compose.add_prefix(
            part, prefix, rename_inputs=part is not first, rename_outputs=part is not last))
    whole = compose.merge_models(first, middle, [('before/crops', f'network/{network.input}')])
    whole = compose.merge_models(whole, last, [(middle.graph.output[0].name, 'after/logits')])
    set_metadata(whole, about)
    with tempfile.TemporaryDirectory() as folder, replacing(target) as temporary:
        onnx.save(whole, temporary)
        onnx.save(first, Path(folder) / 'first.onnx')
        _check(OnnxModel(Path(folder) / 'first.onnx'), network, OnnxModel(temporary), probabilities, EvalCrops(
            side, about['crops']), about)
    return Path(target)


def _exported(part: nn.Module, example: torch.Tensor, inputs: List[str], outputs: List[str], sizes: Dict) -> Any:
    program: Any = torch.onnx.export(
        part.eval(), (example,), dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=(sizes,),
        verbose=False)
    return program.model_proto


def _check(
        first: OnnxModel,
        network: OnnxModel,
        whole: OnnxModel,
        probabilities: Callable[[torch.Tensor], torch.Tensor],
        cut: EvalCrops,
        about: Dict[str, Any],
) -> None:
    """Compare crops of pictures of several shapes with Pillow's, and what the file says of them with the network."""
    rng = np.random.default_rng(0)
    normalise = normalisation(about['mean'], about['std'])
    step = 1 / 255 / min(about['std'])
    for width, height in ((90, 60), (200, 301), (cut.img_size, cut.img_size)):
        picture = Image.fromarray(rng.integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC)
        pictures = np.asarray(picture)[None]
        crops = first(pictures)
        expected = normalise(cut(grey_world(picture) if about.get('grey_world') else picture))
        error = np.abs(crops - expected.numpy()).max() / step
        if not error <= LEVELS + 0.1:
            raise ExportError(f'Crops of a picture of {width} x {height} px differ from those of Pillow by {error:.1f} '
                              f'of 255 levels, more than {LEVELS}.')
        means = probabilities(torch.from_numpy(network(crops))).mean(0).numpy()
        error = np.abs(whole(pictures)[0] - means).max()
        if not error <= 1e-4:
            raise ExportError(f'The file with its preprocessing differs from the network by {error:.2g}, more than '
                              f'0.0001.')
