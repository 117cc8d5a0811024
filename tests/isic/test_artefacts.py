"""Hair and bubbles: where they are drawn is what the mask says, and nothing else changes."""
import numpy as np
import pytest
from PIL import Image

from timm_arl.isic.artefacts import draw_bubbles, draw_hair

SKIN = (205, 160, 140)


@pytest.mark.parametrize('draw', [draw_hair, draw_bubbles])
@pytest.mark.parametrize('size', [(300, 200), (120, 320)])
def test_the_mask_is_where_the_picture_changed(draw, size):
    before = Image.new('RGB', size, SKIN)
    after, mask = draw(before, 3)
    assert after.size == mask.size == size and after.mode == 'RGB' and mask.mode == 'L'
    drawn = np.asarray(mask) == 255
    assert set(np.unique(mask)) == {0, 255}
    changed = (np.asarray(after) != np.asarray(before)).any(-1)
    assert not (changed & ~drawn).any() and changed[drawn].mean() > 0.95
    assert before.getcolors() == [(size[0] * size[1], SKIN)]  # the picture given is left as it is
    assert 0.005 < drawn.mean() < 0.25


@pytest.mark.parametrize('draw', [draw_hair, draw_bubbles])
def test_the_seed_decides_and_the_count_adds(draw):
    skin = Image.new('RGB', (200, 150), SKIN)
    first, again, other = (np.asarray(draw(skin, seed)[0]) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    few, many = (np.asarray(draw(skin, 1, count)[1]).mean() for count in (2, 30))
    assert many > 3 * few > 0
    untouched, mask = draw(skin, 1, 0)
    assert untouched.getcolors() == skin.getcolors() and mask.getcolors() == [(200 * 150, 0)]


def test_hair_is_dark_and_thin_and_a_bubble_is_bright_within_a_dark_rim():
    skin = Image.new('RGB', (600, 450), SKIN)
    hairy, mask = draw_hair(skin, 0)
    hair = np.asarray(hairy.convert('L'), float)[np.asarray(mask) == 255]
    assert np.median(hair) < 90
    assert np.asarray(mask).mean() / 255 < 0.06  # thin
    bubbly, mask = draw_bubbles(skin, 0)
    inside = np.asarray(bubbly.convert('L'), float)[np.asarray(mask) == 255]
    skin_grey = np.asarray(skin.convert('L'), float)[0, 0]
    assert np.median(inside) > skin_grey and inside.max() > 240 and inside.min() < skin_grey - 20
