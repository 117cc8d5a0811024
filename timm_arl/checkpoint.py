"""What a user calls a trained network -> the network, and what travels with its weights."""
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, cast

import timm
import torch.nn as nn
from timm.models import get_deprecated_models

from .download import WeightsError, fetch_weights
from .factory import create_for_task, near_names, read_json, source_of, unknown_tag
from .pretrained import OWN_WEIGHTS, described_by, shipped_weights, tag_with_weights

__all__ = ['Checkpoint', 'create_trained']


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
            raise WeightsError(f'No folder {name}, and no model of that name: {near_names(name)}pass the output folder '
                               f'of finetune_isic.py, or a name like {next(iter(OWN_WEIGHTS))}.')
        source, place = ('local-dir', name) if is_path else source_of(name)
        if source is None and '.' not in place and timm.is_model(place):
            place = '.'.join(filter(None, [place, tag_with_weights(place)]))
        self.path = path = Path(place) if source == 'local-dir' else None
        self._on_hub = source == 'hf-hub'
        try:
            self._cfg = None if source else timm.get_pretrained_cfg(get_deprecated_models().get(place, place))
        except RuntimeError:
            raise WeightsError(unknown_tag(place)) from None
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
        return read_json(self._published('config.json'))

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
            Those of task, thresholds, temperatures, biases, crops, grey_world, lesion_crop and aspect that are known.

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
        if any(arguments.get(key) not in (None, value) for key, value in (home.get('shown') or {}).items()):
            home = {}
        home, config = (  # temperatures alone are those of an older version, whose calibration was another
            {k: v for k, v in source.items() if k != 'temperatures' or 'biases' in source} for source in (home, config))
        return {key: source[key] for source, keys in (
            (home, ('thresholds', 'temperatures', 'biases')),
            (config, ('task', 'thresholds', 'temperatures', 'biases')),
            (arguments, ('crops', 'grey_world', 'lesion_crop', 'aspect')))
            for key in keys if source.get(key) is not None}

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
        """Folder with the run.json of finetune_isic.py: that of the weights, or up to three above it; or None.

        Raises:
            WeightsError: A run.json that is damaged.
        """
        for path in dict.fromkeys((self.path.absolute(), self.path.resolve()) if self.path else ()):
            for folder in (path, *path.parents[:3]):
                saved = _read_record(folder / 'run.json').get('arguments')
                if isinstance(saved, dict) and 'train_ids' in saved:  # else another program's
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


def _read_record(path: Optional[Path]) -> Dict[str, Any]:
    """Content of a JSON file that tells how a network was trained, empty where there is none.

    Raises:
        WeightsError: It is damaged or cannot be read: what it says must not be replaced by defaults.
    """
    content = read_json(path)
    if not content and path is not None and path.is_file():
        raise WeightsError(f'{path} is damaged or cannot be read: restore it, or remove it if nothing is lost by that.')
    return content
