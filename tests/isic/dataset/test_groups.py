"""Images of one patient or lesion stay together, however it is written."""
import datasets
import pytest
from any_data import lines, table
from small_data import jpeg

from timm_arl.isic.dataset import DataError, Wanted, load_data
from timm_arl.isic.dataset.__main__ import main as prepare
from timm_arl.isic.task import Task


def groups_of(source, **kwargs):
    """By image_id, its group and its split."""
    data = load_data(str(source), **kwargs)
    return {image_id: (group, name) for name, split in data.splits.items()
            for image_id, group in zip(split['image_id'], data.group_ids(name))}


def given(folder, word):
    """A table with splits, and in its column patient_id what word says of each row."""
    return table(folder, 42, head=('image', 'label', 'split', 'patient_id'),
                 more=lambda k: (('train', 'val', 'test')[k // 2 % 3], word(k)))


@pytest.mark.parametrize('words', [('12', '12.0'), ('P1', 'p1'), ('a  b', 'a b'), ('7.00', '7')])
def test_two_spellings_are_one_patient(tmp_path, words):
    with pytest.raises(DataError, match='1 of the groups in column patient_id are in several splits'):
        load_data(str(given(tmp_path, lambda k: words[k // 2] if k in (0, 2) else f'q{k}')))


def test_numbers_of_one_split_are_the_words_of_another(tmp_path):
    (tmp_path / 'data').mkdir()
    for name, kind in (('train', float), ('validation', str), ('test', int)):
        datasets.Dataset.from_list([
            {'image': {'bytes': jpeg((k, 80, 60)), 'path': None}, 'image_id': f'{name}{k}', 'label': 'ab'[k % 2],
             'patient_id': kind(k + 5 * (name == 'test'))} for k in range(4)],
            features=datasets.Features({
                'image': datasets.Image(), 'image_id': datasets.Value('string'), 'label': datasets.Value('string'),
                'patient_id': datasets.Value({float: 'float64', str: 'string', int: 'int64'}[kind])})).to_parquet(
            tmp_path / 'data' / f'{name}-00000-of-00001.parquet')
    for streaming in (False, True):
        with pytest.raises(DataError, match=r'4 of the groups .*: 0 .train and validation.*3 .train and val'):
            load_data(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize('word', ['unknown', 'None', 'nan', '?', ''])
def test_patients_that_are_not_known_are_not_one_patient(tmp_path, word):
    found = groups_of(given(tmp_path, lambda k: 'p1' if k == 0 else word))
    assert len({group for group, _ in found.values()}) == 42
    # nothing is known at all: there are no groups, and nothing is said of any
    assert load_data(str(given(tmp_path / 'none', lambda k: word))).groups == ''


def test_an_image_is_no_patient_of_the_same_number(tmp_path):
    found = groups_of(given(tmp_path, lambda k: '' if k % 2 else (k + 2) % 42))
    assert len({group for group, _ in found.values()}) == 42 and found['4'][0] == '6'


def test_without_a_patient_the_lesion_counts(tmp_path):
    source = table(tmp_path, 48, head=('image', 'label', 'patient_id', 'lesion_id'),
                   more=lambda k: ('' if k % 6 else ('', f'p{k // 12}')[k // 6 % 2], f'L{k // 6}'))
    for seed in range(5):
        found = groups_of(source, seed=seed)
        for lesion in range(8):  # all of its images have one group, that of its patient where one image tells
            group, = {found[str(k)] for k in range(6 * lesion, 6 * lesion + 6)}
            assert group[0] == (f'p{lesion // 2}' if lesion % 2 else f'L{lesion}')
    # a column of patients without any entry
    source = table(tmp_path / 'empty', 48, head=('image', 'label', 'patient_id', 'lesion_id'),
                   more=lambda k: ('', f'L{k // 6}'))
    assert load_data(str(source)).groups == 'lesion_id'


@pytest.mark.parametrize('delimiter', ';\t')
def test_a_file_of_splits_as_excel_writes_it_elsewhere(tmp_path, delimiter):
    lines(tmp_path / 'splits.csv', ('image_id', 'split'), [
        (k, ('train', 'val', 'test')[k // 2 % 3]) for k in range(18)], delimiter)
    found = load_data(str(table(tmp_path, 18)), Wanted(splits=str(tmp_path / 'splits.csv'))).splits
    assert list(found['validation']['image_id']) == ['2', '3', '8', '9', '14', '15']


def test_heads_in_capitals(tmp_path):
    source = table(tmp_path, 42, head=('Image', 'Label', 'Split', 'Patient_ID'),
                   more=lambda k: (('Train', 'VALID', 'test')[k // 2 % 3], f'p{k // 2}'))
    data = load_data(str(source))
    assert data.groups == 'Patient_ID' and not data.made
    assert {name: len(split) for name, split in data.splits.items()} == {'train': 14, 'validation': 14, 'test': 14}


def test_parquet_with_a_column_split(tmp_path):
    rows = [{'image': {'bytes': jpeg((k, 80, 60)), 'path': None}, 'label': 'ab'[k % 2],
             'fold': ('train', 'val', 'test')[k // 2 % 3]} for k in range(24)]
    features = datasets.Features({
        'image': datasets.Image(), 'label': datasets.Value('string'), 'fold': datasets.Value('string')})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'one.parquet')
    data = load_data(str(tmp_path / 'one.parquet'), Wanted(columns=(('split', 'fold'),)))
    assert {name: len(split) for name, split in data.splits.items()} == {'train': 8, 'validation': 8, 'test': 8}
    assert not data.made
    rows[5]['fold'] = 'tset'
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'one.parquet')
    with pytest.raises(DataError, match="the split is 'tset' .1 such rows., which is none of train"):
        load_data(str(tmp_path / 'one.parquet'), Wanted(columns=(('split', 'fold'),)))


def test_a_row_without_a_split_is_named(tmp_path):
    """Also where the column is one of names of classes, in which a missing one is None."""
    rows = [{'image': {'bytes': jpeg((k, 80, 60)), 'path': None}, 'label': 'ab'[k % 2],
             'split': None if k == 5 else ('train', 'val', 'test')[k // 2 % 3]} for k in range(24)]
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('string'),
                                  'split': datasets.ClassLabel(names=['train', 'val', 'test'])})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'one.parquet')
    with pytest.raises(DataError, match='the split is None .1 such rows., which is none of train'):
        load_data(str(tmp_path / 'one.parquet'))


def test_a_run_s_division_of_the_same_data_holds_when_they_change(tmp_path):
    source = table(tmp_path, 30)
    lines(tmp_path / 'splits.csv', ('image_id', 'split'), [
        (k, ('train', 'validation', 'test')[k // 2 % 3]) for k in range(30)])
    head, *rows = source.read_text().splitlines()
    kwargs = dict(needed=('test',), whole='test', earlier=tmp_path / 'splits.csv')
    source.write_text('\n'.join([head, *rows[:20]]) + '\n')
    with pytest.raises(DataError, match='20 of the 20 images .* pass --splits FILE.csv .* or --other-data'):
        load_data(str(source), **kwargs)  # another table, and a file of an older version, without labels
    same = load_data(str(source), same=True, **kwargs)
    assert list(same.splits['test']['image_id']) == ['4', '5', '10', '11', '16', '17']
    table(tmp_path, 31)
    with pytest.raises(DataError, match='splits.csv has no split for 30 .1 such images'):
        load_data(str(source), same=True, **kwargs)


def spelled(folder, head, per=3):
    """A table without splits, and in its last column a patient with several images."""
    return table(folder, 48, head=('image', 'label', head), more=lambda k: (f'p{k // per}',))


@pytest.mark.parametrize('head', ['Patient_ID', 'Patient ID', 'patientid', 'PatientId', 'Lesion ID', 'lesionid'])
def test_columns_of_groups_in_any_spelling(tmp_path, head):
    data = load_data(str(spelled(tmp_path, head)))
    assert data.groups == head
    parts = [set(data.group_ids(name)) for name in data.splits]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    said = data.summary('it')
    assert f'Images of one {head} stay together' in said and 'one by one' not in said


def test_what_is_said_where_no_column_of_groups_is_used(tmp_path):
    source = str(spelled(tmp_path, 'patient'))
    data = load_data(source)
    said = 'No column of patients or lesions: images are divided one by one. The column patient looks like one: '
    assert not data.groups and said + '--group-column patient.' in data.summary(source)
    assert said in load_data(source, needed=('train',), whole='train').summary(source, folds=True)
    # scored as a whole, nothing is divided
    one = load_data(source, needed=('test',), whole='test').summary(source)
    assert 'one by one' not in one and 'patient looks like one' in one
    assert 'one by one' not in load_data(source, Wanted(group='none')).summary(source)
    assert load_data(source, Wanted(group='Patient')).groups == 'patient'
    # one image of each: nothing to keep together
    assert load_data(str(spelled(tmp_path / 'one', 'patient', 1))).missed == ''
    half = given(tmp_path / 'half', lambda k: f'p{k // 2}' if k < 20 else '')
    assert '22 of the 42 images have no patient_id: each is a group by itself.' in load_data(str(half)).summary('it')


def test_the_column_of_a_run_or_of_prepare_is_used_where_it_is_there(tmp_path, capsys):
    source = str(spelled(tmp_path, 'case'))
    assert load_data(source, usual_groups='Case').groups == 'case'
    assert load_data(source, usual_groups='clinic').groups == ''
    assert prepare(['prepare', source, str(tmp_path / 'small'), '--workers', '1', '--group-column', 'case']) == 0
    assert 'Task mine: melanoma, nevus (softmax). Images of one case stay together.' in capsys.readouterr().out
    for streaming in (False, True):
        assert load_data(str(tmp_path / 'small'), streaming=streaming).groups == 'case'


def divided(folder, rows, head=('image_id', 'split', 'label')):
    """The splits.csv of a run, by number of the image."""
    return lines(folder / 'splits.csv', head, [
        (k, ('train', 'validation', 'test')[k // 2 % 3], ('melanoma', 'nevus')[k % 2])[:len(head)] for k in rows])


def test_a_run_knows_its_images_by_names_and_labels(tmp_path):
    source = table(tmp_path, 30, name='renamed.csv')
    kwargs = dict(needed=('test',), whole='test', earlier=divided(tmp_path, range(30)))
    head, *rows = source.read_text().splitlines()
    for count in (30, 29):  # a row was taken out
        source.write_text('\n'.join([head, *rows[:count]]) + '\n')
        data = load_data(str(source), **kwargs)
        assert len(data.splits['test']) == 10 - (count < 30) and 'are those of the run' in data.summary('it')
    table(tmp_path, 31, name='renamed.csv')
    with pytest.raises(DataError, match='splits.csv has no split for 30 .1 such images'):
        load_data(str(source), **kwargs)
    # what an image without a label is called is no difference
    lines(tmp_path / 'several.csv', ('image', 'melanoma'), [(f'images/{k}.png', 1 - k % 2) for k in range(30)])
    text = (tmp_path / 'splits.csv').read_text()
    (tmp_path / 'splits.csv').write_text(text.replace('nevus', 'other'))
    assert len(load_data(str(tmp_path / 'several.csv'), Wanted(labels=('melanoma',)), expected=Task(
        'x', ('melanoma',), rest='other'), **kwargs).splits['test']) == 10
    (tmp_path / 'splits.csv').write_text(text)
    # the same names, other images
    table(tmp_path, 30, ('nevus', 'melanoma'), name='renamed.csv')
    for same in (False, True):
        with pytest.raises(DataError, match='30 of the 30 images .* another label there .0 is melanoma, here nevus.: '
                                            'pass --other-data'):
            load_data(str(source), same=same, **kwargs)
    assert len(load_data(str(source), **dict(kwargs, earlier=None)).splits['test']) == 30
    # none of its names, and none of its test images
    assert len(load_data(str(source), **dict(kwargs, earlier=divided(tmp_path, range(40, 50)))).splits['test']) == 30
    source.write_text('\n'.join([head, *rows[:2]]) + '\n')
    with pytest.raises(DataError, match='has none of the test images of the run'):
        load_data(str(source), **dict(kwargs, earlier=divided(tmp_path, range(30))))
