"""A file of weights into a network, and a network into a folder."""
import copy
import hashlib
import inspect
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union, cast

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict, save_for_hf

from .download import WeightsError
from .pretrained import (
    CONVERT,
    GATE_ARGUMENTS,
    LENIENT,
    check_finite,
    check_fit,
    check_gate_of,
    classifiers_of,
    find_file,
)

__all__ = ['load_weights_file', 'save_network', 'tensors_sha256']


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
    if hasattr(model, 'mask_scale'):  # which timm knows of models that its create_model made
        model_args = {**{name: getattr(model, name) for name in GATE_ARGUMENTS}, **model_args}
    if hasattr(model, '_model_args') and LENIENT in model._model_args:  # of that loading, not of the network
        model = copy.copy(model)
        model._model_args = {key: value for key, value in model._model_args.items() if key != LENIENT}
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
