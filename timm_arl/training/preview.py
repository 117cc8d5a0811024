"""A contact sheet of what the network will see."""
from itertools import islice

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from ..files import replacing
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.loading import IsicStream
from ..isic.task import ISIC2017, Task

__all__ = ['preview']

COLUMNS = 8
LINE, MARGIN = 16, 12  # height of a line of text, space around a tile, in pixels


def preview(args, images, data_config, task: Task = ISIC2017):
    """Draw a contact sheet: a row of training images, augmented, at the final size, and crops of each other split."""
    side, font = data_config['input_size'][-1], ImageFont.load_default(size=12)
    width = max(side, 124) + MARGIN  # room for the captions
    height = side + 3 * LINE + 2 * MARGIN
    mean, std = (torch.tensor(data_config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    sheet = Image.new('RGB', (COLUMNS * width + MARGIN, len(images) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    synthetic = ' (SYNTHETIC images)' * (args.data in DEMO_TASKS)
    grown = f', the last epochs (the first have {args.start_size} px)' * (0 < (args.start_size or 0) < side)
    for row, (name, split) in enumerate(images.items()):
        top = row * height + MARGIN
        what = f'augmentation {args.augmentation}{grown}' if name == 'train' else f'crops {args.crops}'
        draw.text((MARGIN, top), f'{name}, {what}, {side} px{synthetic}', 'black', font)
        for column, (image, labels, caption) in enumerate(islice(_tiles(split), COLUMNS)):
            left = column * width + MARGIN
            sheet.paste(to_pil_image((image * std + mean).clamp(0, 1)), (left, top + LINE + 4))
            draw.multiline_text(
                (left, top + side + LINE + 6), f'{caption}\n{task.diagnosis(labels)}', 'black', font)
    with replacing(args.preview) as temporary:
        sheet.save(temporary, format='PNG')
    print(f'Contact sheet of what the network sees: {args.preview}')


def _tiles(split):
    """Tensors (3, H, W) of a split, their labels, and captions: the image_id, and which crop of how many."""
    if isinstance(split, IsicStream):
        for images, labels, image_ids, *_ in split:
            yield from zip(images, labels, image_ids)
        return
    for row, image_id in enumerate(split.image_ids):
        crops, labels, *_ = split[row]
        if crops.ndim == 3:
            yield crops, labels, image_id
        else:
            yield from ((crop, labels, f'{image_id}, {k}/{len(crops)}') for k, crop in enumerate(crops, 1))
