"""The images that a report shows: the most wrong, the most certain, those on which networks disagree, and maps."""
import contextlib
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from ..explain import GateMap, class_activation_map, gate_maps, on_picture, overlay
from ..isic.crops import Box
from ..isic.html_report import Example, Examples, Group, Shown
from ..isic.images import stored_size
from ..isic.loading import IsicSplit
from ..isic.task import ISIC2017, OFFICIAL_THRESHOLD, Task, label_words
from ..isic.transforms import EvalCrops, seeded

__all__ = ['most_certain', 'most_different', 'most_wrong', 'report_examples']

WIDTH = 360  # px of a picture; overlay enlarges what is narrower
SCALES = {  # of masks: what the numbers are, and what their scale spans at least, so that a flat mask looks flat
    'spatial': ('1 is a flat mask', (0.5, 1.5)), 'channel': ('1 is a flat mask', (0.5, 1.5)),
    'mixed': ('its mean over the channels', (0., 1.))}


def most_wrong(truth: np.ndarray, probabilities: np.ndarray, count: int = 2) -> List[int]:
    """Up to `count` positives with the lowest probabilities, then as many negatives with the highest, all called wrong.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,); positive means strictly above 0.5.
        count: Images of each kind.
    """
    return _extremes(truth, probabilities, count, right=False)


def most_certain(truth: np.ndarray, probabilities: np.ndarray, count: int = 2) -> List[int]:
    """Up to `count` positives with the highest probabilities, then as many negatives with the lowest, all called right.

    Args:
        truth, probabilities, count: As for most_wrong.
    """
    return _extremes(truth, probabilities, count, right=True)


def most_different(first: np.ndarray, second: np.ndarray, count: int = 4) -> List[int]:
    """The images whose two probabilities differ most, those that do not differ left out."""
    gap = np.abs(first - second)
    return [row for row in np.argsort(-gap, kind='stable')[:count].tolist() if gap[row]]


def _extremes(truth: np.ndarray, probabilities: np.ndarray, count: int, right: bool) -> List[int]:
    p = np.asarray(probabilities, np.float64)
    chosen = ((p > OFFICIAL_THRESHOLD) == (truth == 1)) == right
    up, down = (np.argsort(sign * p, kind='stable') for sign in (1, -1))
    return [row for value, order in ((1, down if right else up), (0, up if right else down))
            for row in [row for row in order.tolist() if truth[row] == value and chosen[row]][:count]]


class _Look(NamedTuple):
    """An image as the network looked at it: the picture as shown, and maps (crops, h, w) with where each crop lies."""
    picture: Image.Image
    boxes: List[Box]
    cams: Dict[str, torch.Tensor]
    gates: Dict[str, GateMap]


class _Overlay(NamedTuple):
    """A kind of map, laid on pictures with one scale for all of them."""
    name: str
    words: str
    limits: Tuple[float, float]
    heats: Dict[int, np.ndarray]


def report_examples(
        model: nn.Module,
        images: IsicSplit,
        crops: EvalCrops,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        probabilities: np.ndarray,
        other: Optional[np.ndarray] = None,
        task: Task = ISIC2017,
        scored: Optional[Task] = None,
) -> Examples:
    """Choose images of a split, and lay on them the map of a label and the mask of the gate that changes most.

    Args:
        model: The network that gave the probabilities.
        images: The split.
        crops: How its pictures are cut.
        normalise: From 8-bit crops to what the network is given.
        probabilities: Shape (N, labels).
        other: Those of another network on the same images.
        task: Of the network, its head included.
        scored: That of the images, where they have some of its labels alone.
    """
    head, task = task, scored or task
    truth = images.labels.numpy()
    chosen = [  # label, whether it compares two networks, title, text, rows
        each for label, t, p in zip(task.labels, truth.T, probabilities.T) for each in (
            (label, False, f'{label_words(label)}: most wrong',
             f'Of those called wrong at {OFFICIAL_THRESHOLD}: images with {label_words(label)} that got the lowest '
             f'probabilities, then images without it that got the highest.', most_wrong(t, p)),
            (label, False, f'{label_words(label)}: most certain',
             f'Of those called right at {OFFICIAL_THRESHOLD}: images with {label_words(label)} that got the highest '
             f'probabilities, then images without it that got the lowest.', most_certain(t, p)))]
    for label, p, q in zip(task.labels, probabilities.T, [] if other is None else other.T):
        chosen.append((label, True, f'{label_words(label)}: largest disagreement',
                       'Images whose two probabilities are furthest apart. The maps are those of this network.',
                       most_different(p, q)))
    rows = list(dict.fromkeys(row for *_, some in chosen for row in some))
    looks = {row: _look(model, images, row, crops, normalise, head) for row in rows}
    blocks = _blocks([look.gates for look in looks.values()])
    share, block = max(((share, name) for name, _, share, _ in blocks), default=(0., ''))
    alpha = dict(each[:2] for each in blocks).get(block, 0.)
    kind = str(model.get_submodule(block).attention) if block else 'spatial'
    mask = f'of {block}, alpha {alpha:.2g}: lighter is {"weakened" if alpha < 0 else "strengthened"} more; '
    overlays = {label: _overlays(label, looks, [row for of, *_, some in chosen if of == label for row in some],
                                 block if share else '', mask + SCALES[kind][0], SCALES[kind][1])
                for label in task.labels}
    groups: Tuple[List[Group], List[Group]] = [], []
    for label, differs, title, text, some in chosen:
        groups[differs].append(Group(
            title, text, [_example(
                row, label, images, looks[row].picture, overlays[label], truth, probabilities, other, task)
                for row in some], [(each.name, *each.limits, each.words) for each in overlays[label]]))
    notes = [
        'This network has no class activation map: its outputs are not a linear layer on features averaged over the '
        'positions.' * any(not look.cams for look in looks.values()),
        'Every alpha is 0: the attention masks change nothing and are not shown.' * bool(block and not share)]
    sizes = [stored_size(images.cells[row]['image']) for row in rows]
    return Examples(*groups, ' '.join(filter(None, notes)), blocks, min(map(min, sizes), default=0),
                    'aspect_ratio' in images.cells.column_names and all(w == h for w, h in sizes))


def _look(
        model: nn.Module,
        images: IsicSplit,
        row: int,
        crops: EvalCrops,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        task: Task,
) -> _Look:
    picture = images.picture(row)
    with seeded(images.image_ids[row], images.seed):  # the crops that were scored
        cut, boxes = crops.with_boxes(picture)
    tensors = normalise(cut.to(next(model.parameters()).device)).contiguous(memory_format=torch.channels_last)
    cams, gates = {}, {}
    with contextlib.suppress(ValueError):  # another kind of head
        maps = class_activation_map(model, tensors).cpu()
        cams = {label: maps[:, task.outputs.index(label)] for label in task.labels}
    with contextlib.suppress(ValueError):  # no gates
        gates = gate_maps(model, tensors)
    scale = WIDTH / picture.width
    shown = picture.resize((WIDTH, max(round(picture.height * scale), 1)), Image.Resampling.LANCZOS)
    x, y = shown.width / picture.width, shown.height / picture.height
    return _Look(shown, [(left * x, top * y, right * x, bottom * y) for left, top, right, bottom in boxes], cams, gates)


def _blocks(gates: List[Dict[str, GateMap]]) -> List[Tuple[str, float, float, float]]:
    """Name, alpha, contribution and effective share of each gate, means over images."""
    def mean(name: str, of: str) -> float:
        return float(np.mean([getattr(maps[name], of).mean().item() for maps in gates]))
    return [(name, gate.alpha, mean(name, 'contribution'), mean(name, 'effective_share'))
            for name, gate in (gates[0].items() if gates else ())]


def _overlays(
        label: str,
        looks: Dict[int, _Look],
        rows: Sequence[int],
        block: str,
        words: str,
        limits: Tuple[float, float],
) -> List[_Overlay]:
    """The kinds of maps that there are for a label's images; no block: no masks."""
    overlays = []
    if rows and looks[rows[0]].cams:
        heats = _heats({row: (looks[row].cams[label], looks[row]) for row in rows})
        most = max(*map(abs, _range(heats)), 1e-3)  # so that 0 has the middle colour
        overlays.append(_Overlay(
            'class activation map',
            f'of {label_words(label)}, in units of the logit: yellow speaks for it, blue against it, grey is 0',
            (-most, most), heats))
    if rows and block:
        heats = _heats({row: (looks[row].gates[block].mask, looks[row]) for row in rows})
        low, high = _range(heats)
        overlays.append(_Overlay('attention mask', words, (min(low, limits[0]), max(high, limits[1])), heats))
    return overlays


def _heats(maps: Dict[int, Tuple[torch.Tensor, _Look]]) -> Dict[int, np.ndarray]:
    return {row: on_picture(each, look.boxes, look.picture.size) for row, (each, look) in maps.items()}


def _range(heats: Dict[int, np.ndarray]) -> Tuple[float, float]:
    return min(float(np.nanmin(h)) for h in heats.values()), max(float(np.nanmax(h)) for h in heats.values())


def _example(
        row: int,
        label: str,
        images: IsicSplit,
        picture: Image.Image,
        overlays: Sequence[_Overlay],
        truth: np.ndarray,
        probabilities: np.ndarray,
        other: Optional[np.ndarray],
        task: Task,
) -> Example:
    image_id, k = images.image_ids[row], task.labels.index(label)
    diagnosis = task.diagnosis(truth[row])
    positive, called = truth[row, k] == 1, float(probabilities[row, k]) > OFFICIAL_THRESHOLD
    verdict = {(True, True): 'found', (True, False): 'missed', (False, True): 'false alarm',
               (False, False): 'rightly not called'}[bool(positive), called]
    text = f'probability of {label_words(label)} {probabilities[row, k]:.3f}'
    if other is not None:
        text += f', by the other network {other[row, k]:.3f}'
    if images.groups:
        text += f'; {images.group_column.removesuffix("_id")} {images.groups[row]}'
    pictures = [Shown(picture, 'image', f'Dermoscopic image {image_id}, {diagnosis}.')]
    for each in overlays:
        heat = each.heats[row]
        place = _place(heat)
        pictures.append(Shown(
            overlay(picture, heat, '', each.limits).crop((0, 0, *picture.size)),  # its scale is told once for all
            each.name, f'{each.name.capitalize()} {each.words.partition(":")[0].partition(",")[0]} on {image_id}: from '
                       f'{np.nanmin(heat):.2g} to {np.nanmax(heat):.2g}, highest {place}.'))
    return Example(image_id, diagnosis, verdict, text, pictures)


def _place(heat: np.ndarray) -> str:
    """Where a map is highest, in words."""
    y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
    words = [names[min(int(3 * at / side), 2)] for names, at, side in (
        (('top', 'middle', 'bottom'), y, heat.shape[0]), (('left', 'middle', 'right'), x, heat.shape[1]))]
    return 'in the middle' if words == ['middle'] * 2 else 'at the ' + ' '.join(w for w in words if w != 'middle')
