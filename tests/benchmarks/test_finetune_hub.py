"""Training images from a dataset repo of a Hub, over HTTP: whole, and shard by shard."""
import json
import os
import subprocess
import sys

import pytest
import timm
from loopback_hub import Hub
from small_data import rows, write
from test_finetune_isic import TINY, read_csv
from timm.models import save_for_hf

# several runs in a process of its own, since the libraries read the environment when they are imported
RUNS = """
import contextlib, io, json, os, sys
from accelerate.state import AcceleratorState
import finetune_isic
for line in sys.stdin:
    os.environ['HF_TOKEN'], *args = json.loads(line)
    sys.argv = ['finetune_isic.py', *args]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status = finetune_isic.main() or 0
        except SystemExit as stopped:
            status = stopped.code
    AcceleratorState._reset_state(reset_partial_state=True)
    print(json.dumps([status, err.getvalue()]), flush=True)
"""


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'isic2017'
    write(folder, train=rows(16))
    files = {str(path.relative_to(folder)): path for path in folder.rglob('*.parquet')}
    save_for_hf(timm.create_model('resnet14', num_classes=2), folder / 'net', safe_serialization=True,
                model_config=dict(label_names=['melanoma', 'seborrheic_keratosis']))
    network = {path.name: path for path in (folder / 'net').iterdir()}
    with Hub({'user/net': network, 'datasets/user/isic2017': files, 'datasets/user/mine': files},
             private=['datasets/user/mine']) as hub:
        yield hub


@pytest.mark.slow
def test_data_from_a_hub(repo, hub, tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-c', RUNS], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **hub.env(tmp_path / 'home'), 'PYTHONPATH': os.pathsep.join(
            [str(repo / 'benchmarks'), os.environ.get('PYTHONPATH', '')])})

    def run(out, *args, token=''):
        args = [*args, '--model', 'resnet14', *TINY, '--epochs', 1, '--img-size', 64, '--batch-size', 8,
                '--crops', 'center', '--workers', 0, '--tracker', 'none', '--output-dir', tmp_path / out]
        process.stdin.write(json.dumps([token, *map(str, args)]) + '\n')
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    hub.fault('GET /_cdn/.*isic2017', 'status', code=503)
    status, said = run('streamed', '--data', 'user/isic2017', '--streaming')
    assert status == 0, said
    assert [r for r in hub.requests if '/_cdn/' in r] and not [  # only parts of files are asked for
        r for r in hub.requests if '/_cdn/' in r and 'bytes=' not in r]

    status, said = run('folds', '--data', 'user/isic2017', '--folds', 2, '--teacher', 'hf-hub:user/net')
    assert status == 2 and '--teacher hf-hub:user/net was trained on images that --folds would hold out' in said

    for extra in ((), ('--streaming',)):
        status, said = run('none', '--data', 'user/mine', *extra)
        assert status == 2 and 'Traceback' not in said and said.count('\n') == 1, said
        assert 'user/mine' in said and 'HF_TOKEN' in said and 'HF_ENDPOINT' in said
    assert not (tmp_path / 'none').exists()
    status, said = run('private', '--data', 'user/mine', token='hf_test')
    assert status == 0, said
    streamed, whole = (
        [row['image_id'] for row in read_csv(tmp_path / out / 'predictions_test.csv')]
        for out in ('streamed', 'private'))
    assert streamed == whole == [f'ISIC_{200 + k:07d}' for k in range(4)]
    process.stdin.close()
    assert process.wait(60) == 0
