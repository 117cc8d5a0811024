"""RAN: the Residual Attention Networks that the ARL-CNN paper compares with

Papers:
* `Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
* `Attention Residual Learning for Skin Lesion Classification` - https://doi.org/10.1109/TMI.2019.2893944

A ResNet trunk with one attention module per stage, for the first three stages, as Table II of the ARL-CNN paper has it.
The modules of RAN-50 follow the blocks of their stage, so any ResNet-50 checkpoint fits its trunk; those of RAN-14 come
before them, which gives the printed number of parameters.
"""
from typing import Any, Dict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs
from timm.models.resnet import Bottleneck, ResNet

from .baselines import register_if_free
from .pretrained import build_with_local_weights

__all__ = ['AttentionModule', 'ResidualAttentionNet']  # registration adds each entry point to this


class AttentionModule(nn.Module):
    """Attention residual module of two levels, H(x) = (1 + M(x)) * T(x), Eq. 3 of the RAN paper.

    T is a trunk of two residual units. M is a sigmoid mask from a small hourglass: two max pools and two bilinear
    upsamplings, with a residual unit on each way and a skip connection between. One unit comes before and one after
    (p = 1, t = 2, r = 1 of the paper). All units are bottlenecks that keep their width.
    """

    def __init__(self, width: int, **block_kwargs) -> None:
        """
        Args:
            width: Channels in and out, a multiple of 4.
            **block_kwargs: Keyword arguments of timm's Bottleneck, act_layer and norm_layer among them.
        """
        super().__init__()

        def unit() -> Bottleneck:
            return Bottleneck(width, width // Bottleneck.expansion, **block_kwargs)

        norm_layer = block_kwargs.get('norm_layer', nn.BatchNorm2d)
        act_layer = block_kwargs.get('act_layer', nn.ReLU)
        self.first = unit()
        self.trunk = nn.Sequential(unit(), unit())
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.down = unit()
        self.skip = unit()
        self.bottom = nn.Sequential(unit(), unit())
        self.up = unit()
        self.mask = nn.Sequential(
            norm_layer(width), act_layer(inplace=True), nn.Conv2d(width, width, kernel_size=1, bias=False),
            norm_layer(width), act_layer(inplace=True), nn.Conv2d(width, width, kernel_size=1, bias=False))
        self.last = unit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        half = self.down(self.pool(x))
        y = self.bottom(self.pool(half))
        y = F.interpolate(y, size=half.shape[-2:], mode='bilinear', align_corners=False) + self.skip(half)
        y = F.interpolate(self.up(y), size=x.shape[-2:], mode='bilinear', align_corners=False)
        return self.last((1. + self.mask(y).sigmoid()) * self.trunk(x))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Complete a ResNet checkpoint, which has no attention module at all, with the model's own; others pass as is."""
    modules = tuple(f'{name}.' for name, m in model.named_modules() if isinstance(m, AttentionModule))
    own = {k: v for k, v in model.state_dict().items() if k.startswith(modules)}
    return dict(own, **state_dict) if own.keys().isdisjoint(state_dict) else state_dict


class ResidualAttentionNet(ResNet):
    """ResNet with an attention module in each of its first three stages."""
    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(self, *args, module_first: bool = False, **kwargs) -> None:
        """
        Args:
            *args: Positional arguments of timm's ResNet.
            module_first: Whether the module comes before the blocks of its stage, at the stage's input width, or after.
            **kwargs: Keyword arguments of timm's ResNet. The modules share act_layer and norm_layer; drop_path_rate,
                block_args and the like act on the blocks of the trunk alone.
        """
        super().__init__(*args, **kwargs)
        zero_init_last = kwargs.get('zero_init_last', True)
        layers = dict(
            act_layer=get_act_layer(kwargs.get('act_layer', nn.ReLU)),
            norm_layer=get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d)))
        widths = [info['num_chs'] for info in self.feature_info]
        for i in (1, 2, 3):
            stage = getattr(self, f'layer{i}')
            module = AttentionModule(widths[i - 1 if module_first else i], **layers).to(stage[-1].conv3.weight)
            stage.insert(0 if module_first else len(stage), module)
        self.init_weights(zero_init_last)


def _create_ran(variant: str, pretrained: bool = False, **kwargs) -> ResidualAttentionNet:
    return build_with_local_weights(ResidualAttentionNet, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_name': 'Residual Attention Network for Image Classification', 'paper_ids': 'arXiv:1704.06904',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'ran14.untrained': _cfg(),
    'ran50.a1_in1k': _cfg(
        hf_hub_id='timm/resnet50.a1_in1k', hf_hub_filename='model.safetensors', interpolation='bicubic', crop_pct=0.95,
        test_input_size=(3, 288, 288), test_crop_pct=1.0,
        origin_url='https://github.com/huggingface/pytorch-image-models'),
    'ran50.tv_in1k': _cfg(
        hf_hub_id='timm/resnet50.tv_in1k', hf_hub_filename='model.safetensors', license='bsd-3-clause',
        origin_url='https://github.com/pytorch/vision'),
})


@register_if_free
def ran14(pretrained: bool = False, **kwargs) -> ResidualAttentionNet:
    """RAN-14 of the ARL-CNN paper: four bottleneck blocks, attention modules at the widths 64, 256 and 512."""
    model_args = dict(block=Bottleneck, layers=(1, 1, 1, 1), module_first=True)
    return _create_ran('ran14', pretrained, **dict(model_args, **kwargs))


@register_if_free
def ran50(pretrained: bool = False, **kwargs) -> ResidualAttentionNet:
    """RAN-50 of the ARL-CNN paper: ResNet-50 with attention modules at the widths 256, 512 and 1,024."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_ran('ran50', pretrained, **dict(model_args, **kwargs))
