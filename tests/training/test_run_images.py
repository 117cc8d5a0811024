"""The images of a run: read once, by all processes together, and kept; augmented with workers as without."""
import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import Forked
from small_data import WITH_ASPECT, jpeg, rows, write

from timm_arl.isic.dataset import DataError, decode, load_splits
from timm_arl.isic.images import unreadable_images
from timm_arl.isic.loading import IsicSplit
from timm_arl.isic.transforms import eval_transform, train_transform
from timm_arl.training import images as run_images
from timm_arl.training.images import check_images, epoch_sides, image_loader, note_squares, predict

CONFIG = dict(input_size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
MEAN_STD = CONFIG['mean'], CONFIG['std']


def options(**changes):
    return SimpleNamespace(**{**dict(
        data='it', seed=3, batch_size=4, workers=0, crops='multiscale', aspect='keep', grey_world=False, epochs=4,
        lesion_crop=False, start_size=None, augmentation='modern', patches_per_image=1, balance='none', mask_weight=0,
        skip_bad_images=False), **changes})


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def coloured(count, first=0):
    colours = np.random.default_rng(first).integers(0, 255, (count, 3)).tolist()
    return rows(count, first, image={i: {'bytes': jpeg(tuple(c), (40, 30)), 'path': None}
                                     for i, c in enumerate(colours)})


@pytest.fixture
def splits(tmp_path):
    return load_splits(write(tmp_path / 'd', train=coloured(8), validation=coloured(6, 100), test=coloured(5, 200)))


@pytest.mark.parametrize('workers', [0, 2])
def test_growing_images_and_epochs_reach_the_workers(splits, accelerator, workers):
    args = options(workers=workers, start_size=32)
    config = dict(CONFIG, input_size=(3, 96, 96))
    assert epoch_sides(args, 96) == [32, 64, 64, 96]
    loader = image_loader(args, splits['train'], config, accelerator, training=True)
    for epoch, side in enumerate(epoch_sides(args, 96)):
        loader.set_epoch(epoch)
        expected = IsicSplit(splits['train'], train_transform(side, *MEAN_STD), seed=3)
        expected.set_epoch(epoch)
        shown = [(row, image) for images, _, which in loader for row, image in zip(which.tolist(), images)]
        assert sorted(row for row, _ in shown) == list(range(8))
        assert all(torch.equal(image, expected[row][0]) for row, image in shown)


@pytest.mark.parametrize('workers, share', [(0, 1 / 8), (2, 1 / 8), (2, 0)])
def test_crops_are_those_of_the_images_at_every_pass(splits, accelerator, monkeypatch, workers, share):
    monkeypatch.setattr(run_images, 'MEMORY_SHARE', share)  # 0: nothing fits
    loader = image_loader(options(workers=workers), splits['validation'], CONFIG, accelerator)
    transform = eval_transform(16, *MEAN_STD, 'multiscale')
    expected = torch.stack([transform(decode(cell)) for cell in splits['validation']['image']])
    for _ in range(3):
        batches = list(loader)
        assert [len(crops) for crops, _ in batches] == [4, 2]
        assert torch.equal(torch.cat([crops for crops, _ in batches]), expected)
    assert torch.equal(loader.dataset[1][0], expected[1])  # what a preview draws


@pytest.mark.parametrize('workers', [0, 2])
def test_loading_draws_no_random_numbers_of_the_run(splits, accelerator, workers):
    """So dropout is the same with any number of workers, and after --resume."""
    args, state = options(workers=workers), torch.get_rng_state()
    loaders = [image_loader(args, splits[name], CONFIG, accelerator, name == 'train') for name in splits]
    for _ in range(2):
        for loader in loaders:
            list(loader)
            assert torch.equal(torch.get_rng_state(), state)


def test_images_are_read_once(tmp_path, accelerator):
    """The files are removed after the check: what is scored needs them no more, what is trained on does."""
    for number, name in enumerate(('train', 'validation', 'test')):
        (tmp_path / name).mkdir()
        lines = ['file_name,image_id,melanoma,seborrheic_keratosis']
        for i in range(4):
            (tmp_path / name / f'{i}.jpg').write_bytes(jpeg((60 * i, 90, 120)))
            lines.append(f'{i}.jpg,I{number}{i},{int(i == 1)},{int(i == 2)}')
        (tmp_path / name / 'metadata.csv').write_text('\n'.join(lines) + '\n')
    splits, args = load_splits(str(tmp_path)), options(workers=1)
    check_images(splits, args, accelerator, CONFIG)
    for path in tmp_path.glob('*/*.jpg'):
        path.unlink()
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    for name in ('validation', 'test'):
        loader = image_loader(args, splits[name], CONFIG, accelerator)
        first, second = (predict(accelerator, model, loader, name) for _ in range(2))
        assert first.shape == (4, 2) and torch.equal(first, second)
    with pytest.raises(OSError):  # with other crops, the kept ones do not count
        list(image_loader(options(crops='center'), splits['test'], CONFIG, accelerator))


def test_bad_images_are_named_with_the_reason(tmp_path, accelerator):
    whole = jpeg(size=(64, 64))
    bad = {2: {'bytes': b'<html>', 'path': None}, 4: {'bytes': whole[:len(whole) // 2], 'path': None}}
    splits = load_splits(write(tmp_path / 'd', test=rows(6, 200, image=bad)))
    with pytest.raises(DataError, match=r'^2 of 6 test images cannot be read: ISIC_0000202, ISIC_0000204 '
                                        r'.ISIC_0000202: it is not an image .*--skip-bad-images\.$'):
        check_images(splits, options(workers=1), accelerator, CONFIG)
    check_images(splits, options(skip_bad_images=True), accelerator, CONFIG)
    assert list(splits['test']['image_id']) == [f'ISIC_000020{i}' for i in (0, 1, 3, 5)]
    loader = image_loader(options(), splits['test'], CONFIG, accelerator)
    assert [row for _, rows in loader for row in rows.tolist()] == [0, 1, 2, 3]


def read_as_another_user(file, pipe):
    split = datasets.Dataset.from_dict(
        {'image': [str(file)]}, features=datasets.Features({'image': datasets.Image(decode=False)}))
    os.setuid(65534)
    pipe.send(unreadable_images(split))


def test_files_that_may_not_be_read_are_told_from_damaged_ones(tmp_path):
    """The check runs as another user, since root may read everything."""
    if os.geteuid() != 0:
        pytest.skip('only root can become another user')
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # of pytest's own, down from /tmp
        if parent.stat().st_uid == 0 and parent.name.startswith('pytest'):
            parent.chmod(0o755)
    file = tmp_path / 'i.jpg'
    file.write_bytes(jpeg())
    file.chmod(0o600)
    fork = multiprocessing.get_context('fork')
    here, there = fork.Pipe()
    fork.Process(target=read_as_another_user, args=(file, there), daemon=True).start()
    assert here.poll(100) and f'Permission denied: {file}' in here.recv()[0]


def test_large_jpegs_are_decoded_small(tmp_path, accelerator):
    """But never so small that a crop is enlarged, nor so that a picture is taken for a square one."""
    photograph = {'bytes': jpeg(size=(1600, 1200)), 'path': None}
    squashed = {'bytes': jpeg(size=(512, 512)), 'path': None}
    content = rows(4, 200, image={0: photograph, 1: squashed, 2: squashed}, aspect_ratio={1: 1.5, 2: 0.5})
    split = load_splits(write(tmp_path / 'd', features=WITH_ASPECT, test=content))['test']
    sizes = {side: IsicSplit(split, train_transform(side, *MEAN_STD)).picture(0).size for side in (64, 128, 224, 900)}
    assert sizes == {64: (200, 150), 128: (200, 150), 224: (400, 300), 900: (1600, 1200)}
    narrow = IsicSplit(split, train_transform(128, *MEAN_STD))
    assert [narrow.picture(row).size for row in (1, 2)] == [(384, 256), (256, 512)]
    patch = IsicSplit(split, train_transform(64, *MEAN_STD, 'paper')).picture(0)
    assert patch.size == (800, 600)  # a fifth of it, zoomed by 1.1, has 109 px
    assert decode({'bytes': jpeg(size=(1023, 1024)), 'path': None}, 64).size[0] != 128  # a square would be stretched


def read_and_predict(data, accelerator):
    """How many images this process has read at the start; and all images, with what a network says of them."""
    splits, args = load_splits(data), options(skip_bad_images=True)
    check_images(splits, args, accelerator, CONFIG)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    loader = image_loader(args, splits['validation'], CONFIG, accelerator)
    read = len(loader.images.kept)
    return read, f'{list(splits["validation"]["image_id"])} {predict(accelerator, model, loader, "").tolist()}'


def main():
    accelerator = Accelerator(cpu=True)
    said = read_and_predict(sys.argv[1], accelerator)
    Path(sys.argv[2], f'of-{accelerator.process_index}').write_text(json.dumps(said))
    accelerator.end_training()


@pytest.mark.slow
def test_processes_share_the_reading_and_agree(tmp_path, accelerator, capsys):
    content = coloured(8, 100)
    content[3]['image'] = {'bytes': b'', 'path': None}
    content[4]['melanoma'] = 1.  # each label still has both values
    data = write(tmp_path / 'd', validation=content)
    done = Forked('test_run_images', data, tmp_path, processes=2).wait()
    assert done.returncode == 0, done.stderr
    alone, scores = read_and_predict(data, accelerator)
    both = [json.loads((tmp_path / f'of-{rank}').read_text()) for rank in range(2)]
    assert alone == 7 and {other for _, other in both} == {scores}
    assert sum(read for read, _ in both) < 14  # neither has read them all at the start
    for stdout in (done.stdout, capsys.readouterr().out):
        assert 'Leaving out 1 of 8 validation images that cannot be read: ISIC_0000103' in stdout


def test_images_that_may_have_been_squashed_are_noted(tmp_path, splits, accelerator, capsys):
    note_squares(splits, options(), accelerator)  # 40 x 30 px
    note_squares(load_splits(write(tmp_path / 'known', features=WITH_ASPECT)), options(), accelerator)
    squares = load_splits(write(tmp_path / 'squares'))
    note_squares(squares, options(aspect='squash'), accelerator)
    assert capsys.readouterr().out == ''
    note_squares(squares, options(), accelerator)
    said = capsys.readouterr().out
    assert 'The first 8 train images of it are exactly square' in said and 'column aspect_ratio' in said
