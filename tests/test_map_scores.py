"""What maps are scored by."""
import numpy as np
import pytest

from timm_arl.explain import centred_gaussian, map_iou, pointing_game


def test_pointing_game():
    mask = np.zeros((6, 9), bool)
    mask[1:4, 2:5] = True
    heat = np.full((6, 9), -3.)
    heat[3, 4] = -1
    assert pointing_game(heat, mask)
    heat[4, 4] = 0
    assert not pointing_game(heat, mask)
    heat[4, 4] = np.nan  # where no crop looked nothing is the highest
    assert pointing_game(heat, mask)
    heat[3, 5] = heat[2, 5] = -1  # of three highest points one lies in the lesion
    assert not pointing_game(heat, mask)
    assert not pointing_game(np.zeros((6, 9)), mask)  # a flat map points nowhere


def test_map_iou():
    mask = np.zeros((10, 10), bool)
    mask[2:6, 2:6] = True
    heat = np.where(mask, 1., 0.)
    assert map_iou(heat, mask, 0.5) == 1
    assert map_iou(100 * heat - 200, mask, 0.5) == 1  # a threshold is a share of the map's own range
    heat[2:6, 6:10] = 0.6
    assert map_iou(heat, mask, 0.5) == 0.5 and map_iou(heat, mask, 0.7) == 1
    assert map_iou(heat, mask, 0) == 0.16
    heat[2:4] = np.nan
    assert map_iou(heat, mask, 0.7) == 0.5
    assert map_iou(np.zeros((10, 10)), mask, 0.5) == 0.16  # flat: all of the picture


@pytest.mark.parametrize('score', [pointing_game, map_iou])
def test_what_scores_refuse(score):
    mask = np.ones((4, 4), bool)
    with pytest.raises(ValueError, match='needs a mask of that shape'):
        score(np.zeros((4, 5)), mask)
    with pytest.raises(ValueError, match='type uint8'):
        score(np.zeros((4, 4)), mask.astype(np.uint8) * 255)
    with pytest.raises(ValueError, match='mask is empty'):
        score(np.zeros((4, 4)), ~mask)
    with pytest.raises(ValueError, match='NaN throughout'):
        score(np.full((4, 4), np.nan), mask)
    with pytest.raises(ValueError, match='between 0 and 1, not at 50'):
        map_iou(np.zeros((4, 4)), mask, 50)


def test_centred_gaussian():
    heat = centred_gaussian((300, 200))
    assert heat.shape == (200, 300) and heat.dtype == np.float32
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert (y, x) in {(99, 149), (99, 150), (100, 149), (100, 150)} and heat.max() == pytest.approx(1, abs=1e-4)
    # one standard deviation, a quarter of the side, from the centre
    assert heat[100, 75] == pytest.approx(np.exp(-0.5), abs=0.01) == heat[50, 150]
    assert centred_gaussian((300, 200), 0.1)[100, 75] < 0.05
    np.testing.assert_allclose(heat, heat[::-1, ::-1], rtol=1e-5)
