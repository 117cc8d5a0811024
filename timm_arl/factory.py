"""A name, a folder or a file -> a network with its weights and what travels with them, or one clear error."""
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, cast

import safetensors
import safetensors.torch
import timm
import torch.nn as nn
from timm.models import get_deprecated_models, parse_model_name

from .download import WeightsError, fetch_weights, is_of_network, plain_http
from .pretrained import (
    LENIENT,
    OWN_WEIGHTS,
    check_file,
    check_finite,
    described_by,
    local_weights,
    misfits,
    only_file,
    pinned_sha256,
    safe_name,
    shipped_weights,
    tag_with_weights,
    tags_of,
)
from .weights_file import load_weights_file, save_network, tensors_sha256

__all__ = [
    'Checkpoint', 'create_for_task', 'create_trained', 'load_weights_file', 'save_network', 'source_of',
    'tensors_sha256',
]


def create_for_task(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model` whose failures are one sentence, and which has weights of any model fetched and verified.

    Args:
        name: Any timm model name, with or without a tag, or one of timm's ``hf-hub:`` and ``local-dir:`` names.
        pretrained: Load the weights of that name, a safetensors file.
        **kwargs: Passed to `timm.create_model`, num_classes among them.

    Raises:
        WeightsError: An unknown model or tag, a model without weights, or weights that could not be loaded, do not fit
            or hold NaN or infinite values.
    """
    asked, overlay = name, dict(kwargs.get('pretrained_cfg_overlay') or {})
    source, place = source_of(name)
    try:
        if source is None:
            name = get_deprecated_models().get(name, name)  # tv_resnet50 has no weights, but is resnet50.tv_in1k
            if not timm.is_model(name):
                raise WeightsError(_unknown(name, _near(name) + "timm.list_models('arl_*') lists the family."))
            try:
                timm.get_pretrained_cfg(name)
            except RuntimeError:  # no such tag
                raise WeightsError(_unknown_tag(name)) from None
            if pretrained:
                kwargs = _with_local_weights(name, kwargs)
        else:
            config = Path(place, 'config.json')
            repo, _, revision = place.partition('@')
            where = dict(cache_dir=kwargs.get('cache_dir'))
            if source == 'hf-hub':  # verified files: timm would take them from the cache, damaged or not
                config = fetch_weights(repo, 'config.json', revision or None, **where)
                overlay.setdefault('hf_hub_id', place)
            if pretrained and overlay.get('state_dict'):
                overlay['source'] = ''
            elif pretrained:
                overlay.update(only_file(
                    check_file(Path(overlay['file'])) if overlay.get('file') else
                    check_file(config.with_name('model.safetensors')) if source == 'local-dir' else
                    fetch_weights(repo, _weights_name(config), config.parent.name, pinned_sha256(repo), **where)))
            if source == 'hf-hub':
                config = described_by(repo, config)
            if config.is_file() and os.access(config, os.R_OK) and 'architecture' not in _read_json(config):
                raise WeightsError(
                    f'{config} does not describe a timm model (it names no architecture): restore it.')
            if LENIENT in (_read_json(config).get('model_args') or {}):  # who loads it decides, not who saved it
                kwargs.setdefault(LENIENT, True)
            name, kwargs = f'local-dir:{config.parent}', {**kwargs, 'pretrained_cfg_overlay': overlay}
        with plain_http():
            model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except WeightsError:
        raise
    except Exception as error:  # HTTP errors differ with huggingface_hub's version; unrelated ones are raised
        usual = (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError)
        odd = (AssertionError, AttributeError, IndexError) if source else ()  # from an unusual config.json
        if not (isinstance(error, usual + odd) or is_of_network(error)):
            raise
        raise WeightsError(f'Model {asked} cannot be created{" with its weights" if pretrained else ""}: '
                           f'{_short(error)}') from None
    if pretrained:
        check_finite(model.state_dict(), asked)
    return model


def _short(error: Exception) -> str:
    """The text of an error on one line; of load_state_dict's, which lists every tensor, the first three."""
    text = ' '.join(str(error).split()) or repr(error)
    if text.startswith('Error(s) in loading state_dict for '):
        keys = [a or b for a, b in re.findall(r'"([^"]+)"|size mismatch for ([^:]+):', text)]
        return f'its config.json and its weights are of different networks: {misfits(keys)}' if keys else text
    return text


def _with_local_weights(name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    variant, _, tag = name.partition('.')
    return local_weights(variant, {**kwargs, **({'pretrained_cfg': tag} if tag else {})})


def _unknown_tag(name: str) -> str:
    variant = name.partition('.')[0]
    return f'No weights {name}: choose {" or ".join(f"{variant}.{tag}" for tag in tags_of(variant)) or variant}.'


def _weights_name(config: Path) -> str:
    """The file of a repo that its config.json names, or the usual one."""
    content = _read_json(config)
    pretrained_cfg = content.get('pretrained_cfg', content)
    return safe_name(pretrained_cfg.get('hf_hub_filename') if isinstance(pretrained_cfg, dict) else None)


def source_of(name: str) -> Tuple[Optional[str], str]:
    """What timm takes a model name for: its source ('hf-hub', 'local-dir' or None) and what it is called there.

    Args:
        name: As timm.create_model takes it.

    Raises:
        WeightsError: Another source, nothing behind it, or a path or repo without one.
    """
    try:
        return parse_model_name(name)
    except ValueError as error:
        raise WeightsError(_unknown(name, f'{error}')) from None


def _unknown(name: str, otherwise: str) -> str:
    return f'Unknown model {name or "(an empty name)"}: ' + (
        f'that is on this disk; a folder that timm reads is named local-dir:{name}.' if name and Path(name).exists()
        else otherwise)


def create_trained(source: str) -> nn.Module:
    """The network of a trained checkpoint, with its weights.

    Args:
        source: As Checkpoint takes it.

    Raises:
        WeightsError: As Checkpoint.network.
    """
    return Checkpoint(source).network()


class Checkpoint:
    """What a name stands for: a folder or file on this disk, a repo on the Hub, or a registered model.

    Attributes:
        name: As it was given.
        path: Folder or file on this disk, or None.
        folder: Folder on this disk with its config.json, or None. Weights that come with this package have one too.
        repo: Repo on the Hub that the weights are from, or None.
        revision: Branch, tag or commit of that repo, or None for main.
    """

    def __init__(self, name: str, paths: bool = True) -> None:
        """
        Args:
            name: Output folder of finetune_isic.py, staged folder, or a file in one; or a timm name: `local-dir:OUT`,
                `hf-hub:user/model@revision`, or a registered model with or without a tag.
            paths: Whether a path without `local-dir:` counts, before a registered model of that name. It does for
                --checkpoint, but not for --model.

        Raises:
            WeightsError: Nothing of that name.
        """
        self.name = name
        is_path = paths and Path(name).exists()
        if paths and not is_path and ':' not in name and not timm.is_model(name):
            raise WeightsError(f'No folder {name}, and no model of that name: {_near(name)}pass the output folder of '
                               f'finetune_isic.py, or a name like {next(iter(OWN_WEIGHTS))}.')
        source, place = ('local-dir', name) if is_path else source_of(name)
        if source is None and '.' not in place and timm.is_model(place):
            place = '.'.join(filter(None, [place, tag_with_weights(place)]))
        self.path = path = Path(place) if source == 'local-dir' else None
        self._on_hub = source == 'hf-hub'
        try:
            self._cfg = None if source else timm.get_pretrained_cfg(get_deprecated_models().get(place, place))
        except RuntimeError:
            raise WeightsError(_unknown_tag(place)) from None
        location = place if self._on_hub else self._cfg and self._cfg.hf_hub_id or ''
        self.repo, _, self.revision = (part or None for part in location.partition('@'))
        if path is None:
            self.folder = shipped_weights(place)
        else:
            self.folder = path.parent if path.is_file() else path

    def network(self) -> nn.Module:
        """The network with its weights.

        Raises:
            WeightsError: A file, or a folder without config.json or weights; else as create_for_task.
        """
        if self.path is None:
            return create_for_task(self.name, pretrained=True)
        if self.path.exists() and not os.access(self.path, os.R_OK):
            raise WeightsError(f'{self.path} cannot be read: permission denied.')
        if (self.path / 'runs.csv').is_file():
            raise WeightsError(f'{self.path} holds several runs: choose one of the folders listed in its runs.csv.')
        missing = [name for name in ('config.json', 'model.safetensors') if not (self.path / name).is_file()]
        if len(missing) == 2 and (self.path / 'run.json').is_file() and not (self.path / 'summary.csv').is_file():
            raise WeightsError(f'The run in {self.path} has no finished epoch yet: go on with it, by finetune_isic.py '
                               f'--resume --output-dir and that folder (of a cross-validation, the folder of all).')
        if self.path.is_dir() and missing:
            raise WeightsError(f'{self.path} holds no {" and no ".join(missing)}: pass the output folder of '
                               f'finetune_isic.py, or the name of a model.')
        if self.path.is_file():
            raise WeightsError(f'{self.path} is a file: pass the folder that holds it, beside its config.json.')
        return create_for_task(f'local-dir:{self.path}', pretrained=True)

    def config(self) -> Dict[str, Any]:
        """Content of the config.json beside the weights; empty where there is none.

        Raises:
            WeightsError: A config.json that could not be loaded from the Hub.
        """
        return _read_json(self._published('config.json'))

    def label_names(self) -> Sequence[str]:
        """What the outputs of the network are called; empty where its config does not tell.

        Raises:
            WeightsError: A config.json that could not be loaded from the Hub.
        """
        if self.path is None and not self._on_hub:
            return self._cfg and self._cfg.label_names or ()
        return self.config().get('label_names') or ()

    def settings(self, unknown: Optional[List[WeightsError]] = None) -> Dict[str, Any]:
        """How the network is to be used: thresholds and calibration, and how its run prepared images.

        Thresholds and calibration are those of config.json or, of a run, those of the home.json beside it, unless
        they were chosen on images that were prepared in another way.

        Args:
            unknown: Where a results.json could not be loaded from the Hub, its error is put here and the rest is
                returned. None: the error is raised.

        Returns:
            Those of task, thresholds, temperatures, biases, doubts (about them), crops, grey_world, lesion_crop and
            aspect that are known.

        Raises:
            WeightsError: A config.json or results.json that could not be loaded from the Hub, or as arguments.
        """
        config = self.config()
        try:
            arguments = self.arguments()
        except WeightsError as error:
            if unknown is None or self.path is not None:  # a damaged file on this disk can be restored
                raise
            arguments = {}
            unknown.append(error)
        home = _read_record(self.folder and self.folder / 'home.json')
        used = {**arguments, 'img_size': (config.get('pretrained_cfg', {}).get('input_size') or [None])[-1]}
        if any(used.get(key) not in (None, value) for key, value in (home.get('shown') or {}).items()):
            home = {}
        home, config = (  # temperatures alone are those of an older version, whose calibration was another
            {k: v for k, v in source.items() if k != 'temperatures' or 'biases' in source} for source in (home, config))
        return {key: source[key] for source, keys in (
            (home, ('thresholds', 'temperatures', 'biases', 'doubts')),
            (config, ('task', 'thresholds', 'temperatures', 'biases')),
            (arguments, ('crops', 'grey_world', 'lesion_crop', 'aspect')))
            for key in keys if source.get(key) is not None}

    def home(self) -> Dict[str, Any]:
        """Statistics of the run's validation images that published weights come with; {} if not available.

        Raises:
            WeightsError: A damaged results.json on this disk.
        """
        try:
            home = _read_record(self._published('results.json')).get('home')
        except WeightsError:
            if self.path is not None:
                raise
            return {}  # an evaluation does not depend on them
        return home if isinstance(home, dict) else {}

    def arguments(self, published: bool = True) -> Dict[str, Any]:
        """Arguments of the run that made the weights; empty where they are not known.

        They are in the run.json of finetune_isic.py, beside the weights or up to three folders above them (OUT,
        OUT/last/kept), or in the results.json of a staged folder or a repo made of one.

        Args:
            published: Whether to look for a results.json too.

        Raises:
            WeightsError: A run.json or results.json that is damaged, or could not be loaded from the Hub; a repo
                without one is no error.
        """
        folder = self.run_folder()
        if folder is not None:
            return _read_record(folder / 'run.json')['arguments']
        try:
            run = _read_record(self._published('results.json') if published else None).get('run')
        except WeightsError as error:
            if not error.missing:
                raise
            return {}
        arguments = run.get('arguments') if isinstance(run, dict) else None
        return arguments if isinstance(arguments, dict) else {}

    def run_folder(self) -> Optional[Path]:
        """Folder with the run.json of finetune_isic.py: that of the weights, or one of the three above it whose run
        trained this architecture; or None.

        Raises:
            WeightsError: A run.json that is damaged.
        """
        architecture = _read_json(self.folder and self.folder / 'config.json').get('architecture')
        for path in dict.fromkeys((self.folder.absolute(), self.folder.resolve()) if self.path and self.folder else ()):
            for folder in (path, *path.parents[:3]):
                saved = _read_record(folder / 'run.json').get('arguments')
                if isinstance(saved, dict) and 'train_ids' in saved and (  # else another program's
                        folder == path or _may_have_trained(saved.get('model'), architecture)):
                    return folder
                if (folder / 'results.json').is_file():  # a staged folder, whatever it lies in
                    break
        return None

    def _published(self, file: str) -> Optional[Path]:
        """A file beside the weights; from the Hub, of the commit that the weights are loaded from."""
        if self.folder is not None or not self._on_hub:
            return self.folder and self.folder / file
        repo = cast(str, self.repo)
        described = described_by(repo, Path(file))
        if described != Path(file):
            return described
        config = fetch_weights(repo, 'config.json', self.revision)
        return config if file == config.name else fetch_weights(repo, file, config.parent.name)


def _read_json(path: Optional[Path]) -> Dict[str, Any]:
    """Content of a JSON file, empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding='utf-8')) if path else None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _read_record(path: Optional[Path]) -> Dict[str, Any]:
    """Content of a JSON file that tells how a network was trained, empty where there is none.

    Raises:
        WeightsError: It is damaged or cannot be read: what it says must not be replaced by defaults.
    """
    content = _read_json(path)
    if not content and path is not None and path.is_file():
        raise WeightsError(f'{path} is damaged or cannot be read: restore it, or remove it if nothing is lost by that.')
    return content


def _may_have_trained(model: Any, architecture: Any) -> bool:
    """Whether a run of --model can have made weights of an architecture; so it can where one is not known."""
    if not (isinstance(model, str) and architecture) or ':' in model:  # a repo or folder, which names no architecture
        return True
    return get_deprecated_models().get(model, model).partition('.')[0] == architecture


def _near(name: str) -> str:
    names = timm.list_models() if '.' not in name else [*timm.list_models(), *timm.list_pretrained()]
    near = difflib.get_close_matches(name, names, n=3)
    return f'did you mean {" or ".join(near)}? ' if near else ''
