"""ARL-CNN: ResNets with attention residual learning

Paper: `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944

A timm ResNet whose bottleneck blocks gate their shortcut with a mask computed from their own residual branch. This
adds one scalar per block, alpha. Any ResNet checkpoint of the same depth fits, as weights or as
`pretrained_cfg_overlay=dict(file=PATH)`; the alphas then start at `alpha_init`.
"""
import math
from typing import Any, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch.nn.modules import module as nn_module

from .attention import can_fuse, check_gate, folds_norms, fused_attention_residual, gated_sum
from .kernels import compiled
from .pretrained import GATE_ARGUMENTS, HUB, build_with_local_weights

__all__ = ['ARLBottleneck', 'ARLCNN', 'GatedBlock']  # register_model adds each entry point to this


torch.fx.wrap('gated_sum')  # a leaf of FX graphs: in eval mode they match eager mode bit for bit


class GatedBlock:
    """What a block of timm's becomes by attention residual learning: it has alpha, and T where it is learned."""

    def __init__(
            self,
            *args,
            attention: str = 'spatial',
            alpha_init: float = 1e-3,
            mask_scale: str = 'softmax',
            mask_temperature: float = 1.,
            learn_temperature: bool = False,
            **kwargs,
    ) -> None:
        """
        Args:
            *args: Positional arguments of timm's block.
            attention: Normalisation of the mask, 'spatial' (Eq. 4), 'channel' (Eq. 5) or 'mixed' (Eq. 6).
            alpha_init: Initial value of alpha, the learnable weight of the gate.
            mask_scale: 'softmax' for the mask as printed, 'mean1' for one rescaled to a mean of 1.
            mask_temperature: T of the mask n(F / T), 1 in the paper; a smaller one makes peaked masks. Any other
                than 1 is computed in plain operations, without the fused kernels.
            learn_temperature: Whether T is learned, one for each block, from ``mask_temperature`` on.
            **kwargs: Keyword arguments of timm's block.

        Raises:
            ValueError: An unknown ``attention`` or ``mask_scale``, an ``alpha_init`` that is not finite, or a
                ``mask_temperature`` that is not from 1e-6 to 1e6.
        """
        check_gate(attention, mask_scale, alpha_init, mask_temperature, learn_temperature)
        super().__init__(*args, **kwargs)
        self.add_gate(attention, alpha_init, mask_scale, mask_temperature, learn_temperature)

    def add_gate(
            self,
            attention: str,
            alpha_init: float,
            mask_scale: str,
            mask_temperature: float,
            learn_temperature: bool,
    ) -> None:
        """Create alpha, and T where it is learned, in dtype and device of the block's layers."""
        self.attention = attention
        self.mask_scale = mask_scale
        self.mask_temperature = float(mask_temperature)
        self.alpha_init = float(alpha_init)
        weight = next(self.parameters())  # type: ignore[attr-defined]  # of the module that this is a part of
        self.alpha = nn.Parameter(weight.new_empty(1))  # shape (1,) and not (): FSDP refuses scalars
        self.log_temperature = nn.Parameter(weight.new_empty(1)) if learn_temperature else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha and temperature to their initial values, for example after `to_empty()`; layers have their own."""
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.mask_temperature))


class ARLBottleneck(GatedBlock, Bottleneck):
    """Bottleneck block with attention residual learning, y = act(x + F + alpha * n(F) * x), Eq. 3-9.

    F is the residual branch after bn3, x the shortcut after its projection, if any. Stochastic depth acts on
    F + alpha * n(F) * x: a dropped block is act(x).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        x = self.conv3(x)
        norm, shortcut_norm, relu, inplace = None, None, False, False
        if not torch.jit.is_scripting():
            norm, shortcut_norm, relu, inplace = self._fusible(x)

        if norm is None:
            x = self.bn3(x)
            if self.se is not None:
                x = self.se(x)

        if self.downsample is not None:
            if shortcut_norm is None:
                shortcut = self.downsample(shortcut)
            else:
                for layer in list(self.downsample)[:-1]:
                    shortcut = layer(shortcut)

        add_shortcut = self.drop_path is None
        if torch.jit.is_scripting() or (norm is None and shortcut_norm is None):
            x = gated_sum(
                x, shortcut, self.alpha, self.attention, self.mask_scale, add_shortcut,
                relu, inplace, self.mask_temperature, self.log_temperature)
        else:  # scripted code takes no norms as arguments
            x = fused_attention_residual(
                x, shortcut, self.alpha, self.attention, self.mask_scale, add_shortcut,
                relu, norm, shortcut_norm, inplace, self.mask_temperature, self.log_temperature)
        if self.drop_path is not None:
            x = self.drop_path(x) + shortcut
        if not relu:
            x = self.act3(x)

        return x

    def _fusible(self, x: torch.Tensor) -> Tuple[Optional[nn.BatchNorm2d], Optional[nn.BatchNorm2d], bool, bool]:
        """What the gate may do: compute bn3 and the projection's norm, apply the ReLU, overwrite what it is given."""
        if self.mask_temperature != 1 or self.log_temperature is not None:
            return None, None, False, False
        compiles = compiled.takes(x, x, self.alpha)
        if not compiles and not can_fuse(x, self.alpha):
            return None, None, False, False
        relu = self.drop_path is None and _is_plain(self.act3, nn.ReLU)
        grad = torch.is_grad_enabled()  # if not, nothing is kept for backward
        ours = not grad and _is_plain(self.conv3, nn.Conv2d)  # its output, which nobody else sees
        if not grad and not compiles and not folds_norms(x, x, self.alpha):
            return None, None, relu, self.se is None and (
                _is_plain(self.bn3, nn.BatchNorm2d) or _is_plain(self.bn3, nn.Identity) and ours)  # folded
        norm = self.bn3 if self.se is None and _folds(self.bn3, x) else None
        shortcut_norm = None
        if self.downsample is not None and self.drop_path is None and _is_plain(self.downsample, nn.Sequential):
            last = self.downsample[-1] if len(self.downsample) else None
            shortcut_norm = last if _folds(last, x) else None  # whose input has the shape of x
        return norm, shortcut_norm, relu, ours and norm is not None


def _is_plain(module: nn.Module, cls: Type[nn.Module]) -> bool:
    """Whether a module is exactly of this class and its call runs its forward alone: no hooks, no wrappers."""
    return type(module) is cls and 'forward' not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


def _folds(norm: Optional[nn.Module], x: torch.Tensor) -> bool:
    """Whether a norm is an ordinary batch norm with running statistics, and x has enough values per channel for it."""
    return isinstance(norm, nn.BatchNorm2d) and bool(
        _is_plain(norm, nn.BatchNorm2d) and norm.affine and norm.momentum is not None and norm.track_running_stats
        and norm.running_mean is not None and norm.num_batches_tracked is not None and x.numel() > x.shape[1]
        and (can_fuse(norm.weight, norm.bias) or compiled.takes(x, x, norm.weight, norm.bias)))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Add the model's own alphas, and temperatures, to a checkpoint without any of them, such as a ResNet's."""
    for kind in ('.alpha', '.log_temperature'):
        own = {k: v for k, v in model.state_dict().items() if k.endswith(kind)}
        if own.keys().isdisjoint(state_dict):
            state_dict = dict(state_dict, **own)
    return state_dict


class ARLCNN(ResNet):
    """ResNet of attention residual learning blocks.

    Everything but the block is timm's ResNet. With every alpha at 0 the output is the same, on a CPU bit for bit.
    """
    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
            self,
            *args,
            attention: str = 'spatial',
            alpha_init: float = 1e-3,
            mask_scale: str = 'softmax',
            mask_temperature: float = 1.,
            learn_temperature: bool = False,
            **kwargs,
    ) -> None:
        """
        Args:
            *args: Positional arguments of timm's ResNet.
            attention: Normalisation of the mask, 'spatial' (Eq. 4), 'channel' (Eq. 5) or 'mixed' (Eq. 6).
            alpha_init: Initial value of each block's alpha.
            mask_scale: 'softmax' for the mask as printed, 'mean1' for one rescaled to a mean of 1.
            mask_temperature: T of the mask n(F / T), 1 in the paper; a smaller one makes peaked masks. Any other
                than 1 is computed in plain operations, without the fused kernels.
            learn_temperature: Whether T is learned, one for each block, from ``mask_temperature`` on.
            **kwargs: Keyword arguments of timm's ResNet.

        Raises:
            ValueError: As GatedBlock.
        """
        arl_args = dict(
            attention=attention, alpha_init=alpha_init, mask_scale=mask_scale, mask_temperature=mask_temperature,
            learn_temperature=learn_temperature)
        block_args = dict(arl_args, **(kwargs.pop('block_args', None) or {}))
        super().__init__(*args, block_args=block_args, **kwargs)
        self.attention = block_args['attention']
        self.mask_scale = block_args['mask_scale']
        self.mask_temperature = block_args['mask_temperature']
        self.learn_temperature = block_args['learn_temperature']
        self._model_args = {name: getattr(self, name) for name in GATE_ARGUMENTS}  # which timm saves


def _create_arl_cnn(variant: str, pretrained: bool = False, **kwargs) -> ARLCNN:
    return build_with_local_weights(ARLCNN, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_name': 'Attention Residual Learning for Skin Lesion Classification',
        'paper_ids': 'doi:10.1109/TMI.2019.2893944',
        **kwargs
    }


def _rcfg(source: str, **kwargs) -> Dict[str, Any]:
    """ImageNet weights of timm's own ResNets (alphas start at alpha_init), and their preprocessing."""
    return _cfg(**dict({
        'hf_hub_id': f'timm/{source}', 'hf_hub_filename': 'model.safetensors',
        'interpolation': 'bicubic', 'crop_pct': 0.95, 'test_input_size': (3, 288, 288), 'test_crop_pct': 1.0,
        'origin_url': 'https://github.com/huggingface/pytorch-image-models',
    }, **kwargs))


def _tvcfg(source: str, **kwargs) -> Dict[str, Any]:
    """ImageNet weights of torchvision's ResNets as timm republishes them, the closest to the paper's initialisation."""
    return _cfg(
        hf_hub_id=f'timm/{source}', hf_hub_filename='model.safetensors',
        license='bsd-3-clause', origin_url='https://github.com/pytorch/vision', **kwargs)


def _icfg(name: str, **kwargs) -> Dict[str, Any]:
    """Weights trained on ISIC 2017 by this project; two sigmoid outputs."""
    return _cfg(**dict({
        'hf_hub_id': f'{HUB}/{name}@v1', 'hf_hub_filename': 'model.safetensors',
        'num_classes': 2, 'label_names': ('melanoma', 'seborrheic_keratosis'),
    }, **kwargs))


_rsb_papers = ('doi:10.1109/TMI.2019.2893944', 'arXiv:2110.00476')  # the network's paper, then the weights'
_variants = ('', '_spatial', '_channel', '_mixed')
default_cfgs = generate_default_cfgs({
    'arl_cnn14.isic2017': _icfg('arl_cnn14.isic2017', input_size=(3, 160, 160), pool_size=(5, 5)),
    'arl_cnn14.untrained*': _cfg(),  # the default tag: 1,000 outputs at 224 px, as for the other models
    **{f'arl_cnn14{v}.untrained': _cfg() for v in _variants[1:]},
    'arl_cnn26.bt_in1k': _rcfg('resnet26.bt_in1k', crop_pct=0.875, test_crop_pct=0.95),
    **{f'arl_cnn50{v}.a1_in1k': _rcfg('resnet50.a1_in1k', paper_ids=_rsb_papers) for v in _variants},
    **{f'arl_cnn50{v}.tv_in1k': _tvcfg('resnet50.tv_in1k') for v in _variants},
    'arl_cnn101.a1_in1k': _rcfg('resnet101.a1_in1k', paper_ids=_rsb_papers),
    'arl_cnn101.tv_in1k': _tvcfg('resnet101.tv_in1k'),
    'arl_cnn152.a1_in1k': _rcfg('resnet152.a1_in1k', paper_ids=_rsb_papers),
    'arl_cnn152.tv_in1k': _tvcfg('resnet152.tv_in1k'),
})


@register_model
def arl_cnn14(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN14 of the paper: four blocks, spatial attention. Its weights, `isic2017`, have two outputs at 160 px."""
    model_args = dict(block=ARLBottleneck, layers=(1, 1, 1, 1))
    return _create_arl_cnn('arl_cnn14', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn14_spatial(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN14, softmax over positions (Eq. 4), the same as arl_cnn14, which has the weights."""
    model_args = dict(block=ARLBottleneck, layers=(1, 1, 1, 1), attention='spatial')
    return _create_arl_cnn('arl_cnn14_spatial', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn14_channel(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN14, softmax over channels (Eq. 5)."""
    model_args = dict(block=ARLBottleneck, layers=(1, 1, 1, 1), attention='channel')
    return _create_arl_cnn('arl_cnn14_channel', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn14_mixed(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN14, sigmoid (Eq. 6)."""
    model_args = dict(block=ARLBottleneck, layers=(1, 1, 1, 1), attention='mixed')
    return _create_arl_cnn('arl_cnn14_mixed', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn26(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN26, not in the paper: ResNet-26 with spatial attention."""
    model_args = dict(block=ARLBottleneck, layers=(2, 2, 2, 2))
    return _create_arl_cnn('arl_cnn26', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn50(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN50 of the paper: ResNet-50 with spatial attention."""
    model_args = dict(block=ARLBottleneck, layers=(3, 4, 6, 3))
    return _create_arl_cnn('arl_cnn50', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn50_spatial(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN50, softmax over positions (Eq. 4), the same as arl_cnn50."""
    model_args = dict(block=ARLBottleneck, layers=(3, 4, 6, 3), attention='spatial')
    return _create_arl_cnn('arl_cnn50_spatial', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn50_channel(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN50, softmax over channels (Eq. 5)."""
    model_args = dict(block=ARLBottleneck, layers=(3, 4, 6, 3), attention='channel')
    return _create_arl_cnn('arl_cnn50_channel', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn50_mixed(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN50, sigmoid (Eq. 6)."""
    model_args = dict(block=ARLBottleneck, layers=(3, 4, 6, 3), attention='mixed')
    return _create_arl_cnn('arl_cnn50_mixed', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn101(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN101, not in the paper: ResNet-101 with spatial attention."""
    model_args = dict(block=ARLBottleneck, layers=(3, 4, 23, 3))
    return _create_arl_cnn('arl_cnn101', pretrained, **dict(model_args, **kwargs))


@register_model
def arl_cnn152(pretrained: bool = False, **kwargs) -> ARLCNN:
    """ARL-CNN152, not in the paper: ResNet-152 with spatial attention."""
    model_args = dict(block=ARLBottleneck, layers=(3, 8, 36, 3))
    return _create_arl_cnn('arl_cnn152', pretrained, **dict(model_args, **kwargs))
