"""A registered name -> a verified weights file on this disk; and whether its tensors fit a model."""
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Optional, Tuple, Union

import safetensors
import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, clean_state_dict, resolve_pretrained_cfg

from .download import LOCAL_FILE, WeightsError, fetch_weights, is_whole, say

__all__ = [
    'GATE_ARGUMENTS', 'HUB', 'LENIENT', 'OWN_WEIGHTS', 'build_with_local_weights', 'check_file', 'check_finite',
    'check_fit', 'check_gate_of', 'check_loadable', 'classifiers_of', 'described_by', 'find_file', 'local_weights',
    'only_file', 'pinned_sha256', 'safe_name', 'shipped_weights', 'tag_with_weights', 'tags_of',
]

HUB = os.environ.get('TIMM_ARL_HUB') or 'timm-arl'  # user or organisation of this project's repos on the Hub
# sha256 of model.safetensors in them: other content is refused, whoever owns the name there
OWN_WEIGHTS = {
    'arl_cnn14.isic2017': 'e78a58f5034b9c47ca1574561470a3454cef1f47788064d30dc7433f82982f81',
    'arl_tf_efficientnet_lite0.isic2017': '12353ebfe71f7655e2e1a6069529dd876ed3d63850748595ad4add7401c72ad9',
}
LENIENT = 'pretrained_strict'  # false: timm leaves what does not fit
# what tells apart networks with the same tensors, and last, what changes the tensors
GATE_ARGUMENTS = ('attention', 'mask_scale', 'mask_temperature', 'learn_temperature')
CONVERT = 'save the weights again with safetensors.torch.save_file'


def safe_name(file: Optional[str]) -> str:
    file = file or 'pytorch_model.bin'
    return 'model.safetensors' if file == 'pytorch_model.bin' else re.sub(r'\.bin$', '.safetensors', file)  # as timm


def tags_of(variant: str) -> List[str]:
    return [name.partition('.')[2] for name in timm.list_pretrained(f'{variant}.*')]


def tag_with_weights(variant: str) -> str:
    """The tag that pretrained=True means where a name has none and the default one has no weights, or ''."""
    cfg = timm.get_pretrained_cfg(variant, allow_unregistered=True)
    tags = tags_of(variant)
    return tags[0] if cfg is not None and not cfg.has_weights and tags else ''


def local_weights(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Keyword arguments of a timm entry point, with weights of the Hub replaced by their verified file on this disk.

    A local file also says how many classes its classifier has, unless the caller does: timm would drop the classifier
    where that differs from the config of the model.

    Args:
        variant: Model name.
        kwargs: What the entry point was called with, without pretrained=True.

    Raises:
        WeightsError: No such weights, a file that cannot be read, or as fetch_weights.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    default = timm.get_pretrained_cfg(variant, allow_unregistered=True)
    # timm's scripts fill in the default's config where a name has no tag
    tagged = kwargs.get('pretrained_cfg') and not (default and kwargs['pretrained_cfg'] == default.to_dict())
    if not tagged and not {'file', 'url', 'hf_hub_id', 'state_dict'} & overlay.keys():
        kwargs = {**kwargs, 'pretrained_cfg': tag_with_weights(variant) or None}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if not cfg.has_weights and not cfg.state_dict:
        tags = ' or '.join(f'{variant}.{tag}' for tag in tags_of(variant))
        raise WeightsError(f'No pretrained weights exist for {variant}' + (
            f'.{cfg.tag}: choose {tags}.' if tags else f': leave pretrained out, or {LOCAL_FILE}.'))
    by_config = cfg.source in ('hf-hub', 'local-dir')  # a config.json, whose own file and state_dict are ignored
    given = overlay.get('state_dict') if by_config else cfg.state_dict
    if given:
        classes = _num_classes(given, replace(cfg, state_dict=None).to_dict())
        return {**kwargs, 'pretrained_cfg_overlay': {**classes, **overlay, 'source': ''}}
    file = overlay.get('file') if by_config else cfg.file
    if file or cfg.source == 'local-dir':
        path = check_file(Path(file or Path(cfg.file, 'model.safetensors')))
        classes = _num_classes(path, cfg.to_dict()) if overlay.get('file') else {}
        return {**kwargs, 'pretrained_cfg_overlay': {**classes, **overlay, **only_file(path)}}
    if not cfg.hf_hub_id and str(cfg.url).endswith('.safetensors'):
        raise WeightsError(f'Weights at a URL are not loaded ({cfg.url}): download them, and {LOCAL_FILE}.')
    if not cfg.hf_hub_id:
        raise WeightsError(f'The weights of {variant} are a pickle at {cfg.url}, and only safetensors are opened: '
                           f'{CONVERT}, and {LOCAL_FILE}.')
    repo, _, revision = cfg.hf_hub_id.partition('@')
    name = f'{variant}.{cfg.tag}'
    own = cfg.source != 'hf-hub' and repo == f'{HUB}/{name}'  # the registered weights, not a repo given by name
    sha256 = OWN_WEIGHTS.get(name) if own else pinned_sha256(repo)
    shipped = shipped_weights(name) if own else None
    if shipped is not None and is_whole(shipped / 'model.safetensors', sha256):
        path = shipped / 'model.safetensors'
    else:
        if shipped is not None:
            say(f'{shipped / "model.safetensors"} is damaged: loading it from the Hub.')
        path = fetch_weights(repo, safe_name(cfg.hf_hub_filename), revision or None, sha256, kwargs.get('cache_dir'))
    if cfg.source == 'hf-hub':
        _check_described(repo, path.with_name('config.json'))
    classes = {} if by_config else _num_classes(path, cfg.to_dict())
    return {**kwargs, 'pretrained_cfg_overlay': {**classes, **overlay, **only_file(path)}}


def build_with_local_weights(
        model_cls: Callable[..., Any],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[[Dict[str, torch.Tensor], nn.Module], Dict[str, torch.Tensor]],
        **kwargs,
) -> Any:
    """timm's build_model_with_cfg with verified weights, all of which must fit.

    Args:
        model_cls: Class of the model.
        variant: Model name.
        pretrained: Whether to load weights.
        filter_fn: Completes a checkpoint of the base network.
        **kwargs: Of build_model_with_cfg.

    Raises:
        WeightsError: As local_weights, or weights that do not fit.
    """
    features_only = bool(kwargs.get('features_only'))  # timm then drops a classifier, and needs none

    def checked(state_dict, model):
        state_dict = filter_fn(state_dict, model)
        # with another number of classes timm would skip what does not fit
        check_loadable(state_dict, model, features_only)
        return state_dict

    first_conv = ''
    if pretrained:
        kwargs = local_weights(variant, kwargs)
        overlay = kwargs['pretrained_cfg_overlay']
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        weights = cfg.state_dict or overlay.get('file')
        if weights and kwargs.get('in_chans', cfg.input_size[0]) == _channels(weights, cfg.first_conv) != 3:
            first_conv = cfg.first_conv  # hidden, or timm adapts it as if it were for 3 channels
            kwargs = {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'first_conv': None}}
    model = build_model_with_cfg(
        model_cls, variant, pretrained,
        pretrained_filter_fn=checked if kwargs.get(LENIENT, True) else filter_fn, **kwargs)
    if first_conv:
        model.pretrained_cfg['first_conv'] = first_conv
        getattr(model, '_traits', {})['first_conv'] = first_conv  # what timm >= 1.0.31 saves
    return model


def only_file(path: Path) -> Dict[str, Any]:
    """The overlay with which timm loads this file, whatever else a config names."""
    return {'file': str(path), 'source': '', 'state_dict': None, 'custom_load': False}  # older timm would expect .npz


def pinned_sha256(repo: str) -> Optional[str]:
    return OWN_WEIGHTS.get(repo.removeprefix('timm-arl/'))


def find_file(path: Path) -> Path:
    """A weights file, or the model.safetensors of a folder, that can be read.

    Raises:
        WeightsError: It is missing, or reading it is not permitted.
    """
    try:
        path = path / 'model.safetensors' if path.is_dir() else path
        with path.open('rb'):
            return path
    except PermissionError:
        raise WeightsError(f'{path} cannot be read: permission denied.') from None
    except OSError:
        raise WeightsError(
            f'No weights at {path}: pass a .safetensors file, or a folder that holds model.safetensors.') from None


def check_file(path: Path) -> Path:
    """As find_file, for a file that timm will open.

    Raises:
        WeightsError: It is missing, cannot be read, or is no safetensors file.
    """
    path = find_file(path)
    if path.suffix != '.safetensors':  # which timm would open as a pickle
        raise WeightsError(f'{path} is no .safetensors file, and only those are opened: {CONVERT}.')
    try:
        with safetensors.safe_open(path, 'pt'):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f'{path} is not a readable safetensors file ({error}): download or save it again.') from None
    return path


def _num_classes(weights: Union[Path, Dict[str, torch.Tensor]], cfg: Dict[str, Any]) -> Dict[str, int]:
    """Number of classes of the classifier in a file or state_dict, as an overlay; empty where it has none."""
    if cfg.get('label_offset'):  # timm drops the first outputs
        return {}
    shapes = (_weight_shape(weights, name) for name in classifiers_of(cfg))
    return next(({'num_classes': shape[0]} for shape in shapes if shape), {})


def _channels(weights: Union[str, Path, Dict[str, torch.Tensor]], first_conv: Any) -> int:
    """Channels of the images that the first convolution of a file or state_dict takes; 0 where it has none."""
    shape = _weight_shape(weights, first_conv)
    return shape[1] if len(shape) == 4 else 0


def _weight_shape(weights: Union[str, Path, Dict[str, torch.Tensor]], layer: Any) -> List[int]:
    """Shape of a layer's weight, empty where there is none; DDP's and the compiler's prefixes do not count."""
    if isinstance(weights, dict):
        return list(getattr(clean_state_dict(weights).get(f'{layer}.weight'), 'shape', ()))
    with safetensors.safe_open(weights, 'pt') as file:
        name = clean_state_dict({key: key for key in file.keys()}).get(f'{layer}.weight')
        return file.get_slice(name).get_shape() if name else []


def classifiers_of(cfg: Dict[str, Any]) -> Tuple[str, ...]:
    """Names of the classifier layers, from a model's pretrained_cfg."""
    classifiers = cfg.get('classifier') or ()
    return (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)


def check_loadable(state_dict: Dict[str, torch.Tensor], model: Any, features_only: bool = False) -> None:
    """Refuse what timm is about to load into a model, if the tensors do not fit.

    A classifier for another number of classes, and a first convolution for another number of channels, may differ:
    timm drops the one and adapts the other.

    Args:
        state_dict: What is about to be loaded.
        model: The model.
        features_only: Whether the classifier is not wanted, so that it may be missing.

    Raises:
        WeightsError: As check_fit and check_finite, or weights of another gate.
    """
    cfg, own = model.pretrained_cfg, model.state_dict()
    what = cfg.get('file') or 'The given state_dict'
    free = {f'{name}.{part}' for name in classifiers_of(cfg) for part in ('weight', 'bias')}
    offset = cfg.get('label_offset') or 0  # of the outputs that timm drops
    state_dict = {key: tensor[offset:] if key in free else tensor for key, tensor in state_dict.items()}
    may_differ = free if features_only or getattr(model, 'num_classes', None) != cfg['num_classes'] else set()
    dropped = {key for key in may_differ if not features_only and key in state_dict and key in own}
    if dropped and all(state_dict[key].shape == own[key].shape for key in dropped):  # and the model's would be random
        raise WeightsError(f'{what} has the {model.num_classes} outputs of the model, but num_classes of its config is '
                           f'{cfg["num_classes"]}: pass pretrained_cfg_overlay=dict(num_classes={model.num_classes}) '
                           f'too.')
    first = f'{cfg.get("first_conv")}.weight'
    shapes: List[Tuple[int, ...]] = [tuple(t[first].shape) if first in t else () for t in (state_dict, own)]
    in_channels_alone = shapes[0][:1] + shapes[0][2:] == shapes[1][:1] + shapes[1][2:]
    if in_channels_alone and shapes[0][1:2] == tuple(cfg.get('input_size') or (3,))[:1]:
        may_differ = may_differ | {first}
    wrong = [key for key in mismatched(state_dict, model) if key not in may_differ]
    if wrong and own.keys() & state_dict.keys() >= {*wrong}:  # what to pass, where that is the only difference
        outputs = [t[wrong[0]].shape[:1] for t in (state_dict, own)]
        if free.issuperset(wrong) and outputs[0] != outputs[1] and all(
                state_dict[key].shape[:1] == outputs[0] for key in wrong):
            raise WeightsError(f'{what} has {outputs[0][0]} outputs, not {outputs[1][0]}: pass '
                               f'num_classes={outputs[0][0]}.')
        if wrong == [first] and in_channels_alone:
            raise WeightsError(f'{what} takes images of {shapes[0][1]} channels, not {shapes[1][1]}: pass '
                               f'in_chans={shapes[0][1]}.')
    check_fit(state_dict, model, what, may_differ)
    check_finite(state_dict, what)
    if cfg.get('file'):
        check_gate_of(model, Path(cfg['file']))


def check_gate_of(model: Any, file: Path) -> None:
    """Refuse weights whose config.json names another mask: every tensor would fit, but compute something else.

    Args:
        model: The model they are for.
        file: The weights. Without a config.json beside it, nothing is known of their mask.

    Raises:
        WeightsError: Another attention, mask_scale or mask_temperature, or a config.json that cannot be read.
    """
    if not hasattr(model, 'mask_scale') or not file.with_name('config.json').is_file():
        return
    path = file.with_name('config.json')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture, arguments = config.get('architecture', ''), config.get('model_args') or {}
        if not timm.is_model(architecture):  # of another program
            return
        with torch.device('meta'):
            saved = timm.create_model(architecture, **{
                name: arguments[name] for name in arguments.keys() & {*GATE_ARGUMENTS, 'block_args'}})
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f'{path}, which tells the mask of {file.name}, is damaged ({error}): restore it.') from None
    if not hasattr(saved, 'mask_scale'):
        return
    fixed = GATE_ARGUMENTS[:2 if saved.learn_temperature else 3]  # a learned temperature is a tensor
    differ = [name for name in fixed if getattr(saved, name) != getattr(model, name)]
    if differ:
        kind, asked = (' and '.join(f'{name} {getattr(of, name)}' for name in differ) for of in (saved, model))
        raise WeightsError(f'{file} was trained with {kind}, not {asked}: choose the model it was saved from.')


def check_fit(state_dict: Dict[str, Any], model: nn.Module, what: Any, may_differ: Collection[str] = ()) -> None:
    """Refuse tensors of which not every one has its place in a model, and the other way round.

    Args:
        state_dict: Tensors by name.
        model: The model.
        what: What the tensors are of, for the message.
        may_differ: Names that do not count.

    Raises:
        WeightsError: Tensors are missing, unexpected or of another shape; it names three of them.
    """
    wrong = [key for key in mismatched(state_dict, model) if key not in may_differ]
    if wrong:
        raise WeightsError(f'{what} does not fit {type(model).__name__}: {misfits(wrong)}; choose the model it was '
                           f'saved from.')


def mismatched(state_dict: Dict[str, Any], model: nn.Module) -> List[str]:
    """Names of tensors that are missing, unexpected or of another shape."""
    own = model.state_dict()
    return sorted(key for key in own.keys() | state_dict.keys() if key not in own or (
        not key.endswith('num_batches_tracked') if key not in state_dict  # old files have none
        else own[key].shape != state_dict[key].shape))


def misfits(names: List[str]) -> str:
    """How many tensors do not fit, and the first three of them."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)} tensors are missing, unexpected or of another shape ({", ".join(names[:3])}{more})'


def check_finite(state_dict: Dict[str, torch.Tensor], what: Any) -> None:
    """Refuse weights that hold NaN or infinite values.

    Raises:
        WeightsError: It names the first such tensor.
    """
    for key, tensor in state_dict.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise WeightsError(f'{what} holds {"NaN" if tensor.isnan().any() else "infinite values"} in {key}: choose '
                               f'another checkpoint.')


def described_by(repo: str, path: Path) -> Path:
    """A config.json or results.json of a repo on the Hub: the package's own where the repo has the name of its weights.

    Who owns that name must not say what their outputs mean, or which thresholds they have.
    """
    shipped = shipped_weights(repo.removeprefix('timm-arl/')) if pinned_sha256(repo) else None
    return shipped / path.name if shipped else path


def _check_described(repo: str, theirs: Path) -> None:
    """The same for timm.create_model('hf-hub:...'), which has built the network by the repo's config.json."""
    described = described_by(repo, theirs)
    if described != theirs and json.loads(described.read_text(encoding='utf-8')) != _content(theirs):
        name = repo.removeprefix('timm-arl/')
        raise WeightsError(f'The config.json of {repo} is not that of the weights that have this name: load {name}.')


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def shipped_weights(name: str) -> Optional[Path]:
    """Folder of weights that come with this package, a model repo with its results, or None.

    Args:
        name: Model and tag.
    """
    folder = Path(__file__).with_name('weights') / name
    return folder if name in OWN_WEIGHTS and (folder / 'model.safetensors').is_file() else None
