"""What the network sees."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_arl.isic.transforms import (
    AUGMENTATIONS,
    CROPS,
    EvalCrops,
    eval_transform,
    grey_world,
    lesion_crop,
    restore_aspect,
    train_transform,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def gradient(width=256, height=256):
    x = np.linspace(0, 255, width, dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(x[None, :, None], (height, width, 3)).copy())


@pytest.mark.parametrize('aspect_ratio, size', [
    (1.5, (384, 256)), (4 / 3, (341, 256)), (None, (384, 256)), (float('nan'), (384, 256)), (1.0, (256, 256))])
def test_squashed_copy_gets_its_shape_back(aspect_ratio, size):
    assert restore_aspect(gradient(), aspect_ratio).size == size


def test_pictures_that_are_not_square_are_left_alone():
    assert restore_aspect(gradient(300, 200), 1.5).size == (300, 200)


def test_eval_sees_the_centre_normalised():
    out, = eval_transform(224, MEAN, STD)(gradient(384, 256))
    assert out.shape == (3, 224, 224) and out.dtype == torch.float32
    pixels = out[0] * STD[0] + MEAN[0]
    # 224 of 384 columns about the centre: from 80/384 to 304/384 of a ramp from 0 to 1
    assert pixels[0, 0].item() == pytest.approx(80 / 384, abs=0.01)
    assert pixels[0, -1].item() == pytest.approx(304 / 384, abs=0.01)
    assert torch.equal(out, eval_transform(224, MEAN, STD)(gradient(384, 256))[0])


@pytest.mark.parametrize('size', [64, 96, 160, 224, 256, 320])
def test_eval_is_timms_own_preprocessing_of_the_saved_config(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8))
    theirs = create_transform((3, size, size), interpolation='bilinear', crop_pct=0.875, mean=MEAN, std=STD)
    assert torch.allclose(eval_transform(size, MEAN, STD)(noise)[0], theirs(noise), atol=1e-5)


@pytest.mark.parametrize('augmentation', AUGMENTATIONS)
@pytest.mark.parametrize('size', [(256, 256), (384, 256), (60, 200)])
def test_training_varies_with_the_torch_seed_alone(augmentation, size):
    transform = train_transform(64, MEAN, STD, augmentation)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(transform(gradient(*size)))
    assert outputs[0].shape == (3, 64, 64) and outputs[0].dtype == torch.float32
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize('augmentation', ['paper', 'modern'])
def test_augmentation_brings_no_black_corners(augmentation):
    transform = train_transform(64, (0, 0, 0), (1, 1, 1), augmentation)
    for seed in range(20):
        torch.manual_seed(seed)
        assert transform(Image.new('RGB', (384, 256), (200, 170, 150))).min() > 0.2


def test_paper_patches_have_the_papers_scales():
    """Rotated by at most 10 degrees, a ramp's slope shows what share of the picture a patch spans."""
    transform = train_transform(64, (0, 0, 0), (1, 1, 1), 'paper')
    shares = []
    for seed in range(80):
        torch.manual_seed(seed)
        patch = transform(gradient(256, 256))[0]
        across = (patch[:, 56:60].mean() - patch[:, 4:8].mean()).abs() / 52 * 64
        down = (patch[56:60].mean() - patch[4:8].mean()).abs() / 52 * 64
        shares.append(float((across ** 2 + down ** 2).sqrt()))
    shares = np.array(shares)
    for low, high in ((0.2 / 1.15, 0.2 / 0.85), (0.4 / 1.15, 0.4 / 0.85), (0.6 / 1.15, 0.6 / 0.85), (0.7, 0.95)):
        assert 8 <= ((shares > low) & (shares < high)).sum()
    assert 0.15 < shares.min() and shares.max() < 1


@pytest.mark.parametrize('crops, count', [('center', 1), ('multiscale', 5), ('paper', 9)])
def test_crops_of_a_test_image(crops, count):
    transform = eval_transform(32, (0, 0, 0), (1, 1, 1), crops)
    torch.manual_seed(4)
    first = transform(gradient(384, 256))
    torch.manual_seed(4)
    assert first.shape == (count, 3, 32, 32) and torch.equal(first, transform(gradient(384, 256)))
    torch.manual_seed(5)
    assert torch.equal(first, transform(gradient(384, 256))) == (crops != 'paper')
    if crops == 'multiscale':  # together they see the picture from end to end
        assert first[:, 0].min() < 0.02 and first[:, 0].max() > 0.98
    assert set(CROPS) == {'center', 'multiscale', 'paper'}


@pytest.mark.parametrize('size', [(384, 256), (256, 256), (301, 517)])
@pytest.mark.parametrize('crops', CROPS)
def test_boxes_say_where_each_crop_was_cut(crops, size):
    """In a picture whose red and green tell the place, the means of a crop are those of its box's centre."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    place = np.stack([x / width, y / height, 0 * x], -1) * 255
    picture = Image.fromarray(place.round().astype(np.uint8))
    tensor, boxes = EvalCrops(32, crops).with_boxes(picture)
    assert len(tensor) == len(boxes)
    for crop, (left, top, right, bottom) in zip(tensor.double(), boxes):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert crop[0].mean() / 255 * width == pytest.approx((left + right) / 2 - 0.5, abs=1)
        assert crop[1].mean() / 255 * height == pytest.approx((top + bottom) / 2 - 0.5, abs=1)
        across = (crop[0, :, -1] - crop[0, :, 0]).mean() / 255 * width / 31 * 32  # as far apart as 32 px of the crop
        assert across == pytest.approx(right - left, rel=0.03, abs=2)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Unknown augmentation 'strong': choose modern"):
        train_transform(64, MEAN, STD, 'strong')
    with pytest.raises(ValueError, match="Unknown crops 'ten': choose multiscale"):
        eval_transform(64, MEAN, STD, 'ten')


def test_grey_world():
    pixels = np.random.default_rng(0).integers(0, 60, (20, 30, 3)) * (1, 2, 3)
    out = np.asarray(grey_world(Image.fromarray(pixels.astype(np.uint8))), float)
    assert np.allclose(out.mean((0, 1)), pixels.mean(), atol=0.3)
    assert np.corrcoef(out[..., 0].ravel(), pixels[..., 0].ravel())[0, 1] > 0.999
    assert np.asarray(grey_world(Image.new('RGB', (4, 4), (0, 90, 30)))).tolist()[0][0] == [0, 40, 40]
    assert np.asarray(grey_world(Image.new('RGB', (4, 4)))).max() == 0


def test_lesion_crop():
    mask = Image.new('L', (100, 50))
    mask.paste(255, (40, 10, 60, 20))
    # 20 x 10 px of the mask are 80 x 40 of the picture, about (200, 60); a margin of a quarter of 80 all round
    assert lesion_crop(gradient(400, 200), mask).size == (120, 120)
    out = np.asarray(lesion_crop(gradient(400, 200), mask))
    assert out[0, 0, 0] == pytest.approx(140 / 400 * 255, abs=1.5)
    assert lesion_crop(gradient(400, 200), None).size == (400, 200)
    assert lesion_crop(gradient(400, 200), Image.new('L', (10, 10))).size == (400, 200)
    mask.paste(255, (0, 0, 100, 50))
    assert lesion_crop(gradient(400, 200), mask).size == (400, 200)
