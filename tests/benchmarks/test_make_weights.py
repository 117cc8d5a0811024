"""The one command that makes published weights, end to end on a small network."""
import json
import shlex
import shutil

import pytest
import safetensors.torch
import timm
import torch
from in_process import run_here

from timm_arl.factory import Checkpoint, create_trained
from timm_arl.isic.shift import home_of

pytestmark = pytest.mark.slow


def program_here(program, arguments, lock):
    """As run_program does it, but in this process."""
    assert program.is_file() and not lock.closed
    print(f'$ python benchmarks/{shlex.join([program.name, *arguments])}')
    done = run_here(program.stem, *arguments)
    print(done.stdout)
    return done.returncode, done.stderr.strip().rpartition('\n')[2].rpartition('error: ')[2]


@pytest.fixture(scope='module')
def made(repo, few, tmp_path_factory):
    """Weights of two runs of EfficientNet-Lite0 from a file, pushed to a folder."""
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    safetensors.torch.save_file(
        timm.create_model('tf_efficientnet_lite0').state_dict(), folder / 'start.safetensors')
    arguments = [
        'arl_tf_efficientnet_lite0.isic2017', '--data', few, '--output-dir', 'W', '--init-checkpoint',
        'start.safetensors', '--seeds', '3', '4', '--epochs', '1', '--img-size', '64', '--workers', '0',
        '--cpu-threads', '1', '--note', 'a few images', '--push', './pushed']
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repo / 'benchmarks')
        patch.setattr('make_weights.run_program', program_here)
        done = run_here('make_weights', *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, arguments, done.stdout


def test_everything_is_made(made):
    folder, _, stdout = made
    assert {path.name for path in (folder / 'W').iterdir() if path.is_dir()} == {
        'seed-3', 'seed-4', 'average', 'network', 'evaluation', 'alpha_zero', 'staged'}
    for program in ('finetune_isic.py', 'average_runs.py', 'evaluate_isic.py'):
        assert f'$ python benchmarks/{program}' in stdout
    pushed = folder / 'pushed'
    assert {path.name for path in pushed.iterdir()} >= {'README.md', 'config.json', 'model.safetensors', 'results.json'}
    results = json.loads((pushed / 'results.json').read_text())
    # the test split was looked at twice, by the evaluations of the published network alone
    assert len(results['looks']) == 2 and all('evaluate_isic.py' in look['command'] for look in results['looks'])
    assert results['alpha_zero']['test']['mean_auc']['difference'] is not None
    scores = {name: json.loads((folder / 'W' / name / 'metrics.json').read_text())['validation']['mean_auc']
              for name in ('average', 'seed-3', 'seed-4', 'network')}
    best = max(('average', 'seed-3', 'seed-4'), key=scores.get)  # the average where it is no worse than the runs
    assert [run['seed'] for run in results['run']['averaged']] == {
        'average': [3, 4], 'seed-3': [3], 'seed-4': [4]}[best]
    assert scores['network'] == pytest.approx(scores[best], abs=0.01) and f'Chosen: W/{best}' in stdout
    assert len(results['alphas']) == 9
    assert 'a few images' in (pushed / 'README.md').read_text()
    assert create_trained(pushed).num_classes == 2


def test_again_makes_nothing_twice(call, made):
    folder, arguments, _ = made
    before = {path: path.stat().st_mtime_ns for path in (folder / 'W').glob('*/metrics.json')}
    done = call('make_weights', *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert '$ python' not in done.stdout and 'everything is there already' in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / 'W').glob('*/metrics.json')}


def test_what_the_card_says_can_be_changed(call, made):
    folder, arguments, _ = made
    shutil.copytree(folder / 'W', folder / 'V')
    arguments = ['V' if part == 'W' else part for part in arguments]
    done = call('make_weights', *arguments[:-4], '--note', 'clinic two', '--tag', 'two', cwd=folder)
    assert done.returncode == 0 and '$ python' not in done.stdout, done.stderr
    results = json.loads((folder / 'V' / 'staged' / 'results.json').read_text())
    assert results['name'] == 'arl_tf_efficientnet_lite0.two' and results['data']['note'] == 'clinic two'
    assert 'clinic two' in (folder / 'V' / 'staged' / 'README.md').read_text()
    # what external validation of the weights compares with
    assert results['home']['images']['images'] == results['metrics']['validation']['melanoma']['images']
    staged = Checkpoint(str(folder / 'V' / 'staged'))
    assert home_of(staged.folder, {}, staged.home())['labels'] == results['home']['labels']


def test_a_command_that_failed_can_be_corrected(call, benchmarks, monkeypatch, few, tmp_path):
    arguments = ['arl_cnn14.isic2017', '--data', few, '--output-dir', tmp_path / 'W', '--teacher',
                 'arl_cnn14.isic2017', '--epochs', 1]
    done = call('make_weights', *arguments, '--recipe', 'wieghts')
    assert done.returncode == 2
    assert 'error: finetune_isic.py: ' in done.stderr and '(status 2)' in done.stderr  # a process of its own
    monkeypatch.setattr('make_weights.run_program', program_here)
    for _ in range(2):  # a run with that name of a recipe was begun nowhere
        done = call('make_weights', *arguments, '--recipe', 'wights')
        assert done.returncode == 2 and 'was begun with' not in done.stderr


def test_another_command_is_refused_there(call, made):
    folder, arguments, _ = made
    for change, message in ((['--epochs', '2'], 'was begun with epochs 1, not 2'),
                            (['--seeds', '3'], r'was begun with seeds [3, 4], not [3]')):
        done = call('make_weights', *arguments, *change, cwd=folder)
        assert done.returncode == 2 and message in done.stderr


def test_shipped_weights_are_shown_the_size_that_is_made(benchmarks):
    from make_weights import WEIGHTS
    for name, how in WEIGHTS.items():
        if how.img_size:
            assert Checkpoint(name).config()['pretrained_cfg']['input_size'] == [3, how.img_size, how.img_size]


def test_bad_input_is_refused(call, benchmarks, monkeypatch, tmp_path, few):
    monkeypatch.setattr('make_weights.run_program', program_here)
    for args, message in (
            (['resnet50.isic2017'], 'invalid choice'),
            (['arl_cnn14.isic2017', '--teacher', 'no_such'], 'no_such'),
            (['arl_cnn50.isic2017', '--init-checkpoint', tmp_path / 'nothing.safetensors'], 'No weights at'),
            (['arl_cnn50.isic2017', '--seeds', 1, 1], 'names a seed twice'),
            (['arl_cnn14.isic2017', '--seeds', 0, 1], 'starts from random weights'),
            (['arl_cnn14.isic2017', '--tag', 'a/b'], "'a/b' cannot be a tag"),
            (['arl_cnn14.isic2017', '--push', 'model'], "'model' is neither a repo (user/name) nor a folder")):
        done = call('make_weights', *args, '--data', few, '--output-dir', tmp_path / 'W')
        shutil.rmtree(tmp_path / 'W', ignore_errors=True)
        assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
