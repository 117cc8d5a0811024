"""What a finished run and its evaluations say of a network: the content of results.json."""
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..attention import alphas_of, temperatures_of
from ..factory import Checkpoint, tensors_sha256
from ..files import read_rows
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.dataset.sources import CHALLENGE_IDS, ids_digest
from ..isic.selection import kept_row
from ..isic.shift import HOME_FILE, STAGED
from ..isic.task import Task
from ..pretrained import OWN_WEIGHTS

__all__ = ['UNKNOWN_LICENSE', 'HubError', 'brief', 'check_tag', 'evaluated', 'read_object', 'results_of']

UNKNOWN_LICENSE = 'unknown'  # one of the Hub's abbreviations


class HubError(RuntimeError):
    """Staging, pushing or verifying failed; the message says why and what to do."""


def results_of(
        run: Path,
        model: torch.nn.Module,
        record: Dict[str, Any],
        metrics: Dict[str, Any],
        config: Dict[str, Any],
        evaluation: Optional[Path],
        alpha_zero: Optional[Path],
        tag: Optional[str],
        note: str,
        task: Task,
        license: Optional[str],  # noqa: A002
) -> Dict[str, Any]:
    """Content of results.json; adds to that of config.json."""
    averaged = record.get('averaged', [])  # of average_runs.py
    for each in averaged:
        each['command'] = _without_folders(each['command'])
    if len(averaged) > 1:  # which have a summary each
        epochs, kept_epoch, learned_masks = (
            record['arguments']['epochs'], averaged[0]['epoch'], any(each['learned_masks'] for each in averaged))
    else:
        summary = read_rows(run / 'summary.csv')
        kept = kept_row(summary, record['arguments']['keep'], record['arguments'].get('select'))
        epochs, kept_epoch, learned_masks = len(summary), int(kept['epoch']), 'train_mask_loss' in kept
    record['command'] = _without_folders(record['command'])
    record['arguments'] = {key: _without_folder(value) for key, value in record['arguments'].items()}
    official = _official_splits(record['arguments'], run, evaluation)
    tag = check_tag(tag) if tag is not None else _usual_tag(config['architecture'], record['arguments'], official)
    start = record['arguments']['model'] if record['arguments'].get('pretrained') else None
    versions = {'timm_arl': record['versions']['timm_arl'], 'timm': timm.__version__}
    if license is not None and not re.fullmatch('[a-z0-9][a-z0-9.-]*', license):
        raise HubError(f'{license!r} is no licence as the Hub abbreviates it: apache-2.0 and cc-by-nc-4.0 are two.')
    known = 'train' in official or record['arguments']['data'] in DEMO_TASKS
    usual = config['pretrained_cfg'].get('license', 'apache-2.0') if known else UNKNOWN_LICENSE
    config['pretrained_cfg'].update(tag=tag, license=license or usual)
    config.update(
        {f'{name}_version': version for name, version in versions.items()},
        **_operating_points(metrics, task, Checkpoint(str(run)).settings()))
    return {
        'name': f'{config["architecture"]}.{tag}', 'metrics': metrics, 'run': record, 'epochs': epochs,
        'base_model': Checkpoint(start, paths=False).repo if start else None,
        'data': {'name': record['arguments']['data'], 'note': note, 'official_splits': official},
        'kept_epoch': kept_epoch, 'img_size': config['pretrained_cfg']['input_size'][-1],
        'alphas': {key: p.item() for key, p in alphas_of(model).items()}, 'looks': _looks(run),
        'temperatures_of_masks': {key: p.exp().item() for key, p in temperatures_of(model).items()},
        'learned_masks': learned_masks,
        **_home(run),
        **({'alpha_zero': _differences(run, metrics, alpha_zero, task)} if alpha_zero is not None else {}),
    }


def _home(run: Path) -> Dict[str, Any]:
    """What is known of the run's validation images, for the external validation of the weights."""
    path = run / HOME_FILE
    if not path.is_file():  # an older run
        return {}
    record = read_object(path, 'a finished run of finetune_isic.py')
    return {'home': {key: record[key] for key in STAGED}} if set(STAGED) <= record.keys() else {}


def evaluated(run: Path, metrics: Dict[str, Any], evaluation: Path, task: Task) -> Dict[str, Any]:
    """The scores of an evaluation, after checking that it is one of this run."""
    what = 'an output folder of evaluate_isic.py'
    about = read_object(evaluation / 'evaluation.json', what)
    _check_weights(run, about, evaluation)
    if about.get('alpha_zero'):
        raise HubError(f'{evaluation} is an evaluation with every alpha at 0: pass it by --alpha-zero, and one of the '
                       f'network as it was trained by --evaluation.')
    if about.get('duplicates_left_out'):
        raise HubError(f'{evaluation} leaves images out (--drop-duplicates): pass an evaluation of all of them.')
    richer = read_object(evaluation / 'metrics.json', what)
    looks = read_rows(evaluation / 'looks.csv') if (evaluation / 'looks.csv').is_file() else []
    if any('external' in scores for scores in richer.values()) or any(look.get('other_data') for look in looks[-1:]):
        raise HubError(f'{evaluation} is an evaluation on other data than those of {run}: pass one on its own.')
    for split, scores in richer.items():
        probabilities = _predictions(evaluation / f'predictions_{split}.csv', task)
        if split in metrics:
            ours = _predictions(run / f'predictions_{split}.csv', task)
            both = ours.keys() & probabilities.keys()
            if not both or any(abs(a - b) > 2e-3 for key in both for a, b in zip(ours[key], probabilities[key])):
                raise HubError(f'{evaluation} has other predictions on {split} than the run: evaluate {run} again, '
                               f'with the images and crops of its training.')
        for k, label in enumerate(task.labels):
            scores[label]['mean_probability'] = sum(p[k] for p in probabilities.values()) / len(probabilities)
        scores.pop('comparison', None)  # it names files of this disk
    return richer


def _check_weights(run: Path, about: Dict[str, Any], evaluation: Path) -> None:
    if 'tensors_sha256' not in about:
        raise HubError(f'{evaluation} does not say which weights it is of: evaluate {run} again.')
    if about['tensors_sha256'] != tensors_sha256(run / 'model.safetensors'):
        raise HubError(f'{evaluation} is an evaluation of other weights than those of {run}: choose one of {run}.')


def _differences(run: Path, metrics: Dict[str, Any], alpha_zero: Path, task: Task) -> Dict[str, Any]:
    """What setting every alpha to 0 changed, by split and label, on the same images."""
    what = 'an output folder of evaluate_isic.py --alpha-zero --compare'
    theirs = read_object(alpha_zero / 'metrics.json', what)
    found = {split: scores['comparison'] for split, scores in theirs.items() if 'comparison' in scores}
    about = read_object(alpha_zero / 'evaluation.json', what)
    if not found or not about.get('alpha_zero'):
        raise HubError(f'{alpha_zero} is not {what}.')
    _check_weights(run, about, alpha_zero)
    for split, pair in found.items():
        for label in task.labels:
            difference = pair[label]['difference']
            before = metrics.get(split, {}).get(label, {}).get('auc')
            if difference is not None and (
                    before is None or abs(theirs[split][label]['auc'] - before - difference) > 1e-3):
                raise HubError(f'{alpha_zero} was compared with other predictions on {split} than those of this run.')
    return {split: {key: pair[key] for key in (*task.labels, 'mean_auc')} for split, pair in found.items()}


def _usual_tag(architecture: str, arguments: Dict[str, Any], official: List[str]) -> str:
    """Tag for weights from the name of their training images; never that of weights that come with this package."""
    data = _slug(Path(arguments['data']).name.removesuffix('.csv'))
    tag = 'isic2017' if 'train' in official else '-'.join(filter(None, [data, _slug(arguments.get('fold') or '')]))
    if tag == 'isic2017' and 'train' not in official:
        tag = 'isic2017-other'
    if f'{architecture}.{tag}' in OWN_WEIGHTS:
        tag += '-' + _slug(Path(arguments['recipe']).stem)
    if not tag:
        raise HubError(f'The name of the data ({arguments["data"]}) gives no tag for the weights: pass --tag.')
    return tag


def _slug(text: str) -> str:
    return re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')


def check_tag(tag: str) -> str:
    """A tag of weights, as it was given.

    Raises:
        HubError: It cannot be part of the name of a repo.
    """
    try:
        validate_repo_id(f'user/model.{tag}')
        good = bool(tag) and '/' not in tag
    except HFValidationError:
        good = False
    if not good:
        raise HubError(f'{tag!r} cannot be a tag: use letters, digits and - (it becomes part of the name of a repo).')
    return tag


def _operating_points(metrics: Dict[str, Any], task: Task, own: Dict[str, Any]) -> Dict[str, Any]:
    """Thresholds by name and label, temperatures and biases by label: of an evaluation, or else the run's own."""
    tasks = {label: metrics['validation'][label] for label in task.labels}
    names = [point['name'] for point in tasks[task.labels[0]].get('operating_points', ())]
    thresholds = {'official': {label: of['threshold'] for label, of in tasks.items()}}
    for k, name in enumerate(names):
        thresholds[name] = {label: of['operating_points'][k]['threshold'] for label, of in tasks.items()}
    calibration = {name: {label: of['calibration'][key] for label, of in tasks.items() if 'calibration' in of}
                   for name, key in (('temperatures', 'temperature'), ('biases', 'bias'))}
    if not names:
        thresholds.update(own.get('thresholds', {}))
        calibration = {name: own.get(name, {}) for name in calibration}
    return {'thresholds': thresholds, **{name: values for name, values in calibration.items() if values}}


def _official_splits(arguments: Dict[str, Any], run: Path, evaluation: Optional[Path]) -> List[str]:
    """Which splits are the challenge's own, by their image ids. A run that did not record train's: as the others."""
    digests = {}
    for name in ('validation', 'test'):
        for folder in filter(None, (evaluation, run)):
            if (folder / f'predictions_{name}.csv').is_file():
                digests[name] = ids_digest(row['image_id'] for row in read_rows(folder / f'predictions_{name}.csv'))
                break
    official = [name for name, digest in digests.items() if digest == CHALLENGE_IDS[name]]
    train = arguments.get('train_ids', CHALLENGE_IDS['train'] if len(official) == 2 else '')
    whole = not arguments.get('fold') and train == CHALLENGE_IDS['train']
    return ['train', *official] if whole else official


def _predictions(path: Path, task: Task) -> Dict[str, List[float]]:
    try:
        return {row['image_id']: [float(row[label]) for label in task.labels] for row in read_rows(path)}
    except (OSError, KeyError, ValueError) as error:
        raise HubError(f'{path} is missing or unreadable: restore it or evaluate again.') from error


def _looks(run: Path) -> List[Dict[str, str]]:
    """Looks at the run's own test split; those at other data are left out."""
    if not (run / 'looks.csv').is_file():
        return []
    return [{**row, 'checkpoint': Path(row['checkpoint']).name, 'command': _without_folders(row['command'])}
            for row in read_rows(run / 'looks.csv') if not row.pop('other_data', '')]


def _without_folders(command: str) -> str:
    """A command line without the folders of the disk it ran on: paths become names."""
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.partition('=')
        short = _without_folder(word)  # a folder may be called lr=0.01
        words.append(short if short != word else flag + equals + _without_folder(value))
    return shlex.join(words)


def _without_folder(value: Any) -> Any:
    """A value, or list of values, without the folders of the paths in it."""
    if isinstance(value, list):
        names = [_without_folder(each) for each in value]
        return names if len(set(map(str, names))) == len(names) else [  # W/network and V/network
            '/'.join(Path(each).parts[-2:]) if name != each else name for name, each in zip(names, value)]
    if not isinstance(value, str):
        return value
    if value.lower().startswith('local-dir:'):
        return value[:10] + _without_folder(value[10:])
    return Path(value).name if os.path.isabs(value) or value.startswith(('./', '../', '~/')) else value


def brief(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    return f'no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split()) or type(error).__name__


def read_object(path: Path, what: str) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise HubError(f'{path.parent} is not {what}: {path.name} is missing or unreadable.')
