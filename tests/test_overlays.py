"""Maps on pictures: they lie where the crop was cut, lighter is more, and the legend is there."""
import numpy as np
import pytest
import torch
from PIL import Image

from timm_arl.isic.transforms import CROPS, EvalCrops
from timm_arl.overlays import colours, on_picture, overlay, panel


@pytest.mark.parametrize('size', [(600, 400), (400, 400), (333, 517)])
@pytest.mark.parametrize('crops', CROPS)
@pytest.mark.parametrize('place', [(0.5, 0.5), (0.35, 0.6)])
def test_a_hot_spot_of_the_crops_is_where_it_is_in_the_picture(size, crops, place):
    """The crops' own pixels as maps, laid back, are the picture again."""
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    spot = np.exp(-((x - place[0] * width) ** 2 + (y - place[1] * height) ** 2) / (0.08 * min(size)) ** 2)
    picture = Image.fromarray((255 * spot).round().astype(np.uint8)).convert('RGB')
    torch.manual_seed(0)
    tensor, boxes = EvalCrops(64, crops).with_boxes(picture)
    heat = on_picture(tensor[:, 0].float() / 255, boxes, size)
    assert heat.shape == (height, width) and heat.dtype == np.float32
    seen = ~np.isnan(heat)
    assert np.abs(heat - spot)[seen].max() < 0.1
    if crops == 'multiscale':  # from end to end
        assert seen.mean() == (1 if max(size) < 2 * min(size) else 0)
    top, left = np.unravel_index(np.nanargmax(heat), heat.shape)
    assert abs(left - place[0] * width) <= 6 and abs(top - place[1] * height) <= 6


@pytest.mark.parametrize('box', [(0, 0, 400, 400), (200, 0, 600, 400), (137.5, 80.25, 387.5, 330.25)])
def test_a_hot_cell_of_a_coarse_map(box):
    maps = np.zeros((1, 7, 7), np.float32)
    maps[0, 2, 5] = 1
    heat = on_picture(maps, [box], (600, 400))
    left, top, right, bottom = box
    x, y = np.arange(600) + 0.5, np.arange(400)[:, None] + 0.5
    inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
    assert (np.isnan(heat) == ~inside).all()
    middle = left + 5.5 / 7 * (right - left), top + 2.5 / 7 * (bottom - top)
    row, column = np.unravel_index(np.nanargmax(heat), heat.shape)
    assert abs(column + 0.5 - middle[0]) <= 1 and abs(row + 0.5 - middle[1]) <= 1
    # bilinear: nothing is left a whole cell away, and half of it half a cell away
    cell = (right - left) / 7
    assert heat[row, round(column - cell - 1)] == 0
    assert heat[row, round(column - cell / 2)] == pytest.approx(0.5, abs=0.03)


def test_overlapping_crops_are_averaged():
    maps = torch.tensor([1., 4.])[:, None, None].expand(2, 3, 3)
    heat = on_picture(maps, [(0, 0, 10, 10), (6, 0, 16, 10)], (20, 10))
    assert (heat[:, :6] == 1).all() and (heat[:, 6:10] == 2.5).all() and (heat[:, 10:16] == 4).all()
    assert np.isnan(heat[:, 16:]).all()


def test_a_ramp_stays_the_same_ramp():
    left, right = 13.3, 171.8
    cells = (np.arange(8) + 0.5) / 8
    heat = on_picture(np.broadcast_to(cells, (1, 4, 8)), [(left, 2, right, 50)], (200, 60))
    x = np.arange(200) + 0.5
    inside = (x > left + (right - left) / 16) & (x < right - (right - left) / 16)
    np.testing.assert_allclose(heat[30, inside], ((x - left) / (right - left))[inside], atol=1e-5)


def test_a_fine_map_is_averaged_and_not_sampled():
    noise = np.random.default_rng(0).uniform(size=(1, 200, 200))
    heat = on_picture(noise, [(0, 0, 20, 20)], (20, 20))
    assert heat.std() < 0.15 * noise.std() and heat.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize('maps, boxes, match', [
    (np.zeros((2, 3, 3)), [(0, 0, 10, 10)], r'1 boxes need maps of shape \(1, h, w\), not \(2, 3, 3\)'),
    (np.zeros((1, 2, 3, 3)), [(0, 0, 10, 10)], 'not'),
    (np.zeros((1, 3, 3)), [(0, 0, 30, 10)], r'Box \(0, 0, 30, 10\) does not lie in a picture of 20 x 10 px'),
    (np.zeros((1, 3, 3)), [(5, 0, 5, 10)], 'does not lie')])
def test_what_on_picture_refuses(maps, boxes, match):
    with pytest.raises(ValueError, match=match):
        on_picture(maps, boxes, (20, 10))


def luminance(rgb):
    """CIE relative luminance of sRGB, 0 to 1."""
    share = np.asarray(rgb, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_more_is_lighter():
    values = np.linspace(0, 1, 400)
    light = luminance(colours(values))
    assert (np.diff(light) > 0).all() and light[0] < 0.05 and light[-1] > 0.75
    grey = np.asarray(Image.fromarray(colours(values[::6])[None].round().astype(np.uint8)).convert('L'), int)[0]
    assert (np.diff(grey) >= 0).all() and grey[-1] - grey[0] > 150  # printed in grey
    # to those who see no red or no green (Machado et al., 2009, severity 1) blue and yellow remain
    assert (np.diff(colours(values)[:, 2] - colours(values)[:, :2].mean(1))[60:] < 0.01).all()
    np.testing.assert_array_equal(colours(np.array([-3., 7.])), colours(np.array([0., 1.])))


def heat_of(width, height):
    return np.broadcast_to(np.linspace(-1, 3, width, dtype=np.float32), (height, width)).copy()


@pytest.mark.parametrize('size, shown', [
    ((500, 300), (500, 300)), ((3000, 2000), (3000, 2000)), ((90, 60), (360, 240)), ((60, 90), (360, 540))])
def test_the_size_of_an_overlay(size, shown):
    picture = Image.new('RGB', size, (200, 150, 130))
    image = overlay(picture, heat_of(*size), 'Evidence for melanoma')
    assert image.mode == 'RGB' and image.width == shown[0]
    assert shown[1] + 45 < image.height < shown[1] + max(0.2 * shown[0], 100)
    assert picture.getcolors() == [(size[0] * size[1], (200, 150, 130))]


def test_an_overlay_is_lighter_where_there_is_more_and_untouched_where_no_crop_looked():
    picture = Image.fromarray(np.random.default_rng(0).integers(90, 110, (300, 500, 3), dtype=np.uint8))
    heat = heat_of(500, 300)
    heat[:100] = np.nan
    pixels = np.asarray(overlay(picture, heat, ''))
    assert (pixels[:100] == np.asarray(picture)[:100]).all()
    light = luminance(pixels[100:300]).mean(0).reshape(20, -1).mean(1)
    assert (np.diff(light) > 0).all() and light[-1] > 2 * light[0]


def test_limits_hold_across_pictures():
    picture = Image.new('L', (400, 200), 120)
    flat = np.full((200, 400), 1., np.float32)
    pixels = [np.asarray(overlay(picture, flat * value, '', limits=(0, 2)))[100, 200] for value in (0, 1, 2, 5)]
    assert pixels[0].sum() < pixels[1].sum() < pixels[2].sum() == pixels[3].sum()
    alone = np.asarray(overlay(picture, flat, ''))  # a flat map has one colour
    assert len(np.unique(alone[:200].reshape(-1, 3), axis=0)) == 1


def test_the_legend_has_a_bar_its_numbers_and_the_words():
    picture = Image.new('RGB', (600, 300))
    strips = {words: np.asarray(overlay(picture, heat_of(600, 300), words))[300:] for words in (
        'Evidence', 'Evidence for seborrheic keratosis', 'Evidence for seborrheic keratosis ' * 4, '')}
    bar = strips['Evidence'][25, 15:585]
    assert (bar == colours(np.linspace(0, 1, 570)).round()).all(1).sum() == 569  # all but the mark at 0
    dark = {words: (strip.max(-1) < 100).sum() for words, strip in strips.items()}
    assert dark[''] < dark['Evidence'] < dark['Evidence for seborrheic keratosis']
    longest = strips['Evidence for seborrheic keratosis ' * 4]
    assert longest.shape[0] > strips['Evidence'].shape[0]  # it is wrapped
    assert (longest[:, -10:] == 255).all()  # and nothing runs out of the picture


def test_limits_that_differ_in_the_fifth_digit_are_told_apart():
    heat = np.linspace(1, 1.00002, 300 * 600).reshape(300, 600)
    ink = np.asarray(overlay(Image.new('RGB', (600, 300)), heat, ''))[345:].max(-1) < 128
    numbers = []
    for half in (ink[:, :200], ink[:, 400:]):
        rows, columns = (np.flatnonzero(half.any(axis)) for axis in (1, 0))
        numbers.append(half[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])
    assert numbers[0].shape[1] < numbers[1].shape[1] / 3  # 1 and 1.00002


@pytest.mark.parametrize('heat, limits, match', [
    (np.zeros((300, 200)), None, r'A picture of 300 x 200 px needs a map of shape \(200, 300\), not \(300, 200\)'),
    (np.full((200, 300), np.nan), None, 'NaN throughout'), (np.zeros((200, 300)), (2, 1), 'two rising numbers'),
    (np.zeros((200, 300)), (1, 1), 'two rising numbers')])
def test_what_an_overlay_refuses(heat, limits, match):
    with pytest.raises(ValueError, match=match):
        overlay(Image.new('RGB', (300, 200)), heat, '', limits)


def test_a_panel_lines_pictures_up():
    red, blue = Image.new('RGB', (200, 100), (255, 0, 0)), Image.new('RGB', (100, 90), (0, 0, 255))
    pixels = np.asarray(panel([(red, 'first'), (blue, ''), (red, 'a caption that needs more than a line ' * 3)], 2))
    reds, blues = ((pixels == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    rows = np.flatnonzero(reds[:, 50])
    assert len(rows) == 200 and reds.sum() == 2 * 200 * 100  # whole, one below the other
    assert blues.any(1).sum() == 180 and blues.any(0).sum() == 200  # as wide as the widest
    assert np.flatnonzero(blues.any(1))[0] == rows[0]  # aligned at the top, though only one has a caption
    narrow = panel([(red, 'first')], 3, width=90)
    assert 90 <= narrow.width < 110
    for pictures, columns in (([], 2), ([(red, '')], 0)):
        with pytest.raises(ValueError, match='at least one picture and one column'):
            panel(pictures, columns)
