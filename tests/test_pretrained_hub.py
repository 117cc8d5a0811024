"""Weights from a Hub that fails in every way a Hub can, by the real client: the right result, or one clear error."""
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from loopback_hub import Hub

import timm_arl  # noqa: F401  registers the models

pytestmark = pytest.mark.slow

# in a process of its own, since huggingface_hub reads the environment when it is imported: a line of JSON for each repo
CLIENT = """
import json, os, sys, time
import huggingface_hub, timm, timm_arl
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 10)  # between tries
from timm_arl.factory import Checkpoint, create_for_task
for line in sys.stdin:
    job = json.loads(line)
    os.environ.pop('HF_TOKEN', None)
    os.environ.update(job.get('env', {}))
    try:
        if 'checkpoint' in job:
            found = Checkpoint(job['checkpoint'])
            print(json.dumps(dict(labels=found.label_names(), arguments=found.arguments())), flush=True)
            print('END', file=sys.stderr, flush=True)
            continue
        if 'name' in job:
            create = timm.create_model if job.get('plain') else create_for_task
            model = create(job['name'], pretrained=True)
        else:
            model = timm.create_model('arl_cnn14', pretrained=True, num_classes=2, **job.get(
                'arguments', {'channels': [8, 16, 32, 64]}), pretrained_cfg_overlay=dict(
                    hf_hub_id=job['repo'], hf_hub_filename='model.safetensors', num_classes=2))
        result = dict(sum=sum(p.double().sum().item() for p in model.parameters()), hub=huggingface_hub.__version__)
    except timm_arl.WeightsError as error:
        result = dict(error=str(error), repo=error.repo, file=error.file, revision=error.revision)
    except Exception as error:  # what a user should never see: the tests fail on it
        result = dict(raw=repr(error))
    print(json.dumps(result), flush=True)
    print('END', file=sys.stderr, flush=True)
"""
UNCAUGHT = '''
import sys, traceback
import timm, timm_arl
from timm_arl.factory import create_for_task
try:
    create_for_task('hf-hub:row/cold')
except Exception:
    traceback.print_exc()
    print('NEXT', file=sys.stderr)
timm.create_model('arl_cnn50', pretrained=True)
'''
GET = 'GET /_cdn/.*/{}'
RESOLVE = 'HEAD /{}/resolve/.*model.safetensors'
LOADS = [  # repo, faults
    ('row/01-500-on-head', [(RESOLVE, 'status', dict(code=500))]),
    ('row/01-429-on-head', [(RESOLVE, 'status', dict(code=429))]),
    ('row/02-503-on-get', [(GET, 'status', dict(code=503))]),
    ('row/03-reset-in-get', [(GET, 'reset', dict(after=10 ** 5))]),
    ('row/03-reset-on-head', [(RESOLVE, 'reset', {})]),
    ('row/05-early-close', [(GET, 'close', dict(after=2 * 10 ** 7))]),  # of a large file
    ('row/06-short-body', [(GET, 'short', dict(after=10 ** 5))]),
    ('row/07-stall', [(GET, 'stall', dict(seconds=2))]),
    ('row/08-wrong-byte', [(GET, 'corrupt', {})]),
    ('row/09-wrong-header', [(GET, 'corrupt', dict(at=20))]),
]
REFUSED = [  # repo, faults, what the message says
    ('row/08-always-wrong', [(GET, 'corrupt', dict(times=-1))], 'wrong checksum; .*HF_ENDPOINT'),
    ('row/11-missing', [], 'no such repo, or it is private.*log in'),
    ('row/13-gated', [], 'gated .*ask for access at http://127.0.0.1.*/row/13-gated'),
    ('row/15-no-weights', [], 'no such file in the repo.*.bin'),
    ('row/16-head-fails-and-bin', [(RESOLVE, 'status', dict(code=500, times=-1))], 'answered 500.*HF_ENDPOINT'),
    ('row/20-pickle-alone', [], 'no such file in the repo'),
]


@pytest.fixture(scope='module', params=['newest', 'huggingface_hub 1'])
def library(request):
    """The environment that gives a process one version of huggingface_hub or another."""
    if request.param == 'newest':
        return {}
    folder = Path(sys.prefix) / 'hub1'
    if not folder.is_dir():
        pytest.skip(f'no huggingface_hub 1 in {folder}, where make test puts it')
    return {'PYTHONPATH': os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64])
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    config = dict(architecture='arl_cnn14', num_classes=2, pretrained_cfg=dict(model.pretrained_cfg, num_classes=2),
                  model_args={'channels': [8, 16, 32, 64]})
    return path, json.dumps(config).encode(), sum(p.double().sum().item() for p in model.parameters())


def saved(name, folder, **kwargs):
    """A file of random weights, and their sum."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    path = folder / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path, sum(p.double().sum().item() for p in model.parameters())


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """Weights of 32 MB: huggingface_hub resumes a download after a chunk of 10 MB alone."""
    return saved('arl_cnn14', tmp_path_factory.mktemp('large'), num_classes=2)


@pytest.fixture(scope='module')
def vit_tiny(tmp_path_factory):
    """Weights of a model of timm's own, for which timm has a format of others too (custom_load)."""
    return saved('vit_tiny_patch16_224', tmp_path_factory.mktemp('vit'), num_classes=21843)


@pytest.fixture(scope='module')
def hub(weights, large, vit_tiny, library):
    path, config, _ = weights
    files = {'model.safetensors': path, 'config.json': config}
    repos = {repo: files for repo, *_ in [*LOADS, *REFUSED] if repo != 'row/11-missing'}
    others = ('whole', 'bare', 'refuses', 'private', 'shared', 'unlinked', 'unlinked-2', 'both', 'gone',
              '10-wrong-config', '10-always-wrong-config')
    repos.update({'row/05-early-close': {'model.safetensors': large[0]},
                  'row/15-no-weights': {'config.json': config, 'pytorch_model.bin': b'x'},
                  'row/16-head-fails-and-bin': {**files, 'pytorch_model.bin': b'x'},
                  'row/20-pickle-alone': {'pytorch_model.bin': b'x'}, 'row/tagged': dict(files),
                  'timm/vit_tiny_patch16_224.augreg_in21k': {'model.safetensors': vit_tiny[0]},
                  'timm/resnet18.a1_in1k': {'pytorch_model.bin': b'x'},
                  'timm/resnet34.tv_in1k': {'pytorch_model.bin': b'x'},  # once tv_resnet34
                  'row/vit-pickle': {'config.json': json.dumps(dict(
                      architecture='vit_tiny_patch16_224', pretrained_cfg={})).encode(), 'pytorch_model.bin': b'x'},
                  'row/published': {**files, 'config.json': json.dumps(dict(
                      json.loads(config), label_names=['a', 'b'])).encode(),
                                    'results.json': b'{"run": {"arguments": {"crops": "center"}}}'},
                  'row/moved': dict(files), **{f'row/{name}': files for name in others}, **poisoned(path, config)})
    with Hub(repos, private=['row/private'], gated=['row/13-gated']) as hub:
        for repo, faults, *_ in [*LOADS, *REFUSED]:
            for match, kind, options in faults:
                hub.fault(match.format(repo), kind, **options)
        yield hub


def poisoned(path, config):
    """Repos whose config.json names other weights than the file that is looked for."""
    def resnet(name):
        return json.dumps(dict(architecture='resnet14', pretrained_cfg=dict(hf_hub_filename=name),
                               model_args={'channels': [8, 16, 32, 64]})).encode()

    of_resnet = safetensors.torch.save(timm.create_model('resnet14', channels=[8, 16, 32, 64]).state_dict())
    return {
        **{repo: {'config.json': json.dumps(dict(json.loads(config), pretrained_cfg=dict(
            json.loads(config)['pretrained_cfg'], **more))).encode(), 'model.safetensors': path, 'evil.bin': b'x'}
           for repo, more in (('bad/state', dict(state_dict={'a': 1})), ('bad/file', dict(file=__file__)),
                              ('timm-arl/arl_cnn14.isic2017', dict(state_dict={'a': 1})))},
        'bad/name': {'config.json': resnet('evil.bin'), 'model.safetensors': of_resnet, 'evil.bin': b'x'},
        'bad/path': {'config.json': resnet('../model.safetensors'), 'model.safetensors': of_resnet},
        'row/other-name': {'config.json': resnet('v2.safetensors'), 'v2.safetensors': of_resnet,
                           'model.safetensors': path},
        'bad/config': {'config.json': b'{"architecture": "resnet14", "pretrained_cfg": null}'},
        'bad/args': {'config.json': b'{"architecture": "arl_cnn14", "model_args": [1], "pretrained_cfg": {}}',
                     'model.safetensors': path},
        'bad/bin-alone': {'config.json': config, 'pytorch_model.bin': b'x'}}


class Client:
    def __init__(self, env):
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT], env={**os.environ, **env}, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, **job):
        """What came of it, and what was said meanwhile."""
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        said = ''
        while not said.endswith('END\n'):
            line = self.process.stderr.readline()
            assert line, said
            said += line
        return json.loads(self.process.stdout.readline()), said

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope='module')
def home(tmp_path_factory, library):
    return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def client(hub, home, library):
    client = Client({**hub.env(home), **library})
    yield client
    client.close()


def requests_of(hub, repo):
    return [request for request in hub.requests if repo in request]


def left_behind(home):
    return [p for p in home.rglob('*') if p.name.endswith(('.incomplete', '.tmp'))]


@pytest.mark.parametrize('repo', [repo for repo, _ in LOADS])
def test_faults_that_pass(client, home, hub, weights, large, repo):
    is_large = repo[4:6] == '05'
    result, said = client(repo=repo, **({'arguments': {}} if is_large else {}))
    assert result.get('sum') == (large[1] if is_large else weights[2]), (result, said)
    if is_large:
        assert [r for r in hub.requests if re.search(rf'{repo} bytes=[1-9]\d{{6,}}-', r)]  # not sent twice
    if repo[4:6] not in ('05', '07'):  # which the client resumes by itself
        assert repo in said and any(words in said for words in (
            'trying again', 'downloading it again', 'Retrying in'))  # older huggingface_hub waits by itself
    assert left_behind(home) == []


@pytest.mark.parametrize('repo, message', [(repo, message) for repo, _, message in REFUSED])
def test_faults_that_stay(client, home, hub, repo, message):
    result, said = client(repo=repo)
    assert 'error' in result, (result, said)
    assert (result['repo'], result['file'], result['revision']) == (repo, 'model.safetensors', 'main')
    assert re.search(message, result['error'])
    assert repo in result['error'] and '\n' not in result['error']
    tries = 1 + said.count('trying again') + said.count('downloading it again')  # and none without a word
    assert tries <= 4 and len([r for r in requests_of(hub, repo) if r.startswith('HEAD')]) <= 2 * tries
    assert not [r for r in hub.requests if '.bin' in r]
    assert left_behind(home) == [] and not list((home / 'hub').glob(f'models--{repo.replace("/", "--")}/blobs/*'))


def test_private_and_wrong_tokens_and_revisions(client, hub, weights):
    assert 'no such repo, or it is private' in client(repo='row/private')[0]['error']
    asked = len(requests_of(hub, 'row/private'))
    result, _ = client(repo='row/private', env=dict(HF_TOKEN='hf_wrong'))
    assert 'the token is wrong' in result['error']
    assert len(requests_of(hub, 'row/private')) == asked + 1  # it does not become right by asking again
    assert client(repo='row/private', env=dict(HF_TOKEN='hf_test'))[0]['sum'] == weights[2]
    result, _ = client(repo='row/whole@v9')
    assert 'there is no such revision' in result['error'] and result['revision'] == 'v9'


def test_a_tag_and_a_commit_stay_what_they_were(client, hub, weights):
    first = hub.revision('row/tagged')
    hub.tag('row/tagged', 'v1')
    assert client(repo='row/tagged@v1')[0]['sum'] == weights[2]
    changed = {k: v * 2 if k == 'fc.bias' else v for k, v in safetensors.torch.load(
        hub.repos['row/tagged']['model.safetensors']).items()}
    hub.repos['row/tagged']['model.safetensors'] = safetensors.torch.save(changed)
    moved = client(repo='row/tagged')[0]['sum']
    assert moved == pytest.approx(weights[2] + changed['fc.bias'].double().sum().item() / 2) and moved != weights[2]
    for revision in ('v1', first):
        assert client(repo=f'row/tagged@{revision}')[0]['sum'] == weights[2]


def test_a_config_with_a_wrong_byte(client, hub, weights):
    hub.fault('GET /row/10-wrong-config/resolve/.*/config.json', 'corrupt', at=20)
    assert client(name='hf-hub:row/10-wrong-config')[0].get('sum') == weights[2]
    hub.fault('GET /row/10-always-wrong-config/resolve/.*/config.json', 'corrupt', at=20, times=-1)
    result, _ = client(name='hf-hub:row/10-always-wrong-config')
    assert 'wrong checksum' in result['error'] and result['file'] == 'config.json'


def test_other_models_of_timm(client, hub, vit_tiny):
    """Come by the same way: whole, or one error, and never a pickle."""
    name = 'vit_tiny_patch16_224.augreg_in21k'
    hub.fault(f'GET /_cdn/.*/timm/{name}', 'corrupt')
    result, said = client(name=name)
    assert result.get('sum') == pytest.approx(vit_tiny[1]) and 'arrived damaged: downloading it again' in said, result
    for name, repo in (('resnet18', 'timm/resnet18.a1_in1k'), ('tv_resnet34', 'timm/resnet34.tv_in1k'),
                       ('hf-hub:row/vit-pickle', 'row/vit-pickle')):
        result, _ = client(name=name)
        assert result.get('repo') == repo and 'there is no such file in the repo' in result['error'], result
    assert 'gcvit_base are a pickle' in client(name='gcvit_base')[0]['error']
    assert not [r for r in hub.requests if '.bin' in r]


def test_a_config_that_names_other_weights(client, hub, weights):
    for plain in (False, True):
        for repo in ('bad/state', 'bad/file'):
            assert client(name=f'hf-hub:{repo}', plain=plain)[0].get('sum') == weights[2]
        result, _ = client(name='hf-hub:timm-arl/arl_cnn14.isic2017', plain=plain)  # the name of pinned weights
        assert 'wrong checksum' in result['error']
        result, _ = client(name='HF-Hub:bad/bin-alone', plain=plain)
        assert 'there is no such file in the repo' in result['error']
    assert 'sum' in client(name='hf-hub:row/other-name')[0]
    for repo, message in (('name', r'evil.safetensors of bad/name .*weights in another format \(.bin\) are not opened'),
                          ('path', r'\.\./model.safetensors of bad/path .*it is no .safetensors file'),
                          ('config', 'hf-hub:bad/config cannot be created with its weights|no such file in the repo'),
                          ('args', 'hf-hub:bad/args cannot be created with its weights')):
        assert re.search(message, client(name=f'hf-hub:bad/{repo}')[0].get('error', '')), repo
    assert not [r for r in hub.requests if '.bin' in r]


def test_what_is_in_the_cache_is_used_though_the_hub_has_newer(client, hub, home, weights):
    assert client(name='hf-hub:row/moved')[0].get('sum') == weights[2]
    newer = {k: v * 2 if k == 'fc.weight' else v for k, v in safetensors.torch.load_file(weights[0]).items()}
    hub.repos['row/moved']['model.safetensors'] = safetensors.torch.save(newer)
    asked = len(requests_of(hub, 'row/moved'))
    assert client(name='hf-hub:row/moved')[0].get('sum') == weights[2]
    assert len(requests_of(hub, 'row/moved')) == asked
    (link,) = (home / 'hub' / 'models--row--moved' / 'snapshots').glob('*/model.safetensors')
    link.unlink()  # then the weights are loaded again, of the commit that the config is of
    assert client(name='hf-hub:row/moved')[0].get('sum') == weights[2]
    (home / 'hub' / 'models--row--moved' / 'refs' / 'main').unlink()  # nothing is known of main now
    moved = client(name='hf-hub:row/moved')[0]['sum']
    assert moved == pytest.approx(weights[2] + newer['fc.weight'].double().sum().item() / 2) and moved != weights[2]


def test_what_a_repo_says_of_its_run(client, hub):
    hub.tag('row/published', 'v1')
    first = dict(labels=['a', 'b'], arguments={'crops': 'center'})
    assert client(checkpoint='hf-hub:row/published@v1')[0] == first
    hub.repos['row/published']['results.json'] = b'{"run": {"arguments": {"crops": "paper"}}}'
    assert client(checkpoint='hf-hub:row/published')[0]['arguments'] == {'crops': 'paper'}
    assert client(checkpoint='hf-hub:row/published@v1')[0] == first
    assert client(checkpoint='hf-hub:row/bare')[0] == dict(labels=[], arguments={})  # no results.json: no failure
    hub.fault('HEAD /row/refuses/resolve/.*/results.json', 'status', code=403, times=-1)
    assert 'results.json of row/refuses' in client(checkpoint='hf-hub:row/refuses')[0]['error']


def test_warm_cache(client, hub, home, library, weights):
    result, _ = client(repo='row/whole')
    assert result['sum'] == weights[2] and result['hub'].startswith('1.') == bool(library)
    asked = len(hub.requests)
    result, said = client(repo='row/whole')
    assert result['sum'] == weights[2] and 'timm_arl' not in said and len(hub.requests) == asked
    (blob,) = (home / 'hub' / 'models--row--whole' / 'blobs').iterdir()
    damage(blob)
    result, said = client(repo='row/whole')
    assert result['sum'] == weights[2] and 'in the cache is damaged: downloading it again' in said


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.skipif(not hasattr(huggingface_hub.constants, 'HF_HUB_DISABLE_SYMLINKS'),
                    reason='this huggingface_hub makes links wherever it can')
def test_a_cache_without_links(hub, tmp_path, library, weights):
    """Its files do not bear the Hub's digests in their names: what comes is compared with what the Hub says."""
    lone = Client({**hub.env(tmp_path), **library, 'HF_HUB_DISABLE_SYMLINKS': '1'})
    hub.fault('GET /_cdn/.*/row/unlinked', 'corrupt')
    result, said = lone(repo='row/unlinked')
    assert result.get('sum') == weights[2] and 'arrived damaged: downloading it again' in said, (result, said)
    assert not [path for path in tmp_path.rglob('model.safetensors') if path.is_symlink()]
    hub.fault('GET /_cdn/.*/row/unlinked-2', 'corrupt', times=-1)
    assert 'wrong checksum' in lone(repo='row/unlinked-2')[0]['error']
    lone.close()


def test_damage_and_a_hub_that_fails(client, hub, home, weights):
    assert client(repo='row/both')[0]['sum'] == weights[2]
    (blob,) = (home / 'hub' / 'models--row--both' / 'blobs').iterdir()
    damage(blob)
    hub.fault('GET /_cdn/.*/row/both', 'status', code=503)
    result, said = client(repo='row/both')
    assert result.get('sum') == weights[2] and 'trying again' in said, (result, said)


def test_damage_and_a_hub_that_is_gone(client, hub, home):
    """What has arrived damaged stays in no cache that other programs share, also if it cannot be replaced."""
    hub.fault('GET /_cdn/.*/row/gone', 'corrupt')
    hub.fault('GET /_cdn/.*/row/gone', 'status', times=-1, code=500)
    result, said = client(repo='row/gone')
    assert 'error' in result and 'arrived damaged' in said, (result, said)
    assert not [path for path in (home / 'hub' / 'models--row--gone').rglob('model.safetensors') if path.exists()]


def test_a_cache_that_shares_its_blobs(client, hub, home, weights):
    """Where huggingface_hub has downloaded by Xet, a repo's blob links to a store whose names are Xet's hashes."""
    assert client(repo='row/shared')[0]['sum'] == weights[2]
    (blob,) = (home / 'hub' / 'models--row--shared' / 'blobs').iterdir()
    stored = home / 'hub' / 'blobs' / 'ab' / ('ab' * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(Path('../../blobs/ab', stored.name))
    asked = len(hub.requests)
    result, said = client(repo='row/shared')
    assert result.get('sum') == weights[2] and 'timm_arl' not in said and len(hub.requests) == asked, (result, said)
    damage(stored)
    result, said = client(repo='row/shared')
    assert result['sum'] == weights[2] and 'in the cache is damaged: downloading it again' in said
    assert not [r for r in hub.requests if 'xet' in r]  # whose client tries for minutes without a word


def test_without_a_network(hub, home, client, library, weights):
    assert client(repo='row/whole')[0]['sum'] == weights[2]  # in the cache of home
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        nowhere = f'http://127.0.0.1:{free.getsockname()[1]}'
    cases = [(dict(HF_ENDPOINT=nowhere), 'the connection failed'),
             (dict(HF_HUB_OFFLINE='1'), 'not in the cache and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE')]
    for env, message in cases[1:] if library else cases:
        lone = Client({**hub.env(home), **library, **env})
        assert lone(repo='row/whole')[0]['sum'] == weights[2]
        result, said = lone(repo='row/cold')
        assert all(part in result['error'] for part in (message, 'row/cold', 'pretrained_cfg_overlay'))
        assert said.count('trying again') == (3 if 'HF_ENDPOINT' in env else 0)
        lone.close()


@pytest.mark.parametrize('library', ['newest'], indirect=True)
def test_the_sentence_is_not_lost_in_a_traceback(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', UNCAUGHT], capture_output=True, text=True,
        env={**os.environ, **hub.env(tmp_path), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 1
    for traceback in done.stderr.split('NEXT\n'):
        lines = [line for line in traceback.splitlines() if line.strip(' ^~')]
        assert lines[-1].startswith('timm_arl.download.WeightsError: '), done.stderr
        assert len(lines) <= 20 and traceback.count('Traceback') == 1, done.stderr
