"""Maps mean what they say: CAM against the logit, and what makes maps move."""
import numpy as np
import pytest
import timm
import torch
from as_trained import IMAGES, create
from scipy.stats import spearmanr
from torch import nn

from timm_arl.explain import class_activation_map, gate_maps, gradient_map
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.isic.task import DIAGNOSES
from timm_arl.isic.transforms import eval_transform

ARL = ['arl_cnn14', 'arl_cnn50', 'arl_cnn14_channel', 'arl_cnn14_mixed', 'arl_tf_efficientnet_lite0']
OTHERS = ['resnet14', 'seresnet14', 'ran14', 'resnet18', 'convnext_atto', 'tf_efficientnet_lite0']


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
