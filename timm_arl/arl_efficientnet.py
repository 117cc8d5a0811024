"""ARL-EfficientNet: attention residual learning on a network that is no ResNet

Papers:
* `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944
* `EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946

timm's EfficientNet-Lite0, whose blocks with an identity shortcut x compute y = x + F + alpha * n(F) * x, with no
activation after the sum. Nine blocks have such a shortcut, so the network has nine parameters more, and every
tf_efficientnet_lite0 checkpoint fits.
"""
from functools import partial
from typing import Any, Dict, List, Union, cast

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import (
    BN_EPS_TF_DEFAULT,
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures

from .arl_cnn import GatedBlock, checkpoint_filter_fn
from .attention import check_gate, gated_sum
from .pretrained import GATE_ARGUMENTS, HUB, build_with_local_weights

__all__ = ['ARLEfficientNet', 'ARLInvertedResidual']  # register_model adds each entry point to this

torch.fx.wrap('gated_sum')  # a leaf of FX graphs: in eval mode they match eager mode bit for bit


class ARLInvertedResidual(GatedBlock, InvertedResidual):
    """Inverted residual block with attention residual learning, y = x + F + alpha * n(F) * x, Eq. 3-9.

    F is the output of the linear bottleneck's norm layer, x the block's input. Stochastic depth acts on
    F + alpha * n(F) * x.
    """

    def __init__(self, *args, **kwargs) -> None:
        """
        Args:
            *args: Positional arguments of timm's InvertedResidual.
            **kwargs: Its keyword arguments, and those of GatedBlock.

        Raises:
            ValueError: As GatedBlock, a block without an identity shortcut (of stride 2 or another width), or ``s2d``.
        """
        super().__init__(*args, **kwargs)
        if not self.has_skip:
            raise ValueError('An ARLInvertedResidual needs an identity shortcut: stride 1, as many channels out as in.')
        if getattr(self, 'conv_s2d', None) is not None:  # timm >= 1.0.31
            raise ValueError('An ARLInvertedResidual has no space-to-depth: leave s2d out.')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.conv_pw(x)
        x = self.bn1(x)
        x = self.conv_dw(x)
        x = self.bn2(x)
        x = self.aa(x)
        x = self.se(x)
        x = self.conv_pwl(x)
        x = self.bn3(x)
        add_shortcut = isinstance(self.drop_path, nn.Identity)
        x = gated_sum(
            x, shortcut, self.alpha, self.attention, self.mask_scale, add_shortcut,
            False, False, self.mask_temperature, self.log_temperature)
        return x if add_shortcut else self.drop_path(x) + shortcut


class _Gated:
    """Gates each inverted residual block with an identity shortcut, for the two classes below."""

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
            *args: Positional arguments of timm's EfficientNet.
            attention: Normalisation of the mask, 'spatial' (Eq. 4), 'channel' (Eq. 5) or 'mixed' (Eq. 6).
            alpha_init: Initial value of each block's alpha.
            mask_scale: 'softmax' for the mask as printed, 'mean1' for one rescaled to a mean of 1.
            mask_temperature: T of the mask n(F / T), 1 in the paper; a smaller one makes peaked masks. Any other
                than 1 is computed in plain operations, without the fused kernels.
            learn_temperature: Whether T is learned, one for each block, from ``mask_temperature`` on.
            **kwargs: Keyword arguments of timm's EfficientNet.

        Raises:
            ValueError: An unknown ``attention`` or ``mask_scale``, an ``alpha_init`` that is not finite, or a
                ``mask_temperature`` that is not from 1e-6 to 1e6.
        """
        check_gate(attention, mask_scale, alpha_init, mask_temperature, learn_temperature)
        super().__init__(*args, **kwargs)
        self.attention = attention
        self.mask_scale = mask_scale
        self.mask_temperature = mask_temperature
        self.learn_temperature = learn_temperature
        self._model_args = {name: getattr(self, name) for name in GATE_ARGUMENTS}  # which timm saves
        blocks: List[Any] = [m for m in cast(nn.Module, self).modules() if type(m) is InvertedResidual and m.has_skip]
        for block in blocks:
            block.__class__ = ARLInvertedResidual  # timm's builder knows no other class for them
            block.add_gate(attention, alpha_init, mask_scale, mask_temperature, learn_temperature)


class ARLEfficientNet(_Gated, EfficientNet):
    """EfficientNet with attention residual learning; with every alpha at 0 it is timm's, on a CPU bit for bit."""
    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)


class ARLEfficientNetFeatures(_Gated, EfficientNetFeatures):
    """The same as a feature extractor, ``features_only=True``."""


def _features_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Leave out the head, which a feature extractor does not have."""
    head = ('conv_head.', 'bn2.', 'classifier.')
    return checkpoint_filter_fn({k: v for k, v in state_dict.items() if not k.startswith(head)}, model)


def _create_arl_efficientnet(
        variant: str,
        pretrained: bool = False,
        features_only: bool = False,
        **kwargs,
) -> Union[ARLEfficientNet, ARLEfficientNetFeatures]:
    if not features_only or 'feature_cfg' in kwargs or 'feature_cls' in kwargs:
        return build_with_local_weights(
            ARLEfficientNet, variant, pretrained, checkpoint_filter_fn, features_only=features_only, **kwargs)
    model = build_with_local_weights(
        ARLEfficientNetFeatures, variant, pretrained, _features_filter_fn,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'global_pool'), **kwargs)
    model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'conv_stem', 'classifier': 'classifier', 'license': 'apache-2.0',
        'paper_name': 'Attention Residual Learning for Skin Lesion Classification',
        'paper_ids': ('doi:10.1109/TMI.2019.2893944', 'arXiv:1905.11946'),
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'arl_tf_efficientnet_lite0.in1k': _cfg(
        hf_hub_id='timm/tf_efficientnet_lite0.in1k', hf_hub_filename='model.safetensors',
        origin_url='https://github.com/huggingface/pytorch-image-models'),
    'arl_tf_efficientnet_lite0.isic2017': _cfg(  # by this project
        hf_hub_id=f'{HUB}/arl_tf_efficientnet_lite0.isic2017@v1', hf_hub_filename='model.safetensors',
        interpolation='bilinear', num_classes=2, label_names=('melanoma', 'seborrheic_keratosis')),
})


@register_model
def arl_tf_efficientnet_lite0(pretrained: bool = False, **kwargs) -> ARLEfficientNet:
    """EfficientNet-Lite0 with attention residual learning in its nine blocks with an identity shortcut."""
    kwargs.setdefault('bn_eps', BN_EPS_TF_DEFAULT)
    kwargs.setdefault('pad_type', 'same')
    bn_args = resolve_bn_args(kwargs)
    arch_def = [
        ['ds_r1_k3_s1_e1_c16'],
        ['ir_r2_k3_s2_e6_c24'],
        ['ir_r2_k5_s2_e6_c40'],
        ['ir_r3_k3_s2_e6_c80'],
        ['ir_r3_k5_s1_e6_c112'],
        ['ir_r4_k5_s2_e6_c192'],
        ['ir_r1_k3_s1_e6_c320'],
    ]
    model_args = dict(
        block_args=decode_arch_def(arch_def, fix_first_last=True), num_features=1280, stem_size=32, fix_stem=True,
        round_chs_fn=round_channels, act_layer=resolve_act_layer(kwargs, 'relu6'),
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **bn_args))
    return _create_arl_efficientnet('arl_tf_efficientnet_lite0', pretrained, **dict(model_args, **kwargs))
