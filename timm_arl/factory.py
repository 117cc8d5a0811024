"""A name, a folder or a file -> a network with its weights, or one clear error."""
import copy
import difflib
import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union, cast

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, get_deprecated_models, parse_model_name, save_for_hf

from .download import WeightsError, fetch_weights, is_of_network, plain_http
from .pretrained import (
    CONVERT,
    GATE_ARGUMENTS,
    check_file,
    check_finite,
    check_fit,
    check_gate_of,
    classifiers_of,
    described_by,
    find_file,
    local_weights,
    misfits,
    only_file,
    pinned_sha256,
    safe_name,
    tags_of,
)

__all__ = [
    'create_for_task', 'load_weights_file', 'near_names', 'read_json', 'save_network', 'source_of', 'tensors_sha256',
    'unknown_tag',
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
                raise WeightsError(_unknown(name, near_names(name) + "timm.list_models('arl_*') lists the family."))
            try:
                timm.get_pretrained_cfg(name)
            except RuntimeError:  # no such tag
                raise WeightsError(unknown_tag(name)) from None
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
            if config.is_file() and os.access(config, os.R_OK) and 'architecture' not in read_json(config):
                raise WeightsError(
                    f'{config} does not describe a timm model (it names no architecture): restore it.')
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


def unknown_tag(name: str) -> str:
    variant = name.partition('.')[0]
    return f'No weights {name}: choose {" or ".join(f"{variant}.{tag}" for tag in tags_of(variant)) or variant}.'


def _weights_name(config: Path) -> str:
    """The file of a repo that its config.json names, or the usual one."""
    content = read_json(config)
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


def read_json(path: Optional[Path]) -> Dict[str, Any]:
    """Content of a JSON file, empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding='utf-8')) if path else None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def near_names(name: str) -> str:
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
        WeightsError: No such file, another format, tensors that do not fit the model or are not finite, or another
            kind of attention.
    """
    file = find_file(Path(path))
    try:
        state_dict = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f'{file} is not a readable safetensors file ({error}), and only those are opened: {CONVERT}.') from None
    check_finite(state_dict, file)
    state_dict = dict(clean_state_dict(state_dict))
    if hasattr(model, 'checkpoint_filter_fn'):  # ours
        state_dict = model.checkpoint_filter_fn(state_dict, model)  # type: ignore[operator]  # no module
    check_gate_of(model, file)

    own = model.state_dict()
    classifiers = classifiers_of(cast(Any, model).pretrained_cfg)
    left = [k for k in own.keys() | state_dict.keys() if k.rpartition('.')[0] in classifiers]
    if all(k in own and k in state_dict and own[k].shape == state_dict[k].shape for k in left):
        left = []
    for key in left:
        state_dict.pop(key, None)
    check_fit(state_dict, model, file, left)
    model.load_state_dict(state_dict, strict=False)
    return sorted(own.keys() & set(left), reverse=True)


def save_network(
        model: Any,
        folder: Union[str, Path],
        label_names: Sequence[str] = (),
        data_config: Optional[Dict[str, Any]] = None,
        task: Optional[Dict[str, Any]] = None,
        **model_args,
) -> None:
    """Write config.json and model.safetensors, which `timm.create_model('local-dir:FOLDER', pretrained=True)` reads.

    Args:
        model: A timm model.
        folder: Where to; made if it does not exist.
        label_names: Names of the outputs.
        data_config: timm's data config of its images, where the model's own says something else.
        task: What config.json tells of the task, beside label_names.
        **model_args: Further arguments of `timm.create_model` that the model was created with.
    """
    keywords: Dict[str, Any] = dict(data_config=data_config)
    if 'data_config' not in inspect.signature(save_for_hf).parameters:  # timm < 1.0.31 writes the architecture's config
        del keywords['data_config']
        model = copy.copy(model)
        model.pretrained_cfg = {**model.pretrained_cfg, 'num_classes': model.num_classes, **(data_config or {})}
        if data_config:
            for key in ('pool_size', 'test_input_size', 'test_pool_size', 'test_crop_pct'):
                model.pretrained_cfg.pop(key, None)
        if hasattr(model, 'mask_scale'):
            model_args = {**{name: getattr(model, name) for name in GATE_ARGUMENTS}, **model_args}
    save_for_hf(model, str(folder), safe_serialization=True, model_args=model_args,
                model_config=dict(label_names=list(label_names), **({'task': task} if task else {})), **keywords)


def tensors_sha256(path: Path) -> str:
    """sha256 of the names, shapes, types and values in a safetensors file, whatever its metadata are.

    Args:
        path: .safetensors file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(path).items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}\n'.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
