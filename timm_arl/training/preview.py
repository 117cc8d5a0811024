"""A contact sheet of what the network will see."""
from itertools import islice

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image

from ..files import replacing
from ..isic.loading import IsicStream

__all__ = ['preview']


def preview(args, images, data_config):
    """Draw a contact sheet: a row of training images, augmented, at the final size, and crops of each other split."""
    columns, side, title, caption = 8, data_config['input_size'][-1], 18, 14
    cell = max(side, 108)  # room for the caption
    mean, std = (torch.tensor(data_config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    sheet = Image.new('RGB', (columns * cell, len(images) * (title + side + caption)), 'white')
    draw = ImageDraw.Draw(sheet)
    synthetic = ' (SYNTHETIC images)' * (args.data == 'demo')
    grown = f', the last epochs (the first have {args.start_size} px)' * (0 < (args.start_size or 0) < side)
    for number, (name, split) in enumerate(images.items()):
        top = number * (title + side + caption)
        what = f'augmentation {args.augmentation}{grown}' if name == 'train' else f'crops {args.crops}'
        draw.text((4, top + 3), f'{name}, {what}, {side} px{synthetic}', fill='black')
        for column, (image, text) in enumerate(islice(_tiles(split), columns)):
            sheet.paste(to_pil_image((image * std + mean).clamp(0, 1)), (column * cell, top + title))
            draw.text((column * cell, top + title + side), text, fill='black')
    with replacing(args.preview) as temporary:
        sheet.save(temporary, format='PNG')
    print(f'Contact sheet of what the network sees: {args.preview}')


def _tiles(split):
    """Tensors (3, H, W) of a split and their captions: the image_id, and which crop of how many."""
    if isinstance(split, IsicStream):
        for images, _, image_ids, *_ in split:
            yield from zip(images, image_ids)
        return
    for row, image_id in enumerate(split.image_ids):
        crops = split[row][0]
        if crops.ndim == 3:
            yield crops, image_id
        else:
            yield from ((crop, f'{image_id} {k}/{len(crops)}') for k, crop in enumerate(crops, 1))
