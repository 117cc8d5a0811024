"""What an ONNX file does to a picture is what an evaluation does to it."""
import numpy as np
import pytest
import torch
from PIL import Image
from test_arl_cnn import create

from timm_arl.export.preprocessing import CROPS_INSIDE, Preprocessing, Probabilities, add_preprocessing
from timm_arl.export.quantize import update_metadata
from timm_arl.isic.task import DIAGNOSES, LABELS, calibrate, probabilities_of
from timm_arl.isic.transforms import EvalCrops, grey_world, normalisation
from timm_arl.onnx_file import ExportError, OnnxModel, export_onnx

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width, height):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (max(height // 3, 1), max(width // 3, 1), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('crops', CROPS_INSIDE)
@pytest.mark.parametrize('size', [(300, 200), (200, 301), (64, 64), (97, 97), (40, 61), (16, 160), (999, 769)], ids=str)
def test_crops_are_those_of_an_evaluation(crops, size):
    for grey in (False, True):
        shown = picture(*size)
        found = Preprocessing(64, crops, MEAN, STD, grey)(torch.from_numpy(np.array(shown))[None])
        expected = normalisation(MEAN, STD)(EvalCrops(64, crops)(grey_world(shown) if grey else shown))
        assert found.shape == expected.shape and found.dtype == torch.float32
        levels = (found - expected).abs() * 255 * torch.tensor(STD)[:, None, None]
        assert levels.max() <= 2.01 and levels.mean() <= 0.06


def test_several_pictures_keep_their_order():
    cut = Preprocessing(32, 'multiscale', MEAN, STD)
    pictures = torch.randint(256, (3, 50, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cut(pictures), torch.cat([cut(each[None]) for each in pictures]))


def test_probabilities_are_means_and_then_calibrated():
    logits = torch.randn(15, 2, generator=torch.Generator().manual_seed(0))
    means, calibrated = Probabilities(probabilities_of, 5, [0.5, 2.], [-1., 0.5])(logits)
    assert torch.allclose(means, logits.sigmoid().view(3, 5, 2).mean(1))
    assert np.allclose(calibrated, calibrate(means.numpy(), np.array([0.5, 2.]), np.array([-1., 0.5])), atol=1e-6)
    assert torch.equal(Probabilities(probabilities_of, 5)(logits), means)


@pytest.mark.slow
def test_softmax(tmp_path):
    model = create('test_resnet', num_classes=3)
    with torch.no_grad():
        model.fc.weight.mul_(10)  # else it says nearly the same of all pictures
    model.pretrained_cfg.update(label_names=DIAGNOSES, mean=MEAN, std=STD)
    export_onnx(model, tmp_path / 'm.onnx', 64, settings={'crops': 'center'})
    whole = OnnxModel(add_preprocessing(tmp_path / 'm.onnx', tmp_path / 'w.onnx', probabilities_of, LABELS))
    shown = picture(90, 70)
    with torch.inference_mode():
        expected = model(normalisation(MEAN, STD)(EvalCrops(64, 'center')(shown))).softmax(1)[:, 1:]
    assert np.allclose(whole(np.array(shown)[None]), expected, atol=1e-2)
    update_metadata(tmp_path / 'm.onnx', crops='paper')
    with pytest.raises(ExportError, match='drawn at random'):
        add_preprocessing(tmp_path / 'm.onnx', tmp_path / 'x.onnx', probabilities_of, LABELS)
    assert not (tmp_path / 'x.onnx').exists()
