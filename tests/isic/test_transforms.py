"""What the network sees."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_arl.isic.transforms import eval_transform, restore_aspect, train_transform

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
    out = eval_transform(224, MEAN, STD)(gradient(384, 256))
    assert out.shape == (3, 224, 224) and out.dtype == torch.float32
    pixels = out[0] * STD[0] + MEAN[0]
    # 224 of 384 columns about the centre: from 80/384 to 304/384 of a ramp from 0 to 1
    assert pixels[0, 0].item() == pytest.approx(80 / 384, abs=0.01)
    assert pixels[0, -1].item() == pytest.approx(304 / 384, abs=0.01)
    assert torch.equal(out, eval_transform(224, MEAN, STD)(gradient(384, 256)))


@pytest.mark.parametrize('size', [64, 96, 160, 224, 256, 320])
def test_eval_is_timms_own_preprocessing_of_the_saved_config(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8))
    theirs = create_transform((3, size, size), interpolation='bilinear', crop_pct=0.875, mean=MEAN, std=STD)
    assert torch.allclose(eval_transform(size, MEAN, STD)(noise), theirs(noise), atol=1e-5)


def test_training_varies_with_the_torch_seed_alone():
    transform = train_transform(64, MEAN, STD)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(transform(gradient()))
    assert outputs[0].shape == (3, 64, 64)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
