"""The paper's pictures for any two networks and any images: what they look at, their gates, their faults.

The paper's captions are not repeated here; `FIGURES` says what each of ours shows.
"""
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from ...attention import alphas_of
from ...explain import class_activation_map, gate_maps, on_picture, overlay, panel
from ...files import read_rows, replacing
from ...isic.artefacts import draw_bubbles, draw_hair
from ...isic.images import reason_of
from ...isic.plots import alpha_plot
from ...isic.task import label_words

__all__ = ['FIGURES', 'Shown', 'draw_figures']

FIGURES = {
    'fig5': 'class activation maps (Eq. 13) of both networks',
    'fig6': 'the alphas over the epochs of training',
    'fig7': 'the mask of each gate, and its share of what the block gives',
    'fig9': 'class activation maps when hair or bubbles are drawn on the picture',
    'fig10': 'the images on which the networks disagree most',
}
SEED_OF_ARTEFACTS = 0
WIDTH = 300  # pixels of a picture in a figure


class Shown(NamedTuple):
    """An image of a figure.

    Attributes:
        name: Its id or file name.
        read: Gives the picture, RGB and upright; pictures are not kept.
        label: The diagnosis in words, '' where it is not known.
    """
    name: str
    read: Callable[[], Image.Image]
    label: str = ''


def draw_figures(
        out: Path,
        predictors: Sequence[Any],
        images: List[Shown],
        count: int,
        progress: Callable = iter,
) -> Dict[str, str]:
    """Write fig5.png to fig10.png.

    Args:
        out: Folder.
        predictors: Two trained networks of the same labels, of timm_arl.predictor.
        images: What is shown, at least one.
        count: Images in a figure.
        progress: Wraps the iteration over the images. One that cannot be read is named on stderr and left out.

    Returns:
        By figure, why it was not drawn, or ''.

    Raises:
        ValueError: A network without class activation maps, or no image that can be read.
    """
    names = [Path(predictor.name).name for predictor in predictors]
    seen, answers, reasons = [], [], dict.fromkeys(FIGURES, '')
    for shown in progress(images):
        try:
            picture = shown.read()
            crops = [predictor.prepare(picture, shown.name)[0] for predictor in predictors]
        except OSError as error:
            print(f'{shown.name} is left out: {reason_of(error)}.', file=sys.stderr)
            continue
        seen.append(shown)
        answers.append(torch.stack([predictor.probabilities(each) for predictor, each in zip(predictors, crops)]))
    if not seen:
        raise ValueError('None of the images can be read.')

    def save(name: str, pictures: List, columns: int) -> None:
        with replacing(out / f'{name}.png') as temporary:
            panel(pictures, columns, WIDTH).save(temporary, 'png')

    rows = [(shown, shown.read(), shown.name, of) for shown, of in zip(seen[:count], answers)]
    save('fig5', _cams(predictors, names, rows), 1 + len(predictors))

    for predictor, name in zip(predictors, names):
        path = Path(predictor.name, 'summary.csv')
        alphas = list(alphas_of(predictor.network))
        summary = read_rows(path) if path.is_file() else []
        if summary and alphas and alphas[0] in summary[0]:
            alpha_plot(out / 'fig6.png', summary, alphas, name)
            break
    else:
        reasons['fig6'] = 'neither network is the output folder of a run with gates, whose summary.csv has the alphas'

    gated = next((k for k, predictor in enumerate(predictors) if alphas_of(predictor.network)), None)
    if gated is None:
        reasons['fig7'] = 'neither network has gates'
    else:
        tiles = _gates(predictors[gated], names[gated], seen[0])
        save('fig7', tiles, min(5, len(tiles) // 2))

    changed = [(shown, picture if draw is None else draw(picture, SEED_OF_ARTEFACTS)[0], f'{shown.name}{what}', of)
               for shown, picture, _, of in rows
               for what, draw in (('', None), (', hair drawn', draw_hair), (', bubbles drawn', draw_bubbles))]
    save('fig9', _cams(predictors, names, changed, again=True), 1 + len(predictors))

    apart = [float((first - second).abs().max()) for first, second in answers]
    most = np.argsort(apart)[::-1][:count].tolist()
    save('fig10', _cams(predictors, names, [(seen[k], seen[k].read(), seen[k].name, answers[k]) for k in most]),
         1 + len(predictors))
    return reasons


def _cams(predictors: Sequence[Any], names: List[str], rows: List[Tuple], again: bool = False) -> List:
    """Pictures and, beside each, the maps of the networks for the label that both together find most probable.

    Args:
        predictors: The networks.
        names: Theirs.
        rows: An image, its picture, a caption, and the probabilities (networks, labels) of the picture as it was.
        again: Whether the picture was changed, and probabilities are computed again.
    """
    heats, answers = [], []
    labels = predictors[0].labels
    for shown, picture, _, of in rows:
        label = labels[int(of.mean(0).argmax())]
        maps, found = [], []
        for predictor in predictors:
            crops, boxes = predictor.prepare(picture, shown.name)
            output = predictor.task.outputs.index(label)
            maps.append(on_picture(class_activation_map(predictor.network, crops)[:, output], boxes, picture.size))
            found.append(predictor.probabilities(crops))
        heats.append(maps)
        answers.append(torch.stack(found) if again else of)
    tops = [max(float(np.nanmax(np.abs(maps[k]))) for maps in heats) for k in range(len(predictors))]
    tiles = []
    for (shown, picture, caption, of), maps, answer in zip(rows, heats, answers):
        name_of_label = label_words(labels[int(of.mean(0).argmax())])
        tiles.append((picture, f'{caption}{", " * bool(shown.label)}{shown.label}'))
        for name, heat, top, p in zip(names, maps, tops, answer):  # one scale for each network, 0 in the middle
            text = ', '.join(f'{label_words(each)} {value:.2f}' for each, value in zip(labels, p.tolist()))
            legend = f'Evidence for {name_of_label}, logit: yellow for, blue against'
            tiles.append((overlay(picture, heat, legend, (-top, top)), f'{name}: {text}'))
    return tiles


def _gates(predictor: Any, name: str, shown: Shown) -> List:
    """The picture and the masks of its blocks, and below each mask its contribution."""
    picture = shown.read()
    crops, boxes = predictor.prepare(picture, shown.name)
    gates = gate_maps(predictor.network, crops)
    heats = {block: on_picture(gate.mask, boxes, picture.size) for block, gate in gates.items()}
    top = max(2., max(float(np.nanmax(heat)) for heat in heats.values()))  # a flat mask stays of one colour
    masks = [(overlay(picture, heat, 'mask n(F), 1 is flat', (0., top)), f'{block}, alpha {gates[block].alpha:.2g}')
             for block, heat in heats.items()]
    heats = {block: on_picture(gate.contribution, boxes, picture.size) for block, gate in gates.items()}
    top = max(0.1, max(float(np.nanmax(heat)) for heat in heats.values()))
    shares = [(overlay(picture, heat, 'contribution', (0., top)), block)
              for block, heat in heats.items()]
    width = min(4, len(masks))
    blank = (Image.new('RGB', picture.size, 'white'), '')
    tiles = []
    for start in range(0, len(masks), width):
        for first, of in (((picture, f'{shown.name}, {name}'), masks), (blank, shares)):
            row = of[start:start + width]
            tiles += [first, *row, *[blank] * (width - len(row))]
    return tiles
