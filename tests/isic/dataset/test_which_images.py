"""Images are those that they are taken for: by their split's name, their ids, and the letters of words."""
import shutil
import unicodedata

import datasets
import pytest
from any_data import class_folders, lines, picture, table

from timm_arl.isic.dataset import DataError, Wanted, label_array, load_data
from timm_arl.isic.dataset.columns import class_numbers, with_labels
from timm_arl.isic.dataset.sources import ids_digest, read_table
from timm_arl.isic.task import Task

NAEVUS = [unicodedata.normalize(form, 'N\u00e4vus') for form in ('NFC', 'NFD')]


@pytest.mark.parametrize('name, asked', [('test', 'validation'), ('val', 'test'), ('test', 'train')])
def test_a_split_is_not_taken_for_another(tmp_path, name, asked):
    table(tmp_path, head=('image', 'label', 'split'), more=lambda k: (name,))
    with pytest.raises(DataError, match=f'no split {asked}'):
        load_data(str(tmp_path / 'mine.csv'), needed=(asked,), whole=asked)


def test_data_without_splits_are_scored_as_a_whole(tmp_path):
    assert len(load_data(str(table(tmp_path)), needed=('test',), whole='test').splits['test']) == 40


@pytest.mark.parametrize('folders, ending', [
    (('',), 'csv'), (('training', 'val', 'testing'), 'csv'), (('',), 'parquet')])
def test_images_without_a_row_are_named_in_any_folder_of_the_library(tmp_path, folders, ending):
    for number, folder in enumerate(folders):
        for k in range(6):
            picture(tmp_path / folder / f'{number}{k}.png', k)
        rows = {'file_name': [f'{number}{k}.png' for k in range(6)], 'image_id': [f'I{number}{k}' for k in range(6)],
                'melanoma': [k % 2 for k in range(6)], 'seborrheic_keratosis': [int(k == 2) for k in range(6)]}
        getattr(datasets.Dataset.from_dict(rows), f'to_{ending}')(str(tmp_path / folder / f'metadata.{ending}'))
    whole = dict(needed=('test',), whole='test')
    assert len(load_data(str(tmp_path), **whole).splits['test']) == 6
    picture(tmp_path / folders[-1] / '._alone.png')  # of a Mac, which the library leaves out
    assert len(load_data(str(tmp_path), **whole).splits['test']) == 6
    picture(tmp_path / folders[-1] / 'alone.png')
    with pytest.raises(DataError, match=r'no row of metadata for alone.png \(1 such images\)'):
        load_data(str(tmp_path), **whole)


def test_ids_that_gain_or_lose_folders_are_not_taken_for_other_images(tmp_path):
    data = load_data(str(class_folders(tmp_path / 'all')))  # ids MEL-0, ..., NV-9
    earlier = tmp_path / 'splits.csv'
    lines(earlier, ('image_id', 'split', 'label'), [
        (i, name, label) for name, split in data.splits.items()
        for i, label in zip(split['image_id'], map(data.task.diagnosis, label_array(split, data.task)))])
    how = dict(needed=('test',), whole='test', expected=data.task, earlier=earlier)
    shutil.copytree(tmp_path / 'all', tmp_path / 'few')
    for k in range(10):
        (tmp_path / 'few' / ('NV' if k % 2 else 'MEL') / f'{k}.png').unlink()
    with pytest.raises(DataError, match=r'called as images in .*\(\d here, (MEL|NV)-\d there\).*--other-data'):
        load_data(str(tmp_path / 'few'), **how)  # ids 0, ..., 9
    others = class_folders(tmp_path / 'others')
    for number, path in enumerate(sorted(others.rglob('*.png'))):
        path.rename(path.with_name(f'clinic{number}.png'))
    assert len(load_data(str(others), **how).splits['test']) == 20


def test_numbers_are_ids_too():
    assert ids_digest([3, 10]) == ids_digest(['10', '3'])


def test_a_word_means_one_label():
    with pytest.raises(DataError, match='The word MN stands for nevus and for melanoma'):
        Task('t', ('nevus', 'melanoma'), aliases=(('MN', 'nevus'), ('MN', 'melanoma')))


def test_letters_composed_in_two_ways_are_equal(tmp_path):
    for k in range(40):
        picture(tmp_path / f'{NAEVUS[1]}{k}.png', k)
    lines(tmp_path / 'mine.csv', ('image', 'label', 'patient'), [
        (f'{NAEVUS[k % 2]}{k}.png', NAEVUS[1] if k % 3 else 'melanoma', f'{NAEVUS[k // 4 % 2]} {k // 8}')
        for k in range(40)])
    data = load_data(str(tmp_path / 'mine.csv'), Wanted(group='patient'))
    assert set(data.task.labels) == {NAEVUS[1], 'melanoma'}
    groups = {group for name in data.splits for group in data.group_ids(name)}
    assert len(groups) == 5
    assert class_numbers([*NAEVUS, 'x'], Task('t', (NAEVUS[1], 'x'), kind='multiclass'), 'abc', 'data').tolist() == [
        0, 0, 1]
    lines(tmp_path / 'both.csv', ('image', 'label'), [(f'{NAEVUS[1]}{k}.png', NAEVUS[k % 2]) for k in range(40)])
    with pytest.raises(DataError, match='differ in spelling alone'):
        load_data(str(tmp_path / 'both.csv'))


def test_shifted_rows_and_doubled_columns_of_a_challenge_are_refused(tmp_path):
    head = ('image_id', 'melanoma')
    lines(tmp_path / 'shifted.csv', head, [('a', 1, 0)])
    with pytest.raises(DataError, match='line 2: it has more values than the 2 columns'):
        read_table(tmp_path / 'shifted.csv', head)
    lines(tmp_path / 'doubled.csv', (*head, 'melanoma'), [('a', 1, 0)])
    with pytest.raises(DataError, match='has the column melanoma twice'):
        read_table(tmp_path / 'doubled.csv', head)
    lines(tmp_path / 'excel.csv', head, [('a', 1), ('', ''), ('b', 0)])
    assert list(read_table(tmp_path / 'excel.csv', head)) == ['a', 'b']


def test_words_of_0_and_1_of_every_type():
    split = datasets.Dataset.from_dict({'image_id': ['a', 'b'], 'x': ['0', '1']}, features=datasets.Features({
        'image_id': datasets.Value('string'), 'x': datasets.Value('large_string')}))
    assert with_labels(split, Task('t', ('x',)), '', 'data')['x'] == [0, 1]
