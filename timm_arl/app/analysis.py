"""What the page shows of a picture, and nothing about how: no Gradio here, and no file on disk."""
import base64
import binascii
import contextlib
import io
import json
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from .. import __version__
from ..explain import gate_maps, scaled_alphas
from ..extras import missing
from ..factory import Checkpoint
from ..isic.crops import Box
from ..isic.dicom import SUFFIXES, read_dicom
from ..isic.images import decode
from ..isic.synthetic import draw_lesion
from ..isic.task import label_words
from ..pictures import REMARKS, remark_on
from ..prediction_files import MOST_PROBABLE, PredictionFiles
from ..predictor import Predictor, shrunk

__all__ = [
    'LARGEST_FACTOR', 'MAX_BYTES', 'MAX_PIXELS', 'NOT_FOR', 'Analysis', 'Analyst', 'Block', 'PictureError',
    'accepted_words', 'data_url', 'decode_data_url', 'synthetic_picture',
]

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
LARGEST_FACTOR = 10.  # of the alphas
SHOWN = 720  # pixels, longer side of a picture on the page
FORMATS = {  # Pillow's names, and what readers call them; other formats may start programs, as EPS does
    'JPEG': 'JPEG', 'PNG': 'PNG', 'WEBP': 'WebP', 'TIFF': 'TIFF', 'BMP': 'BMP', 'GIF': 'GIF', 'JPEG2000': 'JPEG 2000'}
NOT_FOR = 'Not a medical device. For research only: do not use it to diagnose, to triage, or to reassure anyone.'
SEEDS = {'nevus': 10, 'melanoma': 3, 'seborrheic_keratosis': 4}  # of generated pictures that look different
SYNTHETIC_SIZE = 480  # pixels


class PictureError(Exception):
    """Why there is no answer to a picture, in one sentence for the reader of the page."""


class Block(NamedTuple):
    """What the gate of a block did to a picture, means over crops and positions, as in :class:`explain.GateMap`."""
    alpha: float
    contribution: float
    effective_share: float


class Analysis(NamedTuple):
    """What is kept of a picture in memory, until its reader drops the next one.

    Attributes:
        name: Of the file.
        synthetic: Whether it was generated.
        size: Width and height of the file's picture.
        remark: What makes it a picture of which little can be expected, or ''.
        picture: A copy of at most 720 px.
        crops: What the network was shown, uint8 (N, 3, S, S); the copy, where the network cuts pictures itself.
        boxes: Where each crop lies in that copy, in its pixels.
        probabilities: Shape (labels,).
        without: The same with every alpha at 0, or None for a network without gates.
        blocks: Of a network with gates, by name.
    """
    name: str
    synthetic: bool
    size: Tuple[int, int]
    remark: str
    picture: Image.Image
    crops: torch.Tensor
    boxes: List[Box]
    probabilities: torch.Tensor
    without: Optional[torch.Tensor]
    blocks: Dict[str, Block]


def accepted_words() -> str:
    """The formats that can be read: 'JPEG, PNG, ... or DICOM'."""
    words = [*FORMATS.values(), *(() if missing('dicom') else ('DICOM',))]
    return f'{", ".join(words[:-1])} or {words[-1]}'


def decode_data_url(url: Any) -> bytes:
    """The bytes of a ``data:...;base64,...`` URL.

    Raises:
        PictureError: Something else.
    """
    head, comma, content = url.partition(',') if isinstance(url, str) else ('', '', '')
    try:
        if not comma or not head.startswith('data:') or not head.endswith(';base64'):
            raise binascii.Error
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError('The picture did not arrive: it must be sent as a data URL in base64.') from None


def data_url(picture: Image.Image, kind: str = 'JPEG') -> str:
    """A picture as a page holds it, without a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({'quality': 88} if kind == 'JPEG' else {}))
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def synthetic_picture(diagnosis: Any) -> Image.Image:
    """The generated picture of one of DIAGNOSES, always the same.

    Raises:
        PictureError: Another diagnosis.
    """
    if not isinstance(diagnosis, str) or diagnosis not in SEEDS:
        raise PictureError(f'There is no generated picture {diagnosis!r}: choose {", ".join(SEEDS)}.')
    return draw_lesion(diagnosis, np.random.default_rng(SEEDS[diagnosis]), SYNTHETIC_SIZE)


class Analyst:
    """A network and what is known about it. Its methods may be called from any thread: they take turns."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: As Predictor takes it.

        Raises:
            WeightsError: As Predictor.
            ImportError: As Predictor.
        """
        self.predictor = Predictor(name)
        self.measured = _measured(name, self.predictor.labels)  # scores, or None
        self.repo = None if self.measured or name.lower().endswith('.onnx') else Checkpoint(name).repo
        self._turn = threading.Lock()  # the alphas of the one network change

    def look_at_file(self, name: str, content: bytes) -> Analysis:
        """Probabilities of a file's picture.

        Args:
            name: Of the file.
            content: Its bytes.

        Raises:
            PictureError: It is too large or cannot be read.
        """
        if len(content) > MAX_BYTES:
            raise PictureError(f'{name} has {len(content) / 1e6:.1f} MB, above the limit of {MAX_BYTES / 1e6:.0f} MB.')
        try:
            try:
                picture, size = self._read(name, content)
            except OSError:
                raise
            except Exception as error:  # decoders raise what they like about a damaged file
                raise PictureError(f'{name} cannot be read ({type(error).__name__}): the file is damaged.') from error
            return self._look(name, picture, size, False)
        except OSError as error:
            raise PictureError(f'{name} cannot be used: {" ".join(str(error).split())[:300]}.') from error

    def look_at_synthetic(self, diagnosis: str) -> Analysis:
        """Probabilities of a generated picture.

        Args:
            diagnosis: One of DIAGNOSES.

        Raises:
            PictureError: Another diagnosis.
        """
        picture = synthetic_picture(diagnosis)
        return self._look(f'synthetic {label_words(diagnosis)}', picture, picture.size, True)

    def _read(self, name: str, content: bytes) -> Tuple[Image.Image, Tuple[int, int]]:
        """A file's picture, a large JPEG decoded smaller, and its own width and height."""
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's and pydicom's, on odd files that they read all the same
            if content[128:132] == b'DICM' or name.lower().endswith(SUFFIXES):
                picture = read_dicom(io.BytesIO(content))
                return picture, picture.size
            size = 0, 0
            try:
                with contextlib.suppress(Image.DecompressionBombError):  # decode says it better
                    with Image.open(io.BytesIO(content), formats=list(FORMATS)) as file:
                        size = file.size
            except UnidentifiedImageError:
                raise OSError(f'it is not a picture of the formats {accepted_words()}') from None
            picture = decode({'bytes': content, 'path': None}, self.predictor.cutter.shorter_side)
            turned = (picture.width < picture.height) != (size[0] < size[1])
            return picture, size[::-1] if turned else size

    def _look(self, name: str, picture: Image.Image, size: Tuple[int, int], synthetic: bool) -> Analysis:
        crops, boxes = self.predictor.cutter(picture, Path(name).stem)
        shown, boxes = shrunk(picture, boxes, SHOWN)
        tensor = self.predictor.normalise(crops)
        with self._turn:
            probabilities, blocks = self.predictor.probabilities(tensor), self._blocks(tensor)
        side = self.predictor.img_size
        remark = REMARKS.get(remark_on(picture, crops[0], side), '').format(side=side)
        if synthetic and remark == REMARKS['square']:  # drawn so, not squashed
            remark = ''
        if self.predictor.cutter.whole:  # the only crop is the picture, which may be large
            crops = pil_to_tensor(shown)[None]
        analysis = Analysis(name, synthetic, size, remark, shown, crops, boxes, probabilities, None, blocks)
        return analysis._replace(without=self.at(analysis, 0.)) if blocks else analysis

    def _blocks(self, tensor: torch.Tensor) -> Dict[str, Block]:
        if self.predictor.network is None:
            return {}
        try:
            maps = gate_maps(self.predictor.network, tensor)
        except ValueError:  # no gates
            return {}
        return {name: Block(gate.alpha, gate.contribution.mean().item(), gate.effective_share.mean().item())
                for name, gate in maps.items()}

    def at(self, analysis: Analysis, factor: float) -> torch.Tensor:
        """Probabilities with every alpha times a factor, shape (labels,).

        Args:
            analysis: Of a network with gates.
            factor: From 0, no attention; 1 is the network as it was trained.
        """
        assert self.predictor.network is not None
        with self._turn, scaled_alphas(self.predictor.network, factor):
            return self.predictor.probabilities(self.predictor.normalise(analysis.crops))

    def maps(self, analysis: Analysis, *blocks: str) -> Dict[str, Image.Image]:
        """Class activation map of each label, then the masks of blocks, laid on the picture; empty if there are none.

        Args:
            analysis: Of a picture.
            blocks: Names; none for no masks.
        """
        with self._turn:
            try:
                return self.predictor.explain_crops(
                    analysis.picture, self.predictor.normalise(analysis.crops), analysis.boxes, blocks)
            except ValueError:  # an ONNX file, or another kind of head
                return {}

    def download(self, analysis: Analysis, factor: float) -> bytes:
        """A zip of predictions.csv as timm_arl.predict writes it, result.json with all that is known, and overlays.

        Args:
            analysis: Of a picture.
            factor: Of the alphas; result.json tells what they change.
        """
        predictor, buffer = self.predictor, io.BytesIO()
        labels, values = predictor.labels, analysis.probabilities.double().tolist()
        table = PredictionFiles(Path(), 'csv', labels, predictor.task.kind == 'multiclass')
        row = table.encode({
            'image': analysis.name, **dict(zip(labels, values)),
            MOST_PROBABLE: predictor.most_probable(analysis.probabilities),
            **dict(zip(table.decisions, predictor.decide(analysis.probabilities).values()))})
        result: Dict[str, Any] = {
            'image': analysis.name, 'synthetic': analysis.synthetic, 'size': analysis.size, 'remark': analysis.remark,
            'not_for': NOT_FOR,
            'probabilities': dict(zip(labels, values)),
            'calibrated': dict(zip(labels, predictor.calibrated(analysis.probabilities).tolist())),
            'temperatures': predictor.temperatures, 'biases': predictor.biases,
            'operating_point': predictor.point,
            'operating_points': {
                point: {label: {'threshold': thresholds[label], 'above': above} for label, above in
                        predictor.decide(analysis.probabilities, point).items()}
                for point, thresholds in predictor.thresholds.items()},
            'model': predictor.name, 'sha256': predictor.sha256, 'img_size': predictor.img_size,
            'crops': predictor.crops, 'boxes': [  # in pixels of the picture in overlays/
                [round(side, 1) for side in box] for box in analysis.boxes],
            'measured': self.measured and {key: self.measured[key] for key in ('split', 'mean_auc', 'mean_auc_ci95')},
            'versions': {'timm_arl': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
        }
        if analysis.without is not None:
            result['blocks'] = {name: block._asdict() for name, block in analysis.blocks.items()}
            result['probabilities_by_factor_of_alpha'] = {
                f'{value:g}': dict(zip(labels, self.at(analysis, value).double().tolist()))
                for value in sorted({0., 1., factor})}
        with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('predictions.csv', table.header() + row)
            archive.writestr('result.json', json.dumps(result, indent=2))
            for name, picture in {'picture': analysis.picture, **self.maps(analysis, *analysis.blocks)}.items():
                file = io.BytesIO()
                picture.save(file, 'PNG')
                archive.writestr(f'overlays/{name}.png', file.getvalue(), zipfile.ZIP_STORED)
        return buffer.getvalue()


def _measured(name: str, labels: Sequence[str]) -> Optional[Dict[str, Any]]:
    """Scores of a checkpoint from the files beside it, on the test images if there are some, or None."""
    if name.lower().endswith('.onnx'):
        return None
    folder = Checkpoint(name).folder
    if folder is None:
        return None
    for file in ('results.json', 'metrics.json'):  # of a staged folder, and of a run
        try:
            content = json.loads(Path(folder, file).read_text(encoding='utf-8'))
            metrics = content.get('metrics', content)
            split = next((split for split in ('test', 'validation') if split in metrics), None)
            if split and metrics[split].get('mean_auc') is not None:
                data = content.get('data', {})
                return {**metrics[split], 'split': split, 'images': metrics[split][labels[0]]['images'],
                        'data': 'ISIC 2017' if split in data.get('official_splits', ()) else
                        data.get('name', 'its data set')}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or another program's
            continue
    return None
