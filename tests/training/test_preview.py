"""The contact sheet as a reader sees it: tiles pixel by pixel, white around them, the diagnosis in words below."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from timm_arl.isic.task import LABELS
from timm_arl.training.preview import preview

SIDE = 64


class Split:
    """Two images of one colour, with the labels given, as IsicSplit would have them."""

    image_ids = ['ISIC_0000001', 'ISIC_0000002']

    def __init__(self, labels):
        self.labels = labels

    def set_epoch(self, epoch):
        pass

    def __getitem__(self, row):
        return torch.full((3, SIDE, SIDE), 1.), torch.tensor(self.labels), row


def sheet(path, labels):
    args = SimpleNamespace(preview=path, data='x', start_size=None, augmentation='modern', crops='center', epochs=1)
    preview(args, {'train': Split(labels)}, {
        'input_size': (3, SIDE, SIDE), 'mean': (0.5, 0.25, 0.), 'std': (0.5, 0.25, 0.)})
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize('label', range(len(LABELS)))
def test_tiles_have_a_margin_and_the_words_of_their_label(tmp_path, label):
    none = sheet(tmp_path / 'none.png', [0.] * len(LABELS))
    tile = (none == [255, 127, 0]).all(-1)  # 1 * std + mean
    rows, columns = np.flatnonzero(tile.any(1)), np.flatnonzero(tile.any(0))
    assert len(rows) == SIDE and len(columns) == 2 * SIDE and tile.sum() == 2 * SIDE ** 2
    assert rows[0] > 8 and (none[rows][:, ~tile.any(0)] == 255).all()  # white beside them
    assert columns[0] > 8 and columns[SIDE] - columns[SIDE - 1] > 8

    other = sheet(tmp_path / 'other.png', [float(k == label) for k in range(len(LABELS))])
    changed = np.flatnonzero((none != other).any((1, 2)))
    assert len(changed) and changed.min() > rows[-1]  # the words below the tiles, and nothing else
    assert (other[-1] == 255).all() and (other[:, -1] == 255).all()  # which are not cut
