"""Pictures of scores: ROC curves with intervals, reliability; losses, AUCs and alphas over the epochs."""
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

from ..extras import require

require('train', __name__)

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from ..files import replacing
from .calibration import reliability
from .intervals import percentile_interval, resampled_indices
from .metrics import operating_point
from .task import LABELS, label_words

__all__ = ['alpha_plot', 'curve_plot', 'reliability_plot', 'roc_plot']

PathLike = Union[str, Path]
COLOURS = ('#1f5fa8', '#c2571a')
GRID = np.linspace(0, 1, 201)


def roc_plot(
        path: PathLike,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        title: str = '',
        resamples: int = 500,
) -> None:
    """ROC curves of both tasks, 95 % bootstrap bands of sensitivity at each specificity, and operating points.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, 2), columns in the order of LABELS.
        probabilities: Shape (N, 2).
        scores: What score_split gave for them.
        title: Above the picture.
        resamples: Number of bootstrap resamples of the bands.
    """
    figure = _figure(9, 5, title)
    index = resampled_indices(len(truth), resamples)
    for k, label in enumerate(LABELS):
        axes = figure.add_subplot(1, 2, k + 1)
        t, p, task = truth[:, k], probabilities[:, k], scores[label]
        axes.plot([0, 1], [0, 1], color='0.7', linewidth=1, linestyle=':')
        axes.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=(-0.01, 1.01), ylim=(-0.01, 1.01),
                 box_aspect=1)
        if task['auc'] is None:
            axes.set_title(f'{label_words(label)}: one class only', fontsize=10)
            continue
        curves = np.array([_sensitivities(t[i], p[i]) for i in index if 0 < t[i].sum() < len(i)])
        low, high = np.array([percentile_interval(column) for column in curves.T]).T
        axes.fill_between(GRID, low, high, color=COLOURS[k], alpha=0.18, linewidth=0)
        fpr, tpr, _ = roc_curve(t, p, drop_intermediate=False)
        axes.plot(fpr, tpr, color=COLOURS[k], linewidth=1.8)
        points = [{'name': 'official 0.5', **operating_point(t, p, task['threshold'])}, *task['operating_points']]
        for point, marker in zip(points, 'os^Dv'):
            axes.plot(1 - point['specificity'], point['sensitivity'], marker, color=COLOURS[k], markeredgecolor='black',
                      label=f'{point["name"]} ({point["threshold"]:.2f})', linestyle='')
        axes.legend(loc='lower right', fontsize=8, frameon=False, title='threshold', title_fontsize=8)
        axes.set_title('{}: AUC {:.3f} [{:.3f}, {:.3f}]'.format(
            label_words(label), task['auc'], *task['auc_ci95']), fontsize=10)
    _save(figure, path)


def reliability_plot(path: PathLike, truth: np.ndarray, probabilities: Dict[str, np.ndarray], title: str = '') -> None:
    """Share of positives against mean probability in ten bins, circles as large as their images are many.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, 2), columns in the order of LABELS.
        probabilities: By name, shape (N, 2) each.
        title: Above the picture.
    """
    figure = _figure(9, 5, title)
    for k, label in enumerate(LABELS):
        axes = figure.add_subplot(1, 2, k + 1)
        axes.plot([0, 1], [0, 1], color='0.7', linewidth=1, linestyle=':')
        for (name, values), colour, style in zip(probabilities.items(), (COLOURS[k], '0.35'), ('-', '--')):
            rows = reliability(truth[:, k], values[:, k])
            x, y = [r['probability'] for r in rows], [r['positives'] for r in rows]
            axes.plot(x, y, style, color=colour, linewidth=1.2, label=name)
            axes.scatter(x, y, [12 + 400 * r['images'] / len(truth) for r in rows], color=colour, alpha=0.5)
        axes.set(xlabel='mean probability', ylabel='share of positives', xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
                 box_aspect=1)
        axes.legend(loc='upper left', fontsize=8, frameon=False)
        axes.set_title(label_words(label), fontsize=10)
    _save(figure, path)


def curve_plot(path: PathLike, summary: List[Dict[str, Any]], title: str = '') -> None:
    """Losses, and validation AUCs, over the epochs; a line where the mean AUC was best.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        title: Above the picture.
    """
    figure = _figure(9, 4.2, title)
    best = max(summary, key=lambda row: float(row['validation_mean_auc']))
    training = 'training, masks included' if 'train_mask_loss' in best else 'training'
    losses = [('train_loss', training, '0.5'), ('validation_loss', 'validation', 'black')]
    aucs = [*((f'validation_auc_{label}', label_words(label), colour) for label, colour in zip(LABELS, COLOURS)),
            ('validation_mean_auc', f'mean, best {float(best["validation_mean_auc"]):.3f}', 'black')]
    for k, (lines, ylabel) in enumerate(((losses, 'loss'), (aucs, 'AUC on validation'))):
        axes = figure.add_subplot(1, 2, k + 1)
        for column, name, colour in lines:
            axes.plot([int(row['epoch']) for row in summary], [float(row[column]) for row in summary], color=colour,
                      linewidth=1.2, marker='.' if len(summary) < 3 else '', label=name)
        axes.axvline(int(best['epoch']), color='0.7', linewidth=1, linestyle=':', label=f'epoch {best["epoch"]}')
        axes.set(xlabel='epoch', ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def alpha_plot(path: PathLike, summary: List[Dict[str, Any]], alphas: Sequence[str], title: str = '') -> None:
    """The alpha of every block over the epochs.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        alphas: Their columns that hold alphas.
        title: Above the picture.
    """
    figure = _figure(7, 4.2, title)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(alphas)))
    epochs = [int(row['epoch']) for row in summary]
    for name, colour in zip(alphas, colours):
        axes.plot(epochs, [float(row[name]) for row in summary], color=colour, label=name.removesuffix('.alpha'),
                  marker='.' if len(epochs) < 3 else '')
    axes.axhline(0, color='0.7', linewidth=1, linestyle=':')
    axes.set(xlabel='epoch', ylabel='alpha')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False, ncols=1 + len(alphas) // 18, loc='center left', bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _sensitivities(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    fpr, tpr, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    return np.interp(GRID, fpr, tpr)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout='constrained')  # without pyplot, which would open a display
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _save(figure: Figure, path: PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png', dpi=130)
