"""Finding, checking and loading weights."""
import difflib
from pathlib import Path
from typing import Any, List, Union, cast

import safetensors
import safetensors.torch
import timm
import torch.nn as nn
from timm.models import clean_state_dict

from .arl_cnn import ARLCNN, checkpoint_filter_fn

__all__ = ['WeightsError', 'create_for_task', 'load_weights_file']


class WeightsError(RuntimeError):
    """Weights that cannot be had or do not fit; the message names them, the cause and the remedy."""


def create_for_task(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model` whose failures are one sentence.

    Args:
        name: Any timm model name, with or without a tag, or one of timm's ``hf-hub:`` and ``local-dir:`` names.
        pretrained: Load the weights of that name.
        **kwargs: Passed to `timm.create_model`, num_classes among them.

    Raises:
        WeightsError: An unknown model or tag, a model without weights, or weights that cannot be had.
    """
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise WeightsError(f'Unknown model {name}: ' + (f'did you mean {" or ".join(near)}? ' if near else '')
                           + "timm.list_models('arl_*') lists the family.")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise WeightsError(f'Model {name} cannot be created{" with its weights" if pretrained else ""}: '
                           f'{" ".join(str(error).split())}') from error


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
        raise WeightsError(f'{file} is not a readable safetensors file ({error}): only that format is opened; write '
                           f'others anew with safetensors.torch.save_file.') from error
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


def _check_attention(model: ARLCNN, file: Path) -> None:
    """Refuse weights whose config.json beside them tells of another mask: every tensor would fit, and mean another."""
    config = file.with_name('config.json')
    if not config.is_file():
        return
    saved = create_for_task(f'local-dir:{file.parent}', device='meta')
    if isinstance(saved, ARLCNN) and (saved.attention, saved.mask_scale) != (model.attention, model.mask_scale):
        raise WeightsError(f'{file} was trained with {saved.attention} attention and mask_scale {saved.mask_scale}, '
                           f'not {model.attention} and {model.mask_scale}: choose the model it was saved from.')
