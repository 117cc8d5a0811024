"""Pictures of scores: ROC curves with intervals, reliability; losses, AUCs and alphas over the epochs.

Each is a PNG file (`*_plot`), or panels for a web page (`inline_svg` of `draw_*`).
"""
import io
import re
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from ..extras import require

require('train', __name__)

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from ..files import replacing
from .calibration import calibrate, reliability
from .intervals import groups_suffice, resampled_times
from .metrics import interval_text
from .selection import selection_column, selection_words
from .task import ISIC2017, Task, label_words

__all__ = [
    'alpha_plot', 'curve_plot', 'draw_alphas', 'draw_aucs', 'draw_losses', 'draw_reliability', 'draw_roc',
    'draw_roc_pair', 'inline_svg', 'reliability_plot', 'roc_plot',
]

PathLike = Union[str, Path]
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')  # Okabe and Ito's, for colour-blind eyes
POINTS = (('o', 12, 'white'), ('s', 8, 'white'), ('^', 5, 'black'))  # nested where operating points coincide
BLOCKS = LinearSegmentedColormap.from_list('', COLOURS[:4])  # seen on a white and on a black ground
GRID = np.linspace(0, 1, 201)
COLUMNS = 4  # of panels, at most


def inline_svg(draw: Callable[[Axes], None], alt: str, name: str, size: Tuple[float, float] = (4.2, 4.8)) -> str:
    """A panel as an <svg> for a page: text stays text, black is the page's ink and white its ground, nothing is loaded.

    Args:
        draw: What draws it, one of draw_*.
        alt: What it shows, in words.
        name: Unlike that of any other panel of the page, for its ids.
        size: Width and height in inches, of which the page keeps the shape.
    """
    name = re.sub(r'[^\w-]', '-', name)
    figure = _figure(*size, '')
    draw(figure.add_subplot())
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}), io.StringIO() as file:
        figure.savefig(file, format='svg', transparent=True)
        svg = file.getvalue()
    svg = svg[svg.index('<svg'):].strip()
    for pattern, text in (
            (r'<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->|<\?.*?\?>', ''), (r' xmlns(:xlink)?="[^"]*"', ''),
            ('xlink:href', 'href'), (r'(?<=<svg) [^>]*?viewBox="([^"]*)"[^>]*', r' viewBox="\1"'),
            (r'( id="|href="#|url\(#)', rf'\g<1>{name}-'),  # the same names in each panel
            ('#000000|(?<=: )black', 'currentColor'), ('#ffffff', 'var(--ground)'), (r'\n\s*', '\n')):
        svg = re.sub(pattern, text, svg, flags=re.DOTALL)
    return svg.replace('<svg', f'<svg class="plot" role="img" aria-label="{escape(alt)}"', 1)


def roc_plot(
        path: PathLike,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        title: str = '',
        resamples: int = 500,
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
) -> None:
    """ROC curve of each label, 95 % bootstrap band of the sensitivity at each specificity, and operating points.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        probabilities: Shape (N, labels).
        scores: What score_split gave for them.
        title: Above the picture.
        resamples: Number of bootstrap resamples of the bands.
        task: Whose labels they are.
        groups: N names of patients or lesions, which are resampled as a whole; None: images are.
    """
    figure, panels = _panels(len(task.labels), 5.8, title)
    for axes, label, t, p in zip(panels, task.labels, truth.T, probabilities.T):
        draw_roc(axes, label, t, p, scores[label], resamples, task, groups)
        axes.set_title(label_words(label) + (
            ': undefined, all images are of one class' if scores[label]['auc'] is None
            else f': AUC {interval_text(scores[label]["auc"], scores[label]["auc_ci95"])}'), fontsize=10)
    _save(figure, path)


def draw_roc(
        axes: Axes,
        label: str,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        resamples: int = 500,
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
) -> None:
    """The panel of one label of roc_plot, without its title; arrays of shape (N,), `scores` its own."""
    _roc_axes(axes)
    if scores['auc'] is None:
        return
    if groups_suffice(truth, groups):
        times = resampled_times(len(truth), resamples, groups=groups)
        band = np.percentile(_sensitivities(truth, probabilities, times), (2.5, 97.5), axis=0)
        axes.fill_between(GRID, *band, color=_colour(label, task), alpha=0.18, linewidth=0)
    _roc_line(axes, truth, probabilities, color=_colour(label, task))
    points = [{'name': task.usual_point, **scores}, *scores['operating_points']]
    for point, (marker, size, colour) in zip(points, cycle(POINTS)):
        axes.plot(1 - point['specificity'], point['sensitivity'], marker, markersize=size, markeredgecolor='black',
                  color=colour, label=f'{point["threshold"]:.2f}, {point["name"]}')
    _legend(axes, title='threshold', title_fontsize=9)


def draw_roc_pair(
        axes: Axes,
        label: str,
        truth: np.ndarray,
        networks: Dict[str, np.ndarray],
        task: Task = ISIC2017,
) -> None:
    """The ROC curves of a label for two networks.

    Args:
        axes: Where.
        label: Which.
        truth: 0 or 1, shape (N,).
        networks: By name, probabilities of shape (N,).
        task: Whose label it is.
    """
    _roc_axes(axes)
    for (name, p), colour, style in zip(networks.items(), (_colour(label, task), '0.5'), ('-', '--')):
        if 0 < truth.sum() < len(truth):
            _roc_line(axes, truth, p, color=colour, linestyle=style, label=_plain(name))
    _legend(axes)


def reliability_plot(
        path: PathLike,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        title: str = '',
        task: Task = ISIC2017,
) -> None:
    """Share of positives against mean probability in ten bins, as given and calibrated.

    Args:
        path: PNG file to write.
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        probabilities: Shape (N, labels).
        scores: As metrics.json has them for the split, with the calibration of each label.
        title: Above the picture.
        task: Whose labels they are.
    """
    figure, panels = _panels(len(task.labels), 5.8, title)
    for axes, label, t, p in zip(panels, task.labels, truth.T, probabilities.T):
        draw_reliability(axes, label, t, p, scores[label], task)
        axes.set_title(label_words(label), fontsize=10)
    _save(figure, path)


def draw_reliability(
        axes: Axes,
        label: str,
        truth: np.ndarray,
        probabilities: np.ndarray,
        scores: Dict[str, Any],
        task: Task = ISIC2017,
) -> None:
    """The panel of one label of reliability_plot, without its title; arrays of shape (N,), `scores` its own."""
    example = 10 ** int(np.log10(max(len(truth) / 2, 1)))  # of a circle's area

    def area(images: float) -> float:
        return 12 + 400 * images / len(truth)

    calibration = scores['calibration']
    temperature = calibration['temperature']
    axes.plot([0, 1], [0, 1], color='0.6', linewidth=1, linestyle=':')
    curves = [(probabilities, _colour(label, task), '-', f'as given, ECE {calibration["ece"]:.3f}')]
    if temperature:
        bias = calibration['bias']
        curves.append((calibrate(probabilities, temperature, bias), '0.5', '--', (
            f'calibrated (T = {temperature:.2f}, b = {bias:.2f}), ECE {calibration["ece_calibrated"]:.3f}')))
    for values, colour, style, name in curves:
        rows = reliability(truth, values)
        x, y = [r['probability'] for r in rows], [r['positives'] for r in rows]
        axes.plot(x, y, style, color=colour, linewidth=1.2, label=name)
        axes.scatter(x, y, [area(r['images']) for r in rows], color=colour, alpha=0.5)
    axes.scatter([], [], area(example), color='white', edgecolor='black', label=f'{example} images')
    axes.set(xlabel='mean probability', ylabel='share of positives', xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    _legend(axes)


def curve_plot(
        path: PathLike,
        summary: List[Dict[str, Any]],
        title: str = '',
        task: Task = ISIC2017,
        select: str = 'mean_auc',
) -> None:
    """Losses, and validation AUCs, over the epochs; a line where the score that chooses the epoch was best.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        title: Above the picture.
        task: Of the run.
        select: That score.
    """
    figure, panels = _panels(2, 4.6, title)
    draw_losses(panels[0], summary, select)
    draw_aucs(panels[1], summary, task, select)
    _save(figure, path)


def draw_losses(axes: Axes, summary: List[Dict[str, Any]], select: str = 'mean_auc') -> None:
    """The losses of curve_plot."""
    training = 'training, masks included' if 'train_mask_loss' in summary[0] else 'training'
    _curves(axes, summary, 'loss', select, [
        ('train_loss', training, '0.6'), ('validation_loss', 'validation', 'black')])


def draw_aucs(
        axes: Axes,
        summary: List[Dict[str, Any]],
        task: Task = ISIC2017,
        select: str = 'mean_auc',
) -> None:
    """The AUCs of curve_plot and, of a multiclass task, the balanced accuracy."""
    balanced = 'validation_balanced_accuracy' in summary[0]
    _curves(axes, summary, 'score on validation' if balanced else 'AUC on validation', select, [
        *((f'validation_auc_{label}', label_words(label), _colour(label, task)) for label in task.labels),
        ('validation_mean_auc', 'mean AUC' if balanced else 'mean', 'black'),
        *[('validation_balanced_accuracy', 'balanced accuracy', '0.6')] * balanced])


def _curves(
        axes: Axes,
        summary: List[Dict[str, Any]],
        ylabel: str,
        select: str,
        lines: List[Tuple[str, str, str]],
) -> None:
    score = selection_column(select)
    best = max(summary, key=lambda row: float(row[score]))
    for column, name, colour in lines:
        _over_epochs(axes, summary, column, name, colour)
    axes.axvline(int(best['epoch']), color='0.6', linewidth=1, linestyle=':', zorder=0,
                 label=f'best {selection_words(select)}: {float(best[score]):.3f}, epoch {best["epoch"]}')
    axes.set_ylabel(ylabel)
    _legend(axes, ncols=2)


def alpha_plot(path: PathLike, summary: List[Dict[str, Any]], alphas: Sequence[str], title: str = '') -> None:
    """The alpha of every block over the epochs.

    Args:
        path: PNG file to write.
        summary: Rows of summary.csv.
        alphas: Their columns that hold alphas, in the order of the blocks; of many, only some are named.
        title: Above the picture.
    """
    figure = _figure(8, 4.6, title)
    draw_alphas(figure.add_subplot(), summary, alphas)
    figure.supxlabel('y = x + F + alpha n(F) x. Above 0, the block strengthens its shortcut x where the mask n(F) is '
                     'high;\nbelow 0, it weakens it there; at 0, it is a residual block.', fontsize=9)
    _save(figure, path)


def draw_alphas(axes: Axes, summary: List[Dict[str, Any]], alphas: Sequence[str]) -> None:
    """The panel of alpha_plot, without the sentence that says what alpha does."""
    for k, name in enumerate(alphas):
        _over_epochs(axes, summary, name, '' if k % (1 + len(alphas) // 20) else name.removesuffix('.alpha'),
                     BLOCKS(k / max(len(alphas) - 1, 1)))
    axes.axhline(0, color='0.6', linewidth=1, linestyle=':')
    axes.set_ylabel('alpha')
    axes.legend(fontsize=9, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))


def _colour(label: str, task: Task) -> str:
    return COLOURS[task.labels.index(label) % len(COLOURS)]


def _roc_axes(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color='0.6', linewidth=1, linestyle=':')
    axes.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def _roc_line(axes: Axes, truth: np.ndarray, probabilities: np.ndarray, **kwargs: Any) -> None:
    fpr, tpr, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    axes.plot(fpr, tpr, linewidth=1.8, **kwargs)


def _sensitivities(truth: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> List[np.ndarray]:
    """Sensitivity at each 1 - specificity of GRID, for each resample with both classes (faster than roc_curve)."""
    order = np.argsort(-probabilities)
    last = np.append(np.diff(probabilities[order]) != 0, True)  # of the images with one probability
    times = times[:, order]
    true, false = (np.cumsum(times * (truth[order] == value), axis=1)[:, last] for value in (1, 0))
    return [np.interp(GRID, np.append(0, f) / f[-1], np.append(0, t) / t[-1]) for t, f in zip(true, false)
            if t[-1] and f[-1]]


def _over_epochs(axes: Axes, summary: List[Dict[str, Any]], column: str, name: str, colour: Any) -> None:
    axes.plot([int(row['epoch']) for row in summary], [float(row[column]) for row in summary], color=colour,
              linewidth=1.4, marker='o' if len(summary) < 15 else '', markersize=4, label=name)
    axes.set_xlabel('epoch')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plain(text: str) -> str:
    """Text whose dollar signs do not begin a formula."""
    return text.replace('$', r'\$')


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure((width, height), dpi=130, layout='constrained')  # without pyplot, which would open a display
    if title:
        figure.suptitle(_plain(title), fontsize=10, wrap=True)
    return figure


def _panels(columns: int, height: float, title: str) -> Tuple[Figure, List[Axes]]:
    rows = -(-columns // COLUMNS)
    across = -(-columns // rows)
    figure = _figure(4.6 * across, height * rows, title)
    panels = list(figure.subplots(rows, across, squeeze=False).flat)
    for panel in panels[columns:]:
        panel.remove()
    return figure, panels[:columns]


def _legend(axes: Axes, **kwargs: Any) -> None:
    """A legend below the axes and their label, where it covers nothing."""
    axes.legend(fontsize=9, frameon=False, loc='upper center', bbox_to_anchor=(0.5, 0), handlelength=1.5,
                borderaxespad=4.3, columnspacing=1, **kwargs)


def _save(figure: Figure, path: PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
