"""A trained network and how it is to be shown a picture: from a picture to probabilities, decisions and maps."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from huggingface_hub import constants
from PIL import Image
from timm.data import resolve_model_data_config
from torchvision.transforms.v2.functional import pil_to_tensor

from .attention import alphas_of
from .download import WeightsError, sha256_of
from .explain import class_activation_map, gate_maps
from .factory import Checkpoint, tensors_sha256
from .isic.crops import Box
from .isic.dicom import is_dicom, read_dicom
from .isic.images import read_image, to_rgb
from .isic.task import OFFICIAL_THRESHOLD, Task, calibrate, label_words
from .isic.transforms import CROPS, EvalCrops, grey_world, normalisation, seeded
from .onnx_file import OnnxModel
from .overlays import on_picture, overlay
from .pretrained import OWN_WEIGHTS

__all__ = ['DEFAULT_MODEL', 'LARGEST_MAP', 'Cutter', 'Predictor', 'read_picture', 'shrunk']

DEFAULT_MODEL = 'arl_cnn14.isic2017'
USUAL_CROPS = 'multiscale'  # as evaluate_isic.py's, where the checkpoint's run is not known
SMALLEST_SIDE = 16  # pixels; in less nobody sees a lesion
MASKS = {  # what the pictures of attention masks show
    'spatial': 'mean over channels; 1 is a flat mask', 'channel': 'largest of the channels; 1 is a flat mask',
    'mixed': 'mean over channels'}
LARGEST_MAP = 1024  # pixels, longer side of a picture with a map
LONGEST_SHAPE = 10  # longer side over shorter side; resizing a thread of pixels can take all memory


def read_picture(path: Union[str, Path], shorter_side: Optional[int] = None) -> Image.Image:
    """Read an image file or a DICOM file: RGB, upright, 8 bits.

    Args:
        path: The file.
        shorter_side: Pixels that the shorter side should keep, where it has them; a large JPEG is then decoded smaller.

    Raises:
        OSError: It cannot be read.
    """
    return read_dicom(path) if is_dicom(path) else read_image(path, shorter_side)


def shrunk(picture: Image.Image, boxes: Sequence[Box], side: int) -> Tuple[Image.Image, List[Box]]:
    """A copy of a picture whose longer side is at most `side` pixels, and where boxes of the picture lie in it."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    x, y = copy.width / picture.width, copy.height / picture.height
    return copy, [(left * x, top * y, right * x, bottom * y) for left, top, right, bottom in boxes]


class Cutter:
    """From a picture to the crops that a network looks at, 8 bits. It is small enough to be sent to other processes."""

    def __init__(
            self,
            img_size: int,
            crops: str,
            colour_constancy: bool = False,
            seed: int = 0,
            whole: bool = False,
    ) -> None:
        """
        Args:
            img_size: Side of the network's input in pixels.
            crops: One of CROPS.
            colour_constancy: Grey-world, as in training.
            seed: Of the random positions of 'paper' crops.
            whole: Give the picture as it is, for a network that cuts it itself.
        """
        self.crops = EvalCrops(img_size, crops)
        self.colour_constancy, self.seed, self.whole = colour_constancy, seed, whole
        self.shorter_side = self.crops.shorter_side

    def __call__(self, picture: Image.Image, image_id: str = '') -> Tuple[torch.Tensor, List[Box]]:
        """Crops, uint8 (N, 3, S, S), and where each was cut: (left, top, right, bottom) in pixels of the picture.

        Args:
            picture: RGB, upright.
            image_id: Name of the image, from which the positions of 'paper' crops are drawn.

        Raises:
            OSError: A picture too small or too long for any network.
        """
        shorter, longer = sorted(picture.size)
        if shorter < SMALLEST_SIDE or longer > LONGEST_SHAPE * shorter:
            raise OSError(f'it has {picture.width} x {picture.height} px, which is no picture of a lesion')
        if self.whole:
            return pil_to_tensor(picture)[None], [(0., 0., float(picture.width), float(picture.height))]
        with seeded(image_id, self.seed):
            return self.crops.with_boxes(grey_world(picture) if self.colour_constancy else picture)


class Predictor:
    """A trained network, by PyTorch or ONNX Runtime, used as it was evaluated.

    >>> predictor = Predictor()
    >>> tensor, boxes = predictor.prepare(read_picture('lesion.jpg', predictor.cutter.shorter_side))
    >>> probabilities = predictor.probabilities(tensor)
    >>> predictor.decide(probabilities)
    {'melanoma': False, 'seborrheic_keratosis': True}

    A file of `python -m timm_arl.export --with-preprocessing` looks at whole pictures: `prepare` gives one crop, the
    picture, uint8 (1, 3, H, W).

    Attributes:
        name: As it was given.
        task: What is predicted.
        labels: Its labels, in order.
        crops: How the picture is cut, one of CROPS.
        img_size: Side of the network's input in pixels.
        cutter: From a picture to 8-bit crops.
        network: The timm model in eval mode, or None for an ONNX file.
        thresholds: Name of an operating point -> label -> threshold of the probability; 'official' is always there.
        point: Name of the operating point that decides: Youden's where validation chose one, else the official 0.5.
        temperatures, biases: Label -> T and b of calibrated; empty where none were fitted.
        sha256: Of the tensors, or of the ONNX file.
        remarks: Sentences that a user should know about how the network is used here.
    """

    def __init__(
            self,
            name: Union[str, Path] = DEFAULT_MODEL,
            device: Union[str, torch.device] = 'cpu',
            crops: Optional[str] = None,
            seed: int = 0,
            threads: int = 0,
    ) -> None:
        """
        Args:
            name: Output folder of finetune_isic.py, staged folder, timm name (`NAME.TAG`, `hf-hub:user/model`), or an
                .onnx file of `python -m timm_arl.export`, which needs ONNX Runtime.
            device: Where a network computes; an ONNX file runs on the CPU.
            crops: One of CROPS; None: as in the checkpoint's run.
            seed: Of random crops.
            threads: Of ONNX Runtime; 0 for one per core.

        Raises:
            WeightsError: A network that cannot be loaded, or whose outputs nobody named; a damaged record of its run.
            ImportError: ONNX Runtime is missing.
        """
        self.name, self.device = str(name), torch.device(device)
        self.network: Optional[nn.Module] = None
        self.remarks: List[str] = []
        self._unknown: List[WeightsError] = []  # why it is not known how a checkpoint was evaluated
        load = self._load_onnx if self.name.lower().endswith('.onnx') else self._load_checkpoint
        self.task, config, saved = load(threads)
        self.labels = self.task.labels
        self.img_size = int(config['input_size'][-1])
        self.crops = crops or saved.get('crops', USUAL_CROPS)
        if self.crops not in CROPS:
            raise WeightsError(f'{self.name} was evaluated with crops {self.crops!r}, which are not known here: choose '
                               f'{", ".join(CROPS)}.')
        if self.network is not None and 'crops' not in saved:
            cause = ', '.join(error.cause for error in self._unknown) or 'no run.json or results.json'
            self.remarks.append(f'How {self.name} was evaluated is not known ({cause}): using crops {self.crops}, '
                                f'without grey-world.')
        self._whole = bool(config.get('with_preprocessing'))
        if self._whole and self.crops != saved.get('crops'):
            raise WeightsError(f'{self.name} cuts pictures itself, with crops {saved.get("crops")}: leave out --crops, '
                               f'or use a file that was exported without --with-preprocessing.')
        self.cutter = Cutter(self.img_size, self.crops, bool(saved.get('grey_world')), seed, self._whole)
        self.normalise = nn.Identity() if self._whole else normalisation(config['mean'], config['std'])
        points: Any = saved.get('thresholds')
        self.thresholds = {name: values for name in (points if isinstance(points, dict) else ())
                           for values in [_numbers(points[name], self.labels)] if values}
        self.temperatures, self.biases = (_numbers(saved.get(name), self.labels) for name in ('temperatures', 'biases'))
        if not self.biases:  # an ONNX file of an older version, whose calibration was another
            self.temperatures = {}
        self.doubts = [str(doubt) for doubt in saved.get('doubts') or ()]  # about the calibration
        self.thresholds.setdefault('official', dict.fromkeys(self.labels, OFFICIAL_THRESHOLD))
        self.point = self.operating_point('youden') or 'official'
        if len(self.thresholds) == 1:
            self.remarks.append(f'{self.name} has no thresholds that were chosen on validation images: using '
                                f'{OFFICIAL_THRESHOLD}.')
        if saved.get('lesion_crop'):
            self.remarks.append(f'{self.name} was trained on pictures cut to the lesion: cut yours, which are shown '
                                f'whole.')
        if saved.get('aspect') == 'squash':
            self.remarks.append(f'{self.name} was trained on copies that were squashed to a square: squash yours, '
                                f'which are shown in the shape that they have.')
        if self.crops != saved.get('crops', self.crops) and len(self.thresholds) > 1:
            self.remarks.append(f'Thresholds and calibration of {self.name} were chosen with crops {saved["crops"]}, '
                                f'not {self.crops}.')

    def _load_checkpoint(self, threads: int) -> Tuple[Task, Dict[str, Any], Dict[str, Any]]:
        checkpoint = Checkpoint(self.name)
        if checkpoint.path is None and not self.name.startswith('hf-hub:') and not checkpoint.label_names():
            own = [name for name in sorted(OWN_WEIGHTS) if name.partition('.')[0] == self.name] or sorted(OWN_WEIGHTS)
            raise WeightsError(f'The weights that {self.name} loads do not know skin lesions: name the output folder '
                               f'of a network that you trained, or {" or ".join(own)}.')
        model: Any = checkpoint.network()
        config = checkpoint.config()
        task = Task.of_network(model, config)
        if task is None:
            remedy = ' in it.' if checkpoint.path is not None else ''
            raise WeightsError(_not_known(self.name, model.num_classes, 'config.json', config, remedy))
        self.remarks += filter(None, [task.assumption(self.name, model, config)])
        # offline, the weights alone may be in the cache
        saved = checkpoint.settings(self._unknown if constants.HF_HUB_OFFLINE else None)
        self.sha256 = tensors_sha256(Path(model.pretrained_cfg['file']))
        self.network = model.to(self.device, memory_format=torch.channels_last).eval()
        return task, resolve_model_data_config(model), saved

    def _load_onnx(self, threads: int) -> Tuple[Task, Dict[str, Any], Dict[str, Any]]:
        if not Path(self.name).is_file():
            raise WeightsError(f'No file {self.name}: python -m timm_arl.export writes one.')
        self.device = torch.device('cpu')  # whatever was asked for: ONNX Runtime computes there
        try:
            self._onnx = OnnxModel(self.name, threads)
        except ImportError:
            raise
        except Exception as error:  # ONNX Runtime's are of many kinds
            raise WeightsError(f'{self.name} is no ONNX file that ONNX Runtime can run: '
                               f'{" ".join(str(error).split())}') from None
        about = self._onnx.about
        if not {'mean', 'std', 'input_size'} <= about.keys():
            raise WeightsError(f'{self.name} does not say how its images are normalised: write it with python -m '
                               f'timm_arl.export.')
        outputs = about.get('outputs') or self._onnx.session.get_outputs()[0].shape[-1]
        task = Task.of_config(about, outputs)
        if task is None:
            raise WeightsError(_not_known(self.name, outputs, 'metadata', about,
                                          ' in the config.json of the network, and export it again.'))
        if (about.get('int8') or {}).get('worse'):
            self.remarks.append(f'{self.name} is in 8 bits, and has a lower AUC than the network that it was made from '
                                f'({about["int8"]["worse"]}).')
        if about.get('weights') == 'random':
            self.remarks.append(f'{self.name} holds random weights: its probabilities mean nothing.')
        self.sha256 = sha256_of(Path(self.name))
        return task, about, about

    def operating_point(self, name: str) -> str:
        """Full name of the operating point whose name begins so, 'youden' for one; '' where there is none."""
        return next((point for point in self.thresholds if point.startswith(name)), '')

    def prepare(self, picture: Image.Image, image_id: str = '') -> Tuple[torch.Tensor, List[Box]]:
        """What the network looks at, normalised, float32 (N, 3, S, S), and where each crop was cut, in pixels.

        Args:
            picture: Any picture, upright; converted to RGB, 16-bit grey too.
            image_id: As for Cutter.

        Raises:
            OSError: A picture too small or too long for any network, or as to_rgb.
        """
        crops, boxes = self.cutter(to_rgb(picture), image_id)
        return self.normalise(crops), boxes

    @torch.inference_mode()
    def probabilities(self, tensors: torch.Tensor) -> torch.Tensor:
        """Means over the crops, not calibrated: (labels,) of (N, 3, S, S), or (B, labels) of (B, N, 3, S, S)."""
        images = tensors.flatten(0, -4)
        if self._whole:
            found = torch.from_numpy(self._onnx(images.permute(0, 2, 3, 1).cpu().numpy()))
            return found.unflatten(0, tensors.shape[:-3]).mean(-2)
        if self.network is None:
            logits = torch.from_numpy(self._onnx(images.numpy()))
        else:
            logits = self.network(images.to(self.device).contiguous(memory_format=torch.channels_last))
        return self.task.probabilities(logits).unflatten(0, tensors.shape[:-3]).mean(-2).cpu()

    def decide(self, probabilities: torch.Tensor, point: Optional[str] = None) -> Dict[str, bool]:
        """Label -> whether its probability is strictly above its threshold.

        Args:
            probabilities: Shape (labels,), not calibrated, as the thresholds are.
            point: Name of an operating point; None: that of the attribute.
        """
        thresholds = self.thresholds[point or self.point]
        return {label: p > thresholds[label] for label, p in zip(self.labels, probabilities.double().tolist())}

    def most_probable(self, probabilities: torch.Tensor) -> str:
        """The label with the largest probability, the first of equals: what an image of exclusive classes is called.

        Args:
            probabilities: Shape (labels,), not calibrated.
        """
        return self.labels[int(probabilities.argmax())]

    def calibrated(self, probabilities: torch.Tensor) -> np.ndarray:
        """sigmoid(logit(p) / T + b) by temperatures and biases, float64, same shape; p where they were not fitted.

        Args:
            probabilities: Shape (..., labels).
        """
        return calibrate(
            probabilities.numpy(), np.array([self.temperatures.get(label, 1.) for label in self.labels]),
            np.array([self.biases.get(label, 0.) for label in self.labels]))

    def explain(self, picture: Image.Image, gates: bool = True, image_id: str = '') -> Dict[str, Image.Image]:
        """Maps laid over a picture, no larger than 1024 px: what speaks for each label, and where the gates looked.

        Args:
            picture: As for prepare.
            gates: Whether to give the attention masks of an ARL network too.
            image_id: As for Cutter.

        Returns:
            By label its class activation map (Eq. 13), if the network has such maps, then by block its mask; each with
            a legend.

        Raises:
            OSError: As prepare.
            ValueError: Nothing to show: an ONNX file, or a network with another head and no masks.
        """
        tensor, boxes = self.prepare(picture, image_id)
        shown, boxes = shrunk(to_rgb(picture), boxes, LARGEST_MAP)
        return self.explain_crops(shown, tensor, boxes, None if gates else ())

    def explain_crops(
            self,
            picture: Image.Image,
            tensor: torch.Tensor,
            boxes: Sequence[Box],
            blocks: Optional[Sequence[str]] = None,
    ) -> Dict[str, Image.Image]:
        """As explain, of crops that are prepared.

        Args:
            picture: RGB, of any size.
            tensor: Crops as prepare gives them.
            boxes: Where each lies in the picture, in its pixels.
            blocks: Names of those whose attention masks to give too; None: all that there are.

        Raises:
            ValueError: As explain.
        """
        if self.network is None:
            raise ValueError(f'{self.name} is an ONNX file, which gives no maps: use the checkpoint.')
        tensor, gates = tensor.to(self.device), {}
        if blocks != () and alphas_of(self.network):
            gates = {name: gate for name, gate in gate_maps(self.network, tensor).items()
                     if blocks is None or name in blocks}
        pictures, heats = {}, {}
        try:
            maps = class_activation_map(self.network, tensor)
        except ValueError:  # another kind of head
            if not gates:
                raise
        else:
            heats = {label: on_picture(maps[:, self.task.outputs.index(label)], boxes, picture.size)
                     for label in self.labels}
        # so that 0 has one colour in all
        most = max((float(np.nanmax(np.abs(heat))) for heat in heats.values()), default=1.) or 1.
        for label, heat in heats.items():
            pictures[label] = overlay(
                picture, heat, f'Class activation map, {label_words(label)}: above 0 speaks for it, below 0 against '
                f'it.', (-most, most))
        attention = getattr(self.network, 'attention', '')
        for name, gate in gates.items():
            heat = on_picture(gate.mask, boxes, picture.size)
            pictures[name] = overlay(
                picture, heat, f'Attention mask of block {name}, {MASKS[attention]}. alpha = {gate.alpha:.3g}.',
                (0., max(np.nanmax(heat), 1. if attention == 'mixed' else 2.)))
        return pictures


def _not_known(name: str, outputs: Any, where: str, config: Dict[str, Any], remedy: str) -> str:
    """That nobody has said what the outputs of a network are, and the entry of a config.json that would.

    Args:
        remedy: Where to set it; '' where the user cannot.
    """
    names = list(config.get('label_names') or ())
    count = outputs if isinstance(outputs, int) else 2  # an ONNX file may leave it open
    labels = names if len(names) == count else ['nevus', 'melanoma', *map(str, range(3, 1 + count))][:count]
    entry = json.dumps({'task': {'name': 'mine', 'kind': 'multiclass', 'labels': labels}}, ensure_ascii=False)[1:-1]
    cause = ('has a task that is damaged or of other outputs' if config.get('task') else
             f'only calls them {", ".join(map(str, names))}' if names else 'has no label_names')
    if not remedy or len(labels) > 20:
        remedy = f'choose a network that was trained on skin lesions, {DEFAULT_MODEL} for one.'
    else:
        remedy = f'set a key such as {entry} (kind multilabel where an image may have several){remedy}'
    return f'What the {outputs} outputs of {name} mean is not known, because its {where} {cause}: {remedy}'


def _numbers(values: Any, labels: Sequence[str]) -> Dict[str, float]:
    """The number of each label that a config.json has; empty where it lacks one."""
    good = isinstance(values, dict) and all(isinstance(values.get(label), (int, float)) for label in labels)
    return {label: float(values[label]) for label in labels} if good else {}
