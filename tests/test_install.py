"""What pip installs: the wheel without extras, in an environment away from any checkout; and what the sdist holds."""
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

CREATE = """
import sys
import timm, timm_arl, torch
model = timm.create_model('arl_cnn14.isic2017', pretrained=True).eval()
with torch.inference_mode():
    logits = model(torch.zeros(1, 3, 128, 128)).tolist()
print(timm_arl.__file__, sorted({name.partition('.')[0] for name in sys.modules}), logits, sep='\\n')
"""
SENTENCE = ("{} is not installed: in a checkout, pip install -e '.[{extra}]'; without one, pip install "
            "'timm-arl[{extra}]'.")
IMPORT_ALL = """
import importlib, pkgutil, timm_arl
for module in pkgutil.walk_packages(timm_arl.__path__, 'timm_arl.', onerror=lambda name: None):
    if not module.name.endswith('__main__'):
        try:
            importlib.import_module(module.name)
            print(module.name, 'imported')
        except ImportError as error:
            print(module.name, error)
"""
RUN_EACH = """
import json, os, runpy, sys, tempfile
import timm, timm_arl, torch  # once for all

said = []
for command in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            try:
                if command[0] == '-m':  # which is argv[0] while Python looks for the module
                    sys.argv = ['-m', *command[2:]]
                    runpy.run_module(command[1], run_name='__main__', alter_sys=True)
                else:
                    sys.argv = command
                    runpy.run_path(command[0], run_name='__main__')
            except SystemExit as stopped:
                print(end='', flush=True)
                os._exit(stopped.code)  # which takes a moment; the end of an interpreter with PyTorch, a second
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.append([status, *((file.seek(0), file.read().decode())[1] for file in (err, out))])
print(json.dumps(said))
"""
NOT_IN_THE_CORE = {'accelerate', 'datasets', 'matplotlib', 'scipy', 'sklearn', 'tensorboard', 'onnxruntime', 'gradio'}


@pytest.fixture(scope='module')
def dist(repo, tmp_path_factory):
    """The folder of `make dist`: an sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, repo], check=True,
                   capture_output=True, text=True, env={**os.environ, 'CFLAGS': '-O0'})  # a tenth of the time
    return folder


def distributions(requirements, found):
    """Add to found, by name, the installed distributions that requirements stand for, with their own."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
            package = distribution(requirement.name)
            if package.name not in found or requirement.extras:
                found[package.name] = package
                asked = [r.partition(';')[0] for r in package.requires or [] for extra in ('', *requirement.extras)
                         if Requirement(r).marker is None or Requirement(r).marker.evaluate({'extra': extra})]
                distributions(asked, found)
    return found


@pytest.fixture(scope='module')
def python(dist, tmp_path_factory):
    """The interpreter of an environment with the wheel and what it requires, linked to here instead of downloaded."""
    folder = tmp_path_factory.mktemp('fresh') / 'venv'
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    site = next(folder.glob('lib/python*/site-packages'))
    wheel, = dist.glob('*.whl')
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel],
                   check=True, capture_output=True, text=True)
    metadata = next(site.glob('timm_arl-*.dist-info')) / 'METADATA'
    requires = [line.partition(': ')[2] for line in metadata.read_text().splitlines()
                if line.startswith('Requires-Dist')]
    for package in distributions(requires, {}).values():
        for top in {file.parts[0] for file in package.files or []} - {'..', '__pycache__'}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(package.locate_file(top)))
    return python


def run(python, *args, cwd):
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run([python, *map(str, args)], cwd=cwd, env={**env, 'HF_HUB_OFFLINE': '1'}, text=True,
                          capture_output=True)


@pytest.fixture(scope='module')
def imported(python, tmp_path_factory):
    """What CREATE prints, and then IMPORT_ALL."""
    done = run(python, '-c', CREATE + IMPORT_ALL, cwd=tmp_path_factory.mktemp('imported'))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_wheel_alone_creates_a_trained_network(python, imported):
    file, modules, logits = imported[:3]
    assert Path(file).is_relative_to(python.parents[1])
    assert not NOT_IN_THE_CORE & set(json.loads(modules.replace("'", '"')))
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(CREATE, {})
    assert here.getvalue().splitlines()[2] == logits


def test_each_module_is_imported_or_names_its_extra(imported):
    said = dict(line.split(' ', 1) for line in imported[3:])
    core = ('arl_cnn', 'attention', 'baselines', 'explain', 'export', 'factory', 'isic', 'isic.artefacts', 'isic.crops',
            'isic.images', 'isic.synthetic', 'isic.task', 'isic.transforms', 'kernels', 'overlays', 'predict',
            'predictor', 'pretrained')
    assert {said[f'timm_arl.{name}'] for name in core} == {'imported'}
    sentence = SENTENCE.format('accelerate', extra='train')
    assert {said[f'timm_arl.{name}'] for name in ('hub', 'training', 'isic.dataset', 'isic.metrics')} == {sentence}
    app = SENTENCE.format('gradio', extra='app')
    assert said['timm_arl.app'] == app and set(said.values()) == {'imported', sentence, app}


def test_each_program_names_its_extra(python, repo, tmp_path):
    programs = [path for path in sorted((repo / 'benchmarks').glob('*.py')) if "'__main__'" in path.read_text()
                and not path.stem.endswith('_worker')]  # which throughput.py starts
    assert len(programs) > 3
    train, export, app = (f'error: {SENTENCE.format(name, extra=extra)}\n'
                          for name, extra in (('accelerate', 'train'), ('onnx', 'export'), ('gradio', 'app')))
    asked = [*(([str(program), '--help'], train) for program in programs), (['-m', 'timm_arl.hub', '--help'], train), (
        ['-m', 'timm_arl.export', '--model', 'arl_cnn14', '--output', 'm.onnx'], export), (['-m', 'timm_arl.app'], app)]
    done = run(python, '-c', RUN_EACH, json.dumps([command for command, _ in asked]), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    for (command, sentence), said in zip(asked, json.loads(done.stdout), strict=True):
        assert said == [2, sentence, ''], command
    assert not list(tmp_path.iterdir())


def test_the_sdist_holds_what_is_tracked(dist, repo):
    if not (repo / '.git').exists():
        pytest.skip('not a checkout')
    tracked = subprocess.run(['git', 'ls-files'], cwd=repo, check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(next(dist.glob('*.tar.gz'))) as archive:
        packed = {name.partition('/')[2] for name in archive.getnames()}
    assert set(tracked) - packed == set()
    assert packed - set(tracked) <= {'PKG-INFO'}
