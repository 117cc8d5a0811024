"""Data as users have them, and as they should not be."""
import io
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_arl.isic.dataset import (
    DataError,
    EpochBatches,
    IsicSplit,
    label_array,
    load_splits,
    unreadable_images,
)
from timm_arl.isic.transforms import eval_transform, train_transform

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
FEATURES = datasets.Features({
    'image': datasets.Image(), 'image_id': datasets.Value('string'),
    'melanoma': datasets.Value('float32'), 'seborrheic_keratosis': datasets.Value('float32')})

WITH_ASPECT = datasets.Features({**FEATURES, 'aspect_ratio': datasets.Value('float32')})


def jpeg(color=(120, 80, 60), size=(32, 32), mode='RGB', format='JPEG'):
    buffer = io.BytesIO()
    Image.new('RGB', size, color).convert(mode).save(buffer, format=format)
    return buffer.getvalue()


def rows(count=4, first=0, **changes):
    """Alternating diagnoses; changes are {column: {row: value}}."""
    made = [{'image': {'bytes': jpeg(), 'path': None}, 'image_id': f'ISIC_{first + i:07d}',
             'melanoma': float(i % 4 == 1), 'seborrheic_keratosis': float(i % 4 == 3)} for i in range(count)]
    for column, values in changes.items():
        for row, value in values.items():
            made[row][column] = value
    return made


def write(folder, features=FEATURES, drop=(), **splits):
    (folder / 'data').mkdir(parents=True)
    for name, content in {'train': rows(8), 'validation': rows(first=100), 'test': rows(first=200), **splits}.items():
        if content is not None:
            content = [{**dict.fromkeys(features), **row} for row in content]
            split = datasets.Dataset.from_list(content, features=features).remove_columns(list(drop))
            split.to_parquet(folder / 'data' / f'{name}-00000-of-00001.parquet')
    return str(folder)


def test_parquet_folder(tmp_path):
    splits = load_splits(write(tmp_path / 'isic'))
    assert {name: len(split) for name, split in splits.items()} == {'train': 8, 'validation': 4, 'test': 4}
    item = IsicSplit(splits['train'], eval_transform(16, MEAN, STD))[1]
    assert item[0].shape == (1, 3, 16, 16) and item[1].tolist() == [1.0, 0.0] and item[2] == 1


def test_real_sample(isic_sample):
    splits = load_splits(isic_sample)
    assert {name: len(split) for name, split in splits.items()} == {'train': 96, 'validation': 24, 'test': 48}
    for split, each in zip(splits.values(), (32, 8, 16)):
        assert IsicSplit(split, None).labels.sum(0).tolist() == [each, each]
        assert unreadable_images(split) == []
    dataset = IsicSplit(splits['train'], lambda image: torch.tensor(image.size))
    sizes = torch.stack([dataset[row][0] for row in range(12)])
    assert (sizes[:, 1] == 256).all() and (sizes[:, 0] > 256).all()  # squashed to 256 x 256, restored


def test_demo_needs_no_files():
    splits = load_splits('demo')
    assert set(splits) == {'train', 'validation', 'test'} and splits['train']['image_id'][0].startswith('DEMO_')


@pytest.mark.parametrize('make, message', [
    (lambda f: str(f / 'nowhere'), 'No folder .*nowhere: pass a folder'),
    (lambda f: './nowhere', r'No folder \./nowhere'),
    (lambda f: 'nowhere', 'No folder nowhere'),
    (lambda f: str(f), 'is not a dataset that can be read'),
    (lambda f: write(f / 'd', validation=None), 'has no split validation'),
    (lambda f: write(f / 'd', drop=['melanoma']), 'has no column melanoma .it has image, image_id, seborrheic'),
    (lambda f: write(f / 'd', test=rows(first=200, melanoma={2: 2.0})),
     'split test: melanoma must be 0 or 1, but is 2.0 for image ISIC_0000202'),
    (lambda f: write(f / 'd', train=rows(melanoma={0: None, 1: None})),
     r'melanoma must be 0 or 1, but is None .*\(2 such'),
    (lambda f: write(f / 'd', train=rows(melanoma={3: 1.0})), 'ISIC_0000003 is labelled both melanoma and'),
    (lambda f: write(f / 'd', test=rows(first=5)), 'image_id ISIC_0000005 occurs twice .splits train and test'),
    (lambda f: write(f / 'd', features=WITH_ASPECT, test=rows(first=200, aspect_ratio={0: 1.5, 1: None, 3: 1e9})),
     'split test: aspect_ratio is 1000000000.0 for image ISIC_0000203'),
    (lambda f: '', 'No folder : pass a folder'),
    (lambda f: write(f / 'd', validation=rows(3, first=100)),
     'validation, has 0 images of seborrheic_keratosis out of 3'),
])
def test_unusable_data_are_refused_in_one_sentence(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as raised:
        load_splits(make(tmp_path))
    assert '\n' not in str(raised.value)


def test_a_folder_that_changed_is_read_anew(tmp_path):
    """With a card, the datasets library would give what it read the first time, or from another folder of that name."""
    card = '---\nconfigs:\n- config_name: default\n  data_files:\n' + ''.join(
        f'  - split: {name}\n    path: data/{name}-*.parquet\n' for name in ('train', 'validation', 'test')) + '---\n'
    lengths = []
    for folder, count in (('a', 8), ('b', 12), ('a', 16)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write(tmp_path / folder / 'isic', train=rows(count))
        (tmp_path / folder / 'isic' / 'README.md').write_text(card)
        lengths.append(len(load_splits(str(tmp_path / folder / 'isic'))['train']))
    assert lengths == [8, 12, 16]


def test_image_column_of_another_type_is_refused(tmp_path):
    features = datasets.Features({**FEATURES, 'image': datasets.Value('int32')})
    content = [dict(row, image=1) for row in rows()]
    with pytest.raises(DataError, match='column image holds no images'):
        load_splits(write(tmp_path / 'd', features=features, train=content, validation=content, test=content))


def test_truncated_parquet_is_refused(tmp_path):
    folder = write(tmp_path / 'd')
    file = tmp_path / 'd' / 'data' / 'train-00000-of-00001.parquet'
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match='is not a dataset that can be read'):
        load_splits(folder)


def test_images_that_do_not_decode_are_found(tmp_path):
    whole = jpeg(size=(64, 64))
    bad = {1: whole[:len(whole) // 2], 3: b'', 4: b'<html>not an image</html>'}
    good = {0: jpeg(mode='L'), 2: jpeg(mode='CMYK'), 5: jpeg(mode='RGBA', format='PNG'),
            7: jpeg(mode='P', format='PNG')}
    cells = {row: {'bytes': data, 'path': None} for row, data in {**bad, **good}.items()}
    content = rows(8, image={**cells, 6: None})
    split = load_splits(write(tmp_path / 'd', train=content))['train']
    assert unreadable_images(split) == sorted([*bad, 6])
    dataset = IsicSplit(split, eval_transform(16, MEAN, STD))
    assert all(dataset[row][0].shape == (1, 3, 16, 16) for row in good)


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (8, 3)).tolist()
    cells = {row: {'bytes': jpeg(tuple(c)), 'path': None} for row, c in enumerate(colours)}
    split = load_splits(write(tmp_path / 'd', train=rows(8, image=cells)))['train']
    dataset = IsicSplit(split, train_transform(16, MEAN, STD), seed=3)

    def batch(workers, epoch):
        dataset.set_epoch(epoch)
        torch.manual_seed(workers)
        return next(iter(DataLoader(dataset, batch_size=8, num_workers=workers)))[0]

    assert torch.equal(batch(0, 0), batch(2, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is left alone


def test_augmentation_does_not_depend_on_the_order_of_rows(tmp_path):
    content = rows(8, image={i: {'bytes': jpeg((20 * i, 90, 200 - 20 * i)), 'path': None} for i in range(8)})
    tensors = []
    for order in (content, content[::-1]):
        split = load_splits(write(tmp_path / str(len(tensors)), train=order))['train']
        dataset = IsicSplit(split, train_transform(16, MEAN, STD), seed=3)
        tensors.append({dataset.image_ids[i]: dataset[i][0] for i in range(8)})
        assert not torch.equal(dataset[0][0], dataset[8][0])  # shown a second time, it is changed in another way
        assert torch.equal(dataset[0][1], dataset[8][1]) and dataset[8][2] == 0
    assert all(torch.equal(tensors[0][i], tensors[1][i]) for i in tensors[0])


@pytest.mark.parametrize('images, batch_size, processes', [(20, 4, 1), (21, 4, 1), (20, 3, 2), (25, 4, 3), (3, 4, 2)])
def test_every_image_once_an_epoch(images, batch_size, processes):
    labels = torch.zeros(images, 2)
    ranks = [EpochBatches(labels, batch_size, 5, processes=processes, rank=rank) for rank in range(processes)]
    for sampler in ranks:
        sampler.set_epoch(2)
    batches = [list(sampler) for sampler in ranks]
    assert all(len(each) == len(sampler) == len(batches[0]) for each, sampler in zip(batches, ranks))
    assert all(batch for each in batches for batch in each)  # none waits for a batch that never comes
    assert sorted(row for each in batches for batch in each for row in batch) == list(range(images))
    # a step of all processes is a step of one
    alone = EpochBatches(labels, batch_size * processes, 5)
    alone.set_epoch(2)
    for step, whole in enumerate(list(alone)[:len(batches[0]) - 1]):
        assert sorted(whole) == sorted(row for each in batches for row in each[step])
    alone.set_epoch(3)
    assert images < 5 or alone.order() != ranks[0].order()


def test_patches_and_balance(tmp_path):
    labels = torch.tensor([[0., 0]] * 80 + [[1., 0]] * 15 + [[0., 1]] * 5)
    shown = EpochBatches(labels, 10, patches_per_image=3).order()
    assert sorted(shown) == list(range(300))  # row, row + 100, row + 200
    balanced = EpochBatches(labels, 10, patches_per_image=30, balanced=True).order()
    assert len(balanced) == len(set(balanced)) == 3000
    rows_shown = np.array(balanced) % 100
    shares = [np.mean(rows_shown < 80), np.mean((rows_shown >= 80) & (rows_shown < 95)), np.mean(rows_shown >= 95)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_masks_colour_and_squash(isic_sample):
    split = load_splits(isic_sample)['train'].select(range(12))
    plain = IsicSplit(split, None)
    cropped = IsicSplit(split, None, crop_to_lesion=True)
    grey = IsicSplit(split, None, colour_constancy=True)
    squashed = IsicSplit(split, None, keep_aspect=False)
    assert label_array(split).shape == (12, 2)
    for row in range(12):
        assert squashed.picture(row).size == (256, 256)
        assert cropped.picture(row).width <= plain.picture(row).width
        before, after = (np.ptp(np.asarray(each.picture(row), float).mean((0, 1))) for each in (plain, grey))
        assert after < 0.4 * before  # the rest was clipped
    assert any(cropped.picture(row).size != plain.picture(row).size for row in range(12))


def test_a_crop_to_the_lesion_is_not_taken_for_a_squashed_copy(tmp_path):
    features = datasets.Features({**WITH_ASPECT, 'mask': datasets.Image()})
    mask = Image.new('L', (400, 300))
    mask.paste(255, (150, 100, 250, 200))
    buffer = io.BytesIO()
    mask.save(buffer, 'PNG')
    cells = {0: {'bytes': jpeg(size=(400, 300)), 'path': None}}
    content = rows(8, image=cells, aspect_ratio={0: 400 / 300}, mask={0: {'bytes': buffer.getvalue(), 'path': None}})
    split = load_splits(write(tmp_path / 'd', features=features, train=content))['train']
    assert IsicSplit(split, None, crop_to_lesion=True).picture(0).size == (150, 150)


def test_crops_of_a_test_image_stay_the_same_all_epochs(isic_sample):
    split = load_splits(isic_sample)['test'].select(range(2))
    dataset = IsicSplit(split, eval_transform(16, MEAN, STD, 'paper'), every_epoch=False)
    first = dataset[1][0]
    dataset.set_epoch(3)  # as Accelerate does at every pass
    assert torch.equal(dataset[1][0], first)


def test_numbers_as_ids(tmp_path):
    features = datasets.Features({**FEATURES, 'image_id': datasets.Value('int64')})
    splits = {name: [dict(row, image_id=k * 100 + i) for i, row in enumerate(rows(4))] for k, name in enumerate(
        ('train', 'validation', 'test'))}
    assert list(load_splits(write(tmp_path / 'd', features=features, **splits))['test']['image_id']) == [
        '200', '201', '202', '203']
