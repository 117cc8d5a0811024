"""Publishing: what is staged, what its card says, and what a Hub holds after a push, a second push, a fault."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import timm
import torch
from loopback_hub import Hub

from timm_arl import hub as publishing
from timm_arl.download import WeightsError, sha256_of
from timm_arl.factory import tensors_sha256
from timm_arl.files import write_json, write_rows
from timm_arl.isic.dataset.sources import CHALLENGE_IDS

# several commands in a process of its own, since huggingface_hub reads the environment when it is imported
COMMANDS = """
import contextlib, io, json, os, sys
from timm_arl.hub.__main__ import main
for line in sys.stdin:
    os.environ['HF_TOKEN'], *args = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(args)
        except SystemExit as stopped:
            status = stopped.code
    print(json.dumps(dict(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())), flush=True)
"""


def test_staged_is_a_model_repo(staged, run):
    assert {p.name for p in staged.iterdir()} == {'README.md', 'config.json', 'model.safetensors', 'results.json'}
    model = timm.create_model(f'local-dir:{staged}', pretrained=True)
    reference = timm.create_model(f'local-dir:{run}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))
    config = json.loads((staged / 'config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'isic2017-other' and config['timm_version'] == timm.__version__
    assert config['thresholds'] == {'official': {'melanoma': 0.5, 'seborrheic_keratosis': 0.5}}
    with safetensors.safe_open(staged / 'model.safetensors', 'pt') as file:
        assert file.metadata()['name'] == 'arl_cnn14.isic2017-other'
    assert (staged / 'model.safetensors').stat().st_mode == (staged / 'config.json').stat().st_mode
    # what is evaluated from the staged folder is an evaluation of the run
    assert tensors_sha256(staged / 'model.safetensors') == tensors_sha256(run / 'model.safetensors')
    again = publishing.stage(run, staged.parent / 'again')  # the same bytes, so that a push finds nothing to send
    assert (again / 'model.safetensors').read_bytes() == (staged / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('changes, official, tag', [
    (dict(data='demo'), False, 'demo'),
    (dict(data='/home/me/My Clinic (2024)'), False, 'my-clinic-2024'),
    (dict(data='me/dermoscopy'), False, 'dermoscopy'),
    (dict(fold='fold-0'), False, 'isic2017-fold-0'),
    (dict(model='arl_cnn14_mixed', architecture='arl_cnn14_mixed'), True, 'isic2017'),
    (dict(model='arl_cnn14.isic2017', pretrained=True), True, 'isic2017-modern'),  # not the name of what it began with
])
def test_weights_are_named_after_their_images(run, tmp_path, monkeypatch, changes, official, tag):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    record, config = (json.loads((run / name).read_text()) for name in ('run.json', 'config.json'))
    config['architecture'] = changes.pop('architecture', 'arl_cnn14')
    record['arguments'].update(changes)
    write_json(copy / 'run.json', record)
    write_json(copy / 'config.json', config)
    if official:
        monkeypatch.setitem(CHALLENGE_IDS, 'train', '0')
    staged = publishing.stage(copy, tmp_path / 's')
    assert json.loads((staged / 'results.json').read_text())['name'] == f'{config["architecture"]}.{tag}'


@pytest.mark.slow
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
        assert done.returncode == 2 and 'Run the same command again' in done.stderr and 'Traceback' not in done.stderr
        done = program('push', staged, '--to', 'user/model', '--yes')
        assert done.returncode == 0, done.stderr
        assert set(server.repos['user/model']) == {p.name for p in staged.iterdir()}
        assert server.repos['user/model']['model.safetensors'] == (staged / 'model.safetensors').read_bytes()
        assert b"create_model('hf-hub:user/model'" in server.repos['user/model']['README.md']
        assert "create_model('local-dir:staged'" in (staged / 'README.md').read_text()  # which stays as it was
        server.repos['user/model']['curves.png'] = b'of an earlier evaluation'
        done = program('push', staged, '--to', 'user/model', '--yes')
        assert done.returncode == 0 and 'removal of curves.png sent' in done.stdout, done.stderr
        assert set(server.repos['user/model']) == {p.name for p in staged.iterdir()}
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
        done = program('push', staged, '--to', 'user/new', '--yes', token='')
        assert done.returncode == 2 and 'log in' in done.stderr and 'is wrong' not in done.stderr, done.stderr

        for fault, code, words in (('PUT /_lfs/', 403, 'with that permission'), ('/objects/batch', 507, 'the network'),
                                   ('POST /api/repos/create', 403, 'with that permission')):
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
        assert done.returncode == 0, done.stderr
        assert {'lab/arl_cnn14.isic2017-other', 'lab/arl_cnn14.mine'} <= server.private
        assert program('verify', 'user/model@v1', '--against', staged).returncode == 0  # a push later
        done = program('push', other, '--yes', '--tag', 'v2')
        assert 'mine: the tag v2 sent' in done.stdout and 'v2' in server.revisions['lab/arl_cnn14.mine'], done
        done = program('push', other, '--tag', 'v3')
        assert 'the tag v3 would be sent' in done.stdout and 'v3' not in server.revisions['lab/arl_cnn14.mine'], done
        assert program('verify', 'lab/arl_cnn14.mine@v1', '--against', other).returncode == 0
        assert program('push', other, '--yes', '--tag', 'v1').returncode == 0  # there already, and the same
        server.repos['lab/arl_cnn14.mine']['notes.md'] = b'written in the browser'
        assert program('push', other, '--yes', '--tag', 'v1').returncode == 0  # the tag has still what is here
        (other / 'README.md').write_text('# Mine\n')
        done = program('push', other, '--yes', '--tag', 'v1')
        assert done.returncode == 2 and 'already has a tag v1 with other content' in done.stderr
        done = program('verify', 'lab/arl_cnn14.mine', '--against', other, token='')
        assert done.returncode == 2 and 'or it is private' in done.stderr and 'HF_TOKEN' in done.stderr
        process.stdin.close()
        assert process.wait(30) == 0


def test_push_to_a_folder(staged, tmp_path):
    there = str(tmp_path / 'mirror')
    before = (staged / 'README.md').read_bytes()
    assert set(publishing.push(staged, there)) == {p.name for p in staged.iterdir()} and not os.path.exists(there)
    publishing.push(staged, there, yes=True)
    assert publishing.push(staged, there, yes=True) == []
    assert publishing.verify(there, staged)['config.json'] == sha256_of(staged / 'config.json')
    assert "'local-dir:mirror'" in (tmp_path / 'mirror' / 'README.md').read_text()
    assert (staged / 'README.md').read_bytes() == before
    damaged = tmp_path / 'damaged'
    shutil.copytree(staged, damaged)
    (damaged / 'model.safetensors').write_bytes((staged / 'model.safetensors').read_bytes()[:5000])
    with pytest.raises(WeightsError, match='damaged/model.safetensors is not a readable safetensors file'):
        publishing.push(damaged, str(tmp_path / 'there'), yes=True)
    assert not (tmp_path / 'there').exists()


def test_what_cannot_be_staged(run, staged, call, tmp_path):
    half = tmp_path / 'half'
    shutil.copytree(run, half)
    (half / 'metrics.json').unlink()
    done = call('timm_arl.hub.__main__', 'stage', half, tmp_path / 's')
    assert done.returncode == 2 and 'is not a finished run of finetune_isic.py: metrics.json' in done.stderr
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('dear')
    done = call('timm_arl.hub.__main__', 'stage', run, tmp_path / 'mine')
    assert done.returncode == 2 and 'holds files that this command did not write' in done.stderr
    assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'dear'
    other = tmp_path / 'r'
    other.mkdir()
    shutil.copy(run / 'metrics.json', other)
    write_json(other / 'evaluation.json', {
        'alpha_zero': False, 'tensors_sha256': tensors_sha256(run / 'model.safetensors')})
    shutil.copy(run / 'predictions_validation.csv', other)
    text = (run / 'predictions_test.csv').read_text()
    (other / 'predictions_test.csv').write_text(text.replace(',0.9', ',0.1'))
    done = call('timm_arl.hub.__main__', 'stage', run, tmp_path / 's', '--evaluation', other)
    assert done.returncode == 2 and 'has other predictions on test than the run' in done.stderr
    shutil.copy(run / 'predictions_test.csv', other)
    scores = json.loads((run / 'metrics.json').read_text())
    for files in ({'metrics.json': {**scores, 'test': {**scores['test'], 'external': {}}}},
                  {'metrics.json': scores, 'looks.csv': [{'time': 'now', 'other_data': 'clinic.csv'}]}):
        for name, content in files.items():
            (write_json if name.endswith('.json') else write_rows)(other / name, content)
        done = call('timm_arl.hub.__main__', 'stage', run, tmp_path / 's', '--evaluation', other)
        assert done.returncode == 2 and f'{other} is an evaluation on other data than those of' in done.stderr
    write_rows(other / 'looks.csv', [{'time': 'then', 'other_data': 'clinic.csv'}, {'time': 'now', 'other_data': ''}])
    done = call('timm_arl.hub.__main__', 'stage', run, tmp_path / 'again', '--evaluation', other)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / 'again')
    for args, message in ((('stage', 'arl_cnn14.isic2018', 's'), 'no weights of that name in this package (it has arl'),
                          (('stage', run, 's', '--tag', 'my tag/x'), "'my tag/x' cannot be a tag"),
                          (('stage', run, 's', '--tag', ''), "'' cannot be a tag"),
                          (('stage', run, 's', '--tag', 'isic2017'), 'is the name of weights that come with'),
                          (('stage', run, run / 'run.json' / 'x' / 's'), 'Cannot make'),
                          (('push', staged, '--to', ''), "'' is neither a repo"),
                          (('push', staged, '--to', 'a/b/c'), "'a/b/c' is neither a repo (user/name) nor a folder"),
                          (('push', staged), 'say where to push it: --to user/arl_cnn14.isic2017-other'),
                          (('push', staged, '--to', 'u/m', '--tag', 'main'), 'is the name of the default branch'),
                          (('push', staged, '--to', 'u/m', '--tag', 'v 1'), "'v 1' cannot be the name of a tag"),
                          (('verify', 'nope', '--against', staged), "'nope' is neither a repo (user/name) nor a"),
                          (('verify', './nope', '--against', staged), 'No folder ./nope: push')):
        done = call('timm_arl.hub.__main__', *args, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, (args, done.stderr)
    assert {p.name for p in tmp_path.iterdir()} == {'half', 'mine', 'r'}
    broken = tmp_path / 'broken'
    shutil.copytree(staged, broken)
    (broken / 'results.json').write_text('{')
    for args in (('push', broken, '--to', './there', '--yes'), ('verify', './there', '--against', broken),
                 ('push', staged, '--to', './there', '--private')):
        done = call('timm_arl.hub.__main__', *args, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert not (tmp_path / 'there').exists()
    done = call('timm_arl.hub.__main__', 'push', tmp_path / 'mine')
    assert done.returncode == 2 and 'stage it first' in done.stderr


@pytest.mark.parametrize('name, content, message', [
    ('run.json', '{}', 'is incomplete ('), ('run.json', '[]', 'run.json is missing or unreadable'),
    ('run.json', '{"arguments": 3}', 'is incomplete ('),
    ('run.json', 'BALANCE', 'is incomplete or of another version ('),
    ('summary.csv', '', 'is incomplete ('),
    ('summary.csv', 'epoch,validation_mean_auc\n', 'is incomplete ('),
    ('metrics.json', '{"test": {}}', 'is incomplete ('),
])
def test_damaged_runs(run, call, tmp_path, name, content, message):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    record = json.loads((copy / 'run.json').read_text())
    record['arguments']['balance'] = 'unheard-of'
    (copy / name).write_text(json.dumps(record) if content == 'BALANCE' else content)
    done = call('timm_arl.hub.__main__', 'stage', copy, tmp_path / 's')
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert not (tmp_path / 's').exists()


def test_data_without_a_name(run, call, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    record = json.loads((run / 'run.json').read_text())
    record['arguments']['data'] = '.'
    write_json(copy / 'run.json', record)
    done = call('timm_arl.hub.__main__', 'stage', copy, tmp_path / 's')
    assert done.returncode == 2 and 'pass --tag' in done.stderr
    assert call('timm_arl.hub.__main__', 'stage', copy, tmp_path / 's', '--tag', 'clinic').returncode == 0


def test_a_card_that_is_edited(run, staged, call, tmp_path):
    shutil.copytree(staged, tmp_path / 's')
    card = tmp_path / 's' / 'README.md'
    added = "Began with 'hf-hub:timm/resnet50': timm.create_model('hf-hub:timm/resnet50')"
    card.write_text(f'{card.read_text()}\n{added}\n')
    assert call('timm_arl.hub.__main__', 'push', tmp_path / 's', '--to', tmp_path / 'there', '--yes').returncode == 0
    pushed = (tmp_path / 'there' / 'README.md').read_text()
    assert added in pushed and "create_model('local-dir:there'" in pushed
    card.write_bytes(card.read_bytes() + b'na\xefve')
    for args in (('push', tmp_path / 's', '--to', tmp_path / 'there'),
                 ('verify', tmp_path / 'there', '--against', tmp_path / 's')):
        done = call('timm_arl.hub.__main__', *args)
        assert done.returncode == 2 and 'README.md is not UTF-8' in done.stderr, done.stderr
    # what was edited is not lost when the folder is staged again
    edited = card.read_bytes()
    done = call('timm_arl.hub.__main__', 'stage', run, tmp_path / 's')
    assert done.returncode == 2 and 'README.md was edited' in done.stderr and '--overwrite' in done.stderr
    assert card.read_bytes() == edited
    assert call('timm_arl.hub.__main__', 'stage', run, tmp_path / 's', '--overwrite').returncode == 0
    assert added not in card.read_text()
    (tmp_path / 's' / 'results.json').write_text('[1]')
    done = call('timm_arl.hub.__main__', 'card', tmp_path / 's')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr


def test_pictures_of_an_earlier_evaluation_go(run, staged, call, tmp_path):
    shutil.copytree(staged, tmp_path / 'evaluated')
    (tmp_path / 'evaluated' / 'roc_test.png').write_bytes(b'png')
    push = ('push', staged, '--to', './there', '--yes')
    assert call('timm_arl.hub.__main__', 'push', tmp_path / 'evaluated', *push[2:], cwd=tmp_path).returncode == 0
    assert (tmp_path / 'there' / 'roc_test.png').read_bytes() == b'png'
    done = call('timm_arl.hub.__main__', 'verify', './there', '--against', staged, cwd=tmp_path)
    assert done.returncode == 2 and 'differs from' in done.stderr and 'roc_test.png' in done.stderr
    done = call('timm_arl.hub.__main__', *push[:-1], cwd=tmp_path)
    assert 'removal of roc_test.png would be sent' in done.stdout and (tmp_path / 'there' / 'roc_test.png').exists()
    assert call('timm_arl.hub.__main__', *push, cwd=tmp_path).returncode == 0
    assert not (tmp_path / 'there' / 'roc_test.png').exists()
    assert call('timm_arl.hub.__main__', 'verify', './there', '--against', staged, cwd=tmp_path).returncode == 0


def test_places_that_are_not_for_a_push(run, staged, call, monkeypatch, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'README.md').write_text('dear')
    (tmp_path / 'thesis' / 'results.json').write_text('{"mine": 1}')
    for place in (copy, tmp_path / 'thesis', tmp_path / 'thesis' / 'README.md'):
        done = call('timm_arl.hub.__main__', 'push', staged, '--to', place, '--yes')
        assert done.returncode == 2 and 'exists and this command did not write it' in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert (tmp_path / 'thesis' / 'README.md').read_text() == 'dear'
    done = call('timm_arl.hub.__main__', 'card', staged, '--output', tmp_path / 'c')
    assert done.returncode == 2 and 'leave out --output' in done.stderr
    done = call('timm_arl.hub.__main__', 'card', 'arl_cnn50.a1_in1k', '--output', tmp_path / 'thesis' / 'README.md')
    assert done.returncode == 2 and 'Cannot make' in done.stderr
    again = publishing.stage(run, tmp_path / 'again')
    monkeypatch.setattr('timm_arl.hub.publish.HUB', 'me')
    done = call('timm_arl.hub.__main__', 'push', staged, again, '--yes')
    assert done.returncode == 2 and 'Two of the folders would go to me/arl_cnn14.isic2017-o' in done.stderr, done.stderr


def test_staging_again(run, tmp_path, monkeypatch):
    folder, link = publishing.stage(run, tmp_path / 's', note='first'), tmp_path / 'link'
    link.symlink_to(folder)
    (tmp_path / '.s.new').mkdir()  # of one that was killed
    assert publishing.stage(run, link, note='second') == link
    assert link.is_symlink() and 'second' in (folder / 'README.md').read_text()
    renames, rename = [], Path.rename

    def interrupted(self, target):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt):
        publishing.stage(run, folder, note='third')
    assert len(renames) == 3 and 'second' in (folder / 'README.md').read_text()
    assert {path.name for path in tmp_path.iterdir()} == {'s', 'link'}
