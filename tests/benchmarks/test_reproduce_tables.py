"""The paper's tables, made as their users make them."""
import csv
import fcntl
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import timm
import torch
from in_process import run_here
from PIL import Image

from timm_arl.factory import save_network
from timm_arl.files import write_json
from timm_arl.isic.task import Task
from timm_arl.kernels import backend
from timm_arl.training.tables.rows import TABLES

pytestmark = pytest.mark.slow
TINY = ['--epochs', 1, '--img-size', 64, '--workers', 0, '--cpu-threads', 1]


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def wait_for(condition):
    deadline = time.time() + 200
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def is_free(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture(scope='module')
def made(repo, few, tmp_path_factory):
    """A table whose program was killed during a run, which lived on; then it was started again."""
    out = tmp_path_factory.mktemp('tables') / 'out'
    args = ['table5', '--data', few, '--output-dir', out, *TINY, '--seeds', 0]
    command = [sys.executable, *map(str, [
        repo / 'benchmarks' / 'reproduce_tables.py', *args, '--row', 'arl_cnn14', 'arl_cnn14_alpha_zero'])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for((out / 'runs' / 'arl_cnn14-seed0' / 'run.json').exists)
        first.kill()
    wait_for(lambda: is_free(out / 'runs' / 'arl_cnn14-seed0.lock'))
    done = run_here('reproduce_tables', *command[2:])
    assert done.returncode == 0, done.stderr
    return out, args, done


def test_table_is_measured_beside_printed(made):
    out, _, done = made
    rows = read(out / 'table5.csv')
    assert list(rows[0])[:14] == ['row', 'label', 'printed', 'measured', 'ci_low', 'ci_high', 'seeds', 'images',
                                  'image_size', 'epochs', 'precision', 'kernels', 'commit', 'command']
    by_key = {(row['row'], row['label']): row for row in rows}
    ours = by_key['arl_cnn14', 'mean']
    assert 0 <= float(ours['ci_low']) <= float(ours['measured']) <= float(ours['ci_high']) <= 1
    assert [ours[key] for key in ('seeds', 'images', 'image_size', 'epochs', 'precision', 'kernels')] == [
        '0', '12', '64', '1', 'fp32', backend(torch.ones(1, 1, 1, 1))]
    assert '--row arl_cnn14 ' in ours['command'] and '--cpu-threads 1' in ours['command'] and ours['commit']
    paper = by_key['arl_cnn50_channel', 'melanoma']
    assert (paper['printed'], paper['measured']) == ('0.861', '') and paper['note']
    apart = by_key['arl_cnn14 - arl_cnn14_alpha_zero', 'mean']
    assert apart['measured'] and '--row arl_cnn14 arl_cnn14_alpha_zero ' in apart['command']
    assert {path.name for path in (out / 'predictions').iterdir()} == {
        f'{row}-seed{seed}.{kind}' for row in ('arl_cnn14', 'arl_cnn14_alpha_zero') for seed in [0]
        for kind in ('csv', 'json')}
    assert 'table5.md' in done.stdout and not (out / 'runs' / 'arl_cnn14-seed0' / 'last').exists()


def test_killed_table_goes_on(made):
    out, _, done = made
    assert 'run 2 of 2' in done.stdout
    assert len(read(out / 'runs' / 'arl_cnn14-seed0' / 'looks.csv')) == 2  # at the test split: its own, and alpha zero


def test_check_computes_every_figure_again(call, made):
    out, args, _ = made
    path = out / 'table5.csv'
    before = path.read_text()
    measured = next(row for row in read(path) if row['measured'])['measured']
    assert call('reproduce_tables', *args, '--check').returncode == 0
    path.write_text(before.replace(measured, '0.9999', 1))
    done = call('reproduce_tables', *args, '--check')
    path.write_text(before)
    assert done.returncode == 1 and f'measured is 0.9999, computed again it is {measured}' in done.stdout


def test_finished_runs_are_not_made_again(call, made):
    out, args, _ = made
    before = {path: path.stat().st_mtime_ns for path in (out / 'predictions').iterdir()}
    done = call('reproduce_tables', *args, '--row', 'arl_cnn14')
    assert done.returncode == 0 and 'finetune_isic' not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (out / 'predictions').iterdir()}
    for row in ('arl_cnn14', 'arl_cnn14_channel'):  # of which the second has no run: it is not begun
        other = call('reproduce_tables', *args, '--row', row, '--img-size', 96)
        assert other.returncode == 2 and 'another --output-dir, or remove' in other.stderr
        assert 'finetune_isic' not in other.stdout
    shutil.move(out / 'predictions', out / 'moved')  # the run is finished, and is recorded by another command
    other = call('reproduce_tables', *args, '--row', 'arl_cnn14', '--epochs', 2)
    assert other.returncode == 2 and 'arl_cnn14-seed0.json was made with other flags' in other.stderr
    shutil.rmtree(out / 'predictions')
    shutil.move(out / 'moved', out / 'predictions')


def test_predictions_of_other_images_are_refused(call, made, few, tmp_path):
    """The same test images, one label changed: figures of the one must not stand under the name of the other."""
    out, args, _ = made
    for path in Path(few).glob('*.parquet'):
        split = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / 'cache'))
        if path.name.startswith('test'):
            split = split.map(lambda row, k: {'melanoma': 1 - row['melanoma'] if k == 0 else row['melanoma'],
                                              'seborrheic_keratosis': 0}, with_indices=True)
        (tmp_path / 'other').mkdir(exist_ok=True)
        split.to_parquet(tmp_path / 'other' / path.name)
    before = (out / 'table5.csv').read_text()
    done = call('reproduce_tables', 'table5', '--data', tmp_path / 'other', *args[3:], '--row', 'arl_cnn14')
    assert done.returncode == 2 and 'other images than' in done.stderr, done.stderr
    assert (out / 'table5.csv').read_text() == before


def test_check_needs_the_labels_alone(call, made, few, tmp_path):
    """Readers have the images in another size than those of the committed predictions."""
    out, args, _ = made
    small = tmp_path / 'thumbnails'  # nor do they have the folder's name
    small.mkdir()
    for path in Path(few).glob('*.parquet'):
        split = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / 'cache'))
        split.map(lambda row: {'image': row['image'].resize((80, 60))}).to_parquet(small / path.name)
    other = ['table5', '--data', small, *args[3:]]
    done = call('reproduce_tables', *other, '--check')
    assert done.returncode == 0, done.stdout + done.stderr
    done = call('reproduce_tables', *other, '--row', 'arl_cnn14')
    assert done.returncode == 2 and 'those of' in done.stderr and 'have 80 x 60 px' in done.stderr


def test_score_without_twins_of_training_images(call, made, few, tmp_path):
    """It stands beside the table of all images, which stays, and runs nothing."""
    out, args, _ = made
    ids = {name: datasets.Dataset.from_parquet(
        [str(path) for path in Path(few).glob(f'{name}*.parquet')], cache_dir=str(tmp_path / 'cache'))['image_id']
        for name in ('train', 'validation', 'test')}
    twins = tmp_path / 'twins.csv'
    pairs = [('train', 0, 'test', 0), ('test', 1, 'train', 1), ('test', 2, 'test', 3), ('validation', 0, 'test', 4)]
    twins.write_text('image_id_a,image_id_b\n' + ''.join(f'{ids[a][k]},{ids[b][j]}\n' for a, k, b, j in pairs))
    before = (out / 'table5.csv').read_bytes()
    done = call('reproduce_tables', *args, '--drop-duplicates', twins)
    assert done.returncode == 0 and 'finetune_isic' not in done.stdout, done.stderr
    assert (out / 'table5.csv').read_bytes() == before
    rows = read(out / 'table5_without_duplicates.csv')
    assert {row['images'] for row in rows if row['measured']} == {str(len(ids['test']) - 2)}
    page = (out / 'table5_without_duplicates.md').read_text()
    assert 'without the 2 that have a twin among the training images (twins.csv)' in page
    assert page.startswith((out / 'table5.md').read_text().splitlines()[0])
    assert call('reproduce_tables', *args, '--drop-duplicates', twins, '--check').returncode == 0
    # committed results have no runs
    copied = shutil.copytree(out, tmp_path / 'copied', ignore=shutil.ignore_patterns('runs'))
    (copied / 'table5_without_duplicates.csv').unlink()
    args = [copied if str(part) == str(out) else part for part in args]
    done = call('reproduce_tables', *args, '--drop-duplicates', twins)
    assert done.returncode == 0 and (copied / 'table5_without_duplicates.csv').exists(), done.stderr


def test_damaged_record_is_named(call, made):
    out, args, _ = made
    record = out / 'predictions' / 'arl_cnn14-seed0.json'
    before = record.read_text()
    record.write_text('{}')
    done = call('reproduce_tables', *args, '--check')
    record.write_text(before)
    assert done.returncode == 2 and f'{record} is missing or damaged' in done.stderr


def test_run_of_another_process_is_left_to_it(call, few, tmp_path):
    (tmp_path / 'runs').mkdir()
    with open(tmp_path / 'runs' / 'resnet14-seed0.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call('reproduce_tables', 'table3', '--data', few, '--output-dir', tmp_path, '--seeds', 0, '--row',
                    'resnet14')
    assert done.returncode == 0 and 'Another process makes it.' in done.stdout
    assert not (tmp_path / 'runs' / 'resnet14-seed0').exists()


def test_weights_out_of_reach_are_an_empty_cell_with_the_reason(call, few, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    done = call('reproduce_tables', 'table3', '--data', few, '--output-dir', tmp_path, *TINY, '--seeds', 0, '--row',
                'resnet50')
    assert done.returncode == 0, done.stderr
    rows = [row for row in read(tmp_path / 'table3.csv') if row['row'] == 'resnet50']
    assert rows and all(row['measured'] == '' and '127.0.0.1:9' in row['note'] for row in rows)
    assert rows[0]['printed'] == '0.857'


@pytest.fixture
def in_process(benchmarks, monkeypatch):
    """The runs are made in this process: those of `made` are not."""
    def run_program(program, arguments, lock):
        print(f'$ python benchmarks/{program.name}')
        done = run_here(program.stem, *arguments)
        return done.returncode, done.stderr.strip().rpartition('error: ')[2]

    monkeypatch.setattr(importlib.import_module('reproduce_tables'), 'run_program', run_program)


@pytest.mark.usefixtures('in_process')
def test_lesion_crops_and_colour_constancy(call, few, tmp_path):
    """A network from ImageNet weights, cut to the lesions that another was trained to find, and in grey-world."""
    start, out = tmp_path / 'start.safetensors', tmp_path / 'out'
    safetensors.torch.save_file(timm.create_model('tf_efficientnet_lite0').state_dict(), start)
    for table, row in (('table6', 'tf_efficientnet_lite0_crop'), ('constancy', 'tf_efficientnet_lite0_grey')):
        args = [table, '--data', few, '--output-dir', out, *TINY, '--seeds', 0, '--weights',
                f'tf_efficientnet_lite0={start}']
        done = call('reproduce_tables', *args, '--row', row)
        assert done.returncode == 0, done.stderr
        measured = {each['row']: each['measured'] for each in read(out / f'{table}.csv') if each['label'] == 'mean'}
        assert [name for name, value in measured.items() if value] == [row]
        assert call('reproduce_tables', *args, '--check').returncode == 0
        made_by = json.loads((out / 'runs' / f'{row}-seed0' / 'run.json').read_text())['arguments']
        assert made_by['lesion_crop'] == (table == 'table6') and made_by['grey_world'] == (table == 'constancy')
    text = (out / 'table6.md').read_text()
    assert re.search(r'Lesion masks of test: by a DeepLabV3\+ .* Dice of 0\.\d+ .* on 12 validation images', text)
    masks = datasets.load_dataset('parquet', data_dir=str(out / 'runs' / 'lesion_masks' / 'data'))['test']['mask']
    assert all(mask.getbbox() for mask in masks)  # the data have none of test images


def test_masks_and_maps_of_the_trained_networks(call, few, made):
    out, _, _ = made
    for table in ('masks', 'maps'):
        args = [table, '--data', few, '--output-dir', out, '--seeds', 0]
        done = call('reproduce_tables', *args)
        assert done.returncode == 0, done.stderr
        assert call('reproduce_tables', *args, '--check').returncode == 0
    kept = out / 'maps' / 'arl_cnn14-seed0.csv'
    before = kept.read_text()
    kept.write_text(''.join(before.splitlines(keepends=True)[:-1]))
    done = call('reproduce_tables', *args, '--check')
    kept.write_text(before)
    assert done.returncode == 2 and f'{kept} is damaged: it should have' in done.stderr
    masks, kept = read(out / 'masks.csv'), out / 'masks' / 'arl_cnn14-seed0.csv'
    before = kept.read_text()
    kept.write_text(re.sub(r'\w{64}$', 'of other weights', before.replace('256.0', '255.0'), flags=re.M))
    call('reproduce_tables', 'masks', *args[1:])  # after the network was trained again
    assert kept.read_text() == before
    assert [row['row'] for row in masks if row['label'] == 'effective share'] == [
        f'arl_cnn14 layer{k}.0' for k in (1, 2, 3, 4)]
    positions = {row['row']: float(row['measured']) for row in masks if row['label'] == 'positions'}
    assert list(positions.values()) == [256, 64, 16, 4]  # of 64 px
    for row in masks:
        value = float(row['measured'])
        if row['label'] == 'effective share':
            assert 0.25 <= value <= 1 + 1e-6  # but for rounding
        if row['label'] == 'largest mask value':  # a mean over the images; a flat mask has one over positions
            assert 1 / positions[row['row']] <= value + 1e-4 <= 1
    maps = {(row['row'], row['label']): row for row in read(out / 'maps.csv')}
    assert float(maps['centred_gaussian', 'pointing game']['measured']) > 0.5  # lesions lie in the centre
    assert 0 < float(maps['arl_cnn14', 'IoU with itself after hair']['measured']) <= 1
    apart = maps['arl_cnn14 - centred_gaussian', 'pointing game']
    assert float(apart['measured']) == pytest.approx(
        float(maps['arl_cnn14', 'pointing game']['measured'])
        - float(maps['centred_gaussian', 'pointing game']['measured']), abs=2e-4)


def test_figures_of_two_checkpoints_and_a_folder(call, made, tmp_path):
    out, _, _ = made
    (tmp_path / 'images').mkdir()
    for k, colour in enumerate(('brown', 'black')):
        picture = Image.new('RGB', (90, 60), 'pink')
        picture.paste(colour, (30, 20, 60, 40))
        picture.save(tmp_path / 'images' / f'{k}.png')
    (tmp_path / 'images' / 'broken.jpg').write_bytes(b'no image')
    models = ['--model', out / 'runs' / 'arl_cnn14-seed0', 'arl_cnn14.isic2017']
    done = call('reproduce_tables', 'figures', '--images', tmp_path / 'images', *models, '--output-dir', tmp_path / 'f')
    assert done.returncode == 0 and 'broken is left out: ' in done.stderr, done.stderr
    assert {path.name for path in (tmp_path / 'f').iterdir()} == {f'fig{k}.png' for k in (5, 6, 7, 9, 10)}
    for path in (tmp_path / 'f').iterdir():
        with Image.open(path) as drawn:
            assert drawn.width > 600 and len(drawn.convert('L').getcolors()) > 50
    one = timm.create_model('arl_cnn14', num_classes=1, channels=[8, 16, 32, 64])
    save_network(one, tmp_path / 'scar', ['scar'], task=Task('mine', ('scar',)).config(), channels=[8, 16, 32, 64])
    done = call('reproduce_tables', 'figures', '--images', tmp_path / 'images', '--model', tmp_path / 'scar',
                'arl_cnn14.isic2017', '--output-dir', tmp_path / 'g')
    assert done.returncode == 2 and 'scar has the labels scar, and arl_cnn14.isic2017 has melanoma' in done.stderr
    (tmp_path / 'none').mkdir()
    done = call('reproduce_tables', 'figures', '--images', tmp_path / 'none', *models, '--output-dir', tmp_path / 'f')
    assert done.returncode == 2 and 'no image' in done.stderr


@pytest.mark.usefixtures('in_process')
def test_a_run_that_fails_after_it_has_begun_does_not_stand_for_its_row(call, few, made, tmp_path):
    """Its seed has the reason, the others are tried, and the program ends with 1."""
    out = shutil.copytree(made[0], tmp_path / 'o')
    for name in ('arl_cnn14', 'arl_cnn14_alpha_zero'):
        for ending in ('csv', 'json'):
            (out / 'predictions' / f'{name}-seed0.{ending}').unlink()
    (out / 'runs' / 'arl_cnn14-seed0' / 'metrics.json').unlink()
    (out / 'runs' / 'arl_cnn14-seed0' / 'last').mkdir()
    (out / 'runs' / 'arl_cnn14-seed0' / 'last' / 'progress.json').write_text('{')  # damaged
    done = call('reproduce_tables', 'table5', '--data', few, '--output-dir', out, *TINY, '--seeds', 0, 1, '--row',
                'arl_cnn14')
    assert done.returncode == 1, done.stderr
    row = next(row for row in read(out / 'table5.csv') if row['row'] == 'arl_cnn14')
    assert row['seeds'] == '1' and row['note'].startswith('seed 0: ') and 'not run' not in row['note']


def test_architectures(call, tmp_path):
    """Parameters with two outputs: RAN50 39.48 million, RAN14 11.88; the gate costs one scalar per block."""
    done = call('reproduce_tables', 'table1', '--output-dir', tmp_path / 'o')
    assert done.returncode == 0, done.stderr
    rows = {row['row']: row for row in read(tmp_path / 'o' / 'table1.csv') if row['label'].startswith('param')}
    measured = {name: float(row['measured']) for name, row in rows.items()}
    assert measured['ran50'] == pytest.approx(39.48, abs=0.005) and measured['ran14'] == pytest.approx(11.88, abs=0.005)
    assert measured['arl_cnn50'] == pytest.approx(measured['resnet50'], abs=2e-4)
    assert rows['seresnet50']['printed'] == '26'


def test_the_kernels_of_a_row_are_those_that_it_uses(benchmarks):
    from reproduce_tables import kernels_of
    rows = {row.name: row for table in ('table3', 'table5') for row in TABLES[table]}
    assert kernels_of(rows['resnet14'], 'native') == ''
    assert kernels_of(rows['arl_cnn14'], 'triton') == 'triton'  # also where another machine records it
    assert kernels_of(rows['arl_cnn14_temperature'], 'native') == 'torch'


def test_a_network_that_was_trained_again_is_scored_again_without_its_attention(call, made, tmp_path):
    """Also where the runs are not there, as in results that were copied."""
    out = shutil.copytree(made[0], tmp_path / 'o', ignore=shutil.ignore_patterns('runs'))
    args = ['table5', '--data', made[1][2], '--output-dir', out, *TINY, '--seeds', 0]
    assert call('reproduce_tables', *args, '--check').returncode == 0
    record = out / 'predictions' / 'arl_cnn14-seed0.json'
    write_json(record, {**json.loads(record.read_text()), 'tensors': 'of another training'})
    done = call('reproduce_tables', *args, '--check')
    assert done.returncode == 1 and 'arl_cnn14_alpha_zero mean: measured is' in done.stdout, done.stderr
    done = call('reproduce_tables', *args, '--row', 'arl_cnn14')
    note, = {row['note'] for row in read(out / 'table5.csv') if row['row'] == 'arl_cnn14_alpha_zero'}
    assert 'scored with other weights than arl_cnn14 has now: --row arl_cnn14_alpha_zero scores it again' in note


def test_rows_from_different_weights_are_not_compared(call, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / 'o', ignore=shutil.ignore_patterns('runs'))
    first = out / 'predictions' / 'arl_cnn14-seed0.json'
    record = json.loads(first.read_text())
    for name, weights in (('arl_tf_efficientnet_lite0', 'a'), ('arl_tf_efficientnet_lite0_channel', 'b')):
        write_json(out / 'predictions' / f'{name}-seed0.json', {
            **record, 'origin': {**record['origin'], 'weights': weights}})
        shutil.copy(first.with_suffix('.csv'), out / 'predictions' / f'{name}-seed0.csv')
    done = call('reproduce_tables', 'table5', '--data', made[1][2], '--output-dir', out, *TINY, '--seeds', 0, '--check')
    assert done.returncode == 2 and 'started from different weights of tf_efficientnet_lite0, a and b' in done.stderr


def test_what_cannot_be_used_is_told_before_a_run(call, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / 'o')
    path = out / 'predictions' / 'arl_cnn14-seed0.csv'
    path.write_text(path.read_text()[:-200])
    done = call('reproduce_tables', 'table5', '--data', made[1][2], '--output-dir', out, *TINY, '--seeds', 0, '--row',
                'arl_cnn14_channel')
    assert done.returncode == 2 and str(path) in done.stderr and 'finetune_isic' not in done.stdout


@pytest.mark.parametrize('row', ['resnet14', 'resnet50'])
def test_a_run_that_fails_in_its_first_epoch_does_not_stand_for_its_row(
        call, few, tmp_path, benchmarks, monkeypatch, row):
    """It leaves no trace of its own, as one whose weights are out of reach; the other seeds are tried."""
    tried = []

    def fails(program, arguments, lock):
        tried.append(program.name)
        return 2, f'The loss is nan at epoch 1, step {len(tried)}'

    monkeypatch.setattr(importlib.import_module('reproduce_tables'), 'run_program', fails)
    done = call('reproduce_tables', 'table3', '--data', few, '--output-dir', tmp_path, *TINY, '--seeds', 0, 1, '--row',
                row)
    assert done.returncode == 1 and len(tried) == 2
    note, = {line['note'] for line in read(tmp_path / 'table3.csv') if line['row'] == row}
    assert note == 'seed 0: The loss is nan at epoch 1, step 1; seed 1: The loss is nan at epoch 1, step 2'
