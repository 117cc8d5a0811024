"""Images for 8 bits: those from which ranges are found, and those on which the loss is measured."""
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm  # of the core: it comes with timm

from ..factory import Checkpoint
from ..files import same_place
from ..image_list import OwnImages, write_image_list
from ..isic.images import readings
from ..isic.task import Task
from ..isic.transforms import EvalCrops, normalisation
from ..onnx_file import ExportError, OnnxModel
from ..pictures import Pictures
from ..predictor import USUAL_CROPS, Cutter

__all__ = ['FEWEST', 'TOLERANCE', 'USUAL', 'CalibrationImages', 'Loss', 'measure_loss']

FEWEST, USUAL = 32, 100  # images to calibrate on
TOLERANCE = 0.003  # by which an AUC may fall
TABLES = ('.parquet', '.csv', '.tsv', '.tab', '.jsonl', '.arrow')  # which a folder of pictures has none of


class CalibrationImages:
    """Images to calibrate on, cut as the network was evaluated; and labelled ones, where there are any.

    Attributes:
        crops: Of each image, uint8 (K, 3, S, S).
        what: These images in words.
        validation: The validation split of a data set, or None.
        normalise: From crops to what the network takes.
    """

    def __init__(
            self,
            source: str,
            about: Dict[str, Any],
            count: int = USUAL,
            checkpoint: Optional[Checkpoint] = None,
    ) -> None:
        """
        Args:
            source: Folder of pictures, or a data set as `--data` of the programs takes it: its train images.
            about: Metadata of the network's file.
            count: Images to calibrate on, spread evenly over those that there are.
            checkpoint: Where the network is from: the division of its run counts, where the data are those.

        Raises:
            ExportError: Fewer than FEWEST images that can be read.
            ValueError: No such data, or no images.
            ImportError: The extra `train`, which reads data sets, is missing.
        """
        self.normalise = normalisation(about['mean'], about['std'])
        self.validation: Any = None
        side, crops = about['input_size'][-1], about.get('crops', USUAL_CROPS)
        inside = list(Path(source).rglob('*'))
        alone = Path(source).is_dir() and not any(
            path.suffix.lower() in TABLES or path.name == 'HAM10000_metadata' for path in inside)
        folders = {path.name for path in inside if path.is_dir()}
        train, problem = None, ''
        if not alone or len(folders & set(about.get('label_names') or ())) > 1:  # folders of classes
            try:
                train, self.validation = _splits(source, EvalCrops(side, crops), about, checkpoint)
            except (ImportError, ValueError) as error:
                if not alone:
                    raise
                problem = f', taken as pictures without labels: {error}'
        if train is None:
            kind, (read, total) = '', _pictures(source, Cutter(side, crops, bool(about.get('grey_world'))))
        else:
            kind, read, total = 'train ', lambda row: train[row][0], len(train)
        rows = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
        found = tqdm(readings(read, rows), desc='reading images', total=len(rows), leave=False, disable=None)
        self.crops: List[torch.Tensor] = [cut for _, cut, reason in found if not reason]
        left_out = len(rows) - len(self.crops)
        self.what = f'{len(self.crops)} {kind}images of {source}'
        self.what += (f' ({left_out} more cannot be read)' if left_out else '') + problem
        if len(self.crops) < FEWEST:
            raise ExportError(f'--calibration: {self.what} are too few: at least {FEWEST} are needed, and {USUAL} are '
                              f'better.')

    def batches(self) -> Iterable[np.ndarray]:
        """Normalised crops of one image after another."""
        for crops in tqdm(self.crops, desc='calibrating', leave=False, disable=None):
            yield self.normalise(crops).numpy()


def _pictures(source: str, cutter: Cutter) -> Tuple[Callable[[int], torch.Tensor], int]:
    """How to read one of the pictures of a folder, and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'images.jsonl'
        listed = list(OwnImages(path, write_image_list(path, [source], (), Path(folder))))
    pictures = Pictures(cutter, '', False)

    def read(row: int) -> torch.Tensor:
        seen = pictures[listed[row]]
        if seen.reason:
            raise OSError(seen.reason)
        return seen.crops

    return read, len(listed)


def _splits(source: str, cut: EvalCrops, about: Dict[str, Any], checkpoint: Optional[Checkpoint]) -> List[Any]:
    """The train and the validation images of a data set, cut as evaluate_isic.py cuts them."""
    from ..isic.dataset import DataError, Wanted, load_data, wanted_of  # these need the extra `train`
    from ..isic.loading import IsicSplit

    names = about.get('label_names') or ()
    task = Task.of_config(about, len(names)) if names else None
    saved = checkpoint.arguments() if checkpoint else {}
    run = checkpoint and (checkpoint.run_folder() or checkpoint.folder)
    same, seed, wanted = same_place(source, saved.get('data')), saved.get('division_seed'), Wanted()
    if same:
        of_run = {**dict.fromkeys(('task', 'labels', 'columns', 'group_column')), **saved, 'splits': None}
        wanted = wanted_of(SimpleNamespace(**of_run))
    data = load_data(
        source, wanted, saved.get('seed', 0) if seed is None else seed, expected=task,
        earlier=run / 'splits.csv' if run else None, given=bool(saved.get('splits')), same=same,
        usual_groups=saved.get('group_column'), train_ids=saved.get('train_ids'))
    if task is not None and data.task.labels != task.labels:
        raise DataError(f'{source} has the labels {", ".join(data.task.labels)}, but the network has '
                        f'{", ".join(task.labels)}: name a folder of pictures, or data with these.')
    look = dict(keep_aspect=about.get('aspect', 'keep') == 'keep', colour_constancy=bool(about.get('grey_world')),
                crop_to_lesion=bool(about.get('lesion_crop')))
    return [IsicSplit(data.splits[name], cut, task=data.task, every_epoch=False, **look)
            for name in ('train', 'validation')]


class Loss(NamedTuple):
    """What 8 bits cost.

    Attributes:
        images: On how many images it was measured.
        aucs: Label -> AUC in float32 and in 8 bits; without labels of which all images or none are positive.
        largest, mean: Differences of the probabilities.
        decisions: How many of the decisions differ, and how many there are.
    """
    images: int
    aucs: Dict[str, Tuple[float, float]]
    largest: float
    mean: float
    decisions: Tuple[int, int]

    def worse(self) -> str:
        """The labels whose AUC falls by more than TOLERANCE, and how far, in words; '' where there is none."""
        return ', '.join(f'{label} {before:.4f} to {after:.4f}' for label, (before, after) in self.aucs.items()
                         if before - after > TOLERANCE)


def measure_loss(
        before: OnnxModel,
        after: OnnxModel,
        images: CalibrationImages,
        probabilities: Callable[[torch.Tensor], torch.Tensor],
        labels: Sequence[str],
        thresholds: Sequence[float],
) -> Loss:
    """Compare two files on the validation images, or, where there are none, on those of the calibration.

    Args:
        before, after: In float32 and in 8 bits.
        images: From where they are.
        probabilities: From logits (B, outputs) to probabilities (B, labels).
        labels: Their names; AUCs are measured where these are columns of the validation split.
        thresholds: Of the decisions, one of each label.
    """
    truth: List[np.ndarray] = []
    found: List[List[np.ndarray]] = []
    labelled = images.validation is not None
    shown = range(len(images.validation if labelled else images.crops))
    read = images.validation.__getitem__ if labelled else lambda row: (images.crops[row], None)
    for _, item, reason in tqdm(readings(read, shown), desc='comparing', total=len(shown), leave=False, disable=None):
        if reason:
            continue
        if labelled:
            truth.append(item[1].numpy())
        x = images.normalise(item[0]).numpy()
        found.append([probabilities(torch.from_numpy(each(x))).mean(0).numpy() for each in (before, after)])
    p, q = np.array(found).transpose(1, 0, 2).astype(np.float64)
    aucs = {}
    if truth:
        from ..isic.metrics import auc
        aucs = {label: (float(auc(t, a)), float(auc(t, b)))
                for label, t, a, b in zip(labels, np.array(truth).T, p.T, q.T) if t.min() != t.max()}
    differ = (p > thresholds) != (q > thresholds)
    return Loss(len(p), aucs, float(np.abs(p - q).max()), float(np.abs(p - q).mean()), (int(differ.sum()), differ.size))
