"""Distillation: a student that also learns the probabilities and the pooled features of a trained network.

Hinton et al., `Distilling the Knowledge in a Neural Network` - https://arxiv.org/abs/1503.02531
"""
from pathlib import Path
from typing import Tuple

import torch
import torch.nn as nn
from isic_common import RunError
from timm.data import resolve_model_data_config
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from timm_arl.isic import LABELS
from timm_arl.pretrained import create_for_task


class WithFeatures(nn.Module):
    """A timm model that returns its logits and its pooled features, projected to the width of another's."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Linear(model.num_features, width)

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, 2) and projected features (B, width) of images (B, 3, H, W)."""
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.get_classifier()(pooled), self.projection(pooled)


class Teacher(nn.Module):
    """A frozen network and the loss that pulls a student towards it."""

    def __init__(self, name: str, data_config: dict, weight: float, feature_weight: float) -> None:
        """
        Args:
            name: Output folder of finetune_isic.py, or a timm name with pretrained weights. Where those have other
                outputs than LABELS, as ImageNet's have, only the features are distilled.
            data_config: The student's, whose normalisation the images carry.
            weight: Share of the loss that the teacher's probabilities take from the labels.
            feature_weight: Weight of one minus the cosine of the features.

        Raises:
            RunError: A network without pooled features of one vector an image.
        """
        super().__init__()
        folder = Path(name)
        self.network = create_for_task(f'local-dir:{folder}' if folder.is_dir() else name, pretrained=True)
        self.network.eval().requires_grad_(False)
        self.knows_labels = self.network.num_classes == len(LABELS)
        self.weight = weight if self.knows_labels else 0.
        self.feature_weight = feature_weight
        own = resolve_model_data_config(self.network)
        mean, std, own_mean, own_std = (
            torch.tensor(config[key]).view(1, 3, 1, 1) for config in (data_config, own) for key in ('mean', 'std'))
        self.register_buffer('scale', std / own_std)
        self.register_buffer('shift', (mean - own_mean) / own_std)
        side = data_config['input_size'][-1]
        try:
            with torch.inference_mode():
                pooled = self.network.forward_head(
                    self.network.forward_features(torch.zeros(1, 3, side, side)), pre_logits=True)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise RunError(f'The teacher {name} does not take images of {side} px: {error}') from error
        if pooled.ndim != 2:
            raise RunError(f'The teacher {name} has no pooled features: choose another.')
        self.width = pooled.shape[1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits and pooled features (B, width) of the student's images (B, 3, H, W)."""
        pooled = self.network.forward_head(
            self.network.forward_features(images * self.scale + self.shift), pre_logits=True)
        return self.network.get_classifier()(pooled), pooled

    def loss(
            self,
            label_loss: torch.Tensor,
            logits: torch.Tensor,
            features: torch.Tensor,
            images: torch.Tensor,
    ) -> torch.Tensor:
        """(1 - w) * label_loss + w * BCE(student, teacher's probabilities) + v * (1 - cos(features, teacher's))."""
        teacher_logits, teacher_features = self(images)
        loss = (1 - self.weight) * label_loss
        if self.weight:
            loss = loss + self.weight * binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid())
        if self.feature_weight:
            loss = loss + self.feature_weight * (1 - cosine_similarity(features, teacher_features)).mean()
        return loss
