"""Every kind of data that docs/data.md names: found out by itself, divided by group, refused in one sentence."""
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import small_data
from any_data import KINDS, class_folders, isic2018, isic2019, isic2020, lines, make, picture, table
from small_data import jpeg

from timm_arl.isic.dataset import DataError, Wanted, label_array, load_data
from timm_arl.isic.dataset.columns import with_labels
from timm_arl.isic.dataset.demo import DEMO_TASKS, demo_dataset
from timm_arl.isic.dataset.options import load_task
from timm_arl.isic.dataset.sources import ids_digest
from timm_arl.isic.loading import EpochBatches, IsicSplit, IsicStream
from timm_arl.isic.transforms import eval_transform

SIZES = {'csv': 40, 'classes': 20, 'splits of classes': 60, 'isic2018': 63, 'isic2019': 50, 'isic2020': 24,
         'isic2024': 20, 'ham10000': 42}


@pytest.mark.parametrize('kind', KINDS)
def test_task_splits_and_groups_are_found(tmp_path, kind):
    source, (_, name, labels, groups) = make(kind, tmp_path / 'data'), KINDS[kind]
    data = load_data(source)
    assert (data.task.name, data.task.labels, data.groups) == (name, labels, groups)
    assert set(data.splits) == {'train', 'validation', 'test'}
    assert sum(map(len, data.splits.values())) == SIZES[kind]
    assert bool(data.made) == (kind not in ('splits of classes', 'isic2018'))
    for split in data.splits.values():
        images = IsicSplit(split, lambda image: image.size, task=data.task, groups=data.groups)
        assert images[0][0] == (40, 32) and len(set(images.image_ids)) == len(split)
    if groups:
        parts = [set(data.group_ids(split)) for split in data.splits]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert (label_array(data.splits['train'], data.task).sum(0) > 0).all()


def test_the_columns_of_a_challenge_are_called_as_here(tmp_path):
    train = load_data(str(isic2020(tmp_path))).splits['train']
    assert {'patient_id', 'lesion_id', 'sex', 'age_approximate', 'site', 'malignant'} <= set(train.column_names)
    assert train[0]['age_approximate'] == 45. and train[0]['sex'] == 'female'


def test_unknown_lesions_are_in_the_test_set_alone(tmp_path):
    data = load_data(str(isic2019(tmp_path)))
    assert (label_array(data.splits['test'], data.task).sum(1) == 0).sum() == 2
    path = tmp_path / 'ISIC_2019_Training_GroundTruth.csv'
    path.write_text(path.read_text().replace('ISIC_0000000,1.0', 'ISIC_0000000,0.0'))
    with pytest.raises(DataError, match='image ISIC_0000000 has none of the labels MEL'):
        load_data(str(tmp_path))


def test_tables_of_many_forms(tmp_path):
    table(tmp_path, head=('image', 'label', 'split', 'age'),
          more=lambda k: (('train', 'val', 'test', 'Training')[k // 2 % 4], '' if k % 5 == 0 else k))
    data = load_data(str(tmp_path / 'mine.csv'))
    assert {name: len(split) for name, split in data.splits.items()} == {'train': 20, 'validation': 10, 'test': 10}
    assert not data.made and data.splits['test'].features['age'].dtype == 'int64'
    # other names of columns, semicolons, names without folders and endings, numbers for classes
    rows = [(k, k % 3, f'p{k // 2}') for k in range(40)]
    lines(tmp_path / 'other.csv', ('photo', 'dx_code', 'case'), rows, ';')
    data = load_data(str(tmp_path / 'other.csv'), Wanted(
        columns=(('image', 'photo'), ('diagnosis', 'dx_code')), group='case'))
    assert data.task.labels == ('0', '1', '2') and data.groups == 'case' and data.task.is_softmax
    # columns of 0 and 1
    lines(tmp_path / 'several.csv', ('image', 'scar', 'ulcer'), [(k, int(k % 2), int(k % 3 == 0)) for k in range(40)])
    data = load_data(str(tmp_path / 'several.csv'), Wanted(labels=('ulcer', 'scar')))
    assert data.task.labels == ('ulcer', 'scar') and data.task.kind == 'multilabel' and not data.task.exclusive
    lines(tmp_path / 'one.csv', ('image', 'target'), [(k, k % 2) for k in range(40)])
    assert load_data(str(tmp_path / 'one.csv')).task.labels == ('target',)


def test_tables_of_other_programs(tmp_path):
    path = table(tmp_path, 40, (True, False), ('image', 'target'))  # as pandas writes what is true
    edited(path, 'images/', 'images\\')  # as Windows does
    data = load_data(str(path))
    assert data.task.labels == ('target',) and '7' in [i for each in data.splits.values() for i in each['image_id']]
    assert sum(label_array(each, data.task).sum() for each in data.splits.values()) == 20


def test_challenges_as_others_lay_them_out(tmp_path):
    isic2020(tmp_path / 'a')  # Kaggle's
    (tmp_path / 'a' / 'jpeg').mkdir()
    (tmp_path / 'a' / 'train').rename(tmp_path / 'a' / 'jpeg' / 'train')
    (tmp_path / 'a' / 'ISIC_2020_Training_GroundTruth_v2.csv').rename(tmp_path / 'a' / 'train.csv')
    isic2019(tmp_path / 'b')  # a folder in a folder of its name
    (tmp_path / 'b' / 'ISIC_2019_Test_Input').rename(tmp_path / 'x')
    (tmp_path / 'b' / 'ISIC_2019_Test_Input').mkdir()
    (tmp_path / 'x').rename(tmp_path / 'b' / 'ISIC_2019_Test_Input' / 'ISIC_2019_Test_Input')
    make('ham10000', tmp_path / 'c')  # the Dataverse has this beside it
    picture(tmp_path / 'c' / 'ISIC2018_Task3_Test_Images' / 'ISIC_1.jpg')
    lines(tmp_path / 'c' / 'ISIC2018_Task3_Test_GroundTruth.csv', ('lesion_id', 'image_id', 'dx'),
          [('H', 'ISIC_1', 'nv')])
    for name in ('HAM10000_images_part_1', 'HAM10000_images_part_2'):  # both zips unpacked into a folder of their name
        (tmp_path / 'c' / name).rename(tmp_path / 'x')
        (tmp_path / 'c' / name).mkdir()
        (tmp_path / 'x').rename(tmp_path / 'c' / name / name)
    assert [load_data(str(tmp_path / name)).task.name for name in 'abc'] == ['isic2020', 'isic2019', 'ham10000']


def test_a_task_in_a_file(tmp_path):
    path = table(tmp_path, classes=('MEL', 'mel', 'NEV', 'SEK'), head=('image', 'diagnostic'))
    (tmp_path / 'pad.yaml').write_text(
        'kind: multiclass\ntitle: PAD\ncolumn: diagnostic\nlabels:\n  nevus: NEV\n  melanoma: [MEL, mel]\nrest: SEK\n')
    with pytest.raises(DataError, match='has none of the labels'):
        load_data(str(path), Wanted(task=str(tmp_path / 'pad.yaml')))
    (tmp_path / 'pad.yaml').write_text((tmp_path / 'pad.yaml').read_text().replace('multiclass', 'multilabel'))
    data = load_data(str(path), Wanted(task=str(tmp_path / 'pad.yaml')))
    assert data.task.labels == ('nevus', 'melanoma') and data.task.name == 'pad'
    counts = sum(label_array(split, data.task).sum(0) for split in data.splits.values())
    assert counts.tolist() == [10, 20]


def test_parquet_with_other_names(tmp_path):
    features = datasets.Features({'img': datasets.Image(), 'dx': datasets.ClassLabel(names=['b', 'a'])})
    rows = [{'img': {'bytes': jpeg((k, 80, 60)), 'path': f'{k}.jpg'}, 'dx': k % 2} for k in range(30)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'all.parquet')
    data = load_data(str(tmp_path / 'all.parquet'), Wanted(columns=(('image', 'img'), ('diagnosis', 'dx'))))
    assert data.task.labels == ('b', 'a') and data.made and len(data.splits['train']) > 18
    with pytest.raises(DataError, match='--columns image=photo: .*has no column photo .it has img, dx'):
        load_data(str(tmp_path / 'all.parquet'), Wanted(columns=(('image', 'photo'),)))


def test_made_splits_are_the_same_again_and_can_be_given(tmp_path):
    path = str(table(tmp_path, 60, head=('image', 'label', 'patient_id'), more=lambda k: (f'p{k // 3}',)))
    first, again, other = (load_data(path, seed=seed).splits for seed in (0, 0, 1))
    ids = [list(each['test']['image_id']) for each in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    lines(tmp_path / 's.csv', ('image_id', 'split'), [(i, name) for name,
        each in first.items() for i in each['image_id']])
    given = load_data(path, Wanted(splits=str(tmp_path / 's.csv')), seed=1)
    assert list(given.splits['test']['image_id']) == ids[0] and not given.made
    lines(tmp_path / 't.csv', ('image_id', 'split'), [(i, 'none' if name == 'test' else 'test' if name == 'validation'
        else 'validation' if int(patient[1:]) % 4 == 0 else 'train') for name, each in first.items()
        for i, patient in zip(each['image_id'], each['patient_id'])])  # to choose without the test split
    held = load_data(path, Wanted(splits=str(tmp_path / 't.csv')), seed=1).splits
    assert list(held['test']['image_id']) == list(first['validation']['image_id'])
    assert not {i for each in held.values() for i in each['image_id']} & set(ids[0])
    whole = load_data(path, needed=('test',), whole='test')
    assert {name: len(split) for name, split in whole.splits.items()} == {'test': 60}
    earlier = load_data(path, needed=('test',), whole='test', earlier=tmp_path / 's.csv')
    assert list(earlier.splits['test']['image_id']) == ids[0]


def test_validation_is_taken_from_train_where_only_that_is_missing(tmp_path):
    data = load_data(str(class_folders(tmp_path / 'd', splits=('train', 'test'))))
    assert {name: len(split) for name, split in data.splits.items()} == {'test': 20, 'train': 16, 'validation': 4}
    assert data.splits['train'][0]['image_id'].startswith('train-')
    whole = ids_digest(load_data(str(tmp_path / 'd'), needed=('test',)).splits['train']['image_id'])
    of_run = dict(whole='test', earlier=tmp_path / 'none', train_ids=whole)  # a fold's, staged
    assert len(load_data(str(tmp_path / 'd'), needed=('test',), **of_run).splits['test']) == 20
    with pytest.raises(DataError, match='are training images of the run'):
        load_data(str(tmp_path / 'd'), needed=('validation',), **of_run)


def test_the_rarest_class_is_in_every_split(tmp_path):
    for seed in range(5):
        classes = ['nevus'] * 37 + ['rare'] * 3
        data = load_data(str(table(tmp_path / str(seed), 40, classes)), seed=seed)
        assert [int(label_array(split, data.task)[:, 1].sum()) for split in data.splits.values()] == [1, 1, 1]


def test_a_stream_of_other_classes(tmp_path):
    features = datasets.Features({'img': datasets.Image(), 'image_id': datasets.Value('string'),
                                  'dx': datasets.ClassLabel(names=['b', 'a', 'c']), 'case': datasets.Value('string')})
    (tmp_path / 'data').mkdir()
    for name, count in (('train', 12), ('validation', 6)):
        content = [{'img': {'bytes': jpeg((k, 80, 60)), 'path': None}, 'image_id': f'{name}{k}', 'dx': k % 3,
                    'case': f'{name}{k // 3}'} for k in range(count)]
        datasets.Dataset.from_list(content, features=features).to_parquet(
            tmp_path / 'data' / f'{name}-00000-of-00001.parquet')
    wanted = Wanted(columns=(('image', 'IMG'), ('diagnosis', 'Dx')), group='case')  # in another spelling
    data = load_data(str(tmp_path), wanted, streaming=True)
    assert data.task.labels == ('b', 'a', 'c') and data.groups == 'case'
    train = data.splits['train']
    pickle.loads(pickle.dumps(train.stream))  # as Python 3.14 sends it to workers
    batches = EpochBatches(label_array(train.table, data.task), 4, task=data.task)
    shown = [(labels, image_id) for _, some, ids in IsicStream(train, batches, eval_transform(16, [0] * 3, [1] * 3))
             for labels, image_id in zip(some, ids)]
    assert len(shown) == 12
    assert all(labels.tolist().index(1) == int(image_id[5:]) % 3 and labels.sum() == 1 for labels, image_id in shown)
    whole = load_data(str(tmp_path), wanted).splits['train']
    assert np.array_equal(label_array(whole, data.task), label_array(train.table, data.task))


def test_a_stream_of_words_of_0_and_1(tmp_path):
    features = datasets.Features({'image': datasets.Image(), **dict.fromkeys(
        ('image_id', 'scar', 'ulcer'), datasets.Value('string'))})
    (tmp_path / 'data').mkdir()
    for name, count in (('train', 12), ('validation', 6)):
        content = [{'image': {'bytes': jpeg((k, 80, 60)), 'path': None}, 'image_id': f'{name}{k}',
                    'scar': str(k % 2), 'ulcer': str(int(k % 3 == 0))} for k in range(count)]
        datasets.Dataset.from_list(content, features=features).to_parquet(
            tmp_path / 'data' / f'{name}-00000-of-00001.parquet')
    data = load_data(str(tmp_path), Wanted(labels=('scar', 'ulcer')), streaming=True)
    train = data.splits['train']
    batches = EpochBatches(label_array(train.table, data.task), 4, task=data.task)
    shown = {image_id: labels.tolist() for _, some, ids in IsicStream(
        train, batches, eval_transform(16, [0] * 3, [1] * 3)) for labels, image_id in zip(some, ids)}
    assert shown == {f'train{k}': [k % 2, int(k % 3 == 0)] for k in range(12)}


def edited(path, old, new):
    path.write_text(path.read_text().replace(old, new))
    return str(path)


def added(data, name, content=''):
    """The folder with one more file."""
    file = Path(data, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return str(data)


def without_truth(data):
    for file in Path(data).glob('*.csv'):
        file.unlink()
    return str(data)


def moved(folder):
    isic2018(folder)
    next((folder / 'ISIC2018_Task3_Test_Input').glob('*.jpg')).unlink()
    return str(folder)


def with_split(folder, words):
    return str(table(folder, head=('image', 'label', 'split', 'patient_id'),
                     more=lambda k: (words[k // 2 % len(words)], f'p{k % 7}')))


@pytest.mark.parametrize('build, wanted, message', [
    (lambda f: str(table(f)), Wanted(labels=('melanoma', 'melanoma')), 'label melanoma is named twice'),
    (lambda f: str(table(f)), Wanted(labels=('melanoma', 'scc')),
     "label is 'nevus' for image 1 .20 such images., which is no label"),
    (lambda f: str(table(f)), Wanted(labels=('scc',)), 'needs at least 2 labels'),
    (lambda f: str(table(f)), Wanted(task='isic2021'), 'No task isic2021: choose isic2017'),
    (lambda f: str(table(f)), Wanted(task='isic2018'), 'has no column MEL, NV'),
    (lambda f: str(table(f)), Wanted(group='case'), 'has no column case .it has image, label.'),
    (lambda f: str(table(f)), Wanted(splits='none.csv'), '--splits .*none.csv cannot be read: No such file'),
    (lambda f: edited(table(f), 'images/3.png', '../3.png'), Wanted(), r'line 5: \.\./3.png leaves the folder'),
    (lambda f: edited(table(f), 'images/3.png', 'images/../../3.png'), Wanted(), 'line 5: .* leaves the folder'),
    (lambda f: edited(table(f), 'images/3.png', f'{f}/images/3.png'), Wanted(), 'mixes relative and absolute paths'),
    (lambda f: edited(table(f), 'images/3', 'images/x'), Wanted(),
     r'11 of the 40 images of .* are missing in .*: images/x.png, images/x0'),
    (lambda f: edited(table(f), 'images/3.png', 'images/2.png'), Wanted(),
     r'line 5: images/2.png occurs twice .in line 4'),
    (lambda f: edited(table(f), 'images/3.png', 'images/../images/2.png'), Wanted(), 'occurs twice .in line 4'),
    (lambda f: str(table(f, classes=('Nevus', 'nevus', 'scc'))), Wanted(), 'has Nevus and nevus, which differ in'),
    (lambda f: str(table(f, classes=('a $x$', 'b'))), Wanted(), 'no usable label.*Rename it, or say in a --task'),
    (lambda f: edited(table(f), 'images/3.png,nevus', 'images/3.png,'), Wanted(),
     'label is missing for image 3 .1 such'),
    (lambda f: edited(table(f), 'images/3.png,nevus', 'images/3.png,NaN'), Wanted(),
     'label is missing for image 3 .1 such'),
    (lambda f: edited(table(f), 'images/3.png,nevus', 'images/3.png,nevus,x'), Wanted(),
     'line 5: it has more values than the 2'),
    (lambda f: str(table(f, 9, 'ab', ('image', 'dx', 'x'), lambda k: ('' if k == 3 else k % 2,))),
     Wanted(labels=('x',)), 'x must be 0 or 1, but is None for image 3'),
    (lambda f: str(table(f, 18, 'abc', ('image', 'dx', 'split'),
                         lambda k: ('test' if k % 3 == 2 else ('train', 'train', 'val')[k // 3 % 3],))),
     Wanted(), r'has images of c in test .6., but none in train'),
    (lambda f: edited(table(f), 'image,', 'fotografia,'), Wanted(),
     'has no column of image paths .it has fotografia, label'),
    (lambda f: edited(table(f), ',label', ',notes'), Wanted(),
     'no column that tells the diagnosis .it has image, notes'),
    (lambda f: str(lines(f / 'e.csv', ('image', 'label'), [])), Wanted(), 'has no rows'),
    (lambda f: str(f / 'none.csv'), Wanted(), 'There is no .*none.csv'),
    (lambda f: str(table(f, 4, head=('image', 'label', 'dx'), more=lambda k: ('a',))), Wanted(),
     'several columns that could be the diagnosis .label, dx.'),
    (lambda f: str(table(f, 20, ('a',) * 9 + ('b',))), Wanted(), 'has 2 images of b, too few to divide'),
    (lambda f: with_split(f, ('train', 'vall', 'test')), Wanted(), "line 4: the split is 'vall' .14 such rows."),
    (lambda f: with_split(f, ('train', 'val', 'test')), Wanted(),
     '7 of the groups in column patient_id are in several splits: p. .train and validation'),
    (lambda f: str(class_folders(f, splits=('trian', 'val', 'test'))), Wanted(),
     'trian is beside the splits but is none'),
    (lambda f: str(class_folders(f, splits=('train', 'training', 'test'))), Wanted(),
     'two folders for the split train'),
    (lambda f: added(class_folders(f), 'mine.csv', 'img_id,age,diagnostic'), Wanted(),
     'has 2 folders of images and a table: pass --data .*mine.csv if the table tells the labels, or move it away'),
    (lambda f: added(class_folders(f), 'MEL/labels.tsv', 'image\tlabel'), Wanted(), 'pass --data .*labels.tsv'),
    (lambda f: added(class_folders(f), 'stray.jpg'), Wanted(), 'left out .1 such pictures.: move it into'),
    (lambda f: added(class_folders(f), 'SCC/p1/1.jpg'), Wanted(), 'p1.1.jpg would be left out .1 such'),
    (lambda f: added(class_folders(f), 'NV/9.HEIC'), Wanted(), '9.HEIC would be .*: convert it to one of'),
    (lambda f: added(class_folders(f, splits=('train',)), 'val/1.jpg'), Wanted(), '1.jpg would be left out'),
    (lambda f: small_data.write(f / 'd', val=small_data.rows(first=300)), Wanted(),
     'd has two splits that mean validation, among .*: keep'),
    (lambda f: added(class_folders(f), os.fsdecode(b'NV/caf\xe9.jpg')), Wanted(), 'is not UTF-8: rename it'),
    (lambda f: without_truth(isic2019(f)), Wanted(),
     'has ISIC_2019_Training_Input, but none of ISIC_2019_Training_GroundTruth.csv: put the ground truth'),
    (lambda f: str(table(f)), Wanted(task='isic2018', labels=('MEL',)), '--task names the labels'),
    (moved, Wanted(), 'do not fit: there is no image for ISIC_.* .1 such of 21 rows and 20 images'),
    (lambda f: edited(isic2018(f) / 'ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv',
                      'ISIC_0000200,1.0,0.0', 'ISIC_0000200,1.0,1.0') and str(f), Wanted(),
     'split test: image ISIC_0000200 has more than one label'),
])
def test_bad_data_are_refused_in_one_sentence(tmp_path, build, wanted, message):
    with pytest.raises(DataError, match=message) as raised:
        load_data(build(tmp_path), wanted)
    assert '\n' not in str(raised.value)


def test_a_task_of_the_user_has_the_column_that_it_names(tmp_path):
    """Histology is not the clinical diagnosis."""
    path = table(tmp_path, head=('image', 'diagnosis', 'Histology'), classes=('nevus', 'nevus', 'melanoma'),
                 more=lambda k: (('melanoma', 'nevus')[k % 2],))
    (tmp_path / 't.yaml').write_text('kind: multiclass\ncolumn: histology\nlabels: [nevus, melanoma]\n')
    data = load_data(str(path), Wanted(task=str(tmp_path / 't.yaml')))
    assert sum(label_array(split, data.task).sum(0) for split in data.splits.values()).tolist() == [20, 20]
    edited(path, 'Histology', 'notes')
    with pytest.raises(DataError, match='has no column histology .it has image, diagnosis, notes'):
        load_data(str(path), Wanted(task=str(tmp_path / 't.yaml')))


def test_what_may_lie_beside_folders_of_classes(tmp_path):
    data = class_folders(tmp_path)
    for name, content in (('duplicates.csv', 'image_id_a,image_id_b\n'), ('splits.csv', 'image_id,split,diagnosis\n'),
                          ('MEL/metadata.csv', 'isic_id,attribution\n'), ('MEL/0_superpixels.png', ''),
                          ('notes.txt', ''), ('.hidden.png', '')):
        added(data, name, content)
    assert sum(map(len, load_data(str(data)).splits.values())) == 20


def test_codes_stay_as_they_are_written(tmp_path):
    assert load_data(str(table(tmp_path, classes=('01', '02', '10')))).task.labels == ('01', '02', '10')


def test_words_of_0_and_1_are_numbers(tmp_path):
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('string')})
    rows = [{'image': {'bytes': jpeg((k, 80, 60)), 'path': f'{k}.jpg'}, 'label': str(k % 2)} for k in range(30)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'all.parquet')
    data = load_data(str(tmp_path / 'all.parquet'))
    assert data.task.labels == ('label',)
    assert sum(label_array(split, data.task).sum() for split in data.splits.values()) == 15
    rows = [{'image': row['image'], 'a': row['label'], 'b': str(1 - int(row['label']))} for row in rows]
    features = datasets.Features({'image': datasets.Image(), **dict.fromkeys('ab', datasets.Value('string'))})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'both.parquet')
    assert load_data(str(tmp_path / 'both.parquet'), Wanted(labels=('a', 'b'))).task.kind == 'multiclass'


def test_tables_of_one_data_set_may_write_numbers_in_two_ways(tmp_path):
    isic2018(tmp_path)
    edited(tmp_path / 'ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv', '.0', '')
    ids = {name: list(split['image_id']) for name, split in load_data(str(tmp_path)).splits.items()}
    lines(tmp_path / 's.csv', ('image_id', 'split'), [(i, name) for name, each in ids.items() for i in each])
    data = load_data(str(tmp_path), Wanted(splits=str(tmp_path / 's.csv')))
    assert {name: list(split['image_id']) for name, split in data.splits.items()} == ids


def test_groups_may_be_divided_if_the_user_says_so(tmp_path):
    assert not load_data(with_split(tmp_path, ('train', 'val', 'test')), Wanted(group='none')).groups


@pytest.mark.parametrize('content, message', [
    ('kind: [', 'is not YAML'), ('labels: [a, b]', 'must have the keys kind'), ('- a', 'must have the keys kind'),
    ('kind: multiclass\nlabels: [a, b]\ncolour: red', 'unknown key colour'),
    ('kind: multiclass\nlabels: [a, a]', 'names a label twice'), ('kind: multiclass\nlabels: a', 'labels a list'),
    ('kind: other\nlabels: [a, b]', 'multilabel or multiclass'), ('kind: multiclass\nlabels: [a, b]\naim: f1',
     'aim must'), ('kind: multiclass\nlabels:\n  - a: [A]\n  - b: [B]', 'labels a list, or labels with the words'),
    ('kind: multiclass\nlabels: [a, b]\nexclusive: [x]', 'exclusive must be true or false'),
])
def test_bad_tasks_are_refused(tmp_path, content, message):
    (tmp_path / 't.yaml').write_text(content)
    with pytest.raises(DataError, match=message):
        load_task(str(tmp_path / 't.yaml'))


def test_names_that_occur_in_several_folders(tmp_path):
    for part in ('a', 'b'):
        picture(tmp_path / part / '1.png', 1)
    lines(tmp_path / 'm.csv', ('image', 'label'), [('1.png', 'x'), ('1.png', 'y')])
    with pytest.raises(DataError, match='there are several files 1.png'):
        load_data(str(tmp_path / 'm.csv'))


@pytest.mark.parametrize('kind', ['demo-7', 'demo-groups'])
def test_generated_images(kind):
    split = next(iter(demo_dataset({'train': 20}, 32, kind=kind).values()))
    assert len(split) == 20 and len(set(split['image_id'])) == 20
    labelled = with_labels(split, DEMO_TASKS[kind], 'diagnosis', kind)
    assert np.all(label_array(labelled, DEMO_TASKS[kind]).sum(1) == 1)
    if kind == 'demo-groups':
        assert len(set(split['patient_id'])) < len(set(split['lesion_id'])) < 20
