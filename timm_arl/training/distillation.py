"""What a network learns besides the labels: the probabilities and features of teachers, and the lesion mask.

Hinton et al., `Distilling the Knowledge in a Neural Network` - https://arxiv.org/abs/1503.02531
"""
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from torch.nn.functional import (
    adaptive_avg_pool2d,
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    normalize,
)
from torchvision.transforms.v2.functional import resize

from ..download import WeightsError
from ..factory import Checkpoint
from ..isic.task import Task
from .arguments import RunError


def pooled_and_logits(model: Any, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pooled features (B, C) of a timm model and the logits that its classifier makes of them."""
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled, model.get_classifier()(pooled)


def feature_width(model: Any, img_size: int, what: str) -> int:
    """Width of a timm model's pooled features.

    Raises:
        RunError: A network that does not take such images, or whose classifier does not work on pooled features.
    """
    training = model.training
    images = torch.zeros(1, 3, img_size, img_size)
    try:
        with torch.inference_mode():
            expected = model.eval()(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RunError(f'{what} does not take images of {img_size} px (--img-size, --start-size): {error}') from error
    try:
        with torch.inference_mode():
            pooled, logits = pooled_and_logits(model, images)
        fits = pooled.ndim == 2 and torch.allclose(logits, expected, atol=1e-4)
    except (AttributeError, TypeError, RuntimeError):
        fits = False
    model.train(training)
    if not fits:
        raise RunError(f'{what} cannot be used for distillation, since its classifier does not work on one vector of '
                       f'pooled features: choose another.')
    return pooled.shape[1]


class Student(nn.Module):
    """A timm model that also returns projected pooled features and the logits of a lesion mask."""

    def __init__(self, model: Any, img_size: int, width: Optional[int] = None, masks: bool = False) -> None:
        """
        Args:
            model: The network that is trained; it is kept without the rest.
            img_size: Side of its images.
            width: Width of the teachers' features, to which its own are projected; None to leave features out.
            masks: Whether to predict masks, from the feature maps before its last stage.

        Raises:
            RunError: With width, a network without one pooled vector per image; with masks, one without feature maps.
        """
        super().__init__()
        self.model: Any = model
        self.projection = None if width is None else nn.Linear(feature_width(model, img_size, 'The model'), width)
        self.mask_head = None
        if masks:
            try:
                with torch.inference_mode():
                    _, (maps,) = model.eval().forward_intermediates(torch.zeros(1, 3, img_size, img_size), indices=[-2])
                self.mask_head = nn.Conv2d(maps.shape[1], 1, 1)
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
                raise RunError(f'The model has no feature maps to learn masks from, pass --mask-weight 0: '
                               f'{" ".join(str(error).split())}') from error

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Logits (B, outputs), projected features (B, width) and mask logits (B, 1, H', W') of images (B, 3, H, W)."""
        mask_logits = None
        if self.mask_head is None:
            features = self.model.forward_features(images)
        else:
            features, (maps,) = self.model.forward_intermediates(images, indices=[-2])
            mask_logits = self.mask_head(maps)
        if self.projection is None:
            return self.model.forward_head(features), None, mask_logits
        pooled = self.model.forward_head(features, pre_logits=True)
        return self.model.get_classifier()(pooled), self.projection(pooled), mask_logits


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy between predicted masks and the lesion's share of each position; 0 without any mask.

    Args:
        logits: (B, 1, H', W').
        masks: (B, 1, H, W) in [0, 1]; an image whose mask is NaN does not count.
    """
    known = ~masks.isnan().flatten(1).any(1)  # as weights: selecting rows would wait for the device
    targets = adaptive_avg_pool2d(masks.nan_to_num(), (logits.shape[-2], logits.shape[-1]))
    losses = binary_cross_entropy_with_logits(logits, targets, reduction='none').flatten(1).mean(1)
    return (losses * known).sum() / known.sum().clamp(min=1)


class Teacher(nn.Module):
    """A frozen network that is shown the student's images, resized to the side that it was trained on.

    At another size its answers are worse, since all things then look larger or smaller than in training:
    `Fixing the train-test resolution discrepancy` - https://arxiv.org/abs/1906.06423
    """

    network: Any
    task: Any  # None where its labels are not known

    def __init__(self, name: str, data_config: dict) -> None:
        """
        Args:
            name: Output folder of finetune_isic.py, or a timm name with pretrained weights.
            data_config: The student's; its images are normalised by it.

        Raises:
            RunError: A network without one pooled vector per image.
            WeightsError: No such network.
        """
        super().__init__()
        checkpoint = Checkpoint(name)
        self.name = name
        self.network = checkpoint.network().to(memory_format=torch.channels_last)
        self.task = Task.of_network(self.network, checkpoint.config())
        self.network.eval().requires_grad_(False)
        own = resolve_model_data_config(self.network)
        try:
            record = checkpoint.arguments()
        except WeightsError:
            if checkpoint.path is not None:  # a damaged file on this disk can be restored
                raise
            record = {}
        self.img_size = record.get('trained_at') or own['input_size'][-1]  # by average_runs.py --img-size, not the same
        mean, std, own_mean, own_std = (
            torch.tensor(config[key]).view(1, 3, 1, 1) for config in (data_config, own) for key in ('mean', 'std'))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer('scale', std / own_std)
        self.register_buffer('shift', (mean - own_mean) / own_std)
        self.width = feature_width(self.network, self.img_size, f'The teacher {name}')

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Pooled features (B, width) and logits of the student's images (B, 3, H, W)."""
        images = resize(images, [self.img_size, self.img_size])
        return pooled_and_logits(self.network, images * self.scale + self.shift)


class Teachers(nn.Module):
    """Frozen networks, and the loss that pulls a student towards the mean of their probabilities and their features."""

    def __init__(
            self,
            names: Sequence[str],
            data_config: dict,
            task: Task,
            weight: float,
            feature_weight: float,
    ) -> None:
        """
        Args:
            names: Of the teachers. Of those whose labels are others, as ImageNet's are, only the features are
                distilled.
            data_config: See :class:`Teacher`.
            task: The student's.
            weight: Share of the loss taken by the teachers' probabilities.
            feature_weight: Weight of one minus the cosine similarity of the features.

        Raises:
            RunError: As :class:`Teacher`, and a network whose outputs the student cannot learn, or from which nothing
                would be learned.
            WeightsError: No such network.
        """
        super().__init__()
        teachers = [Teacher(name, data_config) for name in names]
        self.teachers: Any = nn.ModuleList(teachers)
        self.task, self.feature_weight = task, feature_weight
        self.same_labels = [teacher.task is not None and teacher.task.labels == task.labels for teacher in teachers]
        self.weight = weight if any(self.same_labels) else 0.
        for teacher, same in zip(teachers, self.same_labels):
            if self.weight and same and task.is_softmax and not teacher.task.is_softmax:
                raise RunError(f'The teacher {teacher.name} has one sigmoid per label, and a softmax over the '
                               f'diagnoses cannot learn from it: leave it out, pass --distill-weight 0, or choose a '
                               f'teacher trained with --head softmax.')
            if self.weight and same and task.is_softmax and teacher.task.outputs != task.outputs:
                raise RunError(f'The teacher {teacher.name} has the outputs {", ".join(teacher.task.outputs)}, not '
                               f'{", ".join(task.outputs)}: leave it out, or pass --distill-weight 0.')
            if not feature_weight and not (self.weight and same):
                raise RunError(f'Nothing would be learned from the teacher {teacher.name}: leave it out, raise '
                               f'--distill-features, or raise --distill-weight and choose a teacher of these labels.')
        self.width = sum(teacher.width for teacher in teachers) if feature_weight else None

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """What the student is to give for its images (B, 3, H, W).

        Returns:
            The pooled features of each teacher, of length 1, side by side (B, width), and the mean of the
            probabilities (B, outputs) of those with the same labels, or None where no probabilities are distilled.
        """
        features, probabilities = [], []
        for teacher, same in zip(self.teachers, self.same_labels):
            pooled, logits = teacher(images)
            features.append(normalize(pooled.float(), dim=1))
            if same and self.weight:
                probabilities.append(
                    logits.float().softmax(1) if self.task.is_softmax else teacher.task.probabilities(logits))
        return torch.cat(features, 1), torch.stack(probabilities).mean(0) if probabilities else None

    def loss(
            self,
            label_loss: torch.Tensor,
            logits: torch.Tensor,
            features: Optional[torch.Tensor],
            theirs: Tuple[torch.Tensor, Optional[torch.Tensor]],
    ) -> torch.Tensor:
        """(1 - w) * label_loss + w * H(the teachers' probabilities, student's) + v * (1 - cos(features, theirs)).

        Args:
            label_loss, logits, features: The student's.
            theirs: What the teachers gave for the same images.
        """
        their_features, probabilities = theirs
        loss = (1 - self.weight) * label_loss
        if probabilities is not None:
            cross = cross_entropy if self.task.is_softmax else binary_cross_entropy_with_logits
            loss = loss + self.weight * cross(logits, probabilities)
        if features is not None:
            loss = loss + self.feature_weight * (1 - cosine_similarity(features, their_features)).mean()
        return loss
