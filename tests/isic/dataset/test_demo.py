"""The synthetic demo set: seeded, labelled, and with something to learn in it."""
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from timm_arl.isic.dataset import decode, load_splits
from timm_arl.isic.dataset.demo import DEMO_SIZES, demo_dataset


def test_same_seed_same_images():
    sizes = {'train': 8, 'validation': 4}
    first, again, other = (demo_dataset(sizes, seed=seed) for seed in (0, 0, 1))
    for split in sizes:
        assert [r['bytes'] for r in first[split].data['image'].to_pylist()] == [
            r['bytes'] for r in again[split].data['image'].to_pylist()]
    assert first['train'].data['image'][0].as_py() != other['train'].data['image'][0].as_py()


def test_columns_ids_and_labels():
    splits = demo_dataset({'train': 16, 'validation': 8, 'test': 8})
    ids = [i for split in splits.values() for i in split['image_id']]
    assert len(set(ids)) == 32 and all(i.startswith('DEMO_') for i in ids)
    for split in splits.values():
        labels = np.array([list(split['melanoma']), list(split['seborrheic_keratosis'])])
        assert labels.mean(1).tolist() == [0.25, 0.25] and labels.sum(0).max() == 1
        names = [split.features['diagnosis'].int2str(d) for d in split['diagnosis']]
        assert [n == 'melanoma' for n in names] == [bool(m) for m in labels[0]]
    assert splits['train'][0]['image'].size == (160, 160) and splits['train'][0]['image'].mode == 'RGB'


@pytest.mark.slow
def test_classes_of_the_default_set_differ_but_not_trivially():
    # a classifier of 12 x 12 thumbnails finds the classes, imperfectly: there is something to learn
    splits = load_splits('demo')
    assert {name: len(split) for name, split in splits.items()} == DEMO_SIZES
    assert splits['train']['image_id'][0].startswith('DEMO_')

    def thumbnails(split):
        return np.stack([np.asarray(decode(cell).resize((12, 12)), dtype=float).ravel() / 255
                         for cell in split['image']])

    for label in ('melanoma', 'seborrheic_keratosis'):
        model = RandomForestClassifier(200, random_state=0).fit(thumbnails(splits['train']), splits['train'][label][:])
        area = roc_auc_score(splits['test'][label][:], model.predict_proba(thumbnails(splits['test']))[:, 1])
        assert 0.6 < area < 0.995, label


def test_sizes_of_the_default_set():
    assert set(DEMO_SIZES) == {'train', 'validation', 'test'} and sum(DEMO_SIZES.values()) < 1000


def test_contact_sheet_command(call, tmp_path):
    done = call('timm_arl.isic.dataset.__main__', 'demo', tmp_path / 'sheet.png')
    assert done.returncode == 0 and 'synthetic' in done.stdout, done.stderr
    sheet = Image.open(io.BytesIO((tmp_path / 'sheet.png').read_bytes()))
    assert sheet.format == 'PNG' and sheet.width > 500
    done = call('timm_arl.isic.dataset.__main__', 'demo', tmp_path / 'no' / 'folder.png')
    assert done.returncode == 2 and 'make it first' in done.stderr
    for wrong, message in ((['', ], 'name a file in it'), ([tmp_path / 's.png', '--seed', -1], 'at least 0')):
        done = call('timm_arl.isic.dataset.__main__', 'demo', *wrong)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize('size', [64, 160])
def test_image_size(size):
    assert demo_dataset({'train': 1}, size=size)['train'][0]['image'].size == (size, size)
