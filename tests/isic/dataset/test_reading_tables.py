"""Tables as Excel and other machines write them: read, or refused with the cause and a remedy."""
import datasets
import pytest
from any_data import lines, picture, table

from timm_arl.isic.dataset import DataError, Wanted, load_data
from timm_arl.isic.dataset.names import column_named, looks_like_groups, with_known_names
from timm_arl.isic.dataset.tables import typed


def ids_of(path):
    return sorted(str(i) for split in load_data(str(path)).splits.values() for i in split['image_id'])


def test_empty_rows_and_columns_of_a_spreadsheet(tmp_path):
    path = table(tmp_path, 20)
    head, *rows = path.read_text().splitlines()
    path.write_text('\n'.join([head + ',,', *(f'{row},,' for row in rows[:3]), ',,,', '', *rows[3:], ',,,']) + '\n')
    assert len(ids_of(path)) == 20
    path.write_text(path.read_text().replace('images/3.png', 'images/x.png/../../../3.png'))
    with pytest.raises(DataError, match='line 7: .* leaves the folder'):  # as the file has it
        load_data(str(path))


@pytest.mark.parametrize('written', ['images/{}.jpg', 'images/{}.Jpg', 'images/{}', 'images\\{}.jpg', '{}.jpg', '{}'])
def test_endings_in_other_case_or_missing(tmp_path, written):
    for k in range(20):
        picture(tmp_path / 'images' / f'{k}.JPG', k)
    rows = [(written.format(k), 'ab'[k % 2]) for k in range(20)]
    assert ids_of(lines(tmp_path / 'm.csv', ('image', 'label'), rows)) == sorted(map(str, range(20)))


@pytest.mark.parametrize('name, content, message', [
    ('m.csv', 'image,label\na.png,nävus\n'.encode('cp1252'), 'm.csv is not a text in UTF-8 .*: save it as CSV UTF-8'),
    ('m.csv', 'image,label\na.png,nevus\n'.encode('utf-16'), 'm.csv is not a text in UTF-8 .*: save it as CSV UTF-8'),
    ('m.csv', 'image,label\na.png,b\n'.encode('utf-16-le'), 'm.csv is not a text in UTF-8 .*: save it as CSV UTF-8'),
    ('m.csv', b'PK\x03\x04 and more', 'm.csv is a workbook .*: save it as CSV UTF-8'),
    ('m.xlsx', b'PK\x03\x04 and more', 'm.xlsx is a workbook .*: save it as CSV UTF-8'),
    ('m.csv', b'image,label\nC:\\Users\\me\\a.png,b\n', 'is a path of a Windows machine: .* relative to its folder'),
])
def test_what_is_no_csv_of_this_machine(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / name))


def test_folders_of_images_without_labels(tmp_path):
    for k in range(3):
        picture(tmp_path / 'one' / f'{k}.jpg', k)
    with pytest.raises(DataError, match='one has 3 images, and nothing that tells their labels: pass a CSV'):
        load_data(str(tmp_path / 'one'))
    path = table(tmp_path / 'two', 4, name='photos.csv')
    with pytest.raises(DataError, match=f'has a table: pass --data {path}'):
        load_data(str(tmp_path / 'two'))


def test_columns_are_found_in_other_spelling(tmp_path):
    path = table(tmp_path, 20, head=('File', 'Histology', 'Case No'), more=lambda k: (f'p{k // 2 * 2 + k % 2}',))
    data = load_data(str(path), Wanted(columns=(('diagnosis', 'histology'), ('patient', 'case_no'))))
    assert data.task.labels == ('melanoma', 'nevus') and data.groups == 'patient_id'
    with pytest.raises(DataError, match='--columns lable=Histology: lable is not one of image, image_id, diagnosis, '):
        load_data(str(path), Wanted(columns=(('lable', 'Histology'),)))
    with pytest.raises(DataError, match='no column that tells the diagnosis .it has File, Histology, Case No.'):
        load_data(str(path))
    with pytest.raises(DataError, match='has no column patient .it has File, Histology, Case No.'):
        load_data(str(path), Wanted(columns=(('diagnosis', 'Histology'),), group='patient'))
    path.write_text(path.read_text().replace('images/4.png,melanoma', 'images/4.png,'))
    with pytest.raises(DataError, match='Histology is missing for image 4'):
        load_data(str(path), Wanted(columns=(('diagnosis', 'Histology'),)))


def test_heads_with_spaces(tmp_path):
    path = table(tmp_path, 20, head=('Image Path', 'Label', 'Image ID'), more=lambda k: (f'i{k}',))
    data = load_data(str(path))
    assert ids_of(path) == sorted(f'i{k}' for k in range(20)) and data.task.labels == ('melanoma', 'nevus')
    assert set(data.splits['train'].column_names) == {'image', 'image_id', 'Label', 'melanoma', 'nevus'}


def test_names_of_columns():
    columns = ['age_approximate', 'site', 'Skin Type', 'patient_id', 'sex', 'SEX']
    assert [column_named(columns, name) for name in ('age', 'localization', 'skin_type', 'Patient', 'sex', 'Sex')] == [
        'age_approximate', 'site', 'Skin Type', 'patient_id', 'sex', '']
    assert with_known_names(Wanted(columns=(('age', 'years'), ('MEL', 'm'), ('dx', 'd')))).columns == (
        ('age_approximate', 'years'), ('MEL', 'm'), ('dx', 'd'))
    assert all(map(looks_like_groups, ('patient', 'ID_case', 'studySubject', 'Lesion No.', 'PATIENT')))
    assert not any(map(looks_like_groups, ('patient_age', 'lesionSize', 'lowercase', 'image', 'lesion_type')))


@pytest.mark.parametrize('parquet', [False, True])
def test_a_named_column_counts_before_one_that_is_spelled_alike(tmp_path, parquet):
    path = table(tmp_path, 20, head=('image', 'label', 'Split', 'fold', 'Patient ID', 'case'), more=lambda k: (
        'train', ('train', 'val', 'test')[k // 2 % 3], 'one', f'p{k}'))
    if parquet:
        head, *rows = (line.split(',') for line in path.read_text().splitlines())
        content = dict(zip(head, zip(*rows)), image=[str(tmp_path / row[0]) for row in rows])
        path = tmp_path / 'all.parquet'
        datasets.Dataset.from_dict(content).cast_column('image', datasets.Image()).to_parquet(path)
    data = load_data(str(path), Wanted(columns=(('split', 'fold'), ('patient_id', 'case'))))
    assert {name: len(split) for name, split in data.splits.items()} == {'train': 8, 'validation': 6, 'test': 6}
    assert data.groups == 'patient_id' and len({group for split in data.splits.values() for group in split[
        'patient_id']}) == 20


def test_masks_lie_beside_the_table_as_images_do(tmp_path, monkeypatch):
    for k in range(20):
        picture(tmp_path / 'd' / 'masks' / f'{k}.png', k)
    path = table(tmp_path / 'd', 20, head=('image', 'label', 'Mask'), more=lambda k: (f'masks/{k}.png' if k else '',))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    cells = {row['image_id']: row['mask'] for split in load_data(str(path)).splits.values() for row in split}
    assert cells.pop('0') is None
    assert {image_id: cell['path'] for image_id, cell in cells.items()} == {
        str(k): str(tmp_path / 'd' / 'masks' / f'{k}.png') for k in range(1, 20)}
    path.write_text(path.read_text().replace('masks/8.png', 'masks/9.png'))  # one mask of two pictures
    (tmp_path / 'd' / 'masks' / '7.png').unlink()  # which matters only where masks are used
    assert sum(len(split) for split in load_data(str(path)).splits.values()) == 20


def test_a_column_of_only_one_truth_value():
    assert typed(['False', 'false', '']) == [0, 0, None] and typed(['TRUE', 'True']) == [1, 1]


def test_words_that_python_takes_for_numbers():
    assert typed(['1_23', '12_3', '123']) == ['1_23', '12_3', '123']  # int() takes all of them for 123
    for name in 'PatientID', 'patient', 'lesion_id', 'ID_case':
        assert typed(['007', '7'], name) == ['007', '7']
    assert typed(['007', '7'], 'width') == [7, 7]


@pytest.mark.parametrize('number', [str(2 ** 63), '1' * 22, '9' * 400])
def test_numbers_that_are_too_long_for_a_table_stay_words(number):
    assert typed([number, '7'], 'barcode') == [number, '7']
    assert typed([str(2 ** 63 - 1), '7'], 'barcode') == [2 ** 63 - 1, 7]


def test_names_with_dots_and_an_empty_first_row(tmp_path):
    for k in range(20):
        picture(tmp_path / f'lesion.{k}.png', k)
    (tmp_path / 't.csv').write_text('\n;\n' + '\n'.join(
        ['image;label', *[f'lesion.{k};{("melanoma", "nevus")[k % 2]}' for k in range(20)]]))
    data = load_data(str(tmp_path / 't.csv'))
    assert {image_id for split in data.splits.values() for image_id in split['image_id']} == {
        f'lesion.{k}' for k in range(20)}
