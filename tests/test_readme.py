"""What the README shows works as shown."""
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import timm
from loopback_hub import Hub
from PIL import Image

import timm_arl  # noqa: F401  registers the models

SHOW = """
print('SHAPES', *features.shape, *logits.shape)
print('SUM', model.conv1.weight.double().sum().item())
print('ALPHAS', len(alphas), *set(alphas.values()))
"""


def test_python_example_with_weights_from_timms_repo_on_the_hub(repo, resnet50_file, tmp_path):
    (example,) = re.findall(r'```python\n(.*?)```', (repo / 'README.md').read_text(), re.DOTALL)
    Image.new('RGB', (600, 450), (200, 150, 130)).save(tmp_path / 'lesion.jpg')
    with Hub({'timm/resnet50.a1_in1k': {'model.safetensors': resnet50_file}}) as hub:
        env = dict(os.environ, **hub.env(tmp_path / 'hf', HF_HUB_OFFLINE='0'))
        done = subprocess.run(
            [sys.executable, '-c', example + SHOW], env=env, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in done.stdout.splitlines()}
    assert shown['SHAPES'] == [1, 2048, 7, 7, 1, 2]
    assert shown['ALPHAS'] == [16, pytest.approx(1e-3)]
    expected = safetensors.torch.load_file(resnet50_file)['conv1.weight'].double().sum().item()
    assert shown['SUM'] == [pytest.approx(expected, abs=1e-9)]
    # the safetensors file, once, and never a pickle
    resolved = {r.partition('/resolve/')[2].partition('/')[2] for r in hub.requests if '/resolve/' in r}
    assert resolved == {'model.safetensors'} and len([r for r in hub.requests if 'GET /_cdn' in r]) == 1


def test_model_table(repo):
    rows = re.findall(r'^\| (`.*?) \| ([\d-]+) \| .*? \| (.*?) \|', (repo / 'README.md').read_text(), re.MULTILINE)
    seen = []
    for names, blocks, parameters in rows:
        numbers = [float(n) for n in re.findall(r'([\d.]+) M', parameters)]
        for i, name in enumerate(re.findall(r'`(\w+)`', names)):
            model = timm.create_model(name, num_classes=2, device='meta')
            alphas = [p for n, p in model.named_parameters() if n.endswith('.alpha')]
            total = sum(p.numel() for p in model.parameters()) - len(alphas)
            assert round(total / 1e6, 2) == numbers[min(i, len(numbers) - 1)], name
            assert blocks == '-'.join(str(len(getattr(model, f'layer{n}'))) for n in (1, 2, 3, 4))
            assert not alphas or f'+ {len(alphas)}' in parameters
            seen.append(name)
    assert sorted(seen) == sorted([*timm.list_models('arl_*'), 'resnet14', 'seresnet14'])
