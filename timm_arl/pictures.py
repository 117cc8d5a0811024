"""Images read one by one, in worker processes: the crops of each, or the reason why there are none."""
import errno
import itertools
import math
import os
import stat
import warnings
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from .isic.crops import Box
from .isic.images import SEVERAL
from .isic.transforms import restore_aspect
from .predictor import LARGEST_MAP, Cutter, read_picture, shrunk

__all__ = ['REMARKS', 'Pictures', 'Seen', 'collate', 'remark_on']

LONGEST_REASON = 300  # characters
PASSING = {  # errors of the machine, its disks or its network, not of an image; a platform may lack some
    getattr(errno, name, None) for name in (
        'ENOMEM', 'EMFILE', 'ENFILE', 'EIO', 'ENXIO', 'ENODEV', 'EREMOTEIO', 'ESTALE', 'ENOTCONN', 'ETIMEDOUT',
        'EHOSTDOWN', 'EHOSTUNREACH')} - {None}
AGAIN = 'If a resumed run stops at it again, move it away: its row then says that it is missing.'
REMARKS = {
    'frames': 'holds several pictures (frames or pages), of which the first is used: save the one that is meant as a '
              'file of its own',
    'small': 'is smaller than what the network looks at ({side} x {side} px): expect less of its probabilities',
    'grey': 'has no colours, and the network was trained on colour photographs of skin',
    'flat': 'is nearly one colour, unlike a photograph',
    'square': 'is exactly square. If it was squashed, its probabilities are off: networks here learned lesions in the '
              'shape of the originals',
}


class Seen(NamedTuple):
    """An image as a worker process has read it."""

    name: str
    stem: str
    crops: torch.Tensor  # uint8 (K, 3, S, S); none where there is a reason
    picture: Optional[Image.Image] = None  # a copy of at most LARGEST_MAP pixels
    boxes: Sequence[Box] = ()  # where the crops lie in it
    reason: str = ''
    remark: str = ''  # one of REMARKS
    stop: str = ''  # what to do where the reason is the machine's: no row may say that the image is damaged


class Pictures(Dataset):
    """Reads images by name."""

    def __init__(
            self,
            cutter: Cutter,
            folder: str,
            keep: bool,
            aspect: Optional[float] = None,
            arguments: Sequence[str] = (),
    ) -> None:
        """
        Args:
            cutter: From a picture to crops.
            folder: Where relative names start.
            keep: Whether to give small copies of the pictures too.
            aspect: Width / height of the originals of pictures that are exactly square, which are stretched back to it.
            arguments: What the images were found by. If a folder among them is gone, none of its images is damaged.
        """
        self.cutter, self.folder, self.keep, self.aspect = cutter, folder, keep, aspect
        self.arguments = arguments

    def __getitem__(self, listed: Tuple[str, str]) -> Seen:
        (name, stem), stop = listed, ''
        path = os.path.join(self.folder, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # Pillow's, on odd files that it reads all the same
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise OSError('it is a folder' if os.path.isdir(path) else 'it is no file')  # a pipe would block
                side = self.cutter.shorter_side
                if self.aspect and self.aspect < 1:
                    side = math.ceil(side / self.aspect)  # a square copy will be made narrower
                picture = read_picture(path, side)
                if self.aspect:
                    picture = restore_aspect(picture, self.aspect)
                crops, boxes = self.cutter(picture, Path(name).stem)
        except MemoryError:
            reason, stop = 'too little memory', f'Choose a smaller --batch-size. {AGAIN}'
        except OSError as error:
            reason = error.strerror or str(error) or f'it is damaged ({type(error).__name__})'
            stop = AGAIN if error.errno in PASSING else self._gone(path) if error.errno == errno.ENOENT else ''
        except Exception as error:  # decoders raise what they like about a damaged file, and the others are to be done
            reason = f'{type(error).__name__}: {error}'
        else:
            remark = remark_on(picture, crops[0], self.cutter.crops.img_size)
            small, boxes = shrunk(picture, boxes, LARGEST_MAP) if self.keep else (None, [])
            return Seen(name, stem, crops, small, boxes, remark=remark)
        words = ''.join(c if c.isprintable() else ' ' for c in reason).split()  # decoders quote bytes of the file
        return Seen(name, stem, torch.empty(0), reason=' '.join(words)[:LONGEST_REASON], stop=stop)

    def _gone(self, path: str) -> str:
        """What to do about a missing file that was found in a folder which is no longer there itself; else ''."""
        for name in self.arguments:
            folder = os.path.join(self.folder, name, '')
            if path.startswith(folder) and not os.path.isdir(folder):
                return f'The folder {name} is gone: bring it back (is its disk connected?).'
        return ''


def remark_on(picture: Image.Image, crop: torch.Tensor, side: int) -> str:
    """One of REMARKS for a picture and its first crop, uint8 (3, H, W), or ''; side: of what the network takes."""
    crop = crop.float()
    if picture.info.get(SEVERAL):
        return 'frames'
    if min(picture.size) < side:
        return 'small'
    if crop.std((1, 2)).max() < 4:
        return 'flat'
    if (crop.amax(0) - crop.amin(0)).mean() < 2:
        return 'grey'
    return 'square' if picture.width == picture.height else ''


def collate(seen: List[Seen]) -> Tuple[List[Seen], List[torch.Tensor]]:
    """The images of a batch, and the crops of those that could be read: (B, K, 3, S, S), in several parts for whole
    pictures of several sizes."""
    readable = [image.crops for image in seen if not image.reason]
    return ([image._replace(crops=torch.empty(0)) for image in seen],
            [torch.stack(list(same)) for _, same in itertools.groupby(readable, lambda crops: crops.shape)])
