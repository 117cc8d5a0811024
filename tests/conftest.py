import importlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from in_process import run_here

# xdist's own process reads this file before it starts its workers: what takes long to import, fixtures import

REPO = Path(__file__).resolve().parents[1]

if 'PYTEST_XDIST_WORKER' in os.environ:  # workers share the cores: a thread each, also in programs they start
    import torch

    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def repo() -> Path:
    return REPO


@pytest.fixture(scope='session')
def call():
    """Run a program in this process, for what needs no process of its own."""
    return run_here


@pytest.fixture(scope='session')
def isic_sample() -> str:
    """A sixteenth of ISIC 2017 (96/24/48 images), which lies beside the checkout."""
    folder = Path(os.environ.get('ISIC2017_SAMPLE', REPO.parent / 'shared' / 'isic2017-sample'))
    if not folder.is_dir():
        pytest.skip(f'no ISIC 2017 sample at {folder} (set ISIC2017_SAMPLE)')
    return str(folder)


@pytest.fixture(scope='session')
def browser():
    """A real browser, by Playwright's core: Debian's chromium, without a window."""
    from playwright.sync_api import sync_playwright
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None:
        pytest.fail('no chromium to look at pages with: apt-get install chromium', pytrace=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])  # which root cannot have
        yield chromium
        chromium.close()
        # a forked reader's copy of the driver's pipe keeps it open; by SIGCHLD, torch would raise that one was killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()


@pytest.fixture(scope='session')
def few(isic_sample, tmp_path_factory):
    """32/12/12 images of the sample, as many of each diagnosis as of another where there are."""
    import datasets
    import numpy as np

    folder = tmp_path_factory.mktemp('few')
    for name, split in datasets.load_dataset(isic_sample).items():
        diagnoses = np.array(split['melanoma']) + 2 * np.array(split['seborrheic_keratosis'])
        by_turns = np.argsort([(diagnoses[:row] == diagnoses[row]).sum() for row in range(len(split))], kind='stable')
        rows = sorted(by_turns[:32 if name == 'train' else 12].tolist())
        split.select(rows).to_parquet(folder / f'{name}-00000-of-00001.parquet')
    return str(folder)


@pytest.fixture(scope='session')
def resnet50_file(tmp_path_factory) -> Path:
    """A checkpoint as timm/resnet50.a1_in1k holds it, with random weights."""
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model('resnet50', zero_init_last=False)
    path = tmp_path_factory.mktemp('resnet50') / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope='session')
def run(tmp_path_factory):
    """The output folder of a finished run, as finetune_isic.py leaves it."""
    import timm
    import torch

    from timm_arl.factory import save_network
    from timm_arl.files import write_json, write_rows
    from timm_arl.isic.metrics import score_split
    from timm_arl.isic.predictions import write_predictions

    folder = tmp_path_factory.mktemp('run') / 'out'
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64])
    save_network(model, folder, ['melanoma', 'seborrheic_keratosis'], dict(
        timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)), channels=[8, 16, 32, 64])
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
        'command': 'finetune_isic.py --data /home/me/isic2017 --output-dir /home/me/lr=0.01/seed=7',
        'commit': 'abcdef123456', 'arguments': {
            'data': '/home/me/isic2017', 'recipe': 'modern', 'seed': 7, 'keep': 'best', 'train_ids': '0',
            'crops': 'multiscale', 'train_images': 1234},
        'launch': {'processes': 1, 'mixed_precision': 'no', 'device': 'cpu'},
        'versions': {'timm_arl': '0.1.0', 'torch': '2'}})
    return folder


@pytest.fixture(scope='session')
def staged(run, tmp_path_factory):
    from timm_arl.hub import stage
    return stage(run, tmp_path_factory.mktemp('staged') / 'arl_cnn14.isic2017')


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """The output folder of a run of a network so small that an answer takes milliseconds."""
    import timm
    import torch

    from timm_arl.factory import save_network
    from timm_arl.files import write_json
    from timm_arl.isic import LABELS

    folder = tmp_path_factory.mktemp('tiny') / 'out'
    torch.manual_seed(0)
    model = timm.create_model('arl_cnn14', num_classes=2, channels=[8, 16, 32, 64], alpha_init=2.)
    torch.nn.init.normal_(model.get_classifier().weight, std=0.3)
    save_network(model, folder, LABELS, dict(
        timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)), channels=[8, 16, 32, 64], alpha_init=2.)
    config = json.loads((folder / 'config.json').read_text())
    write_json(folder / 'config.json', {**config, 'thresholds': {
        'official': dict.fromkeys(LABELS, 0.5),
        'youden on validation': {'melanoma': 0.0001, 'seborrheic_keratosis': 0.9999}}})
    scores = {'auc': 0.75, 'auc_ci95': [0.7, 0.8], 'positives': 20, 'images': 100, 'mean_probability': 0.45,
              'sensitivity': 0.31, 'specificity': 0.93, 'operating_points': []}
    write_json(folder / 'metrics.json', {'test': {
        'mean_auc': 0.777, 'mean_auc_ci95': [0.711, 0.833], **{label: scores for label in LABELS}}})
    return folder


@pytest.fixture(scope='session')
def photographs(tmp_path_factory):
    """Eight pictures of lesions in three folders."""
    import numpy as np

    from timm_arl.isic.synthetic import draw_lesion

    folder = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    for k in range(8):
        path = folder / ('', 'a', 'b/c')[k % 3] / f'lesion{k}.{"jpg" if k % 2 else "png"}'
        path.parent.mkdir(parents=True, exist_ok=True)
        # a square, or one smaller than the network's input, would be remarked on
        draw_lesion(('melanoma', 'nevus', 'seborrheic_keratosis')[k % 3], rng, 200).crop((0, 10, 200, 180)).save(path)
    (folder / 'notes.txt').write_text('no picture')
    return folder


@pytest.fixture
def predict(call, tmp_path):
    """The program in this process; --output-dir is out/."""
    def go(*args, cwd=tmp_path, workers=0):
        return call('timm_arl.predict', *args, '--output-dir', tmp_path / 'out', '--workers', workers, cwd=cwd)
    return go


@pytest.fixture
def benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / 'benchmarks')


@pytest.fixture
def no_pictures(benchmarks, monkeypatch):
    """evaluate_isic.py draws nothing, where it is only a means: its files are there, and empty."""
    program = importlib.import_module('evaluate_isic')
    for name in ('roc_plot', 'reliability_plot', 'curve_plot', 'alpha_plot'):
        monkeypatch.setattr(program, name, lambda path, *args, **kwargs: path.touch())
