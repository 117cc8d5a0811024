"""Model cards: what a reader must know of weights, with no figure that was typed."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..isic.metrics import interval_text
from ..isic.task import LABELS, label_words

__all__ = ['render_card']

TEMPLATE = Path(__file__).with_name('card_template.md')
CALIBRATION = ('ece', 'ece_with_temperature', 'temperature')
POINT = ('threshold', 'accuracy', 'sensitivity', 'specificity', 'ppv', 'npv')
WORDS = {label: label_words(label) for label in LABELS}
MIXES = {  # by --balance
    'none': 'those of the mix of diagnoses in training',
    'weights': 'those of a training in which every diagnosis weighed the same (`--balance weights`)',
    'sampler': 'those of a training that saw every diagnosis as often as another (`--balance sampler`)',
}


def render_card(
        name: str,
        config: Dict[str, Any],
        results: Optional[Dict[str, Any]],
        sha256: Optional[str],
        load_name: str,
        pictures: Optional[List[str]] = None,
) -> str:
    """The README.md of a model repo.

    Args:
        name: Model and tag.
        config: Content of config.json, or for weights of timm's a dict of architecture and pretrained_cfg.
        results: Content of results.json; None for weights that were not measured.
        sha256: Digest of model.safetensors, or None for that of the repo it comes from.
        load_name: What timm.create_model is given.
        pictures: File names beside the card.
    """
    cfg = config['pretrained_cfg']
    label_names = config.get('label_names') or []
    measured = results is not None
    source = results['base_model'] if results else (cfg.get('hf_hub_id') or '').partition('@')[0]
    data_set = results['data'] if results else {}
    arguments = results['run']['arguments'] if results else {}
    thresholds = config.get('thresholds') or {}
    point = 'youden on validation' if 'youden on validation' in thresholds else 'official'
    synthetic = data_set.get('name') == 'demo'
    official = 'train' in data_set.get('official_splits', ())
    data = ModelCardData(
        license=cfg.get('license') or 'apache-2.0', library_name='timm', pipeline_tag='image-classification',
        tags=['timm', 'timm_arl', 'image-classification', 'attention', *['dermoscopy', 'skin-lesion'] * measured],
        datasets=['imagenet-1k'] if not measured else ['isic-2017'] if official else None,
        base_model=source or None, model_name=name,
        eval_results=_eval_results(results) if results else None)
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=name, architecture=config['architecture'], measured=measured,
        is_arl=config['architecture'].startswith('arl_cnn'), label_names=label_names, source=source,
        load_name=repr(load_name),
        data_text=('generated, **synthetic** images: its scores say nothing about skin' if synthetic else 'ISIC 2017'
                   if official else f'`{data_set.get("name")}`, which is not the whole training set of ISIC 2017'),
        crops=arguments.get('crops', 'center'), grey_world=arguments.get('grey_world'),
        lesion_crop=arguments.get('lesion_crop'), squash=arguments.get('aspect') == 'squash',
        has_points=len(thresholds) > 1,
        thresholds={label: float(f'{value:.6g}') for label, value in thresholds.get(point, {}).items()}, point=point,
        splits=[_split(split, results) for split in _ordered(results['metrics'])] if results else [],
        looks=_times(len(results['looks'])) if results else '',
        pictures=[(name, _words_of(name)) for name in pictures or []],
        training=_training(results) if results else [], mix=MIXES[arguments.get('balance', 'none')], sha256=sha256)
    return str(card).rstrip() + '\n'


def _eval_results(results: Dict[str, Any]) -> List[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification', task_name='skin lesion classification',
            dataset_type=_data_set(split, results['data'])[0], dataset_name=_data_set(split, results['data'])[1],
            dataset_split=split,
            metric_type='roc_auc', metric_name=f'AUC, {WORDS[label]}', metric_value=scores[label]['auc'])
        for split, scores in _ordered(results['metrics']).items() for label in LABELS
        if scores[label]['auc'] is not None]


def _ordered(metrics: Dict[str, Any]) -> Dict[str, Any]:
    """The test split first, whose images chose nothing."""
    return {split: metrics[split] for split in sorted(metrics, key=lambda split: split != 'test')}


def _data_set(split: str, data: Dict[str, Any]) -> Tuple[str, str]:
    """Id and name of what a split's images are of."""
    if data['name'] == 'demo':
        return 'synthetic', 'synthetic demo images'
    return ('isic-2017', 'ISIC 2017 Part 3') if split in data['official_splits'] else ('other', data['name'])


def _split(name: str, results: Dict[str, Any]) -> Dict[str, Any]:
    scores = results['metrics'][name]
    tasks = {label: scores[label] for label in LABELS}
    chosen = any(task.get('operating_points') for task in tasks.values())
    kept = 'the epoch that was kept' if results['run']['arguments']['keep'] == 'best' else ''
    by_validation = ' and '.join(filter(None, [kept, 'thresholds and temperatures' * chosen]))
    return {
        'title': f'{name.capitalize()}, {tasks[LABELS[0]]["images"]} images of {_data_set(name, results["data"])[1]}'
                 .replace('synthetic', '**synthetic**'),
        'note': f'These images chose {by_validation}: their figures are better than those of new images would be.'
                if name == 'validation' and by_validation else '',
        'rows': [
            *(_cells(WORDS[label], interval_text(t['auc'], t['auc_ci95']), _number(t.get('average_precision')),
                     _number(t['sensitivity']), _number(t['specificity'])) for label, t in tasks.items()),
            _cells('mean', interval_text(scores['mean_auc'], scores['mean_auc_ci95']), '', '', '')],
        'points': [_cells(f'{WORDS[label]}, {point["name"]}', *(_number(point[key]) for key in POINT))
                   for label, t in tasks.items() for point in t.get('operating_points', ())],
        'calibration': [
            _cells(WORDS[label], _number(t['positives'] / t['images']), _number(t.get('mean_probability')),
                   *(_number(t['calibration'][key]) for key in CALIBRATION))
            for label, t in tasks.items() if 'calibration' in t],
        'warnings': [
            f'**The AUC of {WORDS[label]} cannot be told from chance** (0.5) by these images.'
            for label, t in tasks.items() if t['auc_ci95'] and t['auc_ci95'][0] <= 0.5] + [
            f'**Probabilities of {WORDS[label]} are {direction}** here, by {abs(gap):.3f} on average: do not read them '
            f'as risks.' for label, t in tasks.items() if 'mean_probability' in t
            for gap in [t['mean_probability'] - t['positives'] / t['images']]
            for direction in ['too high' if gap > 0 else 'too low'] if abs(gap) > 0.05],
        'alpha_zero': [
            _cells(WORDS.get(key, 'mean'), interval_text(pair['difference'], pair['difference_ci95'], '+'),
                   _number(pair.get('p_value')))
            for key, pair in results.get('alpha_zero', {}).get(name, {}).items()],
        'subgroups': [
            _cells(row['group'], WORDS[row['label']], row['images'], row['positives'],
                   interval_text(row['auc'], row['auc_ci95']))
            for row in scores.get('subgroups', ()) if row['auc'] is not None],
    }


def _words_of(picture: str) -> str:
    kind, _, split = picture.removesuffix('.png').partition('_')
    return {'roc': f'ROC curves on {split}', 'reliability': f'Reliability curves on {split}',
            'curves': 'Losses and validation AUCs over the epochs', 'alphas': 'The alphas over the epochs'}[kind]


def _training(results: Dict[str, Any]) -> List[Any]:
    run = results['run']
    arguments = run['arguments']
    start = (results['base_model'] or arguments.get('init_checkpoint')
             or (arguments.get('pretrained') and arguments.get('model')))
    images = f', {arguments["train_images"]:,} images' if 'train_images' in arguments else ''
    rows = [
        ('data', ', '.join(filter(None, [
            'of a cross-validation, ' + arguments['fold'] if arguments.get('fold') else '',
            'ISIC 2017, the 2,000 training images of the challenge' if 'train' in results['data']['official_splits']
            else f'`{arguments["data"]}`, split train{images}', results['data']['note']]))),
        ('started from', f'`{start}`' if start else 'scratch'),
        ('command', f'`{run["command"]}`'), ('recipe', arguments['recipe']), ('seed', arguments['seed']),
        ('image size', f'{results["img_size"]} px'),
        ('crops', f'{arguments.get("crops")}, whose probabilities are averaged'),
        ('commit', run.get('commit') or 'unknown'),
        ('versions', ', '.join(f'{key} {value}' for key, value in run['versions'].items())),
        ('device', f'{run["launch"]["processes"]} process(es), {run["launch"]["device"]}, mixed precision '
                   f'{run["launch"]["mixed_precision"]}'),
        ('epochs', f'{results["epochs"]}; the kept one: {results["kept_epoch"]}, ' + (
            'the best by mean AUC on validation' if arguments['keep'] == 'best' else 'the last')),
        ('alphas', ', '.join(f'{key.removesuffix(".alpha")} {value:.3g}' for key, value in results['alphas'].items())),
    ]
    return [(key, str(value).replace('|', '\\|')) for key, value in rows]


def _cells(*values: Any) -> str:
    return ' | '.join(str(value) for value in values)


def _number(value: Any) -> str:
    return '' if value is None else f'{value:.3f}'


def _times(count: int) -> str:
    return {0: 'never', 1: 'once', 2: 'twice'}.get(count, f'{count} times')


def registered_config(name: str) -> Dict[str, Any]:
    """What render_card needs of registered weights of timm's.

    Args:
        name: Model and tag.
    """
    cfg = timm.get_pretrained_cfg(name)
    return {'architecture': name.partition('.')[0], 'pretrained_cfg': cfg.to_dict()}


def read_results(folder: Path) -> Optional[Dict[str, Any]]:
    """Content of results.json of a staged folder, or None where there is none, or none that can be read."""
    try:
        results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None
