"""Model repos as folders, ready to publish: weights, config.json, results.json, pictures and the card."""
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import safetensors.torch
import timm

from ..download import sha256_of
from ..factory import create_trained
from ..files import make_folder, replacing, replacing_folder, write_json
from ..isic.task import Task
from ..pretrained import OWN_WEIGHTS, shipped_weights
from .cards import read_results, registered_config, render_card
from .results import HubError, brief, evaluated, read_object, results_of

__all__ = ['NEEDED', 'PICTURES', 'card', 'card_of_registered', 'pretrained_names', 'stage']

NEEDED = ('README.md', 'config.json', 'model.safetensors', 'results.json')  # in every staged folder
PICTURES = (
    'roc_test.png', 'roc_validation.png', 'reliability_test.png', 'reliability_validation.png', 'curves.png',
    'alphas.png',
)


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

    config.json is what timm reads, with versions, thresholds and calibration.

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
    record, metrics, config = (read_object(run / name, 'a finished run of finetune_isic.py') for name in (
        'run.json', 'metrics.json', 'config.json'))
    model = create_trained(str(run))
    task = Task.of_network(model, config)
    if task is None:
        raise HubError(f'The config.json of {run} does not say what its outputs mean: fine-tune it with '
                       f'finetune_isic.py.')
    try:
        if evaluation is not None:
            metrics = {**metrics, **evaluated(run, metrics, evaluation, task)}
        results = results_of(
            run, model, record, metrics, config, evaluation, alpha_zero, tag, ' '.join(note.split()), task, license)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise HubError(f'{run} or its evaluation is incomplete ({brief(error)}): restore the file or rerun.') from None
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
    config = read_object(folder / 'config.json', 'a staged folder')
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
                       f'({brief(error)}): stage it again.') from None


def pretrained_names() -> List[str]:
    """NAME.TAG of the weights that are registered for the models of this package."""
    return [name for pattern in ('arl_*', 'ran*') for name in timm.list_pretrained(pattern)
            if timm.model_entrypoint(name.partition('.')[0]).__module__.startswith('timm_arl.')]


def card_of_registered(name: str, output: Path, overwrite: bool = False) -> Path:
    """Write the README.md of registered weights; with config.json and results.json for those of this package.

    Args:
        name: Model and tag.
        output: Folder; it is made if it does not exist.
        overwrite: Whether to replace a README.md, config.json or results.json that says something else.

    Raises:
        HubError: No such weights, or files that would be replaced.
    """
    shipped = shipped_weights(name)
    if name not in pretrained_names() or (name in OWN_WEIGHTS and shipped is None):
        raise HubError(f'{name} is neither a staged folder nor NAME.TAG of registered weights: choose '
                       f'{", ".join(pretrained_names())}.')
    config, results, digest = registered_config(name), None, None
    contents = {}
    if shipped is not None:
        config, results = read_object(shipped / 'config.json', 'complete'), read_results(shipped)
        digest = sha256_of(shipped / 'model.safetensors')
        contents = {file: (shipped / file).read_bytes() for file in ('config.json', 'results.json')}
    contents['README.md'] = render_card(name, config, results, digest, name).encode()
    for file, content in contents.items():
        if not overwrite and (output / file).exists() and (output / file).read_bytes() != content:
            raise HubError(f'{output / file} is there already and says something else: choose another folder, or '
                           f'replace it by --overwrite.')
    make_folder(output)
    for file, content in contents.items():
        with replacing(output / file) as temporary:
            temporary.write_bytes(content)
    return output / 'README.md'
