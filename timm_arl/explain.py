"""What a network looks at: class activation maps, gradient maps, the masks of ARL blocks, and scores of maps.

docs/explain.md says what each map shows and how it can mislead.
"""
import contextlib
import copy
import math
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from .arl_cnn import ARLBottleneck
from .arl_efficientnet import ARLInvertedResidual
from .attention import attention_mask
from .extras import require
from .overlays import colours, on_picture, overlay, panel

__all__ = [
    'METHODS', 'GateMap', 'centred_gaussian', 'class_activation_map', 'colours', 'gate_maps', 'gradient_map', 'map_iou',
    'on_picture', 'overlay', 'panel', 'pointing_game', 'scaled_alphas',
]

METHODS = {  # of gradient_map: their classes in pytorch_grad_cam
    'gradcam': 'GradCAM', 'gradcam++': 'GradCAMPlusPlus', 'xgradcam': 'XGradCAM', 'hirescam': 'HiResCAM',
    'layercam': 'LayerCAM', 'eigengradcam': 'EigenGradCAM', 'gradcamelementwise': 'GradCAMElementWise',
}
EPS = 1e-6  # beside the norm that a contribution is divided by


class GateMap(NamedTuple):
    """What the gate of one block did to a batch, in float32; n(F) is the mask of Eq. 4, 5 or 6.

    Attributes:
        mask: Shape (B, h, w). Spatial: n(F) times the number of positions, mean over the channels; 1 is a flat mask.
            Channel: the largest n(F) of the channels times their number, 1 is a flat mask (its mean over the channels
            is the same at all positions). Mixed: mean over the channels of the mask that the block applies.
        contribution: Shape (B, h, w), |alpha n(F) x| / (|x + F| + 1e-6) with norms over the channels and n(F) as the
            block applies it, `mask_scale` included: how much the gate changes what the block gives without it.
        alpha: The block's weight.
        effective_share: Shape (B,), exp(entropy of n(F)) / count, 1 for a flat mask and 1 / count for a single peak.
            Spatial, and mixed divided by its sum: over positions, mean over channels. Channel: over channels, mean
            over positions.
        largest: Shape (B,), the largest n(F); in a flat spatial mask of h x w positions all are 1 / hw.
        std: Shape (B,), standard deviation of F. A softmax of a small F is flat.
    """
    mask: torch.Tensor
    contribution: torch.Tensor
    alpha: float
    effective_share: torch.Tensor
    largest: torch.Tensor
    std: torch.Tensor


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def class_activation_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class activation maps (Eq. 13): the classifier's weights on the last feature map, of each output.

    The mean of a map is the logit less the classifier's bias. A LayerNorm between pooling and classifier (ConvNeXt's)
    is counted in, with its scale as it is for the pooled features; its bias then counts as the classifier's.

    Args:
        model: A timm model whose classifier is a linear layer on features averaged over the positions. Runs in
            evaluation mode.
        images: Shape (B, 3, H, W), normalised.

    Returns:
        (B, outputs, h, w) in float32, at the resolution of the last feature map.

    Raises:
        ValueError: Another kind of head.
    """
    with _evaluating(model), torch.no_grad():
        features = _asked(model, 'forward_features')(images)
        logits = _asked(model, 'forward_head')(features)
    classifier = _asked(model, 'get_classifier')()
    weight = getattr(classifier, 'weight', None)
    if weight is None or features.ndim != 4 or features.shape[1] != weight[0].numel():
        raise _no_cam(model)
    dtype = torch.promote_types(features.dtype, torch.float32)
    tolerance = 1e-3 if dtype == features.dtype else 4e-3
    features, logits, weight = features.to(dtype), logits.to(dtype), weight.detach().flatten(1).to(dtype)
    constant = 0. if classifier.bias is None else classifier.bias.detach().to(dtype)
    norm = getattr(getattr(model, 'head', None), 'norm', None)
    if isinstance(norm, nn.LayerNorm):
        variance = features.mean((2, 3)).var(1, correction=0)[:, None, None, None]
        features = (features - features.mean(1, keepdim=True)) / (variance + norm.eps).sqrt()
        constant = constant + weight @ norm.bias.detach().to(dtype)
        weight = weight * norm.weight.detach().to(dtype)
    maps = torch.einsum('lc,bchw->blhw', weight, features)
    error = (maps.mean((2, 3)) + constant - logits).abs()
    size = torch.einsum('lc,bchw->bl', weight.abs(), features.abs()) / features.shape[2:].numel() + logits.abs()
    if (error > tolerance * size).any():  # beyond what rounding explains
        raise _no_cam(model)
    return maps.float()


def _asked(model: nn.Module, method: str) -> Any:
    if not hasattr(model, method):
        raise _no_cam(model)
    return getattr(model, method)


def _no_cam(model: nn.Module) -> ValueError:
    return ValueError(f'{type(model).__name__} has no class activation map: its outputs are not a linear layer on '
                      'features averaged over the positions. gradient_map works with any layer that gives maps.')


def gradient_map(
        model: nn.Module,
        images: torch.Tensor,
        label: int,
        layer: Optional[str] = None,
        method: str = 'gradcam',
) -> torch.Tensor:
    """Grad-CAM or a related method, by the package grad-cam (extra `explain`): where a layer speaks for an output.

    Gradients of the network are switched off meanwhile: threads that share one must take turns.

    Args:
        model: Any network with a layer that gives maps. Runs in evaluation mode; its gradients are left alone. In half
            precision, a copy in float32 runs.
        images: Shape (B, 3, H, W), normalised, in the network's dtype.
        label: Number of the output.
        layer: Name of a module, as `model.named_modules()` has it; None: the last stage of a timm model.
        method: One of METHODS.

    Returns:
        (B, H, W) in float32, from 0 to 1 in each image: what speaks against the output is 0, and size is lost.

    Raises:
        ImportError: The extra `explain` is missing.
        ValueError: No image; an unknown method, layer or output; or a layer whose output is not of shape (B, C, h, w).
    """
    require('explain', __name__)
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    if method not in METHODS:
        raise ValueError(f'Unknown method {method!r}: choose {", ".join(METHODS)}.')
    model = getattr(model, '_orig_mod', model)  # of torch.compile
    outputs = getattr(model, 'num_classes', None)
    if outputs is not None and not 0 <= label < outputs:
        raise ValueError(f'Output {label} does not exist: the network has {outputs}, counted from 0.')
    info: Any = getattr(model, 'feature_info', None)
    if not (layer or info):
        raise ValueError(f'{type(model).__name__} does not say which layer is its last: name one.')
    layer = layer or info[-1]['module']
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f'Unknown layer {layer!r}: its names are those of model.named_modules(), such as '
                         f'{", ".join(name for name, _ in model.named_children())}.')

    def kept(maps: Any) -> torch.Tensor:
        if getattr(maps, 'ndim', 0) != 4 or getattr(model, 'output_fmt', 'NCHW') != 'NCHW':
            raise ValueError(f'Layer {layer!r} does not give maps of shape (B, C, h, w): name another.')
        return maps.clone()  # the next layer may work in place

    if not len(images):
        raise ValueError('There is no image in the batch.')
    if images.dtype in (torch.bfloat16, torch.float16):  # which NumPy, and so grad-cam, does not take
        model, images = copy.deepcopy(model).float(), images.float()
        modules = dict(model.named_modules())
    state = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    recomputing = [m for m in modules.values() if getattr(m, 'grad_checkpointing', False)]
    with (_evaluating(model), torch.inference_mode(False), torch.enable_grad(),
          torch.autocast(images.device.type, enabled=False), torch.compiler.set_stance('force_eager')):
        cam = getattr(pytorch_grad_cam, METHODS[method])(model, [modules[layer]], reshape_transform=kept)
        try:
            for p, _, _ in state:  # the input's gradient is enough
                p.requires_grad_(False)
            for module in recomputing:  # which would run the layers one by one, past the hooks of a stage
                module.grad_checkpointing = False
            heat = cam(images.detach().clone().requires_grad_(), [ClassifierOutputTarget(label)] * len(images))
        finally:
            cam.activations_and_grads.release()
            for module in recomputing:
                module.grad_checkpointing = True
            for p, requires_grad, grad in state:
                p.requires_grad_(requires_grad)
                p.grad = grad
    return torch.from_numpy(heat).float().to(images.device)


def gate_maps(model: nn.Module, images: torch.Tensor) -> Dict[str, GateMap]:
    """What each gate of a network does to images, block by block, in one pass.

    Threads may share a network that is in evaluation mode.

    Args:
        model: A network with attention residual learning. Runs in evaluation mode.
        images: Shape (B, 3, H, W), normalised.

    Returns:
        By the block's name, such as 'layer1.0', from the first to the last.

    Raises:
        ValueError: A network without such blocks.
    """
    maps: Dict[str, GateMap] = {}
    model = getattr(model, '_orig_mod', model)  # of torch.compile
    gates = _gates(model)
    compiled = any(getattr(m, '_compiled_call_impl', None) for m in model.modules())  # whose graphs know no new hooks
    with _stance_lock if compiled else contextlib.nullcontext():  # the stance is that of all threads
        hooks = [hook for name, block in gates.items() for hook in _watch(name, block, maps)]
        try:
            with (_evaluating(model), torch.no_grad(),
                  torch.compiler.set_stance('force_eager') if compiled else contextlib.nullcontext()):
                model(images)
        finally:
            for hook in hooks:
                hook.remove()
    return maps


Block = Union[ARLBottleneck, ARLInvertedResidual]
_stance_lock = threading.Lock()


def _gates(model: nn.Module) -> Dict[str, Block]:
    gates = {name: m for name, m in model.named_modules() if isinstance(m, (ARLBottleneck, ARLInvertedResidual))}
    if not gates:
        raise ValueError(f'{type(model).__name__} has no block of attention residual learning, such as those of '
                         'arl_cnn50.')
    return gates


def _watch(name: str, block: Block, maps: Dict[str, GateMap]) -> List[RemovableHandle]:
    """Hooks that put what a block's gate did in maps: only one block's F and x are kept at a time."""
    found: Dict[str, torch.Tensor] = {}
    owner = threading.get_ident()  # another thread may use the same network meanwhile

    def keep(key: str) -> Any:
        return lambda module, inputs, output: (
            found.update({key: output}) if threading.get_ident() == owner else None)

    def finish(module: nn.Module, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if threading.get_ident() != owner:
            return
        maps[name] = _gate_map(found.pop('residual'), found.pop('shortcut', inputs[0]), block)

    after_norm = block.se if isinstance(block, ARLBottleneck) else None  # squeeze and excitation, which changes F
    downsample = getattr(block, 'downsample', None)
    return [(block.bn3 if after_norm is None else after_norm).register_forward_hook(keep('residual')),
            *([] if downsample is None else [downsample.register_forward_hook(keep('shortcut'))]),
            block.register_forward_hook(finish)]


def _gate_map(residual: torch.Tensor, shortcut: torch.Tensor, block: Block) -> GateMap:
    temperature = block.mask_temperature, block.log_temperature
    plain = attention_mask(residual, block.attention, 'softmax', *temperature)
    applied = plain if block.mask_scale == 'softmax' else attention_mask(
        residual, block.attention, block.mask_scale, *temperature)
    residual, shortcut = residual.to(plain.dtype), shortcut.to(plain.dtype)
    channels, positions = plain.shape[1], plain.shape[2:].numel()
    shares = plain.flatten(2)
    if block.attention == 'spatial':
        mask, axis = plain.mean(1) * positions, 2
    elif block.attention == 'channel':
        mask, axis = plain.amax(1) * channels, 1
    else:
        mask, axis = applied.mean(1), 2
        shares = shares / shares.sum(2, keepdim=True)
    alpha = float(block.alpha)
    effect = torch.special.entr(shares).sum(axis).exp() / shares.shape[axis]
    contribution = abs(alpha) * (applied * shortcut).norm(dim=1) / ((shortcut + residual).norm(dim=1) + EPS)
    return GateMap(mask.float(), contribution.float(), alpha, effect.mean(1).float(), plain.flatten(1).amax(1).float(),
                   residual.flatten(1).var(1, correction=0).sqrt().float())


@contextlib.contextmanager
def scaled_alphas(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside `with`, every alpha is multiplied by a factor; afterwards all are as before, bit for bit.

    The network itself is changed: two threads that share one must take turns.

    Args:
        model: A network with attention residual learning.
        factor: 0 makes the network a plain residual network.

    Raises:
        ValueError: A network without gates, or a factor that is not finite.
    """
    if not math.isfinite(factor):
        raise ValueError(f'The factor must be a finite number, not {factor}.')
    alphas = [block.alpha for block in _gates(model).values()]
    before = [alpha.detach().clone() for alpha in alphas]
    try:
        with torch.no_grad():
            for alpha in alphas:
                alpha.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for alpha, value in zip(alphas, before):
                alpha.copy_(value)


def pointing_game(heat: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the highest point of a map lies in the lesion (Zhang et al., 2018, without a tolerance).

    Where several points share the highest value, most of them must.

    Args:
        heat: Shape (H, W); NaN where there is no map.
        mask: Shape (H, W), True in the lesion.

    Raises:
        ValueError: Shapes that differ, a map that is NaN throughout, or an empty mask.
    """
    heat, mask = _pair(heat, mask)
    return bool(mask[heat == np.nanmax(heat)].mean() > 0.5)


def map_iou(heat: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> float:
    """Intersection over union of the lesion and the part of a map that is at or above a threshold.

    Args:
        heat: Shape (H, W); NaN where there is no map, which counts as below.
        mask: Shape (H, W), True in the lesion.
        threshold: From 0, the map's lowest value, to 1, its highest.

    Raises:
        ValueError: As pointing_game, or a threshold that is not between 0 and 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f'The threshold must lie between 0 and 1, not at {threshold}.')
    heat, mask = _pair(heat, mask)
    low, high = np.nanmin(heat), np.nanmax(heat)
    part = heat >= low + threshold * (high - low)
    return float((part & mask).sum() / (part | mask).sum())


def _pair(heat: np.ndarray, mask: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    heat, mask = np.asarray(heat, np.float64), np.asarray(mask)
    if heat.shape != mask.shape or mask.dtype != bool:
        raise ValueError(f'A map of shape {heat.shape} needs a mask of that shape, True in the lesion and False '
                         f'elsewhere, not one of shape {mask.shape} and type {mask.dtype}.')
    if np.isnan(heat).all() or not mask.any():
        raise ValueError('The map is NaN throughout.' if mask.any() else 'The mask is empty.')
    return heat, mask


def centred_gaussian(size: Tuple[int, int], spread: float = 0.25) -> np.ndarray:
    """A map that has not seen the picture, which others must beat: lesions lie in the centre.

    Args:
        size: Width and height of the picture.
        spread: Standard deviation, as a share of each side.

    Returns:
        (height, width), float32, up to 1.
    """
    across, down = (np.exp(-0.5 * (((np.arange(n) + 0.5) / n - 0.5) / spread) ** 2) for n in size)
    return (down[:, None] * across).astype(np.float32)
