"""The blocks that use the fused gate, held against the same blocks without it, and against a ResNet's memory."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from test_arl_cnn import create, image, with_alpha
from timm.layers import BlurPool2d
from timm.utils.model import freeze_batch_norm_2d
from torch.utils._python_dispatch import TorchDispatchMode

from timm_arl.attention import ATTENTIONS


def without_fusion(model):
    """The same network with hooks that do nothing, which keep its norms and activations out of the function."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: None)
    return model


def group_norm(channels, **kwargs):
    return nn.GroupNorm(4, channels, **kwargs)


def cumulative_batch_norm(channels, **kwargs):
    return nn.BatchNorm2d(channels, momentum=None, **kwargs)


def bare_batch_norm(channels, **kwargs):
    return nn.BatchNorm2d(channels, track_running_stats=False, affine=False, **kwargs)


VARIANTS = {
    'plain': {}, 'channel': dict(attention='channel'), 'mixed': dict(attention='mixed', mask_scale='mean1'),
    'drop_path': dict(drop_path_rate=0.5), 'se': dict(block_args=dict(attn_layer='se')),
    'avg_down': dict(stem_type='deep', stem_width=32, avg_down=True), 'silu': dict(act_layer=nn.SiLU),
    'group_norm': dict(norm_layer=group_norm), 'cumulative': dict(norm_layer=cumulative_batch_norm),
    'bare': dict(norm_layer=bare_batch_norm, zero_init_last=False), 'blur': dict(aa_layer=BlurPool2d),
}


@pytest.mark.parametrize('variant, mode', [
    *((variant, 'train') for variant in ('plain', 'mixed', 'drop_path')), *(
        pytest.param(variant, mode, marks=pytest.mark.slow) for variant, mode in (
            ('plain', 'frozen norms'), ('plain', 'frozen modules'), ('plain', 'eval'), ('mixed', 'frozen norms'),
            ('drop_path', 'frozen modules'), ('drop_path', 'eval'), ('se', 'train'), ('se', 'frozen norms'),
            *((variant, mode) for variant in ('channel', 'avg_down', 'silu', 'cumulative', 'bare')
              for mode in ('train', 'eval')),
            ('group_norm', 'train'), ('blur', 'train')))])  # whose other modes take the same paths
def test_blocks_are_the_plain_ones(variant, mode):
    model = create('arl_cnn26', num_classes=2, channels=[16, 32, 64, 128], trained_look=variant != 'bare',
                   **VARIANTS[variant]).double()
    with_alpha(model, 2.).train(mode != 'eval')
    if mode == 'frozen norms':
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    elif mode == 'frozen modules':
        freeze_batch_norm_2d(model)
    results = []
    for network in (model, without_fusion(model)):
        x = image(48).double().to(memory_format=torch.channels_last).requires_grad_()
        torch.manual_seed(0)
        y = network(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *network.parameters()])
        with torch.no_grad():
            torch.manual_seed(0)
            results.append((y, *gradients, *network.buffers(), network(image(50).double())))
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_folded_batch_norm(attention):
    model = with_alpha(create(num_classes=2, attention=attention, channels=[32, 64, 128, 256]), 2.)
    folded = copy.deepcopy(model)
    for stage in (folded.layer1, folded.layer2, folded.layer3, folded.layer4):
        block = stage[0]
        block.conv3, block.bn3 = nn.utils.fuse_conv_bn_eval(block.conv3, block.bn3), nn.Identity()
        block.downsample = nn.Sequential(nn.utils.fuse_conv_bn_eval(*block.downsample), nn.Identity())
    with torch.inference_mode():
        assert torch.allclose(folded(image()), model(image()), rtol=1e-4, atol=1e-5)


def changed(model, change):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)
    return model


@pytest.mark.parametrize('change', [
    lambda norm: setattr(norm, 'track_running_stats', False), lambda norm: setattr(norm, 'num_batches_tracked', None),
    lambda norm: setattr(norm, 'momentum', 0.), lambda norm: norm.weight.requires_grad_(False)],
    ids=['no tracking', 'no count', 'momentum 0', 'frozen weight'])
def test_norms_that_were_changed(change):
    model = changed(with_alpha(create(num_classes=2), 2.).double(), change).train()
    results = []
    for network in (model, without_fusion(model)):
        y = network(image().double())
        y.square().sum().backward()
        results.append([y, *(p.grad for p in network.parameters() if p.grad is not None), *network.buffers()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*results))


def test_projection_without_layers():
    model = create('arl_cnn26', num_classes=2).train()
    model.layer1[1].downsample = nn.Sequential()
    expected = copy.deepcopy(model)
    expected.layer1[1].downsample = None
    assert torch.equal(model(image()), expected(image()))


def test_sync_batch_norm():
    model = with_alpha(create(num_classes=2), 2.)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(synchronised.layer1[0].bn3, nn.SyncBatchNorm)
    assert torch.allclose(synchronised(image()), model(image()), atol=1e-6)


def test_one_value_a_channel_is_refused_as_by_batch_norm():
    model = create(num_classes=2).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(image(32, batch=1))


@pytest.mark.parametrize('layer', ['conv3', 'bn3'])
def test_a_hook_keeps_what_a_layer_gave(layer):
    model = with_alpha(create(num_classes=2), 2.)
    kept = []
    getattr(model.layer1[0], layer).register_forward_hook(lambda m, i, o: kept.extend((o, o.clone())))
    with torch.inference_mode():
        model(image())
    assert torch.equal(*kept)


@pytest.mark.parametrize('folded', [False, True])
def test_a_mode_keeps_what_a_layer_gave(folded):
    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            given = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.convolution.default:
                kept.append((given, given.clone()))
            return given

    kept, model = [], create(alpha_init=0.5).eval()
    if folded:
        for block in (m for m in model.modules() if hasattr(m, 'bn3')):
            block.bn3 = nn.Identity()
    with torch.no_grad(), Keep():
        model(image())
    assert kept and all(torch.equal(given, before) for given, before in kept)


def test_a_wrapped_forward_is_called():
    for replaced in ('bn3', 'act3'):  # a module whose forward was wrapped, as Accelerate does to offload it
        model, calls = create(num_classes=2), []
        module = getattr(model.layer1[0], replaced)
        module.forward = lambda x, f=module.forward, calls=calls: calls.append(1) or f(x)
        model(image())
        with torch.no_grad():
            model(image())
        assert len(calls) == 2


@pytest.mark.parametrize('grad', [False, True])
def test_global_hooks_see_every_layer(grad):
    model, seen = create(num_classes=2), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.add(module))
    try:
        with torch.set_grad_enabled(grad):
            model(image())
    finally:
        handle.remove()
    assert seen >= {m for block in (model.layer1[0], model.layer4[0]) for m in block.modules()}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_alpha_of_zero_skips_the_gate_in_eval(monkeypatch, attention):
    monkeypatch.setenv('TIMM_ARL_KERNELS', 'torch')  # whose operations can be listed
    def operations(alpha, grad=False):
        model = with_alpha(create(num_classes=2, attention=attention), alpha)
        with Operations() as operations, torch.set_grad_enabled(grad):
            model(image())
        return {o for o in operations.seen if o.startswith(('exp', 'sigmoid', 'softmax', 'addcmul'))}

    assert operations(1e-3) and not operations(0.)
    assert operations(0., grad=True)  # alpha gets its gradient
    frozen = create(num_classes=2, attention=attention, alpha_init=0.).requires_grad_(False)
    with Operations() as seen:
        frozen(image())
    assert not {o for o in seen.seen if o.startswith(('exp', 'sigmoid', 'addcmul'))}


def saved_bytes(model, x, dtype=None):
    """Bytes that autograd keeps for backward, each piece of memory counted once, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(
            'cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        model(x)
    return sum(s.nbytes() for pointer, s in seen.items() if pointer not in owned)


@pytest.mark.parametrize('drop_path_rate', [0., 0.2])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('name, plain, attention', [
    *(('arl_cnn14', 'resnet14', attention) for attention in ATTENTIONS),
    ('arl_cnn26', 'resnet26', 'spatial')])
def test_memory_for_backward(name, plain, dtype, attention, drop_path_rate):
    x = image(96).to(memory_format=torch.channels_last)
    kwargs = dict(channels=[32, 64, 128, 256], drop_path_rate=drop_path_rate)
    models = [timm.create_model(n, **kwargs, **more).to(memory_format=torch.channels_last)
              for n, more in ((plain, {}), (name, dict(attention=attention)))]
    resnet, arl = (saved_bytes(model.train(), x, dtype) for model in models)
    assert arl <= (1.02 if not drop_path_rate else 1.10) * resnet
