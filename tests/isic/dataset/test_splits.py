"""Data as users have them, and as they should not be."""
import io
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import FEATURES, WITH_ASPECT, jpeg, rows, write

from timm_arl.isic.dataset import DataError, check_usable, load_data, load_splits, unreadable_images
from timm_arl.isic.loading import IsicSplit
from timm_arl.isic.transforms import eval_transform

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


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
        assert unreadable_images(split) == {}
    dataset = IsicSplit(splits['train'], lambda image: torch.tensor(image.size))
    sizes = torch.stack([dataset[row][0] for row in range(12)])
    assert (sizes[:, 1] == 256).all() and (sizes[:, 0] > 256).all()  # squashed to 256 x 256, restored


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
    (lambda f: write(f / 'd', train=rows(melanoma={3: 1.0})), 'ISIC_0000003 has more than one label .melanoma and'),
    (lambda f: write(f / 'd', test=rows(first=5)), 'image_id ISIC_0000005 occurs twice .splits train and test'),
    (lambda f: write(f / 'd', features=WITH_ASPECT, test=rows(first=200, aspect_ratio={0: 1.5, 1: None, 3: 1e9})),
     'split test: aspect_ratio is 1000000000.0 for image ISIC_0000203'),
    (lambda f: '', 'No folder : pass a folder'),
    (lambda f: write(f / 'd [1]'), r'd \[1\]: in names of folders, \[.* rename it'),
    (lambda f: write(f / 'd*'), 'in names of folders'),
    (lambda f: write(f / 'd', validation=rows(3, first=100)),
     'validation, has 0 images of seborrheic_keratosis out of 3'),
])
def test_unusable_data_are_refused_in_one_sentence(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as raised:
        load_splits(make(tmp_path))
    assert '\n' not in str(raised.value)


def test_what_is_left_must_be_usable(tmp_path):
    splits = load_splits(write(tmp_path / 'd'))
    check_usable(splits, 'it')
    with pytest.raises(DataError, match='validation, has 0 images of melanoma out of 1'):
        check_usable({'validation': splits['validation'].select([0])}, 'it')
    with pytest.raises(DataError, match='it, split test, has no images'):
        check_usable({**splits, 'test': splits['test'].select([])}, 'it')


def test_a_folder_that_changed_is_read_again(tmp_path):
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


@pytest.mark.parametrize('streaming', [False, True])
def test_no_split_is_left_out_without_a_word(tmp_path, streaming):
    load = partial(load_data, streaming=streaming)
    with pytest.raises(DataError, match='d has no split test .it has .*tset.*: the splits must be named train, '
                                        'validation, test. Rename tset, or take it out'):
        load(write(tmp_path / 'd', test=None, tset=rows(first=200)))
    data = load(write(tmp_path / 'e', tset=rows(first=300)))
    assert data.summary('e').endswith(' Not used: tset, since the splits are train, validation, test.')
    assert set(data.splits) == {'train', 'validation', 'test'}
    data = load(write(tmp_path / 'f', test=None, unlabeled=rows(first=300)))  # of a repo that nobody here can change
    assert 'Not used: unlabeled' in data.summary('f') and set(data.splits) == {'train', 'validation'}


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    write(tmp_path / 'd')
    path = shutil.copy(tmp_path / 'd' / 'data' / 'train-00000-of-00001.parquet', tmp_path / 'all [1].parquet')
    assert len(load_data(str(path), needed=('train',), whole='train').splits['train']) == 8


def test_truncated_parquet_is_refused(tmp_path):
    folder = write(tmp_path / 'd')
    file = tmp_path / 'd' / 'data' / 'train-00000-of-00001.parquet'
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match='is not a dataset that can be read'):
        load_splits(folder)


def test_images_that_do_not_decode_are_found(tmp_path):
    whole = jpeg(size=(64, 64))
    floats = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(floats, 'TIFF')  # white may be 1, or 255
    bad = {1: floats.getvalue(), 3: b'', 4: b'<html>not an image</html>', 6: whole[:len(whole) // 2]}
    good = {0: jpeg(mode='L'), 2: jpeg(mode='CMYK'), 5: jpeg(mode='RGBA', format='PNG'),
            7: jpeg(mode='P', format='PNG')}
    cells = {row: {'bytes': data, 'path': None} for row, data in {**bad, **good}.items()}
    content = rows(9, image={**cells, 8: None})
    split = load_splits(write(tmp_path / 'd', train=content))['train']
    assert sorted(unreadable_images(split)) == sorted([*bad, 8])
    dataset = IsicSplit(split, eval_transform(16, MEAN, STD))
    assert all(dataset[row][0].shape == (1, 3, 16, 16) for row in good)


def test_numbers_as_ids(tmp_path):
    features = datasets.Features({**FEATURES, 'image_id': datasets.Value('int64')})
    splits = {name: [dict(row, image_id=k * 100 + i) for i, row in enumerate(rows(4))] for k, name in enumerate(
        ('train', 'validation', 'test'))}
    assert list(load_splits(write(tmp_path / 'd', features=features, **splits))['test']['image_id']) == [
        '200', '201', '202', '203']
