"""The networks, held against the paper and against what timm promises of its own models."""
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import is_model_pretrained
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor

import timm_arl
from timm_arl.factory import save_network

FAMILY = [
    'arl_cnn14', 'arl_cnn14_spatial', 'arl_cnn14_channel', 'arl_cnn14_mixed',
    'arl_cnn50', 'arl_cnn50_spatial', 'arl_cnn50_channel', 'arl_cnn50_mixed',
    'arl_cnn26', 'arl_cnn101', 'arl_cnn152',
]
SMALL = ['arl_cnn14', 'arl_cnn14_channel', 'arl_cnn14_mixed']


def image(size=64, batch=2, chans=3, seed=1):
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(seed))


def create(name='arl_cnn14', seed=0, trained_look=True, **kwargs):
    """A seeded model whose residual branches are not zero, as they are before training; small ones are narrow too."""
    if name.startswith(('arl_cnn14', 'arl_cnn26', 'resnet14', 'resnet26')):
        kwargs.setdefault('channels', [16, 32, 64, 128])
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    if trained_look:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith('bn3.weight'):
                    p.uniform_(0.5, 1.5)
    return model.eval()


def with_alpha(model, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('.alpha'):
                parameter.fill_(value)
    return model


# What the paper says


@pytest.mark.parametrize('name, millions, blocks', [
    ('arl_cnn14', 8.02, 4), ('arl_cnn50', 23.51, 16), ('arl_cnn50_channel', 23.51, 16), ('arl_cnn50_mixed', 23.51, 16)])
def test_parameters_with_two_outputs(name, millions, blocks):
    model = timm.create_model(name, num_classes=2)
    alphas = {n: p for n, p in model.named_parameters() if n.endswith('.alpha')}
    assert len(alphas) == blocks and all(p.shape == (1,) for p in alphas.values())
    assert {n.rsplit('.', 1)[0] for n in alphas} == {
        n for n, m in model.named_modules() if isinstance(m, timm_arl.ARLBottleneck)}
    plain = sum(p.numel() for p in model.parameters()) - blocks
    assert round(plain / 1e6, 2) == millions
    if name == 'arl_cnn50':
        assert plain == sum(p.numel() for p in timm.create_model('resnet50', num_classes=2).parameters())


@pytest.mark.parametrize('name, plain', [
    ('arl_cnn14', 'resnet14'), ('arl_cnn14_channel', 'resnet14'), ('arl_cnn14_mixed', 'resnet14'),
    ('arl_cnn26', 'resnet26'), ('arl_cnn50', 'resnet50')])
def test_alpha_zero_is_timms_resnet_bit_for_bit(name, plain):
    arl, resnet = create(name, alpha_init=0., num_classes=2), create(plain, num_classes=2)
    missing, unexpected = arl.load_state_dict(resnet.state_dict(), strict=False)
    assert not unexpected and all(k.endswith('.alpha') for k in missing)
    x = image()
    assert torch.equal(arl(x), resnet(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(arl(x), resnet(x))


@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_alpha_zero_trains_as_timms_resnet(drop_path_rate):
    models = [create(name, num_classes=2, drop_path_rate=drop_path_rate, **kwargs).train()
              for name, kwargs in (('arl_cnn26', dict(alpha_init=0.)), ('resnet26', {}))]
    models[0].load_state_dict(models[1].state_dict(), strict=False)
    for model in models:
        torch.manual_seed(3)
        model(image(batch=4)).square().sum().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in models]
    for name, gradient in gradients[1].items():
        assert torch.equal(gradients[0][name], gradient), name
    assert gradients[0]['layer1.0.alpha'].abs() > 0  # alpha itself learns from zero


@pytest.mark.parametrize('attention', ['spatial', 'channel', 'mixed'])
@pytest.mark.parametrize('mask_scale', ['softmax', 'mean1'])
def test_block_computes_the_papers_equation(attention, mask_scale):
    from test_attention import paper_gate
    model = with_alpha(create(attention=attention, mask_scale=mask_scale), 2.)
    block = model.layer2[0]  # "layer 13" of the paper's plot: stride 2, with projection
    assert block.stride == 2 and block.downsample is not None
    seen = {}
    block.bn3.register_forward_hook(lambda m, i, o: seen.update(residual=o.detach().clone()))
    block.downsample.register_forward_hook(lambda m, i, o: seen.update(shortcut=o.detach().clone()))
    block.register_forward_hook(lambda m, i, o: seen.update(output=o.detach().clone()))
    model(image())
    expected = paper_gate(seen['residual'].numpy(), seen['shortcut'].numpy(), 2., attention, mask_scale)
    assert np.abs(seen['output'].numpy() - np.maximum(expected, 0)).max() <= 1e-5 * np.abs(expected).max()


def test_alpha_changes_the_output():
    x = image()
    outputs = [with_alpha(create(name, num_classes=2), 5.)(x) for name in ('arl_cnn14', *SMALL[1:])]
    outputs.append(with_alpha(create(num_classes=2), 0.)(x))
    outputs.append(with_alpha(create(num_classes=2, mask_scale='mean1'), 5.)(x))
    for i, a in enumerate(outputs):
        for b in outputs[i + 1:]:
            assert not torch.allclose(a, b)


def test_dropped_block_is_its_shortcut():
    model = create('arl_cnn26', drop_path_rate=0.99999).train()
    block = model.layer4[1]
    x = image(8, chans=512)
    torch.manual_seed(0)
    block.drop_path.drop_prob = 0.99999
    assert torch.equal(block(x), torch.relu(x))


def test_variants_and_kwargs():
    for name, attention in [('arl_cnn14', 'spatial'), ('arl_cnn14_spatial', 'spatial'),
                            ('arl_cnn14_channel', 'channel'), ('arl_cnn14_mixed', 'mixed')]:
        assert timm.create_model(name).layer1[0].attention == attention
    model = timm.create_model('arl_cnn14', attention='mixed', alpha_init=0.25, mask_scale='mean1')
    assert (model.layer4[0].attention, model.layer4[0].mask_scale) == ('mixed', 'mean1')
    assert all(p.item() == 0.25 for n, p in model.named_parameters() if n.endswith('.alpha'))
    assert timm.create_model('arl_cnn14').layer1[0].alpha.item() == pytest.approx(1e-3)
    with pytest.raises(ValueError, match='finite number, not nan'):
        timm.create_model('arl_cnn14', alpha_init=float('nan'))
    with pytest.raises(ValueError, match="'spatial', 'channel' or 'mixed'"):
        timm.create_model('arl_cnn14', attention='softmax2d')
    with pytest.raises(ValueError, match="'softmax' or 'mean1'"):
        timm.create_model('arl_cnn14', mask_scale='sum1')


# What timm promises of its models


def test_registry():
    assert sorted(timm.list_models('arl_cnn*')) == sorted(FAMILY)
    assert sorted(timm.list_models(module='arl_cnn')) == sorted(FAMILY)
    pretrained = timm.list_pretrained('arl_*')
    assert {'arl_cnn14.isic2017', 'arl_cnn50.a1_in1k', 'arl_cnn50.tv_in1k', 'arl_cnn26.bt_in1k'} <= set(pretrained)
    assert timm.create_model('arl_cnn50').pretrained_cfg['tag'] == 'a1_in1k'
    assert timm.create_model('arl_cnn50.tv_in1k').pretrained_cfg['hf_hub_id'] == 'timm/resnet50.tv_in1k'
    assert is_model_pretrained('arl_cnn50') and not is_model_pretrained('arl_cnn14')


@pytest.mark.parametrize('name', [name for name in timm.list_pretrained('arl_*') if name.endswith('_in1k')])
def test_cfg_is_that_of_the_weights_it_borrows(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_filename == 'model.safetensors' and not cfg.url
    source = timm.get_pretrained_cfg(cfg.hf_hub_id.removeprefix('timm/'))
    for field in ('input_size', 'test_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'crop_mode', 'mean',
                  'std', 'num_classes', 'pool_size', 'first_conv', 'classifier', 'license', 'origin_url'):
        assert getattr(cfg, field) == getattr(source, field), field


@pytest.mark.parametrize('name', FAMILY)
def test_forward_and_cfg(name):
    model = timm.create_model(name).eval()
    cfg = model.default_cfg
    output = model(image(64, batch=1))
    assert output.shape == (1, 1000) and torch.isfinite(output).all()
    assert cfg['pool_size'] == tuple(s // 32 for s in cfg['input_size'][1:])
    assert model.get_classifier().out_features == cfg['num_classes'] and model.num_features == 2048
    assert f'{cfg["classifier"]}.weight' in model.state_dict() and f'{cfg["first_conv"]}.weight' in model.state_dict()
    data_config = resolve_model_data_config(model)
    assert data_config['input_size'] == (3, 224, 224) and create_transform(**data_config) is not None


@pytest.mark.parametrize('name', SMALL)
def test_every_parameter_gets_a_gradient(name):
    model = create(name, num_classes=2).train()
    model(image()).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('kwargs', [dict(global_pool=p) for p in ('avg', 'max', 'avgmax', 'catavgmax')]
                         + [dict(in_chans=1), dict(in_chans=5), dict(drop_rate=0.5), dict(num_classes=0)], ids=str)
def test_model_kwargs(kwargs):
    model = create(**dict(dict(num_classes=2), **kwargs))
    features = model.num_features * model.global_pool.feat_mult()
    output = model(image(chans=kwargs.get('in_chans', 3)))
    assert output.shape == (2, features if kwargs.get('num_classes') == 0 else 2)
    assert model.drop_rate == kwargs.get('drop_rate', 0.)


def test_drop_path_rate_is_spread_over_the_blocks():
    model = create('arl_cnn26', drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob if block.drop_path else 0. for n in (1, 2, 3, 4)
             for block in getattr(model, f'layer{n}')]
    assert rates == pytest.approx(np.linspace(0, 0.3, 8))
    assert torch.allclose(model(image()), create('arl_cnn26')(image()), atol=1e-5)  # eval drops nothing


def test_reset_classifier_and_pooling():
    model = create(num_classes=2)
    model.reset_classifier(7)
    assert model(image()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(image()).shape == (2, 512)
    model.reset_classifier(0, '')
    assert model(image()).shape == (2, 512, 2, 2)
    assert torch.equal(model(image()), model.forward_features(image()))


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('name', ['arl_cnn14', 'arl_cnn26'])
def test_features_only_and_output_stride(name, output_stride):
    features = create(name, features_only=True, output_stride=output_stride)
    reductions = [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    assert features.feature_info.reduction() == reductions
    assert features.feature_info.channels() == [64, 64, 128, 256, 512]
    model = create(name, output_stride=output_stride)
    outputs = features(image(96))
    assert [tuple(o.shape) for o in outputs] == [
        (2, c, 96 // r, 96 // r) for c, r in zip(features.feature_info.channels(), reductions)]
    assert torch.equal(outputs[-1], model.forward_features(image(96)))
    assert any(n.endswith('alpha') for n, _ in features.named_parameters())


def test_features_only_picks_indices():
    features = create(features_only=True, out_indices=(1, 3))
    assert [o.shape[1] for o in features(image())] == [64, 256]


@pytest.mark.parametrize('name', SMALL)
def test_forward_intermediates(name):
    model = create(name)
    expected = model.forward_features(image())
    final, intermediates = model.forward_intermediates(image())
    assert torch.equal(final, expected) and torch.equal(intermediates[-1], expected) and len(intermediates) == 5
    only = model.forward_intermediates(image(), indices=[0, 2], intermediates_only=True)
    assert [o.shape[1] for o in only] == [64, 128]
    model.set_grad_checkpointing()
    assert torch.equal(model.forward_intermediates(image())[0], expected)
    model.prune_intermediate_layers([2], prune_head=True)
    assert torch.equal(model.forward_intermediates(image(), indices=[2], intermediates_only=True)[0], only[1])


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = create('arl_cnn26', num_classes=2).train()
        model.set_grad_checkpointing(checkpointing)
        model(image()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.parametrize('name', SMALL)
def test_torchscript(name):
    model = with_alpha(create(name, num_classes=2), 2.)
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(image()), model(image()), atol=1e-6)
    assert torch.allclose(scripted(image(96, batch=1)), model(image(96, batch=1)), atol=1e-6)


def test_torchscript_with_drop_path():
    scripted = torch.jit.script(create('arl_cnn26', num_classes=2, drop_path_rate=0.2).train())
    scripted(image()).sum().backward()


@pytest.mark.parametrize('name', SMALL)
def test_fx(name):
    model = with_alpha(create(name, num_classes=2), 2.)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(image()), model(image()))
    assert torch.equal(traced(image(96, batch=1)), model(image(96, batch=1)))
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))  # as torch.fx.experimental.optimization does
    assert torch.equal(again(image()), model(image()))
    nodes = create_feature_extractor(model, {'layer2': 'stage'})
    assert torch.equal(nodes(image())['stage'], model.forward_intermediates(image(), indices=[2])[1][0])
    assert torch.allclose(torch.jit.script(nodes)(image())['stage'], nodes(image())['stage'], atol=1e-6)
    in_half = copy.deepcopy(model).bfloat16()
    assert torch.fx.symbolic_trace(in_half)(image().bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_torch_export_with_dynamic_batch():
    model = with_alpha(create(num_classes=2), 2.)
    exported = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)).module()
    for batch in (1, 2, 5):
        assert torch.allclose(exported(image(batch=batch)), model(image(batch=batch)), atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.slow
def test_torch_compile_has_no_graph_break(name):
    model = with_alpha(create(name, num_classes=2), 2.).double().train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    compiled(image().double()).square().sum().backward()
    model(image().double()).square().sum().backward()
    for (n, a), b in zip(compiled.named_parameters(), model.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12), n


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', SMALL)
def test_residual_stream_keeps_dtype_and_format(name, dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = create(name, num_classes=2).to(memory_format=memory_format)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[0].register_forward_hook(lambda m, i, o: seen.append(o))
    x = image().contiguous(memory_format=memory_format)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        reference = model(x)
    assert len(seen) == 3
    assert all(o.dtype == dtype and o.is_contiguous(memory_format=memory_format) for o in seen)
    assert torch.allclose(reference.float(), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_whole_model_in_another_dtype(dtype):
    model = create(num_classes=2)
    converted = copy.deepcopy(model).to(dtype)(image().to(dtype))
    assert torch.allclose(converted.float(), model(image()), atol=0.05, rtol=0.05)
    direct = timm.create_model('arl_cnn14', dtype=dtype, device='meta')
    assert all(p.dtype == dtype and p.is_meta for p in direct.parameters())


def test_alpha_can_be_set_again_after_to_empty():
    # as FSDP initialises a model that was built on the meta device
    with torch.device('meta'):
        model = timm.create_model('arl_cnn14', alpha_init=0.25)
    model.to_empty(device='cpu')
    with_alpha(model, 9.)
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert [block.alpha.tolist() for n in (1, 2, 3, 4) for block in getattr(model, f'layer{n}')] == [[0.25]] * 4


def test_alpha_has_no_weight_decay():
    model = timm.create_model('arl_cnn14')
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert {decay[id(block[0].alpha)] for block in (model.layer1, model.layer2, model.layer3, model.layer4)} == {0.}
    assert decay[id(model.conv1.weight)] == 0.05


# Weights


def test_state_dict_round_trip(tmp_path):
    model = with_alpha(create(num_classes=2, in_chans=1), 0.125)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'w.safetensors')
    other = create(seed=5, num_classes=2, in_chans=1)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / 'w.safetensors'), strict=True)
    assert torch.equal(other(image(chans=1)), model(image(chans=1)))


def test_resnet50_checkpoint_fits(resnet50_file):
    resnet = timm.create_model(
        'resnet50', pretrained=True, pretrained_cfg_overlay=dict(file=str(resnet50_file))).eval()
    arl = timm.create_model(
        'arl_cnn50', pretrained=True, pretrained_cfg_overlay=dict(file=str(resnet50_file)), alpha_init=0.).eval()
    assert torch.equal(arl(image()), resnet(image()))
    arl = timm.create_model('arl_cnn50', pretrained=True, pretrained_cfg_overlay=dict(file=str(resnet50_file)),
                            num_classes=2, in_chans=1, alpha_init=0.5)
    assert arl.fc.out_features == 2 and arl.layer4[2].alpha.item() == 0.5
    assert torch.allclose(arl.conv1.weight, resnet.conv1.weight.sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(arl.layer3[5].conv2.weight, resnet.layer3[5].conv2.weight)


@pytest.mark.parametrize('lost', ['layer2.3.bn3.weight', 'layer3.1.alpha'])
def test_incomplete_checkpoint_is_refused(resnet50_file, tmp_path, lost):
    state_dict = safetensors.torch.load_file(resnet50_file)
    if lost.endswith('alpha'):  # an ARL-CNN's checkpoint that lost one of its alphas is no ResNet's
        state_dict = dict(create('arl_cnn50').state_dict())
    del state_dict[lost]
    safetensors.torch.save_file(state_dict, tmp_path / 'w.safetensors')
    with pytest.raises(RuntimeError, match=lost):
        timm.create_model(
            'arl_cnn50', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.safetensors')))


def test_hub_repo_layout_round_trip(tmp_path):
    model = with_alpha(create(num_classes=2, attention='mixed', mask_scale='mean1'), 0.5)
    save_network(model, tmp_path, ['a', 'b'], channels=[16, 32, 64, 128])
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image()), model(image()))
    assert again.pretrained_cfg['label_names'] == ['a', 'b']


@pytest.mark.slow
def test_import_is_quiet_and_light():
    script = ("import sys, timm_arl; heavy = {'datasets', 'accelerate', 'sklearn', 'matplotlib'} & set(sys.modules); "
              'assert timm_arl.pretrained.HUB == "timm-arl"; sys.exit(f"imported {heavy}" if heavy else 0)')
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', script], capture_output=True, text=True,
                          env={**os.environ, 'TIMM_ARL_HUB': ''})  # empty is as good as unset
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
