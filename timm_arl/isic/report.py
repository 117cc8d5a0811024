"""The page that evaluate_isic.py --report writes."""
from pathlib import Path
from typing import Any, Dict

from .metrics import interval_text
from .task import LABELS, label_words

COLUMNS = ('accuracy', 'sensitivity', 'specificity', 'ppv', 'npv')


def number(value: Any, digits: int = 3) -> str:
    return 'undefined' if value is None else f'{value:.{digits}f}'


def markdown_report(metrics: Dict[str, Any], record: Dict[str, Any], out: Path, args: Any) -> str:
    """Markdown of one evaluation.

    Args:
        metrics: Content of metrics.json.
        record: Command, commit, versions, settings.
        out: Folder with the pictures.
        args: Arguments of evaluate_isic.py.
    """
    alpha_zero = ' with every alpha at 0' if args.alpha_zero else ''
    lines = [f'# {args.checkpoint}{alpha_zero} on {args.data}', '']
    if args.data == 'demo':
        lines += ['The images are **synthetic**: these scores say nothing about skin lesions.', '']
    lines += [
        'Not a medical device. 95 % bootstrap intervals over images. Thresholds and temperature were chosen on the '
        'validation split, so that its own figures at them are optimistic.', '']
    for split, scores in metrics.items():
        images = scores[LABELS[0]]['images']
        lines += [
            f'## {split}, {images} images', '',
            '| | AUC | average precision | AUC above 80 % sensitivity | ECE | ECE with temperature |',
            '|---|---|---|---|---|---|']
        for label in LABELS:
            task, calibration = scores[label], scores[label]['calibration']
            lines.append(
                f'| {label_words(label)} ({task["positives"]}) | {interval_text(task["auc"], task["auc_ci95"])} | '
                f'{number(task["average_precision"])} | {number(task["auc_sens_80"])} | {number(calibration["ece"])} | '
                f'{number(calibration["ece_with_temperature"])} (T = {calibration["temperature"]:.2f}) |')
        lines += [f'| mean | {interval_text(scores["mean_auc"], scores["mean_auc_ci95"])} | | | | |', '',
                  f'| task | threshold | {" | ".join(COLUMNS)} |', '|---' * (2 + len(COLUMNS)) + '|']
        for label in LABELS:
            for point in [{'name': 'official', **scores[label]}, *scores[label]['operating_points']]:
                lines.append(f'| {label_words(label)} | {point["name"]}, {point["threshold"]:.3f} | '
                             f'{" | ".join(number(point[column]) for column in COLUMNS)} |')
        lines += ['', f'![ROC curves](roc_{split}.png)', '', f'![Reliability](reliability_{split}.png)', '']
        if scores['subgroups']:
            lines += ["Groups: DeLong's intervals (none at an AUC of 0 or 1), sensitivity and specificity at 0.5.", '',
                      '| group | task | images | positives | AUC | sensitivity | specificity |',
                      '|---|---|---|---|---|---|---|']
            lines += [f'| {row["group"]} | {label_words(row["label"])} | {row["images"]} | {row["positives"]} | '
                      f'{interval_text(row["auc"], row["auc_ci95"])} | {number(row["sensitivity"])} | '
                      f'{number(row["specificity"])} |' for row in scores['subgroups']]
            lines.append('')
        else:
            lines += ['Sex and age are not known for these images.', '']
        if 'comparison' in scores:
            pair = scores['comparison']
            lines += [f'Paired differences, {pair["second"]} minus {pair["first"]}:', '',
                      "| | AUC difference | DeLong's p |", '|---|---|---|']
            for name in (*LABELS, 'mean_auc'):
                p_value = pair[name].get('p_value')
                difference = interval_text(pair[name]['difference'], pair[name]['difference_ci95'], '+')
                cells = (label_words(name), difference, '' if p_value is None else f'{p_value:.3g}')
                lines.append(f'| {" | ".join(cells)} |')
            lines.append('')
    for picture, of in (('curves.png', 'Losses and validation AUCs'), ('alphas.png', 'The alphas')):
        if (out / picture).exists():
            lines += [f'![{of} over the epochs]({picture})', '']
    lines += ['| | |', '|---|---|', *(f'| {key} | `{value}` |' for key, value in record.items())]
    return '\n'.join(lines) + '\n'
