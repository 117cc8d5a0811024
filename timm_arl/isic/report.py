"""The tables of an evaluation: their cells, for its report, and as Markdown, for model cards."""
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from .classes import CLASS_SCORES
from .intervals import LEAST_GROUPS
from .metrics import interval_text
from .task import ISIC2017, OFFICIAL_THRESHOLD, Task, label_words

__all__ = [
    'Cells', 'calibration_cells', 'calibration_table', 'classes_cells', 'confusion_cells', 'differences_table',
    'few_images', 'group_intervals', 'groups_cells', 'groups_table', 'markdown_table', 'number', 'points_cells',
    'points_table', 'scores_cells', 'scores_page', 'scores_table', 'test_of_aucs',
]

Cells = Tuple[List[str], List[List[Any]]]  # heads of the columns, and the rows

FEW = 30  # images or groups with a label
POINT = ('threshold', 'accuracy', 'sensitivity', 'specificity', 'ppv', 'npv')


def number(value: Any, digits: int = 3) -> str:
    return 'undefined' if value is None else f'{value:.{digits}f}'


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table.

    Args:
        columns: Their heads.
        rows: A cell for each column, whose | and < are escaped.
    """
    cells = [columns, ['---'] * len(columns), *(map(_escaped, row) for row in rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def _escaped(cell: Any) -> str:
    return ' '.join(str(cell).splitlines()).replace('|', '\\|').replace('<', '&lt;')


def scores_cells(scores: Dict[str, Any], task: Task = ISIC2017) -> Cells:
    """AUCs with intervals and other figures that need no threshold.

    Args:
        scores: What metrics.json holds for a split; the same below.
        task: Whose labels it has; the same below.
    """
    rows: List[List[Any]] = [
        [label_words(label), interval_text(of['auc'], of['auc_ci95']), of['positives'],
         number(of['average_precision']), number(of['auc_sens_80'])]
        for label, of in ((label, scores[label]) for label in task.labels)]
    rows.append(['mean', interval_text(scores['mean_auc'], scores['mean_auc_ci95']), '', '', ''])
    return ['diagnosis', 'AUC [95 % interval]', 'images with it', 'average precision',
            'AUC above 80 % sensitivity'], rows


def classes_cells(scores: Dict[str, Any]) -> Cells:
    """The scores of a multiclass task that need all its labels at once."""
    return ['score', 'value [95 % interval]'], [
        [words, interval_text(scores[name], scores[f'{name}_ci95'])] for name, words in CLASS_SCORES.items()]


def confusion_cells(scores: Dict[str, Any]) -> Cells:
    """The confusion matrix of a multiclass task: a row for each true class."""
    labels, counts = (scores['confusion_matrix'][key] for key in ('labels', 'counts'))
    return (['true class', *(f'called {label_words(label)}' for label in labels), 'share called right'],
            [[label_words(label), *row, number(row[k] / sum(row) if sum(row) else None)]
             for k, (label, row) in enumerate(zip(labels, counts))])


def points_cells(scores: Dict[str, Any], task: Task = ISIC2017) -> Cells:
    """Figures at the official threshold and at those of the operating points."""
    return (['diagnosis, threshold', 'threshold', 'accuracy', 'sensitivity', 'specificity', 'PPV', 'NPV'],
            [[f'{label_words(label)}, {point["name"]}', *(number(point[key]) for key in POINT)] for label in task.labels
             for point in ({'name': task.usual_point, **scores[label]}, *scores[label].get('operating_points', ()))])


def test_of_aucs(grouped: bool) -> str:
    """Whose intervals and tests of AUCs are computed: for images in groups, Obuchowski's form of DeLong's."""
    return "Obuchowski's" if grouped else "DeLong's"


def group_intervals(scores: Dict[str, Any], task: Task = ISIC2017) -> str:
    """How to read groups_cells, in two sentences."""
    over = scores.get('intervals_over')
    alike = '' if over is None else f', for images that are alike within {over}'
    at = f'at {OFFICIAL_THRESHOLD}' if task.kind == 'multilabel' else 'those of calling the most probable class'
    return (f'Intervals are {test_of_aucs(over is not None)}{alike}; there is none at an AUC of 0 or 1, or with fewer '
            f'than {LEAST_GROUPS} {over or "images"} with or without it. Sensitivity and specificity are {at}.')


def few_images(scores: Dict[str, Any], task: Task = ISIC2017) -> List[str]:
    """Sentences on labels that few images have or, where they are known, few patients or lesions."""
    lines = []
    for label in task.labels:
        own, words = scores[label], label_words(label)
        having = own.get('positive_groups', own['positives'])
        lacking = own.get('negative_groups', own['images'] - own['positives'])
        over = scores.get('intervals_over', 'images')
        without = f', and below {LEAST_GROUPS} there is no interval'
        if having < FEW:
            images = f' ({own["positives"]} images)' * ('intervals_over' in scores)
            lines.append(f'Only {having} {over} have {words}{images}: figures from so few are uncertain'
                         f'{without * (having < LEAST_GROUPS)}.')
        if lacking < LEAST_GROUPS:
            which = 'have images' if 'intervals_over' in scores else 'are'
            lines.append(f'Only {lacking} {over} {which} without {words}{without}.')
    return lines + _doubts(scores, task)


def _doubts(scores: Dict[str, Any], task: Task = ISIC2017) -> List[str]:
    """Sentences on labels whose calibration the validation images do not determine."""
    return [scores[label]['calibration_doubt'] for label in task.labels if 'calibration_doubt' in scores[label]]


def calibration_cells(scores: Dict[str, Any], task: Task = ISIC2017) -> Cells:
    """Mean probabilities and expected calibration errors, as given and calibrated."""
    rows = []
    for label in task.labels:
        of, calibration = scores[label], scores[label]['calibration']
        rows.append([label_words(label), number(of['positives'] / of['images']),
                     *([number(of['mean_probability'])] if 'mean_probability' in of else []),
                     number(calibration['mean_calibrated']), number(calibration['ece']),
                     number(calibration['ece_calibrated']), number(calibration['temperature']),
                     number(calibration['bias'])])
    mean = ['mean probability'] * ('mean_probability' in scores[task.labels[0]])
    return ['diagnosis', 'share of images with it', *mean, 'mean calibrated', 'calibration error', 'error calibrated',
            'T', 'b'], rows


def groups_cells(rows: Iterable[Dict[str, Any]]) -> Cells:
    """Figures of groups of images.

    Args:
        rows: Those of metrics.json's subgroups that are shown.
    """
    return (['group', 'diagnosis', 'images', 'images with it', 'AUC [95 % interval]', 'sensitivity', 'specificity'],
            [[row['group'], label_words(row['label']), row['images'], row['positives'],
              interval_text(row['auc'], row['auc_ci95']), number(row['sensitivity']), number(row['specificity'])]
             for row in rows])


def scores_table(scores: Dict[str, Any], task: Task = ISIC2017) -> str:
    """Markdown of scores_cells."""
    return markdown_table(*scores_cells(scores, task))


def points_table(scores: Dict[str, Any], task: Task = ISIC2017) -> str:
    """Markdown of points_cells."""
    return markdown_table(*points_cells(scores, task))


def calibration_table(scores: Dict[str, Any], task: Task = ISIC2017) -> str:
    """Markdown of calibration_cells."""
    return markdown_table(*calibration_cells(scores, task))


def scores_page(title: str, metrics: Dict[str, Any], task: Task = ISIC2017) -> str:
    """Markdown of the scores of each split: AUCs, thresholds and calibration.

    Args:
        title: What was scored, and on what.
        metrics: What metrics.json holds.
        task: Whose labels they are.
    """
    parts = [f'# {title}']
    for split, scores in metrics.items():
        parts += [f'## {split}, {scores[task.labels[0]]["images"]} images', scores_table(scores, task),
                  *(markdown_table(*cells(scores)) for cells in (classes_cells, confusion_cells)
                    if 'confusion_matrix' in scores),
                  points_table(scores, task), calibration_table(scores, task), *_doubts(scores, task)]
    return '\n\n'.join(parts) + '\n'


def groups_table(rows: Iterable[Dict[str, Any]]) -> str:
    """Markdown of groups_cells."""
    return markdown_table(*groups_cells(rows))


def differences_table(pair: Dict[str, Any], task: Task = ISIC2017, grouped: bool = False) -> str:
    """AUC differences of two networks on the same images.

    Args:
        pair: A comparison of metrics.json.
        task: Whose labels it has.
        grouped: Whether its test knows groups of images.
    """
    return markdown_table(
        ['diagnosis', 'AUC difference [95 % interval]', f'{test_of_aucs(grouped)} p'],
        [[label_words(name) if name in task.labels else 'mean',
          interval_text(pair[name]['difference'], pair[name]['difference_ci95'], '+'),
          '' if pair[name].get('p_value') is None else number(pair[name]['p_value'])]
         for name in (*task.labels, 'mean_auc')])
