"""Publishing: what is staged, what its card says, and what a Hub holds after a push, a second push, a fault."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import safetensors
import timm
import torch
import yaml
from hub import Hub
from PIL import Image
from timm.models import save_for_hf

from timm_arl import hub as publishing
from timm_arl.isic.metrics import score_split
from timm_arl.isic.results import write_json, write_predictions, write_rows
from timm_arl.isic.sources import CHALLENGE_IDS, ids_digest

# several commands in a process of its own, since huggingface_hub reads the environment when it is imported
COMMANDS = """
import contextlib, io, json, os, sys
from timm_arl import hub
for line in sys.stdin:
    os.environ['HF_TOKEN'], *args = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = hub.main(args)
        except SystemExit as stopped:
            status = stopped.code
    print(json.dumps(dict(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())), flush=True)
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The output folder of a finished run, as finetune_isic.py leaves it."""
    folder = tmp_path_factory.mktemp('run') / 'out'
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2)
    save_for_hf(model, folder, safe_serialization=True, model_config=dict(
        label_names=['melanoma', 'seborrheic_keratosis']), data_config=dict(
            timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)))
    truth = torch.arange(60).reshape(30, 2).remainder(7).eq(0).float().numpy()
    probabilities = torch.rand(30, 2, generator=torch.Generator().manual_seed(1)).numpy()
    write_json(folder / 'metrics.json', {name: score_split(truth, probabilities) for name in ('validation', 'test')})
    for name in ('validation', 'test'):
        write_predictions(folder / f'predictions_{name}.csv', [f'{name}{k}' for k in range(30)], probabilities)
    write_rows(folder / 'summary.csv', [
        {'epoch': epoch, 'validation_mean_auc': auc, 'layer1.0.alpha': 0.125}
        for epoch, auc in ((1, .5), (2, .7), (3, .6))])
    write_rows(folder / 'looks.csv', [{'time': 'now', 'checkpoint': '/home/me/out', 'command': 'x ../me/out'}])
    write_json(folder / 'run.json', {
        'command': 'finetune_isic.py --data /home/me/isic2017', 'commit': 'abcdef123456', 'arguments': {
            'data': '/home/me/isic2017', 'recipe': 'modern', 'seed': 7, 'keep': 'best', 'train_ids': '0'},
        'launch': {'processes': 1, 'mixed_precision': 'no', 'device': 'cpu'},
        'versions': {'timm_arl': '0.1.0', 'torch': '2'}})
    return folder


@pytest.fixture(scope='module')
def staged(run, tmp_path_factory):
    return publishing.stage(run, tmp_path_factory.mktemp('staged') / 'arl_cnn14.isic2017')


def front_matter(card):
    return yaml.safe_load(card.split('---\n')[1])


def test_staged_is_a_model_repo(staged, run):
    assert {p.name for p in staged.iterdir()} == {'README.md', 'config.json', 'model.safetensors', 'results.json'}
    model = timm.create_model(f'local-dir:{staged}', pretrained=True)
    reference = timm.create_model(f'local-dir:{run}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))
    config = json.loads((staged / 'config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'isic2017' and config['timm_version'] == timm.__version__
    assert config['thresholds'] == {'official': {'melanoma': 0.5, 'seborrheic_keratosis': 0.5}}
    with safetensors.safe_open(staged / 'model.safetensors', 'pt') as file:
        assert file.metadata()['name'] == 'arl_cnn14.isic2017'


def test_figures_of_the_card_are_those_of_the_results(staged):
    card, results = (staged / 'README.md').read_text(), json.loads((staged / 'results.json').read_text())
    assert results['kept_epoch'] == 2
    for split, scores in results['metrics'].items():
        for label in ('melanoma', 'seborrheic_keratosis'):
            low, high = scores[label]['auc_ci95']
            row = f'| {label.replace("_", " ")} | {scores[label]["auc"]:.3f} [{low:.3f}, {high:.3f}] |'
            assert card.partition(f'{split}, 30 images of isic2017:')[2].count(row) >= 1
    found = {(r['dataset']['split'], m['name']): m['value']
             for r in front_matter(card)['model-index'][0]['results'] for m in r['metrics']}
    assert found == {(split, 'AUC, ' + label.replace('_', ' ')): results['metrics'][split][label]['auc']
                     for split in results['metrics'] for label in ('melanoma', 'seborrheic_keratosis')}
    assert front_matter(card)['library_name'] == 'timm' and front_matter(card)['license'] == 'apache-2.0'
    for part in ('Not a medical device', 'finetune_isic.py --data isic2017', 'abcdef123456', 'looked at once',
                 'Known leakage', publishing.sha256_of(staged / 'model.safetensors'), '| seed | 7 |', '0.125'):
        assert part in card, part
    assert '\n\n\n' not in card and '/me' not in card + (staged / 'results.json').read_text()


def test_what_an_evaluation_adds(run, tmp_path):
    with open(run / 'metrics.json') as file:
        metrics = json.load(file)
    for scores in metrics.values():
        for label, threshold in (('melanoma', 0.25), ('seborrheic_keratosis', 0.375)):
            scores[label]['operating_points'] = [{**scores[label], 'name': 'youden on validation',
                                                  'threshold': threshold}]
            scores[label]['calibration'] = {'ece': 0.03125, 'temperature': 1.5, 'ece_with_temperature': 0.015625}
    (tmp_path / 'r').mkdir()
    write_json(tmp_path / 'r' / 'metrics.json', metrics)
    for name in ('validation', 'test'):
        shutil.copy(run / f'predictions_{name}.csv', tmp_path / 'r')
    (tmp_path / 'r' / 'roc_test.png').write_bytes(b'png')
    folder = publishing.stage(run, tmp_path / 's', tmp_path / 'r')
    config = json.loads((folder / 'config.json').read_text())
    assert config['thresholds']['youden on validation'] == {'melanoma': 0.25, 'seborrheic_keratosis': 0.375}
    assert config['temperatures'] == {'melanoma': 1.5, 'seborrheic_keratosis': 1.5}
    card = (folder / 'README.md').read_text()
    assert '| melanoma, youden on validation | 0.250 |' in card and '![roc_test.png](roc_test.png)' in card
    assert '| melanoma | 0.031 | 0.016 | 1.500 |' in card
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 2


def test_a_card_calls_isic_2017_what_is_isic_2017(run, staged, tmp_path, monkeypatch):
    card = (staged / 'README.md').read_text()
    assert 'trained on `isic2017`, not the training images of ISIC 2017' in card
    assert 'datasets' not in front_matter(card)
    assert '| started from | scratch |' in card and 'base_model' not in front_matter(card)
    pretrained = tmp_path / 'pretrained'
    shutil.copytree(run, pretrained)
    record = json.loads((run / 'run.json').read_text())
    record['arguments'].update(model='arl_cnn50.tv_in1k', pretrained=True)
    write_json(pretrained / 'run.json', record)
    card = (publishing.stage(pretrained, tmp_path / 'p') / 'README.md').read_text()
    assert front_matter(card)['base_model'] == 'timm/resnet50.tv_in1k'
    monkeypatch.setitem(CHALLENGE_IDS, 'train', '0')
    monkeypatch.setitem(CHALLENGE_IDS, 'test', ids_digest(f'test{k}' for k in range(30)))
    card = (publishing.stage(run, tmp_path / 's', note='copies at 256 px') / 'README.md').read_text()
    assert 'trained on ISIC 2017.' in card and 'training images of the challenge, copies at 256 px' in card
    assert 'test, 30 images of ISIC 2017 Part 3:' in card and 'validation, 30 images of isic2017:' in card
    assert front_matter(card)['datasets'] == ['isic-2017']


def snippets(card):
    return '\n'.join(re.findall(r'```python\n(.*?)```', card, re.DOTALL))


def run_snippets(card, folder, **env):
    Image.new('RGB', (600, 450), (200, 150, 130)).save(folder / 'lesion.jpg')
    return subprocess.run([sys.executable, '-c', snippets(card)], cwd=folder, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=200)


def test_snippets_run(staged, tmp_path):
    card = (staged / 'README.md').read_text()
    assert "'hf-hub:timm-arl/arl_cnn14.isic2017'" in card
    done = run_snippets(card.replace('hf-hub:timm-arl/arl_cnn14.isic2017', f'local-dir:{staged}'), tmp_path)
    assert done.returncode == 0, done.stderr
    first, *shapes = done.stdout.splitlines()
    assert set(eval(first)) == {'melanoma', 'seborrheic_keratosis'} and shapes[-1] == '(1, 2, 2)'


def test_the_card_of_another_network(staged, tmp_path):
    shutil.copytree(staged, tmp_path / 's')
    model = timm.create_model('resnet18', num_classes=2)
    save_for_hf(model, tmp_path / 's', safe_serialization=True, model_config=dict(
        label_names=['melanoma', 'seborrheic_keratosis']))
    text = publishing.card(tmp_path / 's').read_text()
    assert 'resnet18, trained on' in text and 'Attention Residual' not in text and 'activation' not in text


@pytest.mark.parametrize('name', [name for name in timm.list_pretrained('arl_*') if name.endswith('_in1k')])
def test_cards_of_timms_weights_are_there_and_show_no_figure(call, repo, tmp_path, name):
    done = call('timm_arl.hub', 'card', name, '--output', tmp_path / 'c')
    assert done.returncode == 0, done.stderr
    card = (tmp_path / 'c' / 'README.md').read_text()
    assert card == (repo / 'hub_cards' / name / 'README.md').read_text()  # else generate it again
    matter = front_matter(card)
    assert matter['base_model'].startswith('timm/resnet') and 'model-index' not in matter
    assert matter['license'] == ('bsd-3-clause' if '.tv_' in name else 'apache-2.0')
    assert 'this card shows no figure' in card and 'AUC' not in card


def test_snippets_with_timms_weights_run(repo, resnet50_file, tmp_path):
    with Hub({'timm/resnet50.a1_in1k': {'model.safetensors': resnet50_file}}) as server:
        done = run_snippets((repo / 'hub_cards' / 'arl_cnn50.a1_in1k' / 'README.md').read_text(), tmp_path,
                            **server.env(tmp_path / 'home'))
    assert done.returncode == 0 and '(1, 2048)' in done.stdout, done.stderr


def test_push_push_again_verify(run, tmp_path):
    staged = publishing.stage(run, tmp_path / 'staged')
    with Hub({}) as server:
        env = {**os.environ, **server.env(tmp_path / 'home'), 'TIMM_ARL_HUB': 'lab'}
        process = subprocess.Popen(
            [sys.executable, '-c', COMMANDS], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

        def program(*args, token='hf_test'):
            process.stdin.write(json.dumps([token, *map(str, args)]) + '\n')
            process.stdin.flush()
            return SimpleNamespace(**json.loads(process.stdout.readline()))

        done = program('push', staged, '--to', 'user/model')
        assert done.returncode == 0 and 'would be sent; pass --yes' in done.stdout and not server.repos, done.stderr
        server.fault('POST .*/commit/', 'status', code=500)
        done = program('push', staged, '--to', 'user/model', '--yes')
        assert done.returncode == 2 and 'The same command goes on' in done.stderr and 'Traceback' not in done.stderr
        done = program('push', staged, '--to', 'user/model', '--yes')
        assert done.returncode == 0, done.stderr
        assert set(server.repos['user/model']) == {p.name for p in staged.iterdir()}
        assert server.repos['user/model']['model.safetensors'] == (staged / 'model.safetensors').read_bytes()
        assert b"create_model('hf-hub:user/model'" in server.repos['user/model']['README.md']
        commits = len(server.commits['user/model'])
        done = program('push', staged, '--to', 'user/model', '--yes')
        assert done.returncode == 0 and 'everything is there already' in done.stdout
        assert len(server.commits['user/model']) == commits
        done = program('verify', 'user/model', '--against', staged)
        assert done.returncode == 0 and 'the same files, the same outputs' in done.stdout, done.stderr
        server.tag('user/model', 'v1')
        server.repos['user/model']['results.json'] = b'{}'
        done = program('verify', 'user/model', '--against', staged)
        assert done.returncode == 2 and 'differs from' in done.stderr and 'results.json' in done.stderr
        assert program('verify', 'user/model@v1', '--against', staged).returncode == 0
        done = program('verify', 'user/model@v2', '--against', staged)
        assert done.returncode == 2 and 'there is no such revision' in done.stderr
        done = program('push', staged, '--to', 'user/other', '--yes', token='hf_wrong')
        assert done.returncode == 2 and 'the token is wrong' in done.stderr
        assert 'user/other' not in (staged / 'README.md').read_text()
        done = program('push', staged, '--to', 'user/new', '--yes', token='')
        assert done.returncode == 2 and 'log in' in done.stderr and 'is wrong' not in done.stderr, done.stderr

        for fault, code, words in (('PUT /_lfs/', 403, 'that may do that'), ('/objects/batch', 507, 'the network'),
                                   ('POST /api/repos/create', 403, 'that may do that')):
            server.blobs.clear()
            server.fault(fault, 'status', code=code, times=-1)
            done = program('push', staged, '--to', f'user/refused-{code}{len(fault)}', '--yes')
            assert done.returncode == 2 and words in done.stderr, done
            server.faults.clear()
        assert not any(files for name, files in server.repos.items() if 'refused' in name)

        # killed while the weights go up
        server.fault('PUT /_lfs/', 'stall', seconds=20)
        server.blobs.clear()
        server.requests.clear()
        command = [sys.executable, '-m', 'timm_arl.hub', 'push', staged, '--to', 'user/killed', '--yes']
        offline = subprocess.run(command, env={**env, 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
        assert offline.returncode == 2 and 'HF_HUB_OFFLINE is set' in offline.stderr and '\n' not in offline.stderr[:-1]
        killed = subprocess.Popen(command, env={**env, 'HF_TOKEN': 'hf_test'})
        deadline = time.time() + 120
        while 'PUT /_lfs/' not in ' '.join(server.requests) and time.time() < deadline:
            time.sleep(0.1)
        killed.kill()
        killed.wait(30)
        assert server.repos['user/killed'] == {}
        done = program('push', staged, '--to', 'user/killed', '--yes')
        assert done.returncode == 0 and len(server.commits['user/killed']) == 2, done.stderr
        assert program('verify', 'user/killed', '--against', staged).returncode == 0

        # everything that is staged, by one command, and out of sight
        other = publishing.stage(run, tmp_path / 'other', tag='mine')
        done = program('push', staged, other, '--yes', '--private', '--tag', 'v1')
        assert done.returncode == 0 and {'lab/arl_cnn14.isic2017', 'lab/arl_cnn14.mine'} <= server.private, done.stderr
        assert program('verify', 'lab/arl_cnn14.mine@v1', '--against', other).returncode == 0
        assert program('push', other, '--yes', '--tag', 'v1').returncode == 0  # there already, and the same
        server.repos['lab/arl_cnn14.mine']['notes.md'] = b'written in the browser'
        assert program('push', other, '--yes', '--tag', 'v1').returncode == 0  # the tag has still what is here
        (other / 'README.md').write_text('# Mine\n')
        done = program('push', other, '--yes', '--tag', 'v1')
        assert done.returncode == 2 and 'has a tag v1 already, of other content' in done.stderr
        done = program('verify', 'lab/arl_cnn14.mine', '--against', other, token='')
        assert done.returncode == 2 and 'or it is private' in done.stderr and 'HF_TOKEN' in done.stderr
        process.stdin.close()
        assert process.wait(30) == 0


def test_push_to_a_folder(staged, tmp_path):
    there = str(tmp_path / 'mirror')
    assert set(publishing.push(staged, there)) == {p.name for p in staged.iterdir()} and not os.path.exists(there)
    publishing.push(staged, there, yes=True)
    assert publishing.push(staged, there, yes=True) == []
    assert publishing.verify(there, staged)['config.json'] == publishing.sha256_of(staged / 'config.json')


def test_what_cannot_be_staged(run, staged, call, tmp_path):
    half = tmp_path / 'half'
    shutil.copytree(run, half)
    (half / 'metrics.json').unlink()
    done = call('timm_arl.hub', 'stage', half, tmp_path / 's')
    assert done.returncode == 2 and 'is not a finished run of finetune_isic.py: metrics.json' in done.stderr
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('dear')
    done = call('timm_arl.hub', 'stage', run, tmp_path / 'mine')
    assert done.returncode == 2 and 'holds what this command did not put there' in done.stderr
    assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'dear'
    other = tmp_path / 'r'
    other.mkdir()
    shutil.copy(run / 'metrics.json', other)
    shutil.copy(run / 'predictions_validation.csv', other)
    text = (run / 'predictions_test.csv').read_text()
    (other / 'predictions_test.csv').write_text(text.replace(',0.9', ',0.1'))
    done = call('timm_arl.hub', 'stage', run, tmp_path / 's', '--evaluation', other)
    assert done.returncode == 2 and 'has other predictions on test than the run' in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {'half', 'mine', 'r'}
    broken = tmp_path / 'broken'
    shutil.copytree(staged, broken)
    (broken / 'results.json').write_text('{')
    for args in (('push', broken, '--to', './there', '--yes'), ('verify', './there', '--against', broken),
                 ('push', staged, '--to', 'a/b/c'), ('push', staged, '--to', './there', '--private')):
        done = call('timm_arl.hub', *args, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert not (tmp_path / 'there').exists()
    done = call('timm_arl.hub', 'push', tmp_path / 'mine')
    assert done.returncode == 2 and 'stage it first' in done.stderr
