"""The networks of a run: created and tried before any image is read, and what the optimizer is told of them."""
from functools import partial
from typing import Any, Dict, Optional

import torch
from accelerate.utils import set_seed
from timm.data import resolve_model_data_config
from timm.optim import param_groups_weight_decay

from ..attention import alphas_of, temperatures_of
from ..download import WeightsError
from ..factory import create_for_task, load_weights_file
from ..isic.task import ISIC2017, Task
from ..isic.transforms import CROP_PCT
from .arguments import RunError
from .distillation import Teachers

__all__ = ['config_for_size', 'create_networks', 'parameter_groups']

SET_BY_FLAGS = {  # and so not by --model-kwargs
    'model_name', 'name', 'num_classes', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path',
    'features_only', 'in_chans', 'pretrained_strict'}


def given(model_kwargs):
    """The arguments as the command has them."""
    return ' '.join(f'{name}={value}' for name, value in model_kwargs.items())


def config_for_size(model, img_size: Optional[int], what: str) -> Dict[str, Any]:
    """timm's data config of a trained network, for images of another side than its own, if one is given.

    Raises:
        RunError: A network that takes no such images.
    """
    data_config = resolve_model_data_config(model)
    if img_size:
        reason = _size_refused(model, img_size)
        if reason:
            raise RunError(f'{what} does not take images of {img_size} px (--img-size): {reason}')
        data_config['input_size'] = (3, img_size, img_size)
    return data_config


def _size_refused(model, img_size: int) -> Optional[Exception]:
    """Why a network does not take images of this side, or None."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, img_size, img_size).contiguous(memory_format=torch.channels_last))
    except (RuntimeError, ValueError, AssertionError) as error:
        return error
    return None


def create_networks(args, accelerator, task: Task = ISIC2017):
    """The network in its starting state, its teachers or None, and timm's data config for the images.

    Sizes that the model does not take are changed in args, with a line that says so, unless a flag gave them.

    Raises:
        RunError: --model-kwargs or a size that the model does not take, or a teacher that it cannot learn from.
        WeightsError: A model or weights that are not available.
    """
    set_seed(args.seed)
    for name in SET_BY_FLAGS & args.model_kwargs.keys():
        raise RunError(f'--model-kwargs {name}: leave it out, this program sets it itself.')
    try:
        model = create_for_task(
            args.model, pretrained=args.pretrained, num_classes=len(task.outputs), **args.model_kwargs)
    except WeightsError as error:
        if args.model_kwargs and isinstance(error.__context__, (TypeError, ValueError)):
            raise RunError(f'{args.model} does not take --model-kwargs {given(args.model_kwargs)}: '
                           f'{error.__context__}') from None
        raise
    if args.init_checkpoint:
        new = load_weights_file(model, args.init_checkpoint)
        accelerator.print(f'Weights from {args.init_checkpoint}' + (f', but new {" and ".join(new)}' if new else ''))
    model = model.to(memory_format=torch.channels_last)
    data_config = resolve_model_data_config(model)

    refused = partial(_size_refused, model)  # why, or None
    # a size that only the recipe sets gives way to the model's own
    own_size = data_config['input_size'][-1]
    img_size = args.img_size or own_size
    if 'img_size' not in args.sizes_given and img_size != own_size and refused(img_size):
        accelerator.print(f'{args.model} does not take the {img_size} px images of recipe {args.recipe}: training at '
                          f'its own {own_size} px.')
        args.img_size = img_size = own_size
    if args.start_size and 'start_size' not in args.sizes_given and refused(min(args.start_size, img_size)):
        accelerator.print(f'{args.model} cannot start with images of {args.start_size} px, as recipe {args.recipe} '
                          f'does: all epochs have {img_size} px.')
        args.start_size = None
    for side in dict.fromkeys((min(args.start_size or img_size, img_size), img_size)):
        reason = refused(side)
        if reason:
            of = f'{args.model} does not take images of {side} px (--img-size, --start-size): {reason}'
            raise RunError(of if not (args.model_kwargs and refused(own_size)) else
                           f'{args.model} cannot be trained with --model-kwargs {given(args.model_kwargs)}: {reason}')
    data_config.update(
        input_size=(3, img_size, img_size), interpolation='bilinear', crop_pct=CROP_PCT, crop_mode='center')
    teachers = None
    if args.teacher:
        teachers = Teachers(args.teacher, data_config, task, args.distill_weight, args.distill_features)
        for teacher, same in zip(teachers.teachers, teachers.same_labels):
            learned = ' and '.join(['probabilities'] * bool(teachers.weight and same)
                                   + ['pooled features'] * bool(args.distill_features))
            accelerator.print(f'Teacher {teacher.name}, shown images of {teacher.img_size} px: its {learned} are '
                              f'learned.')
    return model, teachers, data_config


def parameter_groups(model, args, lr):
    """Weights with weight decay, biases and norms without it, and the gates' scalars without it at their own rate."""
    alphas = [*alphas_of(model).values(), *temperatures_of(model).values()]
    own = {id(p) for p in alphas}
    groups = param_groups_weight_decay(model, args.weight_decay)
    for group in groups:
        group['params'] = [p for p in group['params'] if id(p) not in own]
    if alphas:
        scale = 1. if args.alpha_lr is None else args.alpha_lr / lr
        groups.append(dict(params=alphas, weight_decay=0., lr_scale=scale))
    return groups
