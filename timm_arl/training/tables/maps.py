"""Where networks look, and how flat the masks of their gates are, measured on images whose lesions are outlined."""
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from ...explain import centred_gaussian, class_activation_map, gate_maps, map_iou, on_picture, pointing_game
from ...isic.artefacts import draw_bubbles, draw_hair
from ...isic.images import decode, decode_mask
from ...isic.intervals import RESAMPLES, resampled_indices
from ...isic.task import LABELS
from ...isic.transforms import restore_aspect
from .pages import cell
from .scores import SEED_OF_IMAGES, measure

__all__ = ['GAUSSIAN', 'MAP_LABELS', 'Rows', 'gaussian_rows', 'map_lines', 'map_rows', 'mask_lines', 'mask_rows']

GAUSSIAN = 'centred_gaussian'
THRESHOLD = 0.5  # of a map's range, above which it counts as marked
MAP_LABELS = {  # columns of a file of map_rows, and what they are
    'pointing': 'pointing game', 'iou': f'IoU with the lesion at {THRESHOLD}',
    'hair': 'IoU with itself after hair', 'bubbles': 'IoU with itself after bubbles',
}
ARTEFACTS = {'hair': draw_hair, 'bubbles': draw_bubbles}
MASK_LABELS = ('alpha', 'positions', 'std of F', 'largest mask value', 'effective share', 'contribution')
Rows = Dict[str, Dict[int, List[Dict[str, Any]]]]  # by row and seed
Prepare = Callable[[Image.Image], Tuple[torch.Tensor, Sequence[Sequence[float]]]]


def _outlined(split: Any) -> Iterator[Tuple[str, int, Image.Image, np.ndarray]]:
    """Images with a positive label and a mask: id, number of the label, picture, mask (height, width)."""
    columns = ('image_id', 'image', 'mask', 'aspect_ratio', *LABELS)
    for cells in split.select_columns([column for column in columns if column in split.column_names]):
        labels = [k for k, label in enumerate(LABELS) if cells[label] == 1]
        if not labels or cells.get('mask') is None:
            continue
        picture = decode(cells['image'])
        mask = decode_mask(cells['mask'], picture.size)
        if 'aspect_ratio' in cells:
            picture = restore_aspect(picture, cells['aspect_ratio'])
        yield cells['image_id'], labels[0], picture, np.asarray(mask.resize(picture.size)) > 127


def _against(heat: np.ndarray, mask: np.ndarray) -> Dict[str, float]:
    return {'pointing': int(pointing_game(heat, mask)), 'iou': map_iou(heat, mask, THRESHOLD)}


def map_rows(network: Any, prepare: Prepare, split: Any, progress: Callable = iter) -> List[Dict[str, Any]]:
    """Scores of a network's class activation maps (Eq. 13) of the true label, an image a row.

    Args:
        network: A timm model whose outputs are LABELS.
        prepare: From a picture to its crops, normalised, and their boxes.
        split: A split of load_splits with masks.
        progress: Wraps the iteration.

    Returns:
        Rows of image_id and MAP_LABELS' keys: whether the highest point lies in the lesion (0 or 1); intersection over
        union of lesion and marked part, at or above THRESHOLD of the map's range; and of the marked parts before and
        after hair or bubbles were drawn.
    """
    def heat(picture: Image.Image, label: int) -> np.ndarray:
        crops, boxes = prepare(picture)
        return on_picture(class_activation_map(network, crops)[:, label], boxes, picture.size)

    rows: List[Dict[str, Any]] = []
    for image_id, label, picture, mask in progress(list(_outlined(split))):
        before = heat(picture, label)
        row: Dict[str, Any] = {'image_id': image_id, **_against(before, mask)}
        for name, draw in ARTEFACTS.items():
            after = heat(draw(picture, len(rows))[0], label)
            row[name] = map_iou(before, _marked(after), THRESHOLD)
        rows.append(row)
    return rows


def _marked(heat: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(heat), np.nanmax(heat)
    return heat >= low + THRESHOLD * (high - low)


def gaussian_rows(split: Any) -> List[Dict[str, Any]]:
    """The same of a Gaussian in the centre of the picture, which has not seen it."""
    return [{'image_id': image_id, **_against(centred_gaussian(picture.size), mask), 'hair': 1, 'bubbles': 1}
            for image_id, _, picture, mask in _outlined(split)]


def map_lines(rows: Rows, pairs: List[Tuple[str, str]], how: Callable) -> List[Dict[str, str]]:
    """Lines of maps.csv: means over images and seeds with intervals over both, and paired differences.

    Args:
        rows: By row and seed, those of map_rows.
        pairs: Rows that are compared, where they have the same seeds.
        how: From a row's name to its other columns.
    """
    values: Dict[str, Dict[str, np.ndarray]] = {}
    for name, by_seed in rows.items():
        images = len(next(iter(by_seed.values())))
        index = np.concatenate([np.arange(images)[None], resampled_indices(images, RESAMPLES, SEED_OF_IMAGES)])
        values[name] = {label: np.stack([np.array([float(row[key]) for row in each])[index].mean(1)
                                         for each in by_seed.values()]) for key, label in MAP_LABELS.items()}
    lines = [cell(name, label, None, measure(of), **how(name))
             for name in values for label, of in values[name].items() if not (name == GAUSSIAN and 'itself' in label)]
    for first, second in pairs:
        if first in rows and second in rows and rows[first].keys() == rows[second].keys():
            lines += [cell(f'{first} - {second}', label, None, measure(of - values[second][label]), **how(first))
                      for label, of in values[first].items() if not (second == GAUSSIAN and 'itself' in label)]
    return lines


def mask_rows(network: Any, prepare: Prepare, pictures: Iterable[Image.Image]) -> List[Dict[str, Any]]:
    """What the gate of each block did, mean over pictures, a block a row.

    Args:
        network: A network with attention residual learning.
        prepare: As for map_rows; the first crop is taken, the largest square in the centre where crops are
            multiscale.
        pictures: Some.
    """
    found: Dict[str, List[Tuple[float, ...]]] = {}
    for picture in pictures:
        for block, gate in gate_maps(network, prepare(picture)[0][:1]).items():
            found.setdefault(block, []).append((
                gate.alpha, float(gate.mask[0].numel()), gate.std.item(), gate.largest.item(),
                gate.effective_share.item(), gate.contribution.mean().item()))
    return [{'block': block, **dict(zip(MASK_LABELS, np.mean(values, axis=0).tolist()))}
            for block, values in found.items()]


def mask_lines(rows: Rows, how: Callable) -> List[Dict[str, str]]:
    """Lines of masks.csv: means over the seeds.

    Args:
        rows: By row and seed, those of mask_rows.
        how: From a row's name to its other columns.
    """
    lines = []
    for name, by_seed in rows.items():
        for blocks in zip(*by_seed.values()):
            for label in MASK_LABELS:
                value = float(np.mean([float(each[label]) for each in blocks]))
                lines.append(cell(f'{name} {blocks[0]["block"]}', label, None, (value,), **how(name)))
    return lines
