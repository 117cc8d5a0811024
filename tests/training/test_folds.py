"""Which images are trained on together, and how many there must be."""
from argparse import Namespace

import datasets
import numpy as np
import pytest

from timm_arl.isic.dataset import DataError
from timm_arl.training.folds import fold_rows
from timm_arl.training.images import check_learnable


def split(count, **columns):
    return datasets.Dataset.from_dict({
        'image_id': [f'i{k}' for k in range(count)], 'melanoma': [int(k % 3 == 1) for k in range(count)],
        'seborrheic_keratosis': [int(k % 3 == 2) for k in range(count)], **columns})


def test_folds_of_fewer_patients_are_refused():
    images = split(60, patient=[f'p{k // 20}' for k in range(60)])
    with pytest.raises(DataError, match='--folds 5 needs 5 images or groups .* there are 3: choose fewer'):
        list(fold_rows(images, 5, 0, groups='patient'))
    found = list(fold_rows(images, 3, 0, groups='patient'))
    assert sorted(np.concatenate([rest for _, rest in found]).tolist()) == list(range(60))


@pytest.mark.parametrize('processes, folds, refused', [
    (1, None, False), (3, None, False), (4, None, True), (2, 2, True)])
def test_each_process_needs_two_training_images(processes, folds, refused):
    args = Namespace(data='d', patches_per_image=1, folds=folds, lesion_crop=False)
    train = {'train': split(6)}
    if refused:
        with pytest.raises(DataError, match=f'images to train on.*each process needs two .there are {processes}'):
            check_learnable(args, train, Namespace(num_processes=processes))
    else:
        check_learnable(args, train, Namespace(num_processes=processes))
