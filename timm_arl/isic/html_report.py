"""The page that evaluate_isic.py --report writes: one file, read without a network and without scripts."""
import base64
import io
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from scipy.stats import binomtest

from ..overlays import colours
from .dataset.demo import DEMO_TASKS
from .intervals import LEAST_GROUPS, group_counts, percentile_interval, resampled_times
from .metrics import interval_text, net_benefit, operating_point, score_split
from .plots import (
    draw_alphas,
    draw_aucs,
    draw_losses,
    draw_reliability,
    draw_roc,
    draw_roc_pair,
    inline_svg,
)
from .report import (
    Cells,
    calibration_cells,
    classes_cells,
    confusion_cells,
    few_images,
    group_intervals,
    groups_cells,
    number,
    points_cells,
    scores_cells,
    test_of_aucs,
)
from .shift_page import External, shift_page
from .task import ISIC2017, OFFICIAL_THRESHOLD, Task, label_words

__all__ = ['Comparison', 'Example', 'Examples', 'Group', 'Shown', 'Training', 'html_report']

TEMPLATE = Path(__file__).with_name('report.html')
QUALITY = 80  # of the JPEGs
COARSE = 512  # px; images with a shorter side below this are called small copies


class Shown(NamedTuple):
    """A picture of an example.

    Attributes:
        image: RGB, as large as it is kept.
        caption: A few words.
        alt: What is to be seen, in words.
    """
    image: Image.Image
    caption: str
    alt: str


class Example(NamedTuple):
    """An image of the split with its overlays.

    Attributes:
        image_id: Of the image.
        diagnosis: The true one.
        verdict: 'missed' for one.
        text: Its probabilities.
        pictures: The image, then its overlays.
    """
    image_id: str
    diagnosis: str
    verdict: str
    text: str
    pictures: List[Shown]


class Group(NamedTuple):
    """Examples under one heading.

    Attributes:
        title: The heading.
        text: How they were chosen, or that there are none.
        examples: The images.
        scales: Of the overlays: name, value of the darkest colour, value of the lightest colour, words.
    """
    title: str
    text: str
    examples: List[Example]
    scales: List[Tuple[str, float, float, str]]


class Examples(NamedTuple):
    """What a report shows of the images.

    Attributes:
        groups: The most wrong and the most certain of each label.
        differing: Where two networks disagree most; empty without a comparison.
        note: Why overlays are missing, or ''.
        blocks: For each gate its name, alpha, contribution, and effective share of its mask: means over
            the images shown; empty without gates.
        side: Shortest side in pixels of the stored images that are shown; 0 if none is.
        square_copies: Whether they are square copies that were stretched back to their shape.
    """
    groups: List[Group]
    differing: List[Group]
    note: str
    blocks: List[Tuple[str, float, float, float]]
    side: int
    square_copies: bool


class Training(NamedTuple):
    """What is known of the checkpoint's run.

    Attributes:
        summary: Rows of its summary.csv; empty where there is none.
        alphas: Columns of it that hold alphas.
        kept_best: Whether validation chose the epoch that was kept.
        same_data: Whether the run is known to have trained on this data.
        own_thresholds: Whether the checkpoint holds thresholds that were chosen before.
        select: The score by which validation chooses the epoch.
    """
    summary: List[Dict[str, Any]]
    alphas: Sequence[str]
    kept_best: bool
    same_data: bool = False
    own_thresholds: bool = False
    select: str = 'mean_auc'


class Comparison(NamedTuple):
    """Another network on the same images.

    Attributes:
        name: Of the other network, or of the file with its predictions.
        probabilities: Its, shape (N, labels).
    """
    name: str
    probabilities: np.ndarray


def html_report(
        name: str,
        data: str,
        split: str,
        metrics: Dict[str, Any],
        truth: Dict[str, np.ndarray],
        probabilities: Dict[str, np.ndarray],
        record: Dict[str, Any],
        training: Training,
        examples: Examples,
        other: Optional[Comparison] = None,
        task: Task = ISIC2017,
        groups: Optional[Mapping[str, Optional[Sequence[str]]]] = None,
        external: Optional[External] = None,
) -> str:
    """The page of one evaluation.

    Args:
        name: Of the network.
        data: As the program was told.
        split: The one that is scored.
        metrics: Content of metrics.json.
        truth, probabilities: By split, shape (N, labels), columns in the order of the task's labels.
        record: Content of evaluation.json.
        training: The checkpoint's run.
        examples: Images of the split.
        other: Another network, whose comparison metrics holds.
        task: What is predicted.
        groups: By split, patient or lesion of each image, or None; None: not known.
        external: What is known of another clinic's data, if they are.

    Returns:
        HTML that loads nothing.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters.update(words=label_words, number=number, uri=_data_uri)
    template = environment.from_string(TEMPLATE.read_text(encoding='utf-8'))
    patients = groups or {}
    shown = {of: _split(of, metrics[of], truth[of], probabilities[of], task, patients.get(of))
             for of in (split, *(metrics.keys() - {split}))}
    shown_groups = (*examples.groups, *examples.differing)
    pictures = [picture for group in shown_groups for example in group.examples for picture in example.pictures]
    html = template.render(
        name=name, data=data, split=split, where=f'{Path(data).name}, {split}' if external else split, task=task,
        splits=shown, labels=task.labels,
        over=metrics[split].get('intervals_over', 'images'), least=LEAST_GROUPS,
        test_of_aucs=test_of_aucs('groups' in metrics[split]), adds_up=task.kind == 'multiclass' and task.is_softmax,
        scores=metrics[split], record=record,
        synthetic=data in DEMO_TASKS, training=training, examples=examples, pictures=len(pictures), today=date.today(),
        coarse=0 < examples.side < COARSE, official=OFFICIAL_THRESHOLD, curves=_curves(training, task),
        kinds={scale[0] for group in shown_groups for scale in group.scales},
        warnings=_warnings(metrics[split], probabilities[split], truth[split], task), blocks=_blocks(examples),
        colours=['rgb({:.0f} {:.0f} {:.0f})'.format(*colour) for colour in colours(np.linspace(0, 1, 9))],
        sections=[
            ('caveats', 'Read this first'), ('summary', 'Summary'), ('scores', f'Scores on {split}'),
            *[('external', 'Another clinic')] * bool(external), *[('comparison', 'Two networks')] * bool(other),
            ('images', 'Images'),
            *[('training', 'Attention and training')] * bool(examples.blocks or training.summary),
            *((of, f'Scores on {of}') for of in shown if of != split), ('terms', 'Definitions'),
            ('settings', 'Settings')],
        external=external and shift_page(external, metrics[split], probabilities[split], task),
        comparison=other and _comparison(
            other, metrics[split], truth[split], probabilities[split], record['seed'], task, patients.get(split)))
    return html.strip() + '\n'


def _split(
        split: str,
        scores: Dict[str, Any],
        truth: np.ndarray,
        probabilities: np.ndarray,
        task: Task,
        groups: Optional[Sequence[str]],
) -> Dict[str, Any]:
    """What the page says of one split."""
    times = None if groups is None else resampled_times(len(truth), groups=groups)
    decisions, rocs, reliabilities = {}, [], []
    for label, t, p in zip(task.labels, truth.T, probabilities.T):
        own, words = scores[label], label_words(label)
        points = [{'name': task.usual_point, **own}, *own['operating_points']]
        decisions[label] = [_confusion(t, p, point, times, groups) for point in points]
        calibration = own['calibration']
        auc = interval_text(own['auc'], own['auc_ci95'])
        rocs.append((f'{words}: AUC {auc}', Markup(inline_svg(
            partial(draw_roc, label=label, truth=t, probabilities=p, scores=own, task=task,
                    groups=groups),
            f'ROC curve of {words} on {split}, with a 95 % band. AUC {auc}.' + ''.join(
                f' At the threshold {point["threshold"]:.2f} ({point["name"]}): sensitivity '
                f'{number(point["sensitivity"])}, specificity {number(point["specificity"])}.' for point in points),
            f'roc-{split}-{label}', (4.2, 5.2)))))
        reliabilities.append((words, Markup(inline_svg(
            partial(draw_reliability, label=label, truth=t, probabilities=p, scores=own, task=task),
            f'Share of positives against mean probability of {words} on {split}. Expected calibration error '
            f'{calibration["ece"]:.3f} as given' + (
                f', {calibration["ece_calibrated"]:.3f} calibrated (T = {calibration["temperature"]:.2f}, b = '
                f'{calibration["bias"]:.2f}).' if calibration['temperature'] else '.'),
            f'reliability-{split}-{label}', (4.2, 5.2)))))
    classes: List[Tuple[str, Cells]] = []
    if task.kind == 'multiclass':
        classes = [('Scores of all labels together', classes_cells(scores)),
                   ('Confusion matrix, by the most probable label', confusion_cells(scores))]
    return {
        'images': len(truth), 'classes': classes, 'scores': scores_cells(scores, task),
        'points': points_cells(scores, task),
        'decisions': decisions, 'calibration': calibration_cells(scores, task), 'rocs': rocs,
        'reliabilities': reliabilities, 'groups': groups_cells(scores['subgroups']) if scores['subgroups'] else None,
        'group_intervals': group_intervals(scores, task)}


def _confusion(
        truth: np.ndarray,
        probabilities: np.ndarray,
        point: Dict[str, Any],
        times: Optional[np.ndarray],
        groups: Optional[Sequence[str]],
) -> Dict[str, Any]:
    """Counts at a threshold, its net benefit, and sensitivity and specificity with Wilson's intervals, or those of a
    bootstrap whose samples have the images so often."""
    positive = np.asarray(probabilities, np.float64) > point['threshold']
    counts = [[int(np.sum((truth == value) & (positive == called))) for called in (True, False)] for value in (1, 0)]
    (tp, fn), (fp, tn) = counts
    return {'name': point['name'], 'threshold': point['threshold'], 'counts': counts,
            'sensitivity': _share(truth == 1, positive, times, groups),
            'specificity': _share(truth == 0, ~positive, times, groups),
            'benefit': net_benefit(tp + fn, fp + tn, tp, fp, point['threshold']),
            'benefit_of_all': net_benefit(tp + fn, fp + tn, tp + fn, fp + tn, point['threshold'])}


def _share(
        images: np.ndarray,
        right: np.ndarray,
        times: Optional[np.ndarray],
        groups: Optional[Sequence[str]],
) -> str:
    part, whole = int((images & right).sum()), int(images.sum())
    if not whole:
        return 'undefined'
    if groups is not None and group_counts(images, groups)[0] < LEAST_GROUPS:
        interval: Any = None
    elif times is None:
        interval = binomtest(part, whole).proportion_ci(method='wilson')
    elif part in (0, whole):  # resamples would all agree: as if each group were one image
        having = group_counts(images, groups)[0]
        interval = binomtest(having if part else 0, having).proportion_ci(method='wilson')
    else:
        with np.errstate(invalid='ignore'):
            interval = percentile_interval(times[:, images & right].sum(1) / times[:, images].sum(1))
    return interval_text(part / whole, interval) + f', {part} of {whole}'


def _warnings(scores: Dict[str, Any], probabilities: np.ndarray, truth: np.ndarray, task: Task) -> List[str]:
    """What a reader must know of these scores, as model cards say it."""
    lines = []
    for label, t, p in zip(task.labels, truth.T, probabilities.T):
        words, interval, gap = label_words(label), scores[label]['auc_ci95'], float(p.mean() - t.mean())
        if interval and interval[0] <= 0.5:
            chance = 'is below chance' if interval[1] < 0.5 else 'cannot be told from chance'
            lines.append(f'The AUC of {words} {chance} (0.5) with these images.')
        if abs(gap) > 0.05:
            lines.append(f'Probabilities of {words} are too {"high" if gap > 0 else "low"} here, by {abs(gap):.3f} on '
                         f'average: do not read them as risks.')
    return lines + few_images(scores, task)


def _curves(training: Training, task: Task) -> List[Tuple[str, Markup]]:
    """Losses, AUCs and alphas over the epochs."""
    if not training.summary:
        return []
    last = training.summary[-1]
    panels = [
        ('Losses', partial(draw_losses, summary=training.summary, select=training.select),
         f'Training and validation loss over {len(training.summary)} epochs.'),
        ('AUCs on validation', partial(
            draw_aucs, summary=training.summary, task=task, select=training.select),
         f'AUCs on the validation images over {len(training.summary)} epochs; at last their mean is '
         f'{float(last["validation_mean_auc"]):.3f}.')]
    if training.alphas:
        panels.append(('Alphas', partial(draw_alphas, summary=training.summary, alphas=training.alphas),
                       'The alpha of every block over the epochs; at last ' + ', '.join(
                           f'{name.removesuffix(".alpha")} {float(last[name]):.3g}' for name in training.alphas) + '.'))
    return [(title, Markup(inline_svg(draw, alt, f'curve-{k}'))) for k, (title, draw, alt) in enumerate(panels)]


def _blocks(examples: Examples) -> Cells:
    return (['block', 'alpha', 'contribution of the gate', 'effective share of the mask'],
            [[name, f'{alpha:.3g}', f'{100 * share:.2f} %', f'{effective:.3f}'] for name, alpha, share, effective
             in examples.blocks])


def _comparison(
        other: Comparison,
        scores: Dict[str, Any],
        truth: np.ndarray,
        probabilities: np.ndarray,
        seed: int,
        task: Task,
        groups: Optional[Sequence[str]],
) -> Dict[str, Any]:
    """Both networks side by side."""
    pair = scores['comparison']
    others = score_split(truth, other.probabilities, seed=seed, task=task, groups=groups)
    times = None if groups is None else resampled_times(len(truth), groups=groups)
    aucs: List[List[Any]] = []
    for label in (*task.labels, 'mean_auc'):
        both = [(s['mean_auc'], s['mean_auc_ci95']) if label == 'mean_auc' else (s[label]['auc'], s[label]['auc_ci95'])
                for s in (scores, others)]
        p_value = pair[label].get('p_value')
        aucs.append(['mean' if label == 'mean_auc' else label_words(label), *(interval_text(*each) for each in both),
                     interval_text(pair[label]['difference'], pair[label]['difference_ci95'], '+'),
                     '' if p_value is None else number(p_value)])
    if 'balanced_accuracy' in pair:
        both = [(s['balanced_accuracy'], s['balanced_accuracy_ci95']) for s in (scores, others)]
        difference = pair['balanced_accuracy']
        aucs.append(['balanced accuracy', *(interval_text(*each) for each in both),
                     interval_text(difference['difference'], difference['difference_ci95'], '+'), ''])
    decisions: List[List[Any]] = []
    rocs = []
    for label, t, ours, theirs in zip(task.labels, truth.T, probabilities.T, other.probabilities.T):
        for network, p in (('this network', ours), ('the other', theirs)):
            point = {'name': task.usual_point, **operating_point(t, p, OFFICIAL_THRESHOLD)}
            at = _confusion(t, p, point, times, groups)
            decisions.append([f'{label_words(label)}, {network}', at['sensitivity'], at['specificity']])
        rocs.append((label_words(label), Markup(inline_svg(
            partial(draw_roc_pair, label=label, truth=t, networks={'this network': ours, 'the other': theirs},
                    task=task),
            f'ROC curves of {label_words(label)}: AUC {number(scores[label]["auc"])} of this network, '
            f'{number(others[label]["auc"])} of the other.', f'pair-{label}'))))
    cells: Cells = (['diagnosis', 'AUC, this network', 'AUC, the other', 'difference [95 % interval]',
                     f'{test_of_aucs(groups is not None)} p'], aucs)
    return {'name': other.name, 'aucs': cells, 'rocs': rocs, 'decisions': (
        ['diagnosis, network', 'sensitivity [95 % interval]', 'specificity [95 % interval]'], decisions)}


def _data_uri(picture: Image.Image) -> str:
    with io.BytesIO() as file:
        picture.save(file, 'JPEG', quality=QUALITY, optimize=True)
        return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()
