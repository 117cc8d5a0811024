"""The tables of an evaluation, for its report and for model cards, and the report that evaluate_isic.py writes."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

from .metrics import interval_text
from .task import LABELS, label_words

__all__ = [
    'calibration_table', 'differences_table', 'groups_table', 'markdown_report', 'markdown_table', 'number',
    'points_table', 'scores_table',
]

POINT = ('threshold', 'accuracy', 'sensitivity', 'specificity', 'ppv', 'npv')


def number(value: Any, digits: int = 3) -> str:
    return 'undefined' if value is None else f'{value:.{digits}f}'


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table.

    Args:
        columns: Their heads.
        rows: A cell for each column, whose | are escaped.
    """
    cells = [columns, ['---'] * len(columns), *([str(cell).replace('|', '\\|') for cell in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def scores_table(scores: Dict[str, Any]) -> str:
    """AUCs with intervals and other figures that need no threshold.

    Args:
        scores: What metrics.json holds for a split; the same below.
    """
    rows: List[List[Any]] = [
        [label_words(label), interval_text(task['auc'], task['auc_ci95']), task['positives'],
         number(task['average_precision']), number(task['auc_sens_80'])]
        for label, task in ((label, scores[label]) for label in LABELS)]
    rows.append(['mean', interval_text(scores['mean_auc'], scores['mean_auc_ci95']), '', '', ''])
    return markdown_table(
        ['diagnosis', 'AUC [95 % interval]', 'images with it', 'average precision', 'AUC above 80 % sensitivity'], rows)


def points_table(scores: Dict[str, Any]) -> str:
    """Figures at the official threshold and at those of the operating points."""
    return markdown_table(
        ['diagnosis, threshold', 'threshold', 'accuracy', 'sensitivity', 'specificity', 'PPV', 'NPV'],
        [[f'{label_words(label)}, {point["name"]}', *(number(point[key]) for key in POINT)] for label in LABELS
         for point in ({'name': 'official', **scores[label]}, *scores[label].get('operating_points', ()))])


def calibration_table(scores: Dict[str, Any]) -> str:
    """Expected calibration errors with and without the temperature."""
    rows = []
    for label in LABELS:
        task, calibration = scores[label], scores[label]['calibration']
        rows.append([label_words(label), number(task['positives'] / task['images']),
                     *([number(task['mean_probability'])] if 'mean_probability' in task else []),
                     number(calibration['ece']), number(calibration['ece_with_temperature']),
                     number(calibration['temperature'])])
    mean = ['mean probability'] * ('mean_probability' in scores[LABELS[0]])
    return markdown_table(
        ['diagnosis', 'share of images with it', *mean, 'calibration error', 'with temperature', 'temperature'], rows)


def groups_table(rows: Iterable[Dict[str, Any]]) -> str:
    """Figures by sex and age.

    Args:
        rows: Those of metrics.json's subgroups that are shown.
    """
    return markdown_table(
        ['group', 'diagnosis', 'images', 'images with it', 'AUC [95 % interval]', 'sensitivity', 'specificity'],
        [[row['group'], label_words(row['label']), row['images'], row['positives'],
          interval_text(row['auc'], row['auc_ci95']), number(row['sensitivity']), number(row['specificity'])]
         for row in rows])


def differences_table(pair: Dict[str, Any]) -> str:
    """AUC differences of two networks on the same images.

    Args:
        pair: A comparison of metrics.json.
    """
    return markdown_table(
        ['diagnosis', 'AUC difference [95 % interval]', "DeLong's p"],
        [[label_words(name) if name in LABELS else 'mean',
          interval_text(pair[name]['difference'], pair[name]['difference_ci95'], '+'),
          '' if pair[name].get('p_value') is None else number(pair[name]['p_value'])]
         for name in (*LABELS, 'mean_auc')])


def markdown_report(metrics: Dict[str, Any], record: Dict[str, Any], out: Path, args: Any) -> str:
    """Markdown of one evaluation.

    Args:
        metrics: Content of metrics.json.
        record: Command, commit, versions, settings.
        out: Folder with the pictures.
        args: Arguments of evaluate_isic.py.
    """
    alpha_zero = ' with every alpha at 0' if args.alpha_zero else ''
    parts = [f'# {args.checkpoint}{alpha_zero} on {args.data}']
    if args.data == 'demo':
        parts.append('The images are **synthetic**: these scores say nothing about skin lesions.')
    parts.append('Not a medical device. Intervals are 95 % bootstrap intervals over images. Thresholds and '
                 'temperatures were chosen on the validation split, so its figures at them are too good.')
    for split, scores in metrics.items():
        parts += [f'## {split}, {scores[LABELS[0]]["images"]} images', scores_table(scores), points_table(scores),
                  calibration_table(scores), f'![ROC curves](roc_{split}.png)',
                  f'![Reliability](reliability_{split}.png)']
        if scores['subgroups']:
            parts += ["Groups of patients. Intervals are DeLong's; there is none at an AUC of 0 or 1. Sensitivity and "
                      'specificity are at 0.5.', groups_table(scores['subgroups'])]
        else:
            parts.append('Sex and age are not known for these images.')
        if 'comparison' in scores:
            pair = scores['comparison']
            parts += [f'Paired differences, {pair["second"]} minus {pair["first"]}:', differences_table(pair)]
    for picture, of in (('curves.png', 'Losses and validation AUCs'), ('alphas.png', 'The alphas')):
        if (out / picture).exists():
            parts.append(f'![{of} over the epochs]({picture})')
    parts.append(markdown_table(['', ''], [(key, f'`{value}`') for key, value in record.items()]))
    return '\n\n'.join(parts) + '\n'
