"""Maps mean what they say: CAM against the logit, gates against the equations in float64, and what makes maps move."""
import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from torch import nn

from timm_arl.explain import (
    METHODS,
    centred_gaussian,
    class_activation_map,
    gate_maps,
    gradient_map,
    map_iou,
    pointing_game,
    scaled_alphas,
)
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.isic.task import DIAGNOSES
from timm_arl.isic.transforms import eval_transform

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ARL = ['arl_cnn14', 'arl_cnn50', 'arl_cnn14_channel', 'arl_cnn14_mixed', 'arl_tf_efficientnet_lite0']
OTHERS = ['resnet14', 'seresnet14', 'ran14', 'resnet18', 'convnext_atto', 'tf_efficientnet_lite0']


def create(name, **kwargs):
    """A network in which every norm, alpha and bias has a value of its own, as if trained on IMAGES."""
    if name.startswith(('arl_cnn14', 'arl_cnn26', 'resnet14', 'seresnet14')):
        kwargs.setdefault('channels', [16, 32, 64, 128])
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 2, **kwargs}).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.
    for number, (key, p) in enumerate(model.named_parameters()):
        if key.endswith('.alpha'):
            nn.init.constant_(p, 0.5 + 0.3 * number % 2)
    if model.num_classes:
        nn.init.normal_(model.get_classifier().bias)
    with torch.no_grad():
        model(IMAGES)
    return model.eval()


@pytest.mark.parametrize('name', [*ARL, *OTHERS])
def test_the_mean_of_a_cam_is_the_logit_less_the_bias(name):
    model = create(name)
    maps = class_activation_map(model, IMAGES)
    with torch.no_grad():
        expected = model(IMAGES) - model.get_classifier().bias
    if name == 'convnext_atto':  # whose norm before the classifier has a bias too
        expected = expected - (model.head.fc.weight @ model.head.norm.bias).detach()
    assert maps.shape[:2] == (3, 2) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps[0, 0].std() > 0  # and no constant
    np.testing.assert_allclose(maps.mean((2, 3)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_cam_is_equation_13():
    model = create('arl_cnn14')
    with torch.no_grad():
        features = model.forward_features(IMAGES).double().numpy()
    weight = model.fc.weight.detach().double().numpy()
    for label in (0, 1):
        expected = (weight[label][None, :, None, None] * features).sum(1)
        np.testing.assert_allclose(class_activation_map(model, IMAGES)[:, label], expected, rtol=1e-4, atol=1e-4)


def test_a_cam_of_half_precision_and_of_a_batch_of_one():
    model = create('resnet18')
    whole = class_activation_map(model, IMAGES)
    torch.testing.assert_close(class_activation_map(model, IMAGES[1:2]), whole[1:2], rtol=1e-4, atol=1e-4)
    half = class_activation_map(model.bfloat16(), IMAGES.bfloat16())
    assert half.dtype == torch.float32 and np.corrcoef(half.ravel(), whole.ravel())[0, 1] > 0.99


@pytest.mark.parametrize('model', [
    lambda: timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=2, depth=1),
    lambda: timm.create_model('mobilenetv3_small_050', num_classes=2),  # a layer between pooling and classifier
    lambda: create('resnet18', global_pool='max'),
    lambda: create('resnet18', num_classes=0),
    lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_a_head_of_another_kind_has_no_cam(model):
    with pytest.raises(ValueError, match='no class activation map.*gradient_map'):
        class_activation_map(model(), IMAGES)


@pytest.mark.parametrize('pool', ['max', 'avgmax'])
@pytest.mark.parametrize('seed', range(3))
def test_nor_has_it_in_half_precision(pool, seed):
    """Rounding must not hide that the map does not explain the logit."""
    torch.manual_seed(seed)
    model = timm.create_model('arl_cnn14', num_classes=2, global_pool=pool).eval()
    with pytest.raises(ValueError, match='no class activation map'):
        class_activation_map(model.bfloat16(), torch.randn(1, 3, 64, 64).bfloat16())


def test_no_image_in_the_batch():
    model = create('arl_cnn14')
    assert class_activation_map(model, IMAGES[:0]).shape[0] == 0
    assert {len(gate.mask) for gate in gate_maps(model, IMAGES[:0]).values()} == {0}


@pytest.mark.parametrize('of', [
    class_activation_map, gate_maps, lambda model, images: gradient_map(model, images, 0)])
def test_the_network_is_left_as_it_was(of):
    model = create('arl_cnn14').train()
    model.layer1.eval()  # as one that is kept frozen
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes = [m.training for m in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = of(model, IMAGES)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ['conv1.weight']
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for key, p in model.named_parameters() if key != 'fc.weight')
    with torch.inference_mode():  # and no mode of the caller's matters
        again = of(model, IMAGES)
    for one, other in zip(*([m.mask for m in maps.values()] if isinstance(maps, dict) else [maps]
                            for maps in (first, again))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def stretched(maps, side=64):
    """As Grad-CAM shows maps: what is below 0 left out, from 0 to 1 in each image, at the size of the input."""
    maps = maps.clamp(min=0)
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = nn.functional.interpolate(
        (maps / maps.amax((1, 2), keepdim=True))[:, None], size=(side, side), mode='bilinear')[:, 0]
    return (maps - maps.amin((1, 2), keepdim=True)) / maps.amax((1, 2), keepdim=True)


@pytest.mark.parametrize('name', ['arl_cnn14', 'ran14', 'resnet18'])
@pytest.mark.parametrize('method', ['gradcam', 'hirescam'])
def test_grad_cam_of_the_last_stage_is_the_cam(name, method):
    """Behind a pooled linear head the gradient is the classifier's weight everywhere."""
    model = create(name)
    expected = stretched(class_activation_map(model, IMAGES)[:, 1])
    np.testing.assert_allclose(gradient_map(model, IMAGES, 1, method=method), expected, atol=1e-3)


@pytest.mark.parametrize('layer', ['layer3.0.bn3', 'layer3.0', 'layer2'])
@pytest.mark.parametrize('name', ['resnet14', 'arl_cnn14'])
def test_grad_cam_of_an_inner_layer(name, layer):
    """Held against autograd; what follows bn3 works in place."""
    model, seen = create(name, channels=[64, 128, 256, 512]), {}  # narrow ones have maps without a value above 0

    def keep(module, inputs, output):
        seen['maps'] = output
        return output.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    gradient, = torch.autograd.grad(model(IMAGES)[:, 0].sum(), seen['maps'])
    hook.remove()
    expected = stretched((gradient.mean((2, 3), keepdim=True) * seen['maps'].detach()).sum(1))
    np.testing.assert_allclose(gradient_map(model, IMAGES, 0, layer), expected, atol=5e-3)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['arl_tf_efficientnet_lite0', 'mobilenetv3_small_050'])
def test_every_method_gives_maps_of_each_image(method, name):
    model = create(name)
    maps = gradient_map(model, IMAGES, 1, method=method)
    assert maps.shape == (3, 64, 64) and maps.dtype == torch.float32
    assert 0 <= maps.min() and maps.max() <= 1 and maps.amax((1, 2)).max() > 0.9
    assert not torch.equal(maps[0], maps[1])


def test_what_gradient_map_refuses(monkeypatch):
    model = create('resnet18')
    for match, args in [('Unknown method', dict(label=0, method='lime')), ("Unknown layer 'layer9'.*layer4", dict(
            label=0, layer='layer9')), ('Output 2 does not exist: the network has 2', dict(label=2)), (
            "'fc' does not give maps", dict(label=0, layer='fc'))]:
        with pytest.raises(ValueError, match=match):
            gradient_map(model, IMAGES, **args)
    with pytest.raises(ValueError, match='does not give maps'):
        gradient_map(timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=2, depth=1), IMAGES, 0)
    with pytest.raises(ValueError, match='Sequential does not say which layer'):
        gradient_map(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), IMAGES, 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'pytorch_grad_cam' else find(name))
    with pytest.raises(ImportError, match=r"grad-cam is not installed: in a checkout, pip install -e '.\[explain\]'"):
        gradient_map(model, IMAGES, 0)


def gated_blocks(model, images):
    """Name, F, x and block of each gated block, and the logits, in float64 by the layers and Eq. 3 alone."""
    model = copy.deepcopy(model).double()
    found = []

    def mask_of(f, block):
        axes = {'spatial': (2, 3), 'channel': 1}
        mask = expit(f) if block.attention == 'mixed' else softmax(f, axis=axes[block.attention])
        over = {'spatial': (2, 3), 'channel': 1, 'mixed': (1, 2, 3)}[block.attention]
        return mask / mask.mean(over, keepdims=True) if block.mask_scale == 'mean1' else mask

    def gate(name, block, f, x):
        f, x = f.numpy(), x.numpy()
        mask = mask_of(f, block)
        found.append((name, f, x, mask, block))
        return torch.from_numpy(x + f + block.alpha.item() * mask * x)

    with torch.no_grad():
        if hasattr(model, 'conv_stem'):
            x = model.bn1(model.conv_stem(images.double()))
            for name, block in [(f'blocks.{i}.{j}', b) for i, s in enumerate(model.blocks) for j, b in enumerate(s)]:
                if hasattr(block, 'alpha'):
                    f = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
                    x = gate(name, block, block.bn3(block.conv_pwl(f)), x)
                else:
                    x = block(x)
            return found, model.forward_head(model.bn2(model.conv_head(x)))
        x = model.maxpool(model.act1(model.bn1(model.conv1(images.double()))))
        for i in (1, 2, 3, 4):
            for j, block in enumerate(getattr(model, f'layer{i}')):
                f = block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x))))))
                f = block.bn3(block.conv3(f))
                f = f if block.se is None else block.se(f)
                x = gate(f'layer{i}.{j}', block, f, x if block.downsample is None else block.downsample(x)).relu()
        return found, model.forward_head(x)


@pytest.mark.parametrize('mask_scale', ['softmax', 'mean1'])
@pytest.mark.parametrize('name, kwargs', [
    ('arl_cnn14', {}), ('arl_cnn14_channel', {}), ('arl_cnn14_mixed', {}), ('arl_cnn14', dict(drop_path_rate=0.3)),
    ('arl_cnn26', {}), ('arl_cnn14', dict(block_args=dict(attn_layer='se'))), ('arl_tf_efficientnet_lite0', {}),
    ('arl_tf_efficientnet_lite0', dict(attention='channel', drop_path_rate=0.3)),
    ('arl_tf_efficientnet_lite0', dict(attention='mixed'))])
def test_gate_maps_are_the_equations(name, kwargs, mask_scale):
    model = create(name, mask_scale=mask_scale, **kwargs)
    expected, logits = gated_blocks(model, IMAGES)
    with torch.no_grad():  # the test's own network is the same
        np.testing.assert_allclose(model(IMAGES), logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    maps = gate_maps(model, IMAGES)
    assert list(maps) == [entry[0] for entry in expected]
    for block_name, f, x, mask, block in expected:
        found = maps[block_name]
        size, channels = f.shape[2] * f.shape[3], f.shape[1]
        plain = {'spatial': lambda f: softmax(f, (2, 3)), 'channel': lambda f: softmax(f, 1), 'mixed': expit}[
            block.attention](f)
        heat, parts, axis = {
            'spatial': (plain.mean(1) * size, plain, (2, 3)), 'channel': (plain.max(1) * channels, plain, 1),
            'mixed': (mask.mean(1), plain / plain.sum((2, 3), keepdims=True), (2, 3))}[block.attention]
        share = np.exp(-(parts * np.log(parts)).sum(axis)) / (channels if axis == 1 else size)
        term = block.alpha.item() * mask * x
        contribution = np.sqrt((term ** 2).sum(1)) / (np.sqrt(((x + f) ** 2).sum(1)) + 1e-6)
        for key, value in dict(
                mask=heat, contribution=contribution, effective_share=share.reshape(3, -1).mean(1),
                largest=plain.max((1, 2, 3)), std=f.std((1, 2, 3))).items():
            given = getattr(found, key)
            assert given.dtype == torch.float32
            np.testing.assert_allclose(given, value, rtol=5e-3, atol=1e-5 * np.abs(value).max(), err_msg=key)
        assert found.alpha == pytest.approx(block.alpha.item())


def test_threads_that_share_a_network_see_their_own_images():
    """As those of a web server: one asks for masks while the other predicts."""
    model, batches = create('arl_cnn14'), [torch.randn(k + 1, 3, 64, 64) for k in range(3)]
    with torch.no_grad():
        expected, alone = [gate_maps(model, images) for images in batches], model(batches[0])

    def ask(k):
        with torch.no_grad():
            return [gate_maps(model, batches[k]) if k else model(batches[0]) for _ in range(8)]

    with ThreadPoolExecutor(3) as pool:
        plain, *maps = pool.map(ask, range(3))
    assert all(torch.equal(logits, alone) for logits in plain)
    for k, found in enumerate(maps, 1):
        for one in found:
            assert list(one) == list(expected[k])
            assert all(torch.equal(one[name].mask, expected[k][name].mask) for name in one)


def test_a_fresh_block_is_flat_and_alpha_zero_adds_nothing():
    fresh = timm.create_model('arl_cnn14')  # its last norms start at 0, so F is 0
    for found in gate_maps(fresh, IMAGES).values():
        size = found.mask[0].numel()
        assert torch.allclose(found.mask, torch.ones(())) and torch.allclose(found.effective_share, torch.ones(()))
        assert torch.allclose(found.largest, torch.tensor(1 / size)) and not found.std.any()
    model = create('arl_cnn14')
    assert all((found.contribution > 0).any() for found in gate_maps(model, IMAGES).values())
    with scaled_alphas(model, 0):
        assert not any(found.contribution.any() or found.alpha for found in gate_maps(model, IMAGES).values())


@pytest.mark.parametrize('name', ['resnet14', 'ran14', 'convnext_atto'])
def test_no_gates_no_gate_maps(name):
    model = timm.create_model(name, num_classes=2)
    with pytest.raises(ValueError, match='no block of attention residual learning'):
        gate_maps(model, IMAGES)
    with pytest.raises(ValueError, match='no block of attention residual learning'), scaled_alphas(model, 2):
        pass


def test_scaled_alphas_come_back_bit_for_bit():
    model = create('arl_tf_efficientnet_lite0')
    alphas = {key: p for key, p in model.named_parameters() if key.endswith('.alpha')}
    for number, p in enumerate(alphas.values()):
        nn.init.constant_(p, 0.1 + 1e-8 * number if number else float('nan'))
    before = {key: p.detach().clone().view(torch.int32) for key, p in alphas.items()}
    with scaled_alphas(model, 1 / 3):
        values = [p.item() for p in alphas.values()]
        assert values[1:] == pytest.approx([0.1 / 3] * 8)
    for factor in (0, -2.5, 1e30):
        with pytest.raises(KeyError), scaled_alphas(model, factor):
            changed = [not torch.equal(p.detach().view(torch.int32), before[key]) for key, p in alphas.items()]
            assert all(changed[1:])
            raise KeyError
        assert all(torch.equal(p.detach().view(torch.int32), before[key]) for key, p in alphas.items())
    with pytest.raises(ValueError, match='finite number, not nan'), scaled_alphas(model, float('nan')):
        pass


def test_a_factor_of_zero_is_the_plain_network():
    model, plain = create('arl_cnn14'), create('resnet14')
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith('.alpha')})
    with torch.no_grad(), scaled_alphas(model, 0):
        assert torch.equal(model(IMAGES), plain(IMAGES))
    with torch.no_grad():
        assert not torch.equal(model(IMAGES), plain(IMAGES))


@pytest.fixture(scope='module')
def lesions():
    pictures = [draw_lesion(DIAGNOSES[k % 3], np.random.default_rng(k)) for k in range(12)]
    mean_std = [timm.get_pretrained_cfg('arl_cnn14.isic2017').to_dict()[key] for key in ('mean', 'std')]
    return torch.cat([eval_transform(128, *mean_std)(picture) for picture in pictures])


@pytest.mark.slow
@pytest.mark.parametrize('of', ['cam', 'gradcam', 'gate'])
def test_randomised_weights_change_the_map(lesions, of):
    """Adebayo et al. (2018): from the classifier down, stage after stage is set to random weights."""
    def maps_of(model):
        if of == 'cam':
            return class_activation_map(model, lesions)[:, 0]
        if of == 'gradcam':
            return gradient_map(model, lesions, 0, 'layer3')
        return gate_maps(model, lesions)['layer4.0'].contribution

    model = timm.create_model('arl_cnn14.isic2017', pretrained=True).eval()
    trained, likeness = maps_of(model).flatten(1).numpy(), []
    torch.manual_seed(0)
    for stage in ['fc', 'layer4', 'layer3', 'layer2', 'layer1', 'conv1']:
        for module in model.get_submodule(stage).modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=module.weight.std().item())
        now = maps_of(model).flatten(1).numpy()
        likeness.append(np.mean([spearmanr(a, b).statistic for a, b in zip(trained, now) if b.std()] or 0))
    changed = 1 if of == 'gate' else 0  # a gate knows nothing of the classifier
    assert (likeness[0] > 0.999) == (of == 'gate')
    assert max(likeness[changed:]) < 0.6


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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradient_maps_of_half_precision(dtype):
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64], zero_init_last=False)
    images = torch.randn(2, 3, 64, 64)
    expected = gradient_map(model, images.to(dtype).float(), 1)
    found = gradient_map(model.to(dtype), images.to(dtype), 1)
    assert found.dtype == torch.float32 and found.shape == (2, 64, 64)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9
    assert next(model.parameters()).dtype == dtype
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert gradient_map(model.float(), images, 1).dtype == torch.float32
    with pytest.raises(ValueError, match='no image'):
        gradient_map(model, images[:0], 1)


@pytest.mark.parametrize('layer', ['', 'layer3'])
def test_gradient_maps_of_checkpointed_and_compiled_networks(layer):
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64], zero_init_last=False).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = gradient_map(model, images, 1, layer)
    model.set_grad_checkpointing()
    assert torch.allclose(gradient_map(model, images, 1, layer), expected)
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    gates = gate_maps(model, images)
    compiled = torch.compile(model, backend='eager')
    assert torch.allclose(gradient_map(compiled, images, 1, layer), expected)
    assert gate_maps(compiled, images).keys() == gates.keys()
    model.compile(backend='aot_eager')
    with torch.no_grad():
        model(images)
    again = gate_maps(model, images)
    other = timm.create_model('resnet18', num_classes=2).eval()
    other.compile(backend='aot_eager')
    with pytest.raises(ValueError, match='has no block'):
        gate_maps(other, images)
    assert torch._dynamo.eval_frame._stance.stance == 'default'  # what is compiled stays so
    assert again.keys() == gates.keys() and all(torch.allclose(again[name].mask, gates[name].mask) for name in gates)
    assert torch.allclose(gradient_map(model, images, 1, layer), expected)
