"""Patches: where they are cut, and that decoding less of a JPEG does not change what is in them."""
import io

import numpy as np
import pytest
from PIL import Image

from timm_arl.isic.crops import SCALES, patch_boxes, patches, shorter_side_for
from timm_arl.isic.images import decode


def picture(width=1600, height=1200):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256 // 8 * 8], -1).astype(np.uint8))


def encoded(image, fmt='JPEG'):
    file = io.BytesIO()
    image.save(file, fmt, **(dict(quality=95) if fmt == 'JPEG' else {}))
    return {'bytes': file.getvalue(), 'path': None}


def test_scales_and_place_are_the_papers():
    assert SCALES == (1 / 5, 2 / 5, 3 / 5, 4 / 5)
    boxes = patch_boxes((1600, 1200), 60, np.random.default_rng(0))
    assert len(boxes) == 60
    sides = {round(right - left, 6) for left, _, right, _ in boxes}
    assert sides == {240, 480, 720, 960}
    for left, top, right, bottom in boxes:
        assert right - left == pytest.approx(bottom - top)  # aspect is kept
        assert left >= 0 and top >= 0 and right <= 1600 + 1e-6 and bottom <= 1200 + 1e-6
        assert 400 <= (left + right) / 2 <= 1200 or right - left > 800
    assert boxes == patch_boxes((1600, 1200), 60, np.random.default_rng(0))
    assert boxes != patch_boxes((1600, 1200), 60, np.random.default_rng(1))


@pytest.mark.parametrize('fmt, shorter, expected', [
    ('JPEG', 1120, (1600, 1200)), ('JPEG', 600, (800, 600)), ('JPEG', 300, (400, 300)), ('JPEG', 1, (200, 150)),
    ('JPEG', 5000, (1600, 1200)), ('PNG', 300, (1600, 1200))])
def test_decoding_is_reduced_as_far_as_asked_and_no_further(fmt, shorter, expected):
    assert decode(encoded(picture(), fmt), shorter).size == expected


def test_reduced_decoding_gives_the_same_patches():
    full, reduced = (decode(encoded(picture()), side) for side in (None, shorter_side_for(56)))
    assert reduced.size == (400, 300)
    for k in range(3):
        both = []
        for image in (full, reduced):
            boxes = patch_boxes(image.size, 9, np.random.default_rng(k))
            both.append(np.stack([np.asarray(p, np.float32) for p in patches(image, boxes, 56)]))
        assert both[0].shape == (9, 56, 56, 3)
        assert np.abs(both[0] - both[1])[..., :2].mean() < 2  # of 255, on the smooth channels


@pytest.mark.slow
def test_no_patch_is_enlarged():
    assert min(SCALES) * shorter_side_for(224) >= 224
    assert min(SCALES) * 3000 / 2 >= 224  # so a 12-megapixel photograph is decoded at half its size
    assert decode(encoded(picture(4000, 3000)), shorter_side_for(224)).size == (2000, 1500)


def test_modes_and_faults(tmp_path):
    for mode in ('CMYK', 'L'):
        small = decode(encoded(picture().convert(mode)), 300)
        assert small.mode == 'RGB' and small.size == (400, 300)
    whole = encoded(picture())['bytes']
    for side in (None, 1):  # a small decode finds a truncated file too
        with pytest.raises(OSError, match='truncated'):
            decode({'bytes': whole[:len(whole) * 3 // 4], 'path': None}, side)
    with pytest.raises(OSError, match='not an image in a format that Pillow knows'):
        decode({'bytes': b'no picture', 'path': None}, 300)
    (tmp_path / 'a.jpg').touch()
    for cell in ({'bytes': b'', 'path': None}, {'bytes': None, 'path': str(tmp_path / 'a.jpg')}):
        with pytest.raises(OSError, match='it is empty'):
            decode(cell, 300)
