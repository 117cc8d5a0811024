"""A name, a folder or a file -> a network with its weights, or one clear error."""
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union, cast

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, get_deprecated_models, parse_model_name

from .arl_cnn import ARLCNN, checkpoint_filter_fn
from .download import WeightsError, fetch_weights, is_of_network, plain_http
from .pretrained import ANEW, OWN_WEIGHTS, check_file, local_weights, only_file, pinned_sha256, safe_name, tags_of

__all__ = ['create_for_task', 'create_trained', 'load_weights_file', 'source_of', 'tensors_sha256']


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
                overlay.update(only_file(
                    check_file(Path(overlay['file'])) if overlay.get('file') else
                    check_file(config.with_name('model.safetensors')) if source == 'local-dir' else
                    fetch_weights(repo, _weights_name(config), config.parent.name, pinned_sha256(repo), **where)))
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
    tags = tags_of(variant)
    if tag and tags and tag not in tags:
        raise WeightsError(f'No weights {name}: choose {" or ".join(f"{variant}.{each}" for each in tags)}.')
    return local_weights(variant, {**kwargs, **({'pretrained_cfg': tag} if tag else {})})


def _weights_name(config: Path) -> str:
    """The file of a repo that its config.json names, or the usual one."""
    try:
        content = json.loads(config.read_text(encoding='utf-8'))
        return safe_name(content.get('pretrained_cfg', content).get('hf_hub_filename'))
    except (OSError, ValueError, AttributeError):  # which timm will tell
        return safe_name(None)


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
