"""Lists of near-duplicates, and the folds that they must not divide."""
from argparse import Namespace

import datasets
import numpy as np
import pytest

from timm_arl.isic.dataset import DataError
from timm_arl.isic.dataset.duplicates import pairs_among, read_pairs, twins_of_training, without_twins
from timm_arl.training.folds import fold_rows
from timm_arl.training.images import check_learnable


def split(ids, **columns):
    count = len(ids)
    return datasets.Dataset.from_dict({
        'image_id': ids, 'melanoma': [int(k % 3 == 1) for k in range(count)],
        'seborrheic_keratosis': [int(k % 3 == 2) for k in range(count)], **columns})


@pytest.fixture
def listed(tmp_path):
    def make(*pairs):
        (tmp_path / 'twins.csv').write_text('image_id_a,image_id_b\n' + ''.join(f'{a},{b}\n' for a, b in pairs))
        return tmp_path / 'twins.csv'
    return make


def test_twins_of_training_images_are_left_out(listed):
    splits = {'train': split(['a', 'b']), 'validation': split(['c']), 'test': split(['d', 'e', 'f'])}
    path = listed(('a', 'd'), ('e', 'b'), ('f', 'c'), ('a', 'b'), ('x', 'f'))
    assert twins_of_training(splits, path) == {'d', 'e'}
    left, lost = without_twins(splits, path)
    assert {name: each['image_id'][:] for name, each in left.items()} == {
        'train': ['a', 'b'], 'validation': ['c'], 'test': ['f']}
    assert lost == {'validation': 0, 'test': 2}


def test_a_list_of_other_images_is_refused(listed):
    """Else an evaluation without twins would be one with all of them."""
    splits = {'train': split(['a', 'b']), 'test': split(['d'])}
    with pytest.raises(DataError, match=r'twins.csv names no image of these data .it has a.jpg, they have '):
        twins_of_training(splits, listed(('a.jpg', 'd.jpg')))
    assert twins_of_training(splits, listed()) == set()
    assert read_pairs(listed(('a.jpg', 'd.jpg'))) == [('a.jpg', 'd.jpg')]
    assert pairs_among(listed(('a', 'b'), ('a', 'd'), ('b', 'a')), ['a', 'b']) == [('a', 'b'), ('b', 'a')]


def test_folds_of_fewer_patients_are_refused(listed):
    """Three patients, or images that are all twins of one another, cannot make five folds."""
    images = split([f'i{k}' for k in range(60)], patient=[f'p{k // 20}' for k in range(60)])
    with pytest.raises(DataError, match='--folds 5 needs 5 images or groups .* there are 3: choose fewer'):
        list(fold_rows(images, 5, 0, groups='patient'))
    found = list(fold_rows(images, 3, 0, groups='patient'))
    assert sorted(np.concatenate([rest for _, rest in found]).tolist()) == list(range(60))


@pytest.mark.parametrize('processes, folds, refused', [
    (1, None, False), (3, None, False), (4, None, True), (2, 2, True)])
def test_each_process_needs_two_training_images(processes, folds, refused):
    args = Namespace(data='d', patches_per_image=1, folds=folds, lesion_crop=False)
    train = {'train': split([f'i{k}' for k in range(6)])}
    if refused:
        with pytest.raises(DataError, match=f'6 training images, too few for {processes} process'):
            check_learnable(args, train, Namespace(num_processes=processes))
    else:
        check_learnable(args, train, Namespace(num_processes=processes))
