"""The paper's pictures for any two networks and any images: what they look at, their gates, their faults.

The paper's captions are not repeated here; `FIGURES` says what each of ours shows.
"""
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image

from ...attention import alphas_of
from ...explain import class_activation_map, gate_maps, on_picture, overlay, panel
from ...files import read_rows, replacing
from ...isic.artefacts import draw_bubbles, draw_hair
from ...isic.plots import alpha_plot
from ...isic.task import LABELS, label_words

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
        predictors: Two trained networks, of timm_arl.predictor.
        images: What is shown, at least one.
        count: Images in a figure.
        progress: Wraps the iteration over the images.

    Returns:
        By figure, why it was not drawn, or ''.

    Raises:
        ValueError: A network without class activation maps.
    """
    names = [Path(predictor.name).name for predictor in predictors]
    answers = []
    for shown in progress(images):
        picture = shown.read()
        answers.append([predictor.probabilities(predictor.prepare(picture, shown.name)[0]) for predictor in predictors])
    chosen = images[:count]
    reasons = dict.fromkeys(FIGURES, '')

    def save(name: str, pictures: List, columns: int) -> None:
        with replacing(out / f'{name}.png') as temporary:
            panel(pictures, columns, WIDTH).save(temporary, 'png')

    save('fig5', [each for shown, of in zip(chosen, answers) for each in _cams(predictors, names, shown, of)],
         1 + len(predictors))

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
        tiles = [each for shown in chosen[:1] for each in _gates(predictors[gated], names[gated], shown)]
        save('fig7', tiles, min(4, len(tiles) // 2))

    save('fig9', [each for shown in chosen for each in _with_artefacts(predictors, names, shown)], 1 + len(predictors))

    apart = [float((first - second).abs().max()) for first, second in answers]
    most = np.argsort(apart)[::-1][:count]
    save('fig10', [each for k in most for each in _cams(predictors, names, images[k], answers[k])], 1 + len(predictors))
    return reasons


def _cam(predictor: Any, picture: Image.Image, label: int, name: str = '') -> np.ndarray:
    crops, boxes = predictor.prepare(picture, name)
    return on_picture(class_activation_map(predictor.network, crops)[:, label], boxes, picture.size)


def _cams(predictors: Sequence[Any], names: List[str], shown: Shown, answers: List[torch.Tensor]) -> List:
    label, original = int(torch.stack(answers).mean(0).argmax()), shown.read()
    tiles = [(original, f'{shown.name}{", " * bool(shown.label)}{shown.label}')]
    for predictor, name, p in zip(predictors, names, answers):
        text = ', '.join(f'{label_words(each)} {value:.2f}' for each, value in zip(LABELS, p.tolist()))
        heat = _cam(predictor, original, label, shown.name)
        tiles.append((overlay(original, heat, f'logit of {label_words(LABELS[label])}'), f'{name}: {text}'))
    return tiles


def _gates(predictor: Any, name: str, shown: Shown) -> List:
    original = shown.read()
    crops, boxes = predictor.prepare(original, shown.name)
    masks, shares = [], []
    for block, gate in gate_maps(predictor.network, crops).items():
        mask, share = (on_picture(each, boxes, original.size) for each in (gate.mask, gate.contribution))
        top = max(2., float(np.nanmax(mask)))  # a flat mask stays of one colour
        masks.append((overlay(original, mask, 'mask n(F), 1 is flat', (0., top)), f'{name}, {block}'))
        top = max(0.1, float(np.nanmax(share)))
        shares.append((overlay(original, share, "share of the block's output", (0., top)),
                       f'{block}, alpha {gate.alpha:.2g}'))
    columns = min(4, len(masks))
    blank = (Image.new('RGB', original.size, 'white'), '')
    tiles = []
    for start in range(0, len(masks), columns):
        for of in (masks, shares):
            row = of[start:start + columns]
            tiles += row + [blank] * (columns - len(row))
    return tiles


def _with_artefacts(predictors: Sequence[Any], names: List[str], shown: Shown) -> List:
    original = shown.read()
    label = int(predictors[0].probabilities(predictors[0].prepare(original, shown.name)[0]).argmax())
    tiles = []
    for what, draw in (('as it is', None), ('hair, drawn', draw_hair), ('bubbles, drawn', draw_bubbles)):
        picture = original if draw is None else draw(original, SEED_OF_ARTEFACTS)[0]
        tiles.append((picture, f'{shown.name}, {what}'))
        tiles += [(overlay(picture, _cam(predictor, picture, label, shown.name),
                           f'logit of {label_words(LABELS[label])}'), name)
                  for predictor, name in zip(predictors, names)]
    return tiles
