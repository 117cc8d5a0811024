"""`python -m timm_arl.isic.dataset`, run as its users run it: prepare and check."""
import contextlib
import multiprocessing
import os
import re
import shutil
import time
from functools import partial

import datasets
import numpy as np
import psutil
import pytest
import yaml
from any_data import class_folders, table
from forked import Forked
from PIL import Image
from small_data import jpeg
from test_sources import challenge, edit, picture, truth, write_csv

from timm_arl.files import hold
from timm_arl.isic.dataset import DataError, decode, load_data, load_splits


@pytest.fixture
def run(call):
    return partial(call, 'timm_arl.isic.dataset.__main__')


@pytest.fixture
def source(tmp_path):
    folder = challenge(tmp_path / 'isic', count=6)
    picture(9, (1200, 800)).save(folder / 'ISIC-2017_Training_Data' / 'ISIC_0000000.jpg')
    return folder


@pytest.mark.slow
def test_prepared_data_are_the_originals_made_small(run, source, tmp_path):
    target = tmp_path / 'deep' / 'parquet'
    done = run('prepare', source, target, '--longest-side', 300, '--workers', 2)
    assert done.returncode == 0 and str(target) in done.stdout, done.stderr
    before, after = load_splits(str(source)), load_splits(str(target))
    for name in before:
        for column in ('image_id', 'melanoma', 'seborrheic_keratosis', 'age_approximate', 'sex'):
            assert list(before[name][column]) == list(after[name][column])
    first = after['train'][0]
    assert decode(first['image']).size == (300, 200)
    assert (first['width'], first['height'], first['aspect_ratio']) == (1200, 800, 1.5)
    assert decode(after['train'][1]['image']).size == (60, 40)  # never enlarged
    mask = after['train'].cast_column('mask', datasets.Image())[0]['mask']
    assert mask.getpixel((15, 15)) and not mask.getpixel((45, 30))
    card = (target / 'README.md').read_text()
    assert yaml.safe_load(card.split('---')[1])['configs'][0]['data_files'][0]['split'] == 'train'
    assert '| train | 6 | 2 | 2 | 2 | 1 | 1 | 5 |' in card  # images, M, SK, neither, masks, age, sex

    done = run('prepare', source, target, '--longest-side', 300)
    assert done.returncode == 0 and 'Continuing: 3 of 3 shards are there' in done.stdout
    done = run('prepare', source, target, '--longest-side', 200)
    assert done.returncode == 2 and 'was prepared with another longest_side' in done.stderr
    table = source / 'ISIC-2017_Training_Part3_GroundTruth.csv'  # a corrected label must not be lost
    table.write_text(re.sub(r'(ISIC_0000000),\S+', r'\1,0.0,1.0', table.read_text()))
    assert load_splits(str(source))['train'][0]['seborrheic_keratosis'] == 1
    done = run('prepare', source, target, '--longest-side', 300)
    assert done.returncode == 2 and 'was prepared with another table of ids, labels, age and sex' in done.stderr


@pytest.mark.slow
def test_killed_and_run_again(run, tmp_path):
    source = tmp_path / 'isic'
    challenge(source, count=3)
    for i in range(3, 1000):  # four shards, so that some are open when the first is there
        picture(i, (250, 200)).save(source / 'ISIC-2017_Training_Data' / f'ISIC_0{i:06d}.jpg')
    edit(truth(source), lambda t: t + ''.join(f'ISIC_0{i:06d},0.0,0.0\n' for i in range(3, 1000)))
    target = tmp_path / 'parquet'
    command = ['prepare', source, target, '--workers', 2]
    deadline = time.time() + 60
    slow = source / 'ISIC-2017_Training_Data' / 'ISIC_0000005.jpg'
    slow.unlink()
    os.mkfifo(slow)  # whoever reads it waits
    program = Forked('timm_arl.isic.dataset.__main__', *command)
    while not list(target.glob('data/*.parquet')) and time.time() < deadline:  # of the worker that does not wait
        time.sleep(0.01)
    for worker in psutil.Process(program.processes[0].pid).children():  # as the system does where the memory is full
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    errors = program.wait().stderr
    slow.unlink()
    picture(5, (250, 200)).save(slow)
    shutil.rmtree(target)
    assert program.returncode == 2 and 'with fewer --workers than 2' in errors and 'Traceback' not in errors, errors
    program = Forked('timm_arl.isic.dataset.__main__', *command)
    process, = program.processes
    while not list(target.glob('data/train-*.parquet')) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    with pytest.raises(DataError, match='is not finished: it has no .* it goes on'):
        load_data(str(target))
    with pytest.raises(ProcessLookupError):  # its workers end with it
        while time.time() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    there = {path: path.stat().st_mtime_ns for path in target.glob('data/*.parquet')}
    assert 0 < len(there) < 6
    (target / 'data' / '.train-00003-of-00004.parquet.tmp').write_bytes(b'half')
    done = run(*command)
    assert done.returncode == 0 and f'{len(there)} of 6 shards are there' in done.stdout, done.stderr
    assert all(path.stat().st_mtime_ns == t for path, t in there.items())
    assert len(load_splits(str(target))['train']) == 1000
    assert not list((target / 'data').glob('.*'))


def test_external_images_and_twins(run, source, tmp_path):
    extra = tmp_path / 'extra'
    extra.mkdir()
    for i in range(3):
        picture(100 + i).save(extra / f'ISIC_00000{50 + i}.jpg')
    write_csv(tmp_path / 'list.csv', [
        {'image_id': f'ISIC_00000{50 + i}', 'melanoma': i % 2, 'seborrheic_keratosis': 0} for i in range(2)])
    write_csv(tmp_path / 'twins.csv', [
        {'image_id_a': 'ISIC_0000001', 'image_id_b': 'ISIC_2000001'},   # test
        {'image_id_a': 'ISIC_0000002', 'image_id_b': 'ISIC_0000003'}])  # both in train
    arguments = ['prepare', source, tmp_path / 'out', '--extra-ids', tmp_path / 'list.csv', '--drop-duplicates',
                 tmp_path / 'twins.csv']
    done = run(*arguments, '--extra-images', tmp_path / 'nowhere')
    assert done.returncode == 2 and 'nowhere: --extra-images is where' in done.stderr
    done = run(*arguments)
    assert done.returncode == 2 and 'lacks 2 of the 2 images' in done.stderr and 'ISIC_0000050' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = run(*arguments, '--extra-images', extra)
    assert done.returncode == 0, done.stderr
    splits = load_splits(str(tmp_path / 'out'))
    assert list(splits['train']['image_id']) == [f'ISIC_00000{i}' for i in ('00', '02', '04', '05', '50', '51')]
    assert splits['train']['melanoma'][5] == 1 and len(splits['test']) == 6
    assert 'twins of other images: ISIC_0000001, ISIC_0000003' in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.slow
def test_faults(run, source, tmp_path):
    image = source / 'ISIC-2017_Validation_Data' / 'ISIC_1000002.jpg'
    whole = image.read_bytes()
    image.write_bytes(whole[:400])
    done = run('prepare', source, tmp_path / 'out')
    assert done.returncode == 2 and 'The image of ISIC_1000002 cannot be used (Truncated File Read' in done.stderr
    done = run('prepare', source, tmp_path / 'out', '--skip-bad-images')
    assert done.returncode == 0 and 'cannot be read: ISIC_1000002. To include' in done.stdout, done.stderr
    assert len(load_splits(str(tmp_path / 'out'))['validation']) == 5
    assert 'Left out, since they cannot be read: ISIC_1000002.' in (tmp_path / 'out' / 'README.md').read_text()
    picture(3, (400, 20)).save(image)
    done = run('prepare', source, tmp_path / 'thin')
    assert done.returncode == 2 and 'it has 400 x 20 px, which is no photograph' in done.stderr
    image.write_bytes(whole)
    done = run('prepare', source, tmp_path / 'out', '--skip-bad-images')  # which makes no shard again
    assert done.returncode == 0 and 'cannot be read: ISIC_1000002. To include' in done.stdout, done.stderr

    (source / 'ISIC-2017_Training_Data.zip').write_bytes(b'not the zip')
    done = run('prepare', source, tmp_path / 'zip')
    assert done.returncode == 2 and re.search('has the md5 [0-9a-f]{32}, not a14a7e62', done.stderr)
    (source / 'ISIC-2017_Training_Data.zip').unlink()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_text('mine')
    done = run('prepare', source, tmp_path / 'full')
    assert done.returncode == 2 and 'was not made by this command' in done.stderr
    done = run('prepare', tmp_path / 'nowhere', tmp_path / 'n')
    assert done.returncode == 2 and 'No folder' in done.stderr and not (tmp_path / 'n').exists()
    (tmp_path / 'out' / 'prepare.json').write_text('{')
    done = run('prepare', source, tmp_path / 'out')
    assert done.returncode == 2 and f'prepare.json is damaged: remove {tmp_path / "out"}' in done.stderr


def test_check_finds_copies_that_were_turned_and_stored_anew(run, source, tmp_path):
    data = source / 'ISIC-2017_Training_Data'
    y, x = np.mgrid[0:40, 0:60]
    smooth = Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8))
    smooth.save(data / 'ISIC_0000003.jpg')
    smooth.transpose(Image.Transpose.ROTATE_90).resize((50, 75)).save(
        source / 'ISIC-2017_Test_v2_Data' / 'ISIC_2000004.jpg', quality=60)
    (source / 'ISIC-2017_Validation_Data' / 'ISIC_1000005.jpg').write_bytes((data / 'ISIC_0000005.jpg').read_bytes())
    for word, number in (('Validation', 1), ('Test_v2', 2)):  # the helper's splits are copies of each other
        for i in range(6):
            path = source / f'ISIC-2017_{word}_Data' / f'ISIC_{number}{i:06d}.jpg'
            if (number, i) not in ((2, 4), (1, 5)):
                picture(1000 * number + i).save(path)
    done = run('check', source, '--output', tmp_path / 'pairs.csv')
    assert done.returncode == 0 and '2 pairs, 2 of them across splits' in done.stdout, done.stdout + done.stderr
    assert 'train ISIC_0000003  test ISIC_2000004  near_identical' in done.stdout
    assert 'train ISIC_0000005  validation ISIC_1000005  byte_identical' in done.stdout
    assert (tmp_path / 'pairs.csv').read_text().startswith('image_id_a,split_a,image_id_b,split_b')


@pytest.mark.slow
def test_a_table_without_splits_and_with_words_among_the_numbers(run, tmp_path):
    source = table(tmp_path / 'd', 20, head=('image', 'label', 'age', 'width'), more=lambda k: (
        ('unknown', '80+', k)[k % 3], f'{k}.5'))  # the width of a lesion in mm, say
    done = run('prepare', source, tmp_path / 'all', '--columns', 'age_approximate=age', '--workers', 1)
    assert done.returncode == 0, done.stderr
    found = [row for split in load_data(str(tmp_path / 'all')).splits.values() for row in split]
    ages = [row['age_approximate'] for row in found]
    assert sorted(age for age in ages if age is not None) == [2, 5, 8, 11, 14, 17, *[80] * 7]
    assert {row['width'] for row in found} == {40}
    train = datasets.load_dataset('parquet', data_files=[*map(str, (tmp_path / 'all' / 'data').glob('*'))])['train']
    (tmp_path / 'train').mkdir()
    train.to_parquet(tmp_path / 'train' / 'train-00000-of-00001.parquet')
    done = run('prepare', tmp_path / 'train', tmp_path / 'divided', '--workers', 1)  # train alone is divided too
    assert done.returncode == 0 and 'train, validation and test divided' in done.stdout, done.stderr


@pytest.mark.parametrize('seed', ['-1', str(2 ** 32), 'x'])
def test_a_seed_that_is_none(run, tmp_path, seed):
    done = run('prepare', table(tmp_path / 'd', 4), tmp_path / 'out', '--seed', seed)
    assert done.returncode == 2 and 'argument --seed: ' in done.stderr and seed in done.stderr


@pytest.mark.parametrize('heads', [('age', 'Sex'), ('AGE_APPROXIMATE', 'SEX')])
def test_age_and_sex_in_other_spelling(run, tmp_path, heads):
    source = table(tmp_path / 'd', 24, head=('image', 'label', 'split', *heads), more=lambda k: (
        ('train', 'val', 'test')[k // 2 % 3], (31, '85+')[k == 0], ('female', 'male')[k % 2]))
    done = run('prepare', source, tmp_path / 'out', '--workers', 1)
    assert done.returncode == 0, done.stderr
    rows = {row['image_id']: row for split in load_data(str(tmp_path / 'out')).splits.values() for row in split}
    assert (rows['0']['age_approximate'], rows['0']['sex'], rows['1']['age_approximate'], rows['1']['sex']) == (
        85, 'female', 31, 'male')
    assert not set(heads) & rows['0'].keys()
    assert '| train | 8 | 4 | 4 | 0 | 8 | 8 |' in (tmp_path / 'out' / 'README.md').read_text()


def test_ages_in_words_are_kept(run, tmp_path):
    source = table(tmp_path / 'd', 24, head=('image', 'label', 'split', 'age'), more=lambda k: (
        ('train', 'val', 'test')[k // 2 % 3], ('30-40', 'adult')[k % 2]))
    done = run('prepare', source, tmp_path / 'out', '--workers', 1)
    assert done.returncode == 0, done.stderr
    assert load_data(str(tmp_path / 'out')).splits['train'][0]['age'] == '30-40'


def test_a_column_of_groups_keeps_its_name(run, tmp_path):
    source = table(tmp_path / 'd', 24, head=('image', 'label', 'age'), more=lambda k: (f'of case {k // 2}',))
    done = run('prepare', source, tmp_path / 'out', '--workers', 1, '--group-column', 'age')
    assert done.returncode == 0, done.stderr
    assert load_data(str(tmp_path / 'out')).groups == 'age'


def hold_until_killed(path, pipe):
    held = hold(path)
    pipe.send(held is not None)
    pipe.poll(120)


@pytest.mark.slow
def test_one_process_at_a_time_writes_to_a_target(run, source, tmp_path):
    (tmp_path / 'p').mkdir()
    fork = multiprocessing.get_context('fork')
    here, there = fork.Pipe()
    other = fork.Process(target=hold_until_killed, args=(tmp_path / 'p' / '.lock', there), daemon=True)
    other.start()
    assert here.recv()
    done = run('prepare', source, tmp_path / 'p', '--workers', 1)
    assert done.returncode == 2 and 'Another process is writing to' in done.stderr
    other.kill()
    other.join()
    done = run('prepare', source, tmp_path / 'p', '--workers', 1)
    assert done.returncode == 0 and not (tmp_path / 'p' / '.lock').exists(), done.stderr


def test_check_takes_the_splits_as_they_are(run, tmp_path):
    done = run('check', class_folders(tmp_path / 'd', count=2, splits=('train', 'test')))
    assert done.returncode == 0 and 'divided' not in done.stdout and 'validation' not in done.stdout, done.stdout


def test_a_list_of_pairs_with_semicolons(run, tmp_path):
    source = class_folders(tmp_path / 'd', count=4, splits=('train', 'val', 'test'))
    (tmp_path / 'pairs.csv').write_text('image_id_a;image_id_b\ntrain-MEL-0;test-MEL-0\n')
    done = run('prepare', source, tmp_path / 'out', '--drop-duplicates', tmp_path / 'pairs.csv', '--workers', 1)
    assert done.returncode == 0 and '(7 train' in done.stdout, done.stdout + done.stderr


def test_an_unknown_aspect_ratio_stays_unknown(run, tmp_path):
    """A square copy of a picture is taken for 3:2 where its own shape is not known; 1 would show it squashed."""
    train = datasets.Dataset.from_list([
        {'image': {'bytes': jpeg((40 * k, 90, 60), (32, 32)), 'path': None}, 'image_id': f'ISIC_{k}',
         'melanoma': k % 2, 'seborrheic_keratosis': int(k == 2), 'sex': k % 2, 'aspect_ratio': (None, 1.25)[k % 2]}
        for k in range(4)]).cast_column('image', datasets.Image()).cast_column(
            'sex', datasets.ClassLabel(names=['female', 'male']))
    for name in 'validation', 'test':
        (tmp_path / 'd').mkdir(exist_ok=True)
        train.to_parquet(tmp_path / 'd' / f'{name}-00000-of-00001.parquet')
        train = train.map(lambda row: {'image_id': row['image_id'] + 'b'})
    done = run('prepare', tmp_path / 'd', tmp_path / 'out', '--workers', 1)
    assert done.returncode == 0, done.stderr
    found = datasets.load_dataset(str(tmp_path / 'out'), split='test')
    assert found['aspect_ratio'] == [None, 1.25, None, 1.25]
    assert found.features['sex'].int2str(found['sex']) == ['female', 'male'] * 2
    for flag in '--extra-ids', '--drop-duplicates':
        done = run('prepare', tmp_path / 'd', tmp_path / 'x', flag, tmp_path / 'list.csv')
        assert done.returncode == 2 and f'{flag} changes the training images, and' in done.stderr
