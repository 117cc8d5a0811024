"""Model repos as folders, ready to publish: weights, config.json, results.json, pictures and the card."""
import hashlib
import json
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import safetensors.torch
import timm
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..attention import alphas_of, temperatures_of
from ..download import sha256_of
from ..factory import Checkpoint, create_trained, tensors_sha256
from ..files import make_folder, read_rows, replacing, replacing_folder, write_json
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.dataset.sources import CHALLENGE_IDS, ids_digest
from ..isic.selection import selection_column
from ..isic.task import TASKS, Task
from ..pretrained import OWN_WEIGHTS, shipped_weights
from .cards import read_results, registered_config, render_card

__all__ = ['NEEDED', 'PICTURES', 'UNKNOWN_LICENSE', 'HubError', 'card', 'card_of_registered', 'stage']

NEEDED = ('README.md', 'config.json', 'model.safetensors', 'results.json')  # in every staged folder
PICTURES = (
    'roc_test.png', 'roc_validation.png', 'reliability_test.png', 'reliability_validation.png', 'curves.png',
    'alphas.png',
)


UNKNOWN_LICENSE = 'unknown'  # one of the Hub's abbreviations


class HubError(RuntimeError):
    """Staging, pushing or verifying failed; the message says why and what to do."""


def stage(
        run: Union[str, Path],
        target: Path,
        evaluation: Optional[Path] = None,
        tag: Optional[str] = None,
        note: str = '',
        alpha_zero: Optional[Path] = None,
        overwrite: bool = False,
        license: Optional[str] = None,  # noqa: A002  # as the Hub calls it
) -> Path:
    """Build a model repo from a finished run: config.json, model.safetensors, results.json, pictures, README.md.

    config.json is what timm reads, with versions, thresholds and, after an evaluation, temperatures.

    Args:
        run: Output folder of finetune_isic.py; or the name of weights that come with this package.
        target: Folder to make; one that was staged before is replaced, unless its card was edited.
        evaluation: Output folder of evaluate_isic.py on that run, for its richer scores and its pictures.
        tag: Tag of the weights. By default the name of the training images: isic2017 for the challenge's, demo for
            synthetic ones, else the name of the data. Names of weights that come with this package are reserved.
        note: What the card should say about the images, their size for example.
        alpha_zero: Output folder of evaluate_isic.py with --alpha-zero and --compare, for the differences.
        overwrite: Replace a card that was edited, too.
        license: Of the weights, as the Hub abbreviates it. By default that of the architecture for the data sets that
            this package knows, else 'unknown': that of a clinic's weights is the clinic's to say.

    Returns:
        target.

    Raises:
        HubError: An unfinished run, an evaluation of something else, a tag or licence that no Hub accepts, or a target
            with other files or an edited card.
        WeightsError: Weights that do not fit their config.
    """
    if target.exists() and not (target.is_dir() and {path.name for path in target.iterdir()} <= {*NEEDED, *PICTURES}):
        raise HubError(f'{target} exists and holds files that this command did not write: choose another folder.')
    if (target / 'README.md').exists() and not overwrite and _edited(target):
        raise HubError(f'{target / "README.md"} was edited, or written by another version: choose another folder, or '
                       f'pass --overwrite to lose it.')
    shipped = None if Path(run).is_dir() else shipped_weights(str(run))
    if shipped is not None:
        if evaluation or tag or note or alpha_zero or license:
            raise HubError(f'{run} comes with the package and its results: leave out --evaluation, --alpha-zero, '
                           f'--tag, --note and --license.')
        if sha256_of(shipped / 'model.safetensors') != OWN_WEIGHTS[str(run)]:
            raise HubError(f'{shipped / "model.safetensors"} is damaged: install the package again.')
        return _replace_folder(target, partial(shutil.copytree, shipped, dirs_exist_ok=True))
    run = Path(run)
    if not run.is_dir():
        raise HubError(f'No folder {run}, and no weights of that name in this package (it has '
                       f'{", ".join(OWN_WEIGHTS)}): pass the output folder of finetune_isic.py.')
    if (run / 'runs.csv').is_file():
        raise HubError(f'{run} holds several runs: choose one of the folders listed in its runs.csv.')
    record, metrics, config = (_read(run / name, 'a finished run of finetune_isic.py') for name in (
        'run.json', 'metrics.json', 'config.json'))
    model = create_trained(str(run))
    task = Task.of_network(model, config)
    if task is None:
        raise HubError(f'The config.json of {run} does not say what its outputs mean: fine-tune it with '
                       f'finetune_isic.py.')
    try:
        if evaluation is not None:
            metrics = {**metrics, **_evaluated(run, metrics, evaluation, task)}
        results = _results(
            run, model, record, metrics, config, evaluation, alpha_zero, tag, ' '.join(note.split()), task, license)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise HubError(f'{run} or its evaluation is incomplete ({_brief(error)}): restore the file or rerun.') from None
    versions = {key: config[f'{key}_version'] for key in ('timm_arl', 'timm')}
    stored = safetensors.torch.load_file(run / 'model.safetensors')  # in half precision, it may be
    tensors = {key: t.to(stored[key].dtype) if key in stored else t for key, t in model.state_dict().items()}
    weights = _safetensors(tensors, {'format': 'pt', 'name': results['name'], **versions})
    digest = hashlib.sha256(weights).hexdigest()
    if OWN_WEIGHTS.get(results['name'], digest) != digest:
        raise HubError(f'{results["name"]} is the name of weights that come with this package: choose another --tag.')

    def write(new: Path) -> None:
        (new / 'model.safetensors').write_bytes(weights)
        write_json(new / 'config.json', config)
        write_json(new / 'results.json', results)
        for name in PICTURES:
            if evaluation is not None and (evaluation / name).is_file():
                shutil.copyfile(evaluation / name, new / name)
    return _replace_folder(target, write)


def _results(
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
        column = selection_column(record['arguments'].get('select') or 'mean_auc')
        kept = (max(summary, key=lambda row: float(row[column])) if record['arguments']['keep'] == 'best' else
                summary[-1])
        epochs, kept_epoch, learned_masks = len(summary), int(kept['epoch']), 'train_mask_loss' in kept
    record['command'] = _without_folders(record['command'])
    record['arguments'] = {key: _without_folder(value) for key, value in record['arguments'].items()}
    official = _official_splits(record['arguments'], run, evaluation)
    tag = _check_tag(tag) if tag is not None else _usual_tag(config['architecture'], record['arguments'], official)
    start = record['arguments']['model'] if record['arguments'].get('pretrained') else None
    versions = {'timm_arl': record['versions']['timm_arl'], 'timm': timm.__version__}
    if license is not None and not re.fullmatch('[a-z0-9][a-z0-9.-]*', license):
        raise HubError(f'{license!r} is no licence as the Hub abbreviates it: apache-2.0 and cc-by-nc-4.0 are two.')
    known = {*TASKS, *DEMO_TASKS} & {task.name, record['arguments']['data']}
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
        **({'alpha_zero': _differences(run, metrics, alpha_zero, task)} if alpha_zero is not None else {}),
    }


def _safetensors(state_dict: Dict[str, Any], metadata: Dict[str, str]) -> bytes:
    """A file of the same bytes each time, so that a second push sends nothing: safetensors shuffles the metadata."""
    content = safetensors.torch.save({key: value.contiguous() for key, value in state_dict.items()}, metadata)
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size)
    return len(text).to_bytes(8, 'little') + text + content[8 + size:]


def _replace_folder(target: Path, write: Callable[[Path], Any]) -> Path:
    """Replace `target` by a folder that `write` fills, with its card."""
    with replacing_folder(target) as new:
        write(new)
        card(new, target.resolve().name)
    return target


def card(folder: Path, called: str = '') -> Path:
    """Write the README.md of a staged folder, from its config.json and results.json.

    Args:
        folder: Staged.
        called: Name that the folder will have, if it is not its present one.

    Raises:
        HubError: Not a staged folder.
    """
    text = _card_text(folder, called)
    with replacing(folder / 'README.md') as temporary:
        temporary.write_text(text, encoding='utf-8')
    return folder / 'README.md'


def _edited(folder: Path) -> bool:
    """Whether the README.md of a folder is another than this version writes."""
    try:
        return (folder / 'README.md').read_bytes() != _card_text(folder).encode()
    except (HubError, OSError):  # it cannot be known
        return True


def _card_text(folder: Path, called: str = '') -> str:
    config = _read(folder / 'config.json', 'a staged folder')
    results = read_results(folder)
    if results is None:
        raise HubError(f'{folder} has no results.json: stage it first.')
    name = str(results.get('name'))
    digest = sha256_of(folder / 'model.safetensors')
    try:
        return render_card(
            name, config, results, digest,
            name if OWN_WEIGHTS.get(name) == digest else f'local-dir:{called or folder.resolve().name}',
            [picture for picture in PICTURES if (folder / picture).is_file()])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HubError(f'results.json or config.json of {called or folder} is incomplete or of another version '
                       f'({_brief(error)}): stage it again.') from None


def card_of_registered(name: str, output: Path) -> Path:
    """Write the README.md of registered weights; with config.json and results.json for those of this package.

    Args:
        name: Model and tag.
        output: Folder; it is made if it does not exist.

    Raises:
        HubError: No such weights.
    """
    shipped = shipped_weights(name)
    if name not in timm.list_pretrained('arl_*') or (name in OWN_WEIGHTS and shipped is None):
        raise HubError(f'{name} is neither a staged folder nor NAME.TAG of registered weights '
                       f"(timm.list_pretrained('arl_*') lists them).")
    make_folder(output)
    config, results, digest = registered_config(name), None, None
    if shipped is not None:
        config, results = _read(shipped / 'config.json', 'complete'), read_results(shipped)
        digest = sha256_of(shipped / 'model.safetensors')
        for file in ('config.json', 'results.json'):
            shutil.copyfile(shipped / file, output / file)
    with replacing(output / 'README.md') as temporary:
        temporary.write_text(render_card(name, config, results, digest, name), encoding='utf-8')
    return output / 'README.md'


def _evaluated(run: Path, metrics: Dict[str, Any], evaluation: Path, task: Task) -> Dict[str, Any]:
    """The scores of an evaluation, after checking that it is one of this run."""
    what = 'an output folder of evaluate_isic.py'
    about = _read(evaluation / 'evaluation.json', what)
    _check_weights(run, about, evaluation)
    if about.get('alpha_zero'):
        raise HubError(f'{evaluation} is an evaluation with every alpha at 0: pass it by --alpha-zero, and one of the '
                       f'network as it was trained by --evaluation.')
    richer = _read(evaluation / 'metrics.json', what)
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
    theirs = _read(alpha_zero / 'metrics.json', what)
    found = {split: scores['comparison'] for split, scores in theirs.items() if 'comparison' in scores}
    about = _read(alpha_zero / 'evaluation.json', what)
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


def _check_tag(tag: str) -> str:
    try:
        validate_repo_id(f'user/model.{tag}')
        good = bool(tag) and '/' not in tag
    except HFValidationError:
        good = False
    if not good:
        raise HubError(f'{tag!r} cannot be a tag: use letters, digits and - (it becomes part of the name of a repo).')
    return tag


def _operating_points(metrics: Dict[str, Any], task: Task, own: Dict[str, Any]) -> Dict[str, Any]:
    """Thresholds by name and label, and temperatures by label, of an evaluation or else of the run's own settings."""
    tasks = {label: metrics['validation'][label] for label in task.labels}
    names = [point['name'] for point in tasks[task.labels[0]].get('operating_points', ())]
    thresholds = {'official': {label: of['threshold'] for label, of in tasks.items()}}
    for k, name in enumerate(names):
        thresholds[name] = {label: of['operating_points'][k]['threshold'] for label, of in tasks.items()}
    temperatures = {label: of['calibration']['temperature'] for label, of in tasks.items() if 'calibration' in of}
    if not names:
        thresholds.update(own.get('thresholds', {}))
        temperatures = own.get('temperatures', {})
    return {'thresholds': thresholds, **({'temperatures': temperatures} if temperatures else {})}


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
    words = (word.rpartition('=') for word in shlex.split(command))
    return shlex.join(flag + equals + _without_folder(value) for flag, equals, value in words)


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


def _brief(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    return f'no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split()) or type(error).__name__


def _read(path: Path, what: str) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise HubError(f'{path.parent} is not {what}: {path.name} is missing or unreadable.')


