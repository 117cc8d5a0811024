"""The part of a report that tells how another clinic's images and probabilities differ from those of home."""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from .metrics import interval_text
from .plots import COLOURS, inline_svg
from .report import Cells, number
from .shift import PROBABILITY_BINS, STATISTICS, Home, probability_counts, standard_difference
from .task import Task, label_words

__all__ = ['External', 'draw_shift', 'shift_page']


class External(NamedTuple):
    """A data set of another clinic.

    Attributes:
        home: What is known of the checkpoint's own validation images.
        images: Statistics of the images that were scored.
        sources: For each scored label the labels of the data that count as it.
        negative: Labels of the data that no label is mapped to.
        not_scored: Labels of the network that are not mapped.
    """
    home: Home
    images: Dict[str, Any]
    sources: Dict[str, List[str]]
    negative: List[str]
    not_scored: List[str]


def shift_page(external: External, scores: Dict[str, Any], probabilities: np.ndarray, task: Task) -> Dict[str, Any]:
    """What the template shows.

    Args:
        external: The data set.
        scores: What metrics.json holds for the split, with its drift.
        probabilities: Shape (N, labels).
        task: Whose labels are scored.
    """
    home = external.home
    drift = scores['external']['drift']
    panels = [
        _panel(f'{text[0].upper()}{text[1:]}', text, external.images[name]['counts'],
               home.get('images', {}).get(name, {}).get('counts'), edges, name, log=name == 'shorter_side')
        for name, (text, edges) in STATISTICS.items()]
    panels += [
        _panel(f'Probabilities of {label_words(label)}', f'probability of {label_words(label)}', probability_counts(p),
               home.get('labels', {}).get(label, {}).get('counts'), PROBABILITY_BINS, f'p-{label}', COLOURS[0])
        for label, p in zip(task.labels, probabilities.T)]
    mapping: Cells = (['label of the network', 'labels of the data that count as it'],
                      [[label_words(label), ', '.join(words)] for label, words in external.sources.items()])
    return {'mapping': mapping, 'negative': external.negative, 'panels': panels, 'images': _images(external),
            'not_scored': [label_words(label) for label in external.not_scored], 'drift': _drift(drift, home),
            'known': {'images': 'images' in home, 'thresholds': 'thresholds' in home}}


def _images(external: External) -> Cells:
    rows = []
    home = external.home.get('images')
    for name, (text, _) in STATISTICS.items():
        here, digits = external.images[name], 0 if name == 'shorter_side' else 3
        row = [text, f'{here["mean"]:.{digits}f} ± {here["sd"]:.{digits}f}']
        if home:
            gap = standard_difference(here, home[name])
            row += [f'{home[name]["mean"]:.{digits}f} ± {home[name]["sd"]:.{digits}f}',
                    'undefined' if gap is None else f'{gap:+.2f}']
        rows.append(row)
    return ['statistic', 'these images, mean ± sd',
            *['home, mean ± sd', 'difference in sd of home'] * bool(home)], rows


def _drift(drift: Dict[str, Any], home: Home) -> Cells:
    rows = []
    for label, here in drift.items():
        for where, each in (('here', here), ('home', home.get('labels', {}).get(label))):
            for how, of in (('as given', each and each['as_given']),
                            ('calibrated at home', each and each['calibrated'])):
                if of:
                    rows.append([f'{label_words(label)}, {where}, {how}', each['positives'], f'{of["expected"]:.1f}',
                                 interval_text(of['ratio'], of['ratio_ci95']), number(of['ece']), number(of['brier'])])
    return ['diagnosis', 'observed positives', 'expected positives', 'expected / observed [95 % interval]',
            'calibration error', 'Brier score'], rows


def _panel(
        title: str,
        text: str,
        here: Sequence[int],
        home: Optional[Sequence[int]],
        edges: np.ndarray,
        name: str,
        colour: str = COLOURS[1],
        log: bool = False,
) -> Tuple[str, Markup]:
    def middle(counts: Sequence[int]) -> str:
        row = int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))
        return f'{edges[row]:.3g} to {edges[row + 1]:.3g}'
    alt = f'Histogram of {text}: the median of these images lies in {middle(here)}' + (
        f', that of home in {middle(home)}.' if home else '; that of home is not known.')
    return title, Markup(inline_svg(
        partial(draw_shift, here=here, home=home, edges=edges, text=text, colour=colour, log=log), alt,
        f'shift-{name}'))


def draw_shift(
        axes: Axes,
        here: Sequence[int],
        home: Optional[Sequence[int]],
        edges: np.ndarray,
        text: str,
        colour: str,
        log: bool = False,
) -> None:
    """Shares of images in bins: filled here, a line at home.

    Args:
        axes: Where.
        here, home: Counts in the bins; home may be None.
        edges: Of the bins.
        text: What is counted.
        colour: Of these images.
        log: Whether the axis is logarithmic.
    """
    used = np.flatnonzero(np.asarray(here) + np.asarray(home if home else 0))
    axes.stairs(np.asarray(here) / max(sum(here), 1), edges, fill=True, color=colour, alpha=0.45, label='these images')
    if home:
        axes.stairs(np.asarray(home) / max(sum(home), 1), edges, color='black', linewidth=1.4, label='home')
    if log:
        axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter('{x:.0f}')
        axes.set_xlim(edges[max(used[0] - 2, 0)], edges[min(used[-1] + 3, len(edges) - 1)])
    axes.set(xlabel=text, ylabel='share of images')
    axes.legend(fontsize=9, frameon=False, loc='upper center', bbox_to_anchor=(0.5, 0), borderaxespad=4.3, ncols=2)
