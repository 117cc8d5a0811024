"""Model cards: what a reader must know about weights; every figure comes from results.json."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import parts_of
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.dataset.options import NO_GROUPS
from ..isic.report import (
    calibration_table,
    classes_cells,
    confusion_cells,
    differences_table,
    few_images,
    group_intervals,
    groups_table,
    markdown_table,
    points_table,
    scores_table,
)
from ..isic.selection import selection_words
from ..isic.task import ISIC2017, TASKS, Task, label_words, words_list

__all__ = ['render_card']

TEMPLATE = Path(__file__).with_name('card_template.md')
MIXES = {  # by --balance
    'none': 'They follow the mix of diagnoses in the training images.',
    'weights': 'In training, every diagnosis had the same weight (`--balance weights`).',
    'sampler': 'In training, every diagnosis was shown equally often (`--balance sampler`).',
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
        sha256: Checksum of model.safetensors, or None where it is that of the repo the weights come from.
        load_name: The name that timm.create_model gets.
        pictures: File names beside the card.
    """
    cfg = config['pretrained_cfg']
    label_names = config.get('label_names') or []
    measured = results is not None
    task = Task.of_config(config, len(label_names)) or ISIC2017
    source = results['base_model'] if results else (cfg.get('hf_hub_id') or '').partition('@')[0]
    data_set = results['data'] if results else {}
    arguments = results['run']['arguments'] if results else {}
    thresholds = config.get('thresholds') or {}
    point = 'youden on validation' if 'youden on validation' in thresholds else 'official'
    synthetic = data_set.get('name') in DEMO_TASKS
    official = 'train' in data_set.get('official_splits', ())
    data = ModelCardData(
        license=cfg.get('license') or 'apache-2.0', library_name='timm', pipeline_tag='image-classification',
        tags=['timm', 'timm_arl', 'image-classification', 'attention', *['dermoscopy', 'skin-lesion'] * measured],
        datasets=['imagenet-1k'] if not measured else ['isic-2017'] if official else None,
        base_model=source or None, model_name=name,
        eval_results=_eval_results(results, task) if results else None)
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=name, architecture=config['architecture'], measured=measured,
        is_arl=config['architecture'].startswith('arl_'), is_ran=config['architecture'].startswith('ran'),
        label_names=label_names, source=source, task=task,
        tasks=TASKS, labels=words_list(task.labels), classes=words_list(task.known),
        load_name=repr(load_name),
        data_text=('generated, **synthetic** images: its scores say nothing about skin' if synthetic else 'ISIC 2017'
                   if official else f'`{data_set.get("name")}`' + (
                       ', which is not the whole training set of ISIC 2017' if task.name == ISIC2017.name else
                       f' (labels of {task.title})' * (task.name in TASKS))), official=official,
        crops=arguments.get('crops', 'center'), grey_world=arguments.get('grey_world'),
        lesion_crop=arguments.get('lesion_crop'), squash=arguments.get('aspect') == 'squash',
        has_points=len(thresholds) > 1,
        thresholds={label: float(f'{value:.6g}') for label, value in thresholds.get(point, {}).items()},
        point=task.usual_point if point == 'official' else point,
        splits=[_split(split, results, task) for split in _ordered(results['metrics'])] if results else [],
        runs=max(len(results['run'].get('averaged', ())), 1) if results else 0,
        over=_over(results['metrics']) if results else '', looks=_times(len(results['looks'])) if results else '',
        pictures=[(name, _words_of(name)) for name in pictures or []],
        training=_training(results) if results else '', mix=MIXES[arguments.get('balance', 'none')], sha256=sha256)
    return str(card).rstrip() + '\n'


def _eval_results(results: Dict[str, Any], task: Task) -> List[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification', task_name='skin lesion classification',
            dataset_type=_data_set(split, results['data'])[0], dataset_name=_data_set(split, results['data'])[1],
            dataset_split=split,
            metric_type='roc_auc', metric_name=f'AUC, {label_words(label)}', metric_value=scores[label]['auc'])
        for split, scores in _ordered(results['metrics']).items() for label in task.labels
        if scores[label]['auc'] is not None]


def _ordered(metrics: Dict[str, Any]) -> Dict[str, Any]:
    """The test split first: its images chose nothing."""
    return {split: metrics[split] for split in sorted(metrics, key=lambda split: split != 'test')}


def _data_set(split: str, data: Dict[str, Any]) -> Tuple[str, str]:
    """Id and name of the data set of a split."""
    if data['name'] in DEMO_TASKS:
        return 'synthetic', 'synthetic demo images'
    return ('isic-2017', 'ISIC 2017 Part 3') if split in data['official_splits'] else ('other', data['name'])


def _split(name: str, results: Dict[str, Any], task: Task) -> Dict[str, Any]:
    scores = results['metrics'][name]
    tasks = {label: scores[label] for label in task.labels}
    chosen = any(own.get('operating_points') for own in tasks.values())
    kept = 'the epoch that was kept' if results['run']['arguments']['keep'] == 'best' else ''
    candidates = results['run'].get('candidates', {})  # of make_weights.py
    among = f'this network among {len(candidates)}' if len(candidates) > 1 else ''
    by_validation = ', '.join(filter(None, [among, kept, 'thresholds and calibration' * chosen]))
    alpha_zero = results.get('alpha_zero', {}).get(name)
    groups = [row for row in scores.get('subgroups', ()) if row['auc'] is not None]
    return {
        'title': f'{name.capitalize()}, {tasks[task.labels[0]]["images"]} images of '
                 f'{_data_set(name, results["data"])[1]}'.replace('synthetic', '**synthetic**'),
        'note': f'These images chose {by_validation}: their figures are too good.'
                if name == 'validation' and by_validation else '',
        'scores': scores_table(scores, task), 'points': points_table(scores, task), 'chosen': chosen,
        'calibration': calibration_table(scores, task) if 'calibration' in tasks[task.labels[0]] else '',
        'warnings': [
            f'**The AUC of {label_words(label)} ' + ('is below chance** (0.5)' if t['auc_ci95'][1] < 0.5 else
                                               'cannot be told from chance** (0.5) with these images') + '.'
            for label, t in tasks.items() if t['auc_ci95'] and t['auc_ci95'][0] <= 0.5] + [
            f'**Probabilities of {label_words(label)} are {direction}** here, by {abs(gap):.3f} on average: do not '
            f'read them as risks.' for label, t in tasks.items() if 'mean_probability' in t
            for gap in [t['mean_probability'] - t['positives'] / t['images']]
            for direction in ['too high' if gap > 0 else 'too low'] if abs(gap) > 0.05] + few_images(scores, task),
        'alpha_zero': differences_table(alpha_zero, task, 'groups' in scores) if alpha_zero else '',
        'groups': groups_table(groups) if groups else '', 'group_intervals': group_intervals(scores, task),
        'classes': '\n\n'.join(
            markdown_table(*cells(scores)) for cells in (classes_cells, confusion_cells)
            if 'confusion_matrix' in scores),
    }


def _over(metrics: Dict[str, Any]) -> str:
    """What intervals are over; of the split that is shown first."""
    scores = next(iter(_ordered(metrics).values()))
    return str(scores.get('intervals_over', 'images'))


def _words_of(picture: str) -> str:
    kind, _, split = picture.removesuffix('.png').partition('_')
    return {'roc': f'ROC curves on {split}', 'reliability': f'Reliability curves on {split}',
            'curves': 'Losses and validation AUCs over the epochs', 'alphas': 'The alphas over the epochs'}[kind]


def _training(results: Dict[str, Any]) -> str:
    run = results['run']
    arguments, averaged = run['arguments'], run.get('averaged', [])  # of average_runs.py
    epochs = [str(each['epoch']) for each in averaged] or [str(results['kept_epoch'])]
    trained_at = arguments.get('trained_at', results['img_size'])
    start = (results['base_model'] or arguments.get('init_checkpoint')
             or (arguments.get('pretrained') and arguments.get('model')))
    images = f', {arguments["train_images"]:,} images' if 'train_images' in arguments else ''
    return markdown_table(['', ''], [
        ('data', ', '.join(filter(None, [
            'of a cross-validation, ' + arguments['fold'] if arguments.get('fold') else '',
            'ISIC 2017, the 2,000 training images of the challenge' if 'train' in results['data']['official_splits']
            else f'`{arguments["data"]}`, split train{images}', results['data']['note']]))),
        ('started from', f'`{start}`' if start else 'scratch'),
        *([('lesion masks', f'learned beside the diagnosis, weight {arguments["mask_weight"]}')]
          if arguments.get('mask_weight') and results.get('learned_masks', True) else []),
        *([('groups', f'images of one `{arguments["group_column"]}` are in one split')]
          if arguments.get('group_column') not in (None, NO_GROUPS) else []),
        ('command', f'`{run["command"]}`'),
        *((f'run {each["run"]}', f'`{each["command"]}`, commit {each["commit"] or "unknown"}') for each in averaged),
        *([('weights', 'stored in half precision')] if arguments.get('half') else []),
        *([('learned from', ', '.join(f'`{name}`' for name in arguments['teacher']))]
          if arguments.get('teacher') else []),
        ('recipe', arguments['recipe']),
        ('seed', ', '.join(str(each['seed']) for each in averaged or [arguments])),
        ('image size', f'{results["img_size"]} px' + (
            f'; trained at {trained_at} px' if trained_at != results['img_size'] else '')),
        ('crops', f'{arguments.get("crops")}; their probabilities are averaged'),
        ('commit', parts_of(run, 'commit') or 'unknown'),
        ('versions', ', '.join(f'{key} {value}' for key, value in run['versions'].items())),
        ('device', f'{run["launch"]["processes"]} process(es), '
                   f'{run.get("processor") or run["launch"]["device"]}, mixed precision '
                   f'{run["launch"]["mixed_precision"]}'),
        ('epochs', f'{results["epochs"]}; epoch {" and ".join(epochs)} was kept, ' + (
            f'the best by {selection_words(arguments.get("select") or "mean_auc")} on validation'
            if arguments['keep'] == 'best' else 'the last')),
        *([('chosen among', ', '.join(f'{name} {score:.3f}' for name, score in run['candidates'].items())
            + ', mean AUC on validation')] if len(run.get('candidates', ())) > 1 else []),
        *([('averaged', 'the weights of the runs' + (
            ', with statistics of batch norms measured again' if run.get('statistics_measured') else ''))]
          if len(averaged) > 1 else []),
        *([('temperatures of masks', ', '.join(f'{key.removesuffix(".log_temperature")} {value:.3g}'
                                               for key, value in results['temperatures_of_masks'].items()))]
          if results.get('temperatures_of_masks') else []),
        ('alphas', ', '.join(f'{key.removesuffix(".alpha")} {value:.3g}' for key, value in results['alphas'].items())),
    ])


def _times(count: int) -> str:
    return {0: 'never', 1: 'once', 2: 'twice'}.get(count, f'{count} times')


def registered_config(name: str) -> Dict[str, Any]:
    """What render_card needs for weights that timm hosts.

    Args:
        name: Model and tag.
    """
    cfg = timm.get_pretrained_cfg(name)
    return {'architecture': name.partition('.')[0], 'pretrained_cfg': cfg.to_dict()}


def read_results(folder: Path) -> Optional[Dict[str, Any]]:
    """Content of results.json of a staged folder, or None where it is missing or unreadable."""
    try:
        results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None
