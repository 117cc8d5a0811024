"""A file in 8 bits says nearly what it said in float32."""
import logging
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from test_arl_cnn import create, with_alpha
from test_onnx_file import randomise

from timm_arl.export import ExportError, OnnxModel, export_onnx, quantize_onnx
from timm_arl.export.calibration import measure_loss

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def batches(count=8, side=64):
    rng = np.random.default_rng(0)
    for _ in range(count):
        levels = rng.integers(0, 256, (2, 3, side, side)) * np.linspace(0, 1, side)
        yield ((levels / 255 - MEAN[:, None, None]) / STD[:, None, None]).astype(np.float32)


@pytest.mark.slow
def test_8_bits(tmp_path, caplog):
    model = create('arl_cnn14_mixed', num_classes=2, channels=[64, 128, 256, 512])  # narrow: a convolution less
    model = randomise(with_alpha(model, 1.))
    source = export_onnx(model, tmp_path / 'f.onnx', 64, weights='mine', settings={'crops': 'center'})
    target = quantize_onnx(source, tmp_path / 'q.onnx', batches())
    assert target.stat().st_size < 0.3 * source.stat().st_size
    before, after = OnnxModel(source), OnnxModel(target)
    assert after.about == before.about and after.about['weights'] == 'mine'
    x = np.concatenate(list(batches()))
    expected = before(x)
    error = np.abs(after(x) - expected)
    assert error.max() <= 0.15 * np.ptp(expected), (error.max(), np.ptp(expected))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    graph = onnx.load(target).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count('Conv') == 17 and 'QuantizeLinear' in kinds
    # black and white, and each level between them, are what they were
    levels, = (node for node in graph.node if node.op_type == 'QuantizeLinear' and node.input[0] == 'levels/pixels')
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    assert [values[key] for key in levels.input[1:]] == [1, 0]


@pytest.mark.slow
def test_networks_that_do_not_begin_with_a_convolution_and_that_have_none(tmp_path):
    class Net(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 2))
            self.pretrained_cfg = dict(mean=MEAN.tolist(), std=STD.tolist(), input_size=(3, 32, 32))
            self.conv = nn.Conv2d(3, 3, 1)  # by which a model's channels are known

        def forward(self, x):
            return self.layers(x)

    pooled = Net(nn.Hardtanh(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1))
    pooled = export_onnx(pooled, tmp_path / 'a.onnx', fold=False)
    x = np.concatenate(list(batches(side=32)))
    after = OnnxModel(quantize_onnx(pooled, tmp_path / 'b.onnx', batches(side=32)))
    assert np.abs(after(x) - OnnxModel(pooled)(x)).max() <= 0.05
    bare = export_onnx(Net(nn.AdaptiveAvgPool2d(1)), tmp_path / 'c.onnx', fold=False)
    (tmp_path / 'd.onnx').write_bytes(b'an earlier file')
    with pytest.raises(ExportError, match='c.onnx cannot be quantised by ONNX Runtime .*: none of its operations'):
        quantize_onnx(bare, tmp_path / 'd.onnx', batches(side=32))
    assert (tmp_path / 'd.onnx').read_bytes() == b'an earlier file'
    model = onnx.load(bare)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'e.onnx')
    with pytest.raises(ExportError, match='does not say how its images are normalised'):
        quantize_onnx(tmp_path / 'e.onnx', tmp_path / 'd.onnx', batches(side=32))


def test_labels_of_one_class_have_no_auc():
    validation = [(torch.full((1, 1), k / 8), torch.tensor([k % 2, 0])) for k in range(8)]
    images = SimpleNamespace(validation=validation, crops=[], normalise=nn.Identity())
    loss = measure_loss(
        lambda x: np.repeat(x, 2, 1), lambda x: np.repeat(x, 2, 1), images, torch.sigmoid, ['a', 'b'], [.5, .5])
    assert loss.aucs.keys() == {'a'} and loss.images == 8 and not loss.worse()
