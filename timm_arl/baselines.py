"""The networks that the ARL-CNN paper compares with and timm lacks

Papers:
* `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
* `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507

ResNet-50 and SENet-50 of the paper are timm's own `resnet50` and `seresnet50`.
"""
from functools import partial
from typing import Any, Callable, Dict

import timm
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SEModule
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet

from .pretrained import build_with_local_weights

__all__ = ['register_if_free']  # register_model adds each entry point to this


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> ResNet:
    return build_with_local_weights(ResNet, variant, pretrained, lambda state_dict, model: state_dict, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        **kwargs
    }


def register_if_free(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register an entry point of a general name, unless timm has it: registering ours would erase timm's weights."""
    return fn if timm.is_model(fn.__name__) else register_model(fn)


default_cfgs = generate_default_cfgs({
    'resnet14.untrained': _cfg(),
    'seresnet14.untrained': _cfg(),
})


@register_if_free
def resnet14(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-14 of the ARL-CNN paper: four bottleneck blocks, 7x7 stem."""
    model_args = dict(block=Bottleneck, layers=(1, 1, 1, 1))
    return _create_resnet('resnet14', pretrained, **dict(model_args, **kwargs))


@register_if_free
def seresnet14(pretrained: bool = False, **kwargs) -> ResNet:
    """SENet-14 of the ARL-CNN paper: ResNet-14 with squeeze and excitation.

    Reduction 4, which gives the 1.1e7 parameters that the paper prints; the usual 16 would give 0.87e7.
    """
    model_args = dict(
        block=Bottleneck, layers=(1, 1, 1, 1), block_args=dict(attn_layer=partial(SEModule, rd_ratio=1 / 4)))
    return _create_resnet('seresnet14', pretrained, **dict(model_args, **kwargs))
