"""Finding, checking and loading weights."""
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union, cast

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, get_deprecated_models, parse_model_name, resolve_pretrained_cfg

from .download import WeightsError, fetch_weights, is_whole, say, sha256_of
from .hub_errors import LOCAL_FILE, is_of_network, plain_http

__all__ = [
    'HUB', 'WeightsError', 'create_for_task', 'create_trained', 'fetch_weights', 'load_weights_file', 'local_weights',
    'sha256_of', 'shipped_weights', 'source_of', 'tensors_sha256',
]

HUB = os.environ.get('TIMM_ARL_HUB') or 'timm-arl'  # whose repos on the Hub this project's own are
# sha256 of model.safetensors in them: other content is refused, whoever has the name there
OWN_WEIGHTS = {
    'arl_cnn14.isic2017': '3dbce88df54dd412c145ce1a0a288c4b7cc6b08d0451430e924cef027d5bb9a1',
}
ANEW = 'write the weights anew with safetensors.torch.save_file'


def create_for_task(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model` whose failures are one sentence, and which has weights of any model fetched and verified.

    Args:
        name: Any timm model name, with or without a tag, or one of timm's ``hf-hub:`` and ``local-dir:`` names.
        pretrained: Load the weights of that name, a safetensors file.
        **kwargs: Passed to `timm.create_model`, num_classes among them.

    Raises:
        WeightsError: An unknown model or tag, a model without weights, or weights that cannot be had.
    """
    asked, overlay = name, dict(kwargs.get('pretrained_cfg_overlay') or {})
    source, place = source_of(name)
    try:
        if source is None:
            name = get_deprecated_models().get(name, name)  # tv_resnet50 has no weights, but is resnet50.tv_in1k
            if not timm.is_model(name):
                raise WeightsError(_unknown(name, _near(name) + "timm.list_models('arl_*') lists the family."))
            if pretrained:
                kwargs = _with_local_weights(name, kwargs)
        else:
            config = Path(place, 'config.json')
            repo, _, revision = place.partition('@')
            where = dict(cache_dir=kwargs.get('cache_dir'))
            if source == 'hf-hub':  # verified files: timm would take them from the cache, whole or not
                config = fetch_weights(repo, 'config.json', revision or None, **where)
                overlay.setdefault('hf_hub_id', place)
            if pretrained and overlay.get('state_dict'):
                overlay['source'] = ''
            elif pretrained:
                overlay.update(_only(
                    _check_file(Path(overlay['file'])) if overlay.get('file') else
                    _check_file(config.with_name('model.safetensors')) if source == 'local-dir' else
                    fetch_weights(repo, _weights_name(config), config.parent.name, _pinned(repo), **where)))
            name, kwargs = f'local-dir:{config.parent}', {**kwargs, 'pretrained_cfg_overlay': overlay}
        with plain_http():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except WeightsError:
        raise
    except Exception as error:  # of an HTTP library that depends on huggingface_hub's version; others go on
        usual = (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError)
        odd = (AssertionError, AttributeError, IndexError) if source else ()  # of a config.json that holds other things
        if not (isinstance(error, usual + odd) or is_of_network(error)):
            raise
        raise WeightsError(f'Model {asked} cannot be created{" with its weights" if pretrained else ""}: '
                           f'{" ".join(str(error).split()) or repr(error)}') from error


def _with_local_weights(name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    variant, _, tag = name.partition('.')
    tags = _tags(variant)
    if tag and tags and tag not in tags:
        raise WeightsError(f'No weights {name}: choose {" or ".join(f"{variant}.{each}" for each in tags)}.')
    return local_weights(variant, {**kwargs, **({'pretrained_cfg': tag} if tag else {})})


def _weights_name(config: Path) -> str:
    """The file of a repo that its config.json names, or the usual one."""
    try:
        content = json.loads(config.read_text(encoding='utf-8'))
        return _safe_name(content.get('pretrained_cfg', content).get('hf_hub_filename'))
    except (OSError, ValueError, AttributeError):  # which timm will tell
        return _safe_name(None)


def _safe_name(file: Optional[str]) -> str:
    return 'model.safetensors' if file in (None, '', 'pytorch_model.bin') else str(file)  # as timm has it


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
        raise WeightsError(_unknown(name, f'{error}')) from error


def _unknown(name: str, otherwise: str) -> str:
    return f'Unknown model {name or "(an empty name)"}: ' + (
        f'that is on this disk; a folder that timm reads is named local-dir:{name}.' if name and Path(name).exists()
        else otherwise)


def create_trained(source: str) -> nn.Module:
    """The network of an output folder of finetune_isic.py, or of a timm name, with its weights.

    Args:
        source: Folder with config.json and model.safetensors, or what create_for_task takes.

    Raises:
        WeightsError: Neither, or as create_for_task.
    """
    folder = Path(source)
    if (folder / 'runs.csv').is_file():
        raise WeightsError(f'{source} holds several runs: choose one of the folders in it that runs.csv names.')
    missing = [name for name in ('config.json', 'model.safetensors') if not (folder / name).is_file()]
    if folder.is_dir() and missing:
        raise WeightsError(f'{source} holds no {" and no ".join(missing)}: pass the output folder of finetune_isic.py, '
                           f'or the name of a model.')
    if folder.is_file():
        raise WeightsError(f'{source} is a file: pass the folder that holds it, beside its config.json.')
    if not folder.is_dir() and ':' not in source and not timm.is_model(source):
        raise WeightsError(f'No folder {source}, and no model of that name: {_near(source)}pass the output folder of '
                           f'finetune_isic.py, or a name like {next(iter(OWN_WEIGHTS))}.')
    return create_for_task(f'local-dir:{folder}' if folder.is_dir() else source, pretrained=True)


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f'did you mean {" or ".join(near)}? ' if near else ''


def _tags(variant: str) -> List[str]:
    return [name.partition('.')[2] for name in timm.list_pretrained(f'{variant}.*')]


def load_weights_file(model: nn.Module, path: Union[str, Path]) -> List[str]:
    """Load a safetensors file, or the model.safetensors of a folder, into a model.

    A ResNet checkpoint fits an ARL-CNN of the same depth, whose alphas it leaves as they are. Apart from that and from
    a classifier of another size, which is left as it is too, every tensor must find its place.

    Args:
        model: A timm model.
        path: A .safetensors file, or a folder that holds model.safetensors.

    Returns:
        Names of the parameters that were left as they are: the classifier's, or none.

    Raises:
        WeightsError: No such file, another format, tensors that do not fit the model, or another kind of attention.
    """
    from .arl_cnn import ARLCNN, checkpoint_filter_fn  # which fetches its weights by this module
    path = Path(path)
    file = path / 'model.safetensors' if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f'No weights at {file}: pass a .safetensors file or a folder that holds model.safetensors.')
    try:
        state_dict = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f'{file} is not a readable safetensors file ({error}), and only those are opened: {ANEW}.') from error
    state_dict = dict(clean_state_dict(state_dict))
    if isinstance(model, ARLCNN):
        state_dict = checkpoint_filter_fn(state_dict, model)
        _check_attention(model, file)

    own = model.state_dict()
    classifiers = cast(Any, model).pretrained_cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    left = [k for k in own.keys() | state_dict.keys() if k.rpartition('.')[0] in classifiers]
    if all(k in own and k in state_dict and own[k].shape == state_dict[k].shape for k in left):
        left = []
    for key in left:
        state_dict.pop(key, None)
    wrong = [k for k in own.keys() ^ state_dict.keys() if k not in left]
    wrong += [k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape]
    if wrong:
        raise WeightsError(f'{file} does not fit {type(model).__name__}: {len(wrong)} tensors are missing, unexpected '
                           f'or of another shape, {sorted(wrong)[0]} among them; choose the model it was saved from.')
    model.load_state_dict(state_dict, strict=False)
    return sorted(own.keys() & set(left), reverse=True)


def _check_attention(model: Any, file: Path) -> None:
    """Refuse weights whose config.json beside them tells of another mask: every tensor would fit, and mean another."""
    config = file.with_name('config.json')
    if not config.is_file():
        return
    saved = create_for_task(f'local-dir:{file.parent}', device='meta')
    kind = getattr(saved, 'attention', None), getattr(saved, 'mask_scale', None)
    if isinstance(saved, type(model)) and kind != (model.attention, model.mask_scale):
        raise WeightsError(f'{file} was trained with {kind[0]} attention and mask_scale {kind[1]}, not '
                           f'{model.attention} and {model.mask_scale}: choose the model it was saved from.')


def tensors_sha256(path: Path) -> str:
    """Digest of the names, shapes, types and values in a safetensors file, whatever its metadata are.

    Args:
        path: .safetensors file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(path).items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}\n'.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def local_weights(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Keyword arguments of a timm entry point, with weights of the Hub replaced by their verified file on this disk.

    Args:
        variant: Model name.
        kwargs: What the entry point was called with, pretrained=True apart.

    Raises:
        WeightsError: No such weights, a file that cannot be read, or as fetch_weights.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    tags = _tags(variant)
    if not cfg.has_weights and not cfg.state_dict:
        raise WeightsError(f'No pretrained weights exist for {variant}' + (
            f' without a tag: choose {" or ".join(f"{variant}.{tag}" for tag in tags)}.' if tags else
            f': leave pretrained out, or {LOCAL_FILE}.'))
    by_config = cfg.source in ('hf-hub', 'local-dir')  # a config.json, whose own file and state_dict count for nothing
    if overlay.get('state_dict') if by_config else cfg.state_dict:
        return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'source': ''}}
    file = overlay.get('file') if by_config else cfg.file
    if file or cfg.source == 'local-dir':
        path = _check_file(Path(file or Path(cfg.file, 'model.safetensors')))
        return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **_only(path)}}
    if not cfg.hf_hub_id:
        raise WeightsError(f'The weights of {variant} are a pickle at {cfg.url}, and only safetensors are opened: '
                           f'{ANEW}, and {LOCAL_FILE}.')
    repo, _, revision = cfg.hf_hub_id.partition('@')
    name = f'{variant}.{cfg.tag}'
    own = cfg.source != 'hf-hub' and repo == f'{HUB}/{name}'  # the registered weights, not a repo that was asked for
    sha256 = OWN_WEIGHTS.get(name) if own else _pinned(repo)
    shipped = shipped_weights(name) if own else None
    if shipped is not None and is_whole(shipped / 'model.safetensors', sha256):
        path = shipped / 'model.safetensors'
    else:
        if shipped is not None:
            say(f'{shipped / "model.safetensors"} is damaged: asking the Hub for it.')
        path = fetch_weights(repo, _safe_name(cfg.hf_hub_filename), revision or None, sha256, kwargs.get('cache_dir'))
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **_only(path)}}


def _only(path: Path) -> Dict[str, Any]:
    """What has timm load this file, whatever else a config names."""
    return {'file': str(path), 'source': '', 'state_dict': None}


def _pinned(repo: str) -> Optional[str]:
    return OWN_WEIGHTS.get(repo.removeprefix('timm-arl/'))


def _check_file(path: Path) -> Path:
    path = path / 'model.safetensors' if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f'No weights at {path}: pass a .safetensors file, or a folder that holds model.safetensors.')
    if path.suffix != '.safetensors':  # which timm would open as a pickle
        raise WeightsError(f'{path} is no .safetensors file, and only those are opened: {ANEW}.')
    try:
        with safetensors.safe_open(path, 'pt'):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f'{path} is not a readable safetensors file ({error}): fetch or write it anew.') from error
    return path


def shipped_weights(name: str) -> Optional[Path]:
    """Folder of weights that came with this package, a model repo with its results, or None.

    Args:
        name: Model and tag.
    """
    folder = Path(__file__).with_name('weights') / name
    return folder if name in OWN_WEIGHTS and (folder / 'model.safetensors').is_file() else None
