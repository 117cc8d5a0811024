"""Pictures of scores: ROC curves with intervals, reliability; losses, AUCs and alphas over the epochs."""
from itertools import cycle
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

from ..extras import require

require('train', __name__)

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from ..files import replacing
from .calibration import apply_temperature, reliability
from .intervals import resampled_indices
from .task import LABELS, label_words

__all__ = ['alpha_plot', 'curve_plot', 'reliability_plot', 'roc_plot']

PathLike = Union[str, Path]
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')  # Okabe and Ito's, for colour-blind eyes
POINTS = (('o', 12, 'white'), ('s', 8, 'white'), ('^', 5, 'black'))  # nested where operating points coincide
GRID = np.linspace(0, 1, 201)


def roc_plot(
        path: PathLike,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        title: str = '',
        resamples: int = 500,
) -> None:
    """ROC curve of each label, 95 % bootstrap band of the sensitivity at each specificity, and operating points.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, labels), columns in the order of LABELS.
        probabilities: Shape (N, labels).
        scores: What score_split gave for them.
        title: Above the picture.
        resamples: Number of bootstrap resamples of the bands.
    """
    figure, panels = _panels(len(LABELS), 5.8, title)
    index = resampled_indices(len(truth), resamples)
    for axes, colour, label, t, p in zip(panels, cycle(COLOURS), LABELS, truth.T, probabilities.T):
        task = scores[label]
        axes.plot([0, 1], [0, 1], color='0.6', linewidth=1, linestyle=':')
        axes.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        if task['auc'] is None:
            axes.set_title(f'{label_words(label)}: undefined, all images are of one class', fontsize=10)
            continue
        band = np.percentile(_sensitivities(t, p, index), (2.5, 97.5), axis=0)
        axes.fill_between(GRID, *band, color=colour, alpha=0.18, linewidth=0)
        fpr, tpr, _ = roc_curve(t, p, drop_intermediate=False)
        axes.plot(fpr, tpr, color=colour, linewidth=1.8)
        points = [{'name': 'official', **task}, *task['operating_points']]
        for point, (marker, size, colour) in zip(points, cycle(POINTS)):
            axes.plot(1 - point['specificity'], point['sensitivity'], marker, markersize=size, markeredgecolor='black',
                      color=colour, label=f'{point["threshold"]:.2f}, {point["name"]}')
        _legend(axes, title='threshold', title_fontsize=9)
        axes.set_title('{}: AUC {:.3f} [{:.3f}, {:.3f}]'.format(
            label_words(label), task['auc'], *task['auc_ci95']), fontsize=10)
    _save(figure, path)


def reliability_plot(
        path: PathLike,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        title: str = '',
) -> None:
    """Share of positives against mean probability in ten bins, as given and with the temperature of each label.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, labels), columns in the order of LABELS.
        probabilities: Shape (N, labels).
        scores: As metrics.json has them for the split, with the calibration of each label.
        title: Above the picture.
    """
    figure, panels = _panels(len(LABELS), 5.8, title)
    example = 10 ** int(np.log10(max(len(truth) / 2, 1)))  # of a circle's area

    def area(images: float) -> float:
        return 12 + 400 * images / len(truth)

    for axes, colour, label, t, p in zip(panels, cycle(COLOURS), LABELS, truth.T, probabilities.T):
        calibration = scores[label]['calibration']
        temperature = calibration['temperature']
        axes.plot([0, 1], [0, 1], color='0.6', linewidth=1, linestyle=':')
        for values, line_colour, style, name in (
                (p, colour, '-', f'as given, ECE {calibration["ece"]:.3f}'),
                (apply_temperature(p, temperature), '0.35', '--',
                 f'with temperature T = {temperature:.2f}, ECE {calibration["ece_with_temperature"]:.3f}')):
            rows = reliability(t, values)
            x, y = [r['probability'] for r in rows], [r['positives'] for r in rows]
            axes.plot(x, y, style, color=line_colour, linewidth=1.2, label=name)
            axes.scatter(x, y, [area(r['images']) for r in rows], color=line_colour, alpha=0.5)
        axes.scatter([], [], area(example), color='white', edgecolor='black', label=f'{example} images')
        axes.set(xlabel='mean probability', ylabel='share of positives', xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        _legend(axes)
        axes.set_title(label_words(label), fontsize=10)
    _save(figure, path)


def curve_plot(path: PathLike, summary: List[Dict[str, Any]], title: str = '') -> None:
    """Losses, and validation AUCs, over the epochs; a line where the mean AUC was best.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        title: Above the picture.
    """
    figure, panels = _panels(2, 4.6, title)
    best = max(summary, key=lambda row: float(row['validation_mean_auc']))
    training = 'training, masks included' if 'train_mask_loss' in best else 'training'
    losses = [('train_loss', training, '0.6'), ('validation_loss', 'validation', 'black')]
    aucs = [*((f'validation_auc_{label}', label_words(label), colour) for label, colour in zip(LABELS, cycle(COLOURS))),
            ('validation_mean_auc', 'mean', 'black')]
    for axes, lines, ylabel in zip(panels, (losses, aucs), ('loss', 'AUC on validation')):
        for column, name, colour in lines:
            _over_epochs(axes, summary, column, name, colour)
        axes.axvline(int(best['epoch']), color='0.6', linewidth=1, linestyle=':', zorder=0,
                     label=f'best mean AUC: {float(best["validation_mean_auc"]):.3f}, epoch {best["epoch"]}')
        axes.set_ylabel(ylabel)
        _legend(axes, ncols=2)
    _save(figure, path)


def alpha_plot(path: PathLike, summary: List[Dict[str, Any]], alphas: Sequence[str], title: str = '') -> None:
    """The alpha of every block over the epochs.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        alphas: Their columns that hold alphas, in the order of the blocks; of many, only some are named.
        title: Above the picture.
    """
    figure = _figure(8, 4.6, title)
    axes = figure.add_subplot()
    for k, name in enumerate(alphas):
        colour = matplotlib.colormaps['viridis'](0.9 * k / max(len(alphas) - 1, 1))
        _over_epochs(axes, summary, name, '' if k % (1 + len(alphas) // 20) else name.removesuffix('.alpha'), colour)
    axes.axhline(0, color='0.6', linewidth=1, linestyle=':')
    axes.set_ylabel('alpha')
    axes.legend(fontsize=9, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.supxlabel('y = x + F + alpha n(F) x. Above 0, the block strengthens its shortcut x where the mask n(F) is '
                     'high;\nbelow 0, it weakens it there; at 0, it is a residual block.', fontsize=9)
    _save(figure, path)


def _sensitivities(truth: np.ndarray, probabilities: np.ndarray, index: np.ndarray) -> List[np.ndarray]:
    """Sensitivity at each 1 - specificity of GRID, for each resample with both classes (faster than roc_curve)."""
    order = np.argsort(-probabilities)
    last = np.append(np.diff(probabilities[order]) != 0, True)  # of the images with one probability
    times = np.array([np.bincount(rows, minlength=len(truth)) for rows in index])[:, order]
    true, false = (np.cumsum(times * (truth[order] == value), axis=1)[:, last] for value in (1, 0))
    return [np.interp(GRID, np.append(0, f) / f[-1], np.append(0, t) / t[-1]) for t, f in zip(true, false)
            if t[-1] and f[-1]]


def _over_epochs(axes: Axes, summary: List[Dict[str, Any]], column: str, name: str, colour: Any) -> None:
    axes.plot([int(row['epoch']) for row in summary], [float(row[column]) for row in summary], color=colour,
              linewidth=1.4, marker='o' if len(summary) < 15 else '', markersize=4, label=name)
    axes.set_xlabel('epoch')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure((width, height), dpi=130, layout='constrained')  # without pyplot, which would open a display
    if title:
        figure.suptitle(title, fontsize=10, wrap=True)
    return figure


def _panels(columns: int, height: float, title: str) -> Tuple[Figure, List[Axes]]:
    figure = _figure(4.6 * columns, height, title)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _legend(axes: Axes, **kwargs: Any) -> None:
    """A legend below the axes and their label, where it covers nothing."""
    axes.legend(fontsize=9, frameon=False, loc='upper center', bbox_to_anchor=(0.5, 0), handlelength=1.5,
                borderaxespad=4.3, columnspacing=1, **kwargs)


def _save(figure: Figure, path: PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
