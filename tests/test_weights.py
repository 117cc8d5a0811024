"""Weights that come with the package: there without a network, and never another's."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from loopback_hub import Hub
from sklearn.metrics import roc_auc_score
from test_cards import front_matter, run_snippets_here

import timm_arl
from timm_arl.factory import Checkpoint, create_trained
from timm_arl.isic import LABELS
from timm_arl.isic.dataset import decode, load_splits
from timm_arl.isic.shift import home_of
from timm_arl.pretrained import OWN_WEIGHTS, shipped_weights

NAME = 'arl_cnn14.isic2017'
OWN = pytest.mark.parametrize('name', OWN_WEIGHTS)
LOAD = f"""
import sys
import timm, timm_arl
for line in sys.stdin:  # as often as it is told
    try:
        print(timm.create_model('{NAME}', pretrained=True).fc.bias.sum().item(), flush=True)
    except timm_arl.WeightsError as error:
        print(error.repo, error.revision, error.cause, flush=True)
"""
# a process for each, since huggingface_hub reads the environment when it is imported; the slow imports are shared
RUN_EACH = """
import json, os, sys, tempfile
import torchvision
assert 'huggingface_hub' not in sys.modules
for line in sys.stdin:
    environment, code = json.loads(line)
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            os.environ.update(environment)
            exec(code)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps([status, said.read().decode()]), flush=True)
"""


@pytest.fixture(scope='module')
def python():
    """Runs code in a process of its own, whose environment has some changes: what it says."""
    process = subprocess.Popen([sys.executable, '-c', RUN_EACH], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)

    def run(environment, code):
        process.stdin.write(json.dumps([environment, code]) + '\n')
        process.stdin.flush()
        status, said = json.loads(process.stdout.readline())
        assert status == 0, said
        return said

    yield run
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_stranger_who_has_the_name_injects_nothing(tmp_path):
    """On an installation without the file: the repo of that name gives these weights or none."""
    shutil.copytree(Path(timm_arl.__file__).parent, tmp_path / 'timm_arl', ignore=shutil.ignore_patterns('weights'))
    ours = (shipped_weights(NAME) / 'model.safetensors').read_bytes()
    theirs = safetensors.torch.save({k: -v for k, v in safetensors.torch.load(ours).items()})
    repo = f'timm-arl/{NAME}'
    with Hub({repo: {'model.safetensors': theirs}}) as hub:
        hub.tag(repo, 'v1')
        env = {**os.environ, **hub.env(tmp_path / 'home'), 'PYTHONPATH': str(tmp_path)}

        process = subprocess.Popen(  # with the copy in the current folder, which comes first
            [sys.executable, '-c', LOAD], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=tmp_path)

        def load():
            process.stdin.write('load\n')
            process.stdin.flush()
            return process.stdout.readline()

        assert f'{repo} v1 the downloaded file has the wrong checksum' in load()
        assert not [p for p in (tmp_path / 'home').rglob('*') if p.is_file() and p.stat().st_size > 10 ** 6]
        hub.revisions[repo]['v1'] = hub.repos[repo] = {'model.safetensors': ours}
        assert float(load()) == pytest.approx(safetensors.torch.load(ours)['fc.bias'].sum().item(), abs=1e-7)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.slow
def test_a_stranger_who_has_the_name_does_not_say_what_they_mean(tmp_path, python):
    """The genuine weights, with a config.json that calls melanoma something else and has other thresholds."""
    folder, repo = shipped_weights(NAME), f'timm-arl/{NAME}'
    config = json.loads((folder / 'config.json').read_text())
    config['label_names'] = config['pretrained_cfg']['label_names'] = ['benign', 'melanoma']
    config['thresholds'] = {'youden on validation': {'melanoma': 0.999, 'seborrheic_keratosis': 0.999}}
    with Hub({repo: {'model.safetensors': folder / 'model.safetensors', 'config.json': json.dumps(config).encode(),
                     'results.json': b'{"run": {"arguments": {"crops": "center"}}}'}}) as hub:
        said = python(hub.env(tmp_path), (
            'import timm, timm_arl\n'
            'from timm_arl.predictor import Predictor\n'
            f'p = Predictor("hf-hub:{repo}")\n'
            'print(p.labels, p.crops, p.thresholds["youden on validation"]["melanoma"] < 0.5)\n'
            'try:\n'
            f'    timm.create_model("hf-hub:{repo}", pretrained=True)\n'
            'except timm_arl.WeightsError as error:\n'
            '    print(error)\n'))
    assert said.splitlines()[-2:] == [
        "('melanoma', 'seborrheic_keratosis') multiscale True",
        f'The config.json of {repo} is not that of the weights that have this name: load {NAME}.'], said


@OWN
def test_the_images_of_home_are_known(name):
    """With which the page of an external validation compares those of another clinic."""
    checkpoint = Checkpoint(name)
    home = home_of(checkpoint.folder, checkpoint.settings(), checkpoint.home())
    assert home['images']['images'] == 150 and home['thresholds'].keys() >= {'youden on validation'}
    assert [home['labels'][label]['positives'] for label in LABELS] == [30, 42]


@pytest.mark.slow
def test_thresholds_do_not_need_a_record_of_the_evaluation(tmp_path, python):
    """timm caches config.json and the weights; offline, results.json is then out of reach."""
    files = {name: shipped_weights(NAME) / name for name in ('config.json', 'model.safetensors')}
    with Hub({'row/arl': files}) as hub:
        python(hub.env(tmp_path), 'import timm, timm_arl; timm.create_model("hf-hub:row/arl", pretrained=True)')
        said = python({**hub.env(tmp_path), 'HF_HUB_OFFLINE': '1'}, (
            'from timm_arl.predictor import Predictor; p = Predictor("hf-hub:row/arl"); '
            'print(len(p.thresholds), bool(p.temperatures), *p.remarks)'))
    assert '3 True How hf-hub:row/arl was evaluated is not known' in said and 'no thresholds' not in said, said


@OWN
def test_labels_and_preprocessing_travel_with_them(isic_sample, name):
    model = timm.create_model(name, pretrained=True).eval()
    assert tuple(model.pretrained_cfg['label_names']) == ('melanoma', 'seborrheic_keratosis')
    config = json.loads((shipped_weights(name) / 'config.json').read_text())
    assert list(config['thresholds']['official'].values()) == [0.5, 0.5] and len(config['thresholds']) == 3
    side = model.pretrained_cfg['input_size'][-1]
    assert side == config['pretrained_cfg']['input_size'][-1]
    split = load_splits(isic_sample)['validation']
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        logits = model(torch.stack([transform(decode(cell)) for cell in split['image']]))
    for k, label in enumerate(model.pretrained_cfg['label_names']):  # an untrained network is near 0.5
        assert roc_auc_score(split[label], logits[:, k]) > 0.75


@pytest.mark.slow
def test_another_repo_of_that_name_is_another(tmp_path, python):
    """Whose weights are called arl_cnn14.isic2017 too: they are not exchanged for those of the package."""
    ours = safetensors.torch.load_file(shipped_weights(NAME) / 'model.safetensors')
    theirs = safetensors.torch.save({k: v + 1 if k == 'fc.bias' else v for k, v in ours.items()})
    config = (shipped_weights(NAME) / 'config.json').read_bytes()
    with Hub({f'lab/{NAME}': {'model.safetensors': theirs, 'config.json': config}}) as hub:
        said = python({**hub.env(tmp_path / 'home'), 'TIMM_ARL_HUB': 'lab'}, (
            'import timm, timm_arl\n'
            f'print(timm.create_model("hf-hub:lab/{NAME}", pretrained=True).fc.bias.sum().item())\n'))
    assert float(said.splitlines()[-1]) == pytest.approx(ours['fc.bias'].sum().item() + 2, abs=1e-5), said


def test_model_without_its_tag():
    """As in timm, the first tag with weights is what pretrained=True means; without weights, it is ImageNet's shape."""
    named, model = (timm.create_model(name, pretrained=True) for name in (NAME, 'arl_cnn14'))
    for (key, ours), theirs in zip(model.state_dict().items(), named.state_dict().values()):
        assert torch.equal(ours, theirs), key
    assert model.pretrained_cfg['label_names'] == named.pretrained_cfg['label_names']
    assert tuple(Checkpoint('arl_cnn14').label_names()) == ('melanoma', 'seborrheic_keratosis')
    assert torch.equal(create_trained('arl_cnn14').fc.bias, named.fc.bias)
    assert timm.create_model('arl_cnn14').num_classes == 1000
    assert timm.create_model('arl_cnn14', pretrained=True, num_classes=7).num_classes == 7
    with pytest.raises(timm_arl.WeightsError, match=r'arl_cnn14.untrained: choose arl_cnn14.isic2017'):
        timm.create_model('arl_cnn14.untrained', pretrained=True)


@OWN
def test_card_is_there_with_the_figures_of_the_results(call, repo, tmp_path, name):
    done = call('timm_arl.hub.__main__', 'card', name, '--output', tmp_path / 'c')
    assert done.returncode == 0, done.stderr
    for file in ('README.md', 'config.json', 'results.json'):  # else generate them again
        assert (tmp_path / 'c' / file).read_bytes() == (repo / 'hub_cards' / name / file).read_bytes()
    card = (tmp_path / 'c' / 'README.md').read_text()
    results = json.loads((shipped_weights(name) / 'results.json').read_text())
    found = {(r['dataset']['split'], m['name']): m['value']
             for r in front_matter(card)['model-index'][0]['results'] for m in r['metrics']}
    assert found == {(split, 'AUC, ' + label.replace('_', ' ')): results['metrics'][split][label]['auc']
                     for split in ('validation', 'test') for label in ('melanoma', 'seborrheic_keratosis')}
    assert results['data']['official_splits'] == ['train', 'validation', 'test']
    assert 'seborrheic_keratosis' in '\n'.join(run_snippets_here(card, tmp_path))


@OWN
def test_staged_by_name(call, tmp_path, name):
    done = call('timm_arl.hub.__main__', 'stage', name, tmp_path / 's')
    assert done.returncode == 0 and 'README.md' in done.stdout, done.stderr
    for file in shipped_weights(name).iterdir():
        assert (tmp_path / 's' / file.name).read_bytes() == file.read_bytes()
    assert f"timm.create_model('{name}', pretrained=True)" in (tmp_path / 's' / 'README.md').read_text()
    done = call('timm_arl.hub.__main__', 'stage', name, tmp_path / 't', '--note', 'mine')
    assert done.returncode == 2 and 'leave out --evaluation, --alpha-zero, --tag, --note and --license' in done.stderr
