"""What is exported computes what the model computes, on ONNX Runtime."""
import copy
import json

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn as nn
from test_arl_cnn import create, image, with_alpha

from timm_arl.onnx_file import ExportError, OnnxModel, export_onnx, fold_batch_norm, metadata_of


def randomise(model):
    """Statistics and affine values that are not those of a new network: what images leave in them, and noise."""
    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.
        for t in (norm.weight.data, norm.bias.data):
            t.copy_(torch.rand(t.shape, generator=generator) * 0.5 + 0.5)
    with torch.no_grad():
        channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        model.train()(torch.randn(8, channels, 64, 64, generator=generator))
    return model.eval()


@pytest.mark.parametrize('kwargs', [{}, dict(attention='channel'), dict(attention='mixed', mask_scale='mean1'),
                                    dict(in_chans=1), dict(drop_path_rate=0.2), dict(block_args=dict(attn_layer='se')),
                                    dict(stem_type='deep', stem_width=32, avg_down=True)], ids=str)
def test_folded_batch_norm(kwargs):
    model = randomise(with_alpha(create('arl_cnn26', num_classes=2, **kwargs), 2.))
    x = image(96, chans=kwargs.get('in_chans', 3))
    folded = fold_batch_norm(model)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]  # the model itself is left as it was
    for grad in (False, True):
        with torch.inference_mode(not grad):
            expected = model(x)
            assert (folded(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_folded_norms_that_have_an_activation():
    """Those of EfficientNets."""
    model = randomise(timm.create_model('arl_tf_efficientnet_lite0', num_classes=2, alpha_init=2.))
    folded, images = fold_batch_norm(model), torch.randn(2, 3, 96, 96)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.inference_mode():
        expected = model(images)
        assert (folded(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_folded_batch_norm_of_other_precisions(dtype):
    """What differs by the rounding of a precision is not another network."""
    folded = fold_batch_norm(randomise(create('arl_cnn14', num_classes=2)).to(dtype))
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert folded(image(96).to(dtype)).dtype == dtype


def test_small_outputs_are_compared_too():
    class Crossed(nn.Sequential):
        def forward(self, x):
            return self[1](self[2](self[0](x))) * 1e-4

    crossed = Crossed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.constant_(crossed[1].bias, -1.)
    with pytest.raises(ExportError, match='differs from the model'):
        fold_batch_norm(crossed)


def test_folding_a_network_of_another_order_is_refused():
    class Crossed(nn.Sequential):
        def forward(self, x):
            return self[1](self[2](self[0](x)))

    crossed = Crossed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.constant_(crossed[1].bias, -1.)
    with pytest.raises(ExportError, match='differs from the model'):
        fold_batch_norm(crossed)


def test_folding_learns_nothing_from_the_images_that_it_is_tried_on():
    model = create('arl_cnn14', num_classes=2).train()
    before = copy.deepcopy(model.state_dict())
    fold_batch_norm(model)
    metadata_of(model)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_stem_that_turns_space_into_channels():
    assert metadata_of(timm.create_model('tresnet_m'))['input_size'] == [3, 224, 224]


@pytest.mark.parametrize('name', ['arl_cnn26', 'arl_cnn14_channel', 'arl_cnn14_mixed'])
@pytest.mark.slow
def test_onnx(name, tmp_path):
    model = randomise(with_alpha(create(name, num_classes=2), 2.))
    path = export_onnx(model, tmp_path / 'm.onnx', img_size=64)
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']
    network = OnnxModel(path)
    for batch in (1, 3):
        x = image(64, batch=batch)
        with torch.inference_mode():
            expected = model(x).numpy()
        assert np.abs(network(x.numpy()) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    about = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}  # what a reader without timm must know
    config = model.pretrained_cfg
    assert (tuple(about['mean']), tuple(about['std'])) == (config['mean'], config['std'])
    assert about['input_size'] == [3, 64, 64] and 'label_names' not in about
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ['images'] and [o.name for o in graph.output] == ['logits']
    operators = {node.op_type for node in graph.node}
    assert 'BatchNormalization' not in operators


def test_folding_a_network_of_one_size_that_has_nothing_to_fold():
    model = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(fold_batch_norm(model)(images), model(images))
