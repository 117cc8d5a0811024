"""Lists of near-duplicates."""
import datasets
import pytest

from timm_arl.isic.dataset import DataError
from timm_arl.isic.dataset.duplicates import (
    is_against,
    pairs_among,
    read_pairs,
    twins_of_training,
    without_known,
    without_twins,
)


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


def test_images_of_a_network_are_left_out_of_data_that_have_training_images_too(tmp_path):
    splits = {'train': split(['a', 'b']), 'validation': split(['c', 'd']), 'test': split(['e', 'f'])}
    path = tmp_path / 'twins.csv'
    path.write_text('image_id_a,image_id_b,split_a,split_b\ne,x,test,against train\nd,y,validation,against test\n'
                    'f,a,test,train\n')
    assert is_against(path)
    left, lost = without_known(splits, path)
    assert {name: each['image_id'][:] for name, each in left.items()} == {
        'train': ['a', 'b'], 'validation': ['c'], 'test': ['f']}
    assert lost == {'validation': 1, 'test': 1}
    path.write_text('image_id_a,image_id_b,split_a,split_b\na,y,train,against test\n')
    assert without_known(splits, path)[1] == {'validation': 0, 'test': 0}  # of these data, and none of those scored
    path.write_text('image_id_a,image_id_b,split_a,split_b\nz,y,validation,against test\n')
    with pytest.raises(DataError, match='names no image of these data with a twin in the data of the network'):
        without_known(splits, path)
