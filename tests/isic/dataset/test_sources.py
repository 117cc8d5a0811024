"""Folders of image files, as the challenge and the archive's client leave them, whole and damaged."""
import csv
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from timm_arl.isic.dataset import DataError, Wanted, decode, label_array, load_data, load_splits, sources
from timm_arl.isic.dataset.sources import read_table

WORDS = {'train': 'Training', 'validation': 'Validation', 'test': 'Test_v2'}
DIAGNOSES = ('nevus', 'melanoma', 'seborrheic keratosis')


def picture(seed, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def write_csv(path, rows, encoding='utf-8', newline='\n'):
    with open(path, 'w', encoding=encoding, newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)


def challenge(folder, count=4, **csv_options):
    """Three splits, one diagnosis after the other, masks and metadata for train."""
    for number, word in enumerate(WORDS.values()):
        images = folder / f'ISIC-2017_{word}_Data'
        images.mkdir(parents=True)
        ids = [f'ISIC_{number}{i:06d}' for i in range(count)]
        for i, image_id in enumerate(ids):
            picture(i).save(images / f'{image_id}.jpg')
            Image.new('L', (60, 40)).save(images / f'{image_id}_superpixels.png')
        write_csv(folder / f'ISIC-2017_{word}_Part3_GroundTruth.csv', [
            {'image_id': image_id, 'melanoma': float(i % 3 == 1), 'seborrheic_keratosis': float(i % 3 == 2)}
            for i, image_id in enumerate(ids)], **csv_options)
        if word == 'Training':
            write_csv(images / 'ISIC-2017_Training_Data_metadata.csv', [
                {'image_id': image_id, 'age_approximate': 'unknown' if i else '55', 'sex': 'female' if i else 'unknown'}
                for i, image_id in enumerate(ids)])
            masks = folder / 'ISIC-2017_Training_Part1_GroundTruth'
            masks.mkdir()
            mask = Image.new('L', (60, 40))
            mask.paste(255, (10, 10, 30, 25))
            mask.save(masks / f'{ids[0]}_segmentation.png')
    return folder


@pytest.mark.parametrize('csv_options', [{}, dict(encoding='utf-8-sig', newline='\r\n')])
def test_challenge_folders(tmp_path, csv_options):
    splits = load_splits(str(challenge(tmp_path / 'isic', **csv_options)))
    assert {name: list(split['image_id']) for name, split in splits.items()} == {
        name: [f'ISIC_{n}{i:06d}' for i in range(4)] for n, name in enumerate(WORDS)}
    assert label_array(splits['test']).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    train = splits['train']
    assert decode(train[0]['image']).size == (60, 40)
    assert (train[0]['age_approximate'], train[0]['sex'], train[1]['age_approximate'], train[1]['sex']) == (
        55, None, None, 'female')
    assert decode(train.cast_column('mask', train.features['image'])[0]['mask']).getpixel((15, 15)) == (255, 255, 255)
    assert train[1]['mask'] is None and splits['test'][0]['mask'] is None


def archive(folder, diagnosis='diagnosis_3'):
    for number, name in enumerate(WORDS):
        (folder / name).mkdir(parents=True)
        ids = [f'ISIC_{number}{i:06d}' for i in range(4)]
        for i, image_id in enumerate(ids):
            picture(i).save(folder / name / f'{image_id}.JPG', 'JPEG')
        write_csv(folder / name / 'metadata.csv', [
            {'isic_id': image_id, 'attribution': 'Anonymous', 'age_approx': '45', 'sex': 'male',
             'diagnosis_1': 'Benign', diagnosis: ('Nevus', 'Melanoma, NOS', 'Seborrheic keratosis')[i % 3]}
            for i, image_id in enumerate(ids)])
        (folder / name / 'licenses').mkdir()
    return folder


def test_one_download_is_not_three_splits(tmp_path):
    folder = archive(tmp_path / 'isic')
    with pytest.raises(DataError, match='is one download of the archive, not three splits: put each'):
        load_splits(str(folder / 'train'))


def test_what_the_archives_client_writes(tmp_path):
    splits = load_splits(str(archive(tmp_path / 'isic')))
    assert label_array(splits['train']).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert splits['train'][0]['age_approximate'] == 45 and splits['train'][0]['sex'] == 'male'


def archive_with_lesions(folder, lesion):
    """As the archive's client writes them today; lesion tells that of each image of a split."""
    archive(folder)
    for name in WORDS:
        path = folder / name / 'metadata.csv'
        head, *rows = path.read_text().splitlines()
        path.write_text('\n'.join([f'{head},lesion_id,anatom_site_general,clin_size,personal_hx_mm', *(
            f'{row},{lesion(name, k)},{("head/neck", "unknown")[k % 2]},{3 if name == "train" else 2.5},True'
            for k, row in enumerate(rows))]) + '\n')
    return str(folder)


def test_what_else_the_archive_tells_is_kept(tmp_path):
    data = load_data(archive_with_lesions(tmp_path / 'isic', lambda name, k: f'IL_{name}{k // 2}'))
    assert data.groups == 'lesion_id' and data.group_ids('test') == ['IL_test0', 'IL_test0', 'IL_test1', 'IL_test1']
    for name, size in (('train', 3.), ('test', 2.5)):
        row = data.splits[name][0]
        assert row['site'] == 'head/neck' and row['clin_size'] == size and row['personal_hx_mm'] == 1
        assert data.splits[name][1]['site'] is None and 'attribution' not in row and 'isic_id' not in row
    assert data.splits['train'].features == data.splits['test'].features


def test_the_official_splits_may_part_lesions(tmp_path, monkeypatch):
    folder = archive_with_lesions(tmp_path / 'isic', lambda name, k: f'IL_{k}')
    with pytest.raises(DataError, match='4 of the groups in column lesion_id are in several splits'):
        load_data(folder)
    for name, split in load_splits(folder).items():  # the official ones, of these few images
        monkeypatch.setitem(sources.CHALLENGE_IDS, name, sources.ids_digest(split['image_id']))
    data = load_data(folder)
    assert data.groups == '' and data.summary('isic') == (
        'Task isic2017: melanoma, seborrheic_keratosis (sigmoid). The official splits of ISIC 2017 are used as they '
        'are, though 4 of the groups in column lesion_id are in several of them: images are divided and scored one by '
        'one.')
    with pytest.raises(DataError, match='4 of the groups in column lesion_id are in several splits'):
        load_data(folder, Wanted(group='lesion_id'))
    assert load_data(folder, needed=('test',), alone=True).groups == 'lesion_id'
    # folds are made of train alone, where each lesion can be in one of them
    assert load_data(folder, needed=('train',), whole='train').groups == 'lesion_id'
    assert load_data(folder, Wanted(group='lesion_id'), needed=('train',), whole='train').groups == 'lesion_id'
    # splits of the user's own are not the official ones
    (tmp_path / 's.csv').write_text('image_id,split\n' + ''.join(
        f'{image_id},{name}\n' for name, split in load_splits(folder).items() for image_id in split['image_id']))
    with pytest.raises(DataError, match='4 of the groups in column lesion_id are in several splits'):
        load_data(folder, Wanted(splits=str(tmp_path / 's.csv')))


def test_the_challenges_labels_count_before_a_diagnosis(tmp_path):
    folder = archive(tmp_path / 'isic')
    write_csv(folder / 'ISIC-2017_Training_Part3_GroundTruth.csv', [
        {'image_id': f'ISIC_0{i:06d}', 'melanoma': 1.0, 'seborrheic_keratosis': 0.0} for i in range(4)])
    assert label_array(load_splits(str(folder))['train'])[:, 0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize('place', ['{}.jpg', 'images/{}.jpg', 'of {}/photo.jpg'])
@pytest.mark.parametrize('table', ['metadata.csv', 'metadata.jsonl'])
def test_an_image_folder_of_the_datasets_library(tmp_path, table, place):
    """Whose metadata.csv is not that of the archive's client: its rows name files, whose folders are no classes."""
    for number, name in enumerate(WORDS):
        content = []
        for i in range(4):
            file = tmp_path / name / place.format(i)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(file)
            content.append({'file_name': place.format(i), 'image_id': f'I{number}{i}', 'melanoma': int(i == 1),
                            'seborrheic_keratosis': int(i == 2)})
        if table.endswith('csv'):
            write_csv(tmp_path / name / table, content)
        else:
            (tmp_path / name / table).write_text('\n'.join(map(json.dumps, content)))
    splits = load_splits(str(tmp_path))
    assert {name: list(split['image_id']) for name, split in splits.items()} == {
        name: [f'I{n}{i}' for i in range(4)] for n, name in enumerate(WORDS)}
    assert label_array(splits['train']).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert decode(splits['test'][0]['image']).size == (60, 40)
    alone = tmp_path / 'train' / place.format('alone')
    alone.parent.mkdir(exist_ok=True)
    picture(0).save(alone)
    with pytest.raises(DataError, match=rf'no row of metadata for {place.format("alone")} \(1 such images\)'):
        load_splits(str(tmp_path))


def truth(folder, word='Training'):
    return folder / f'ISIC-2017_{word}_Part3_GroundTruth.csv'


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize('damage, message', [
    (lambda f: truth(f).unlink(), r'There is no .*Training_Part3_GroundTruth.csv: download it'),
    (lambda f: edit(truth(f), lambda t: t.replace('ISIC_0000002,', 'ISIC_0000009,')),
     'there is no image for ISIC_0000009 .1 such of 4 rows and 4 images'),
    (lambda f: picture(0).save((f / 'ISIC-2017_Training_Data' / 'ISIC_0000001.jpg').rename(
        f / 'ISIC-2017_Training_Data' / 'ISIC_0000001.gif')),
     'ISIC_0000001.gif is in a format that is not read .1 such files.: convert it to JPEG or PNG; .*tiff, .webp'),
    (lambda f: edit(truth(f), lambda t: t.rsplit('ISIC', 1)[0]), 'there is no row of labels for ISIC_0000003'),
    (lambda f: (f / 'ISIC-2017_Validation_Data' / 'ISIC_1000001.jpg').unlink(), 'there is no image for ISIC_1000001'),
    (lambda f: edit(truth(f), lambda t: t + 'ISIC_0000001,0.0,0.0\n'), 'line 6: ISIC_0000001 occurs twice'),
    (lambda f: edit(truth(f), lambda t: t.replace('ISIC_0000001', '../ISIC_0000001')),
     "line 3: '../ISIC_0000001' is no usable"),
    (lambda f: edit(truth(f), lambda t: t.replace('ISIC_0000001', r'C:\x')), 'is no usable image_id'),
    (lambda f: edit(truth(f), lambda t: t.replace('melanoma', 'Melanom')),
     'has no column melanoma .it has image_id, Melanom'),
    (lambda f: edit(truth(f), lambda t: t.replace('1.0', 'yes')), 'labels of ISIC_0000001 are not numbers'),
    (lambda f: truth(f).write_bytes(b'\xff\xfe\x00image_id'), 'is not a text in UTF-8'),
    (lambda f: picture(0).save(f / 'ISIC-2017_Training_Data' / 'ISIC_0000001.png'), 'two files for ISIC_0000001'),
    (lambda f: (f / 'ISIC-2017_Test_v2_Data').rename(f / 'x'), 'has no split test'),
])
def test_damage_is_named(tmp_path, damage, message):
    folder = challenge(tmp_path / 'isic')
    damage(folder)
    with pytest.raises(DataError, match=message) as raised:
        load_splits(str(folder))
    assert '\n' not in str(raised.value)


def test_an_unknown_diagnosis_is_refused(tmp_path):
    folder = archive(tmp_path / 'isic')
    edit(folder / 'test' / 'metadata.csv', lambda t: t.replace('Seborrheic keratosis', 'Lentigo NOS'))
    with pytest.raises(DataError, match="diagnosis of ISIC_2000002 is 'benign lentigo nos', not one of"):
        load_splits(str(folder))


def test_short_rows_do_not_shift(tmp_path):
    (tmp_path / 't.csv').write_text('image_id , melanoma\n a , 1\nb\n')
    assert read_table(tmp_path / 't.csv', ('image_id',)) == {'a': {'image_id': 'a', 'melanoma': '1'},
                                                             'b': {'image_id': 'b', 'melanoma': ''}}


@pytest.mark.parametrize('delimiter', ';\t')
def test_tables_as_excel_writes_them_elsewhere(tmp_path, delimiter):
    folder = challenge(tmp_path / 'isic')
    for path in folder.rglob('*.csv'):
        edit(path, lambda text: text.replace(',', delimiter))
    splits = load_splits(str(folder))
    assert label_array(splits['test']).tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert splits['train'][0]['age_approximate'] == 55


def encoded(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return {'bytes': file.getvalue(), 'path': None}


def tiff_of_12_bits(values):
    """One row of grey values, two in three bytes, as cameras of 12 bits store them."""
    pixels = b''.join((a << 12 | b).to_bytes(3, 'big') for a, b in zip(values[::2], values[1::2]))
    start = 8 + 2 + 9 * 12 + 4  # of the pixels, behind the header and nine tags
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: start, 277: 1, 278: 1, 279: len(pixels)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack('<2sHIH', b'II', 42, 8, len(tags)) + entries + bytes(4) + pixels


@pytest.mark.filterwarnings('ignore:Metadata Warning')
def test_every_kind_of_picture_comes_out_as_it_looks():
    image = picture(1)
    assert np.array_equal(decode(encoded(image, 'PNG')), image)
    grey16 = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
    shown = np.asarray(decode(encoded(grey16, 'PNG')))[..., 0]
    assert np.abs(shown - np.asarray(grey16) / 257).max() <= 0.5  # not cut off at 255
    assert np.asarray(decode({'bytes': tiff_of_12_bits([0, 4095, 2048, 1024]), 'path': None}))[0, :, 0].tolist() == [
        0, 255, 128, 64]
    negative = encoded(grey16, 'TIFF', tiffinfo={262: 0})  # 0 is white
    assert np.abs(255 - np.asarray(decode(negative))[..., 0] - np.asarray(grey16) / 257).max() <= 0.5
    for fmt in ('PNG', 'WEBP'):  # a damaged block of metadata
        assert decode(encoded(image, fmt, exif=b'Exif\0\0II*\0')).size == image.size
    png = bytearray(encoded(image, 'PNG')['bytes'])
    for k in range(100, len(png) - 40, 7):
        png[k] ^= 255
    with pytest.raises(OSError):  # and not half of the picture
        decode({'bytes': bytes(png), 'path': None})
    damaged = encoded(image, 'TIFF', tiffinfo={305: 'x'})
    for k in range(8, len(damaged['bytes'])):  # Pillow raises TypeError and others for some of them
        try:
            decode({'bytes': damaged['bytes'][:k] + bytes([damaged['bytes'][k] ^ 12]) + damaged['bytes'][k + 1:],
                    'path': None})
        except OSError:
            pass
    for values in ([[0, 70000]], [[-5, 300]]):  # would wrap around
        with pytest.raises(OSError, match='grey values beyond 16 bits'):
            decode(encoded(Image.fromarray(np.array(values, np.int32)), 'TIFF'))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    assert decode(encoded(image, 'JPEG', exif=exif)).size == (40, 60)
    rgba = image.convert('RGBA')
    rgba.putalpha(100)
    assert np.array_equal(decode(encoded(rgba, 'PNG')), image)
    for mode, fmt in (('CMYK', 'JPEG'), ('P', 'PNG'), ('L', 'PNG'), ('1', 'PNG')):
        assert decode(encoded(image.convert(mode), fmt)).mode == 'RGB'


def test_a_photograph_is_turned_whatever_else_its_metadata_hold():
    """Cameras write some entries in another type than the standard says; Pillow cannot write those again."""
    jpeg = encoded(picture(1), 'JPEG')['bytes']
    entries = struct.pack('<HHII', 274, 3, 1, 6) + struct.pack('<HHI4s', 282, 2, 3, b'72\0\0')  # a resolution in words
    exif = b'Exif\0\0' + struct.pack('<2sHIH', b'II', 42, 8, 2) + entries + bytes(4)
    segment = struct.pack('>2sH', b'\xff\xe1', len(exif) + 2) + exif
    turned = decode({'bytes': jpeg[:2] + segment + jpeg[2:], 'path': None})
    upright = decode({'bytes': jpeg, 'path': None}).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(turned, upright)


@pytest.mark.parametrize('value', range(1, 9))
def test_every_orientation_is_shown_as_other_programs_show_it(value):
    exif = Image.Exif()
    exif[0x0112] = value
    cell = encoded(picture(1), 'PNG', exif=exif)
    assert np.array_equal(decode(cell), ImageOps.exif_transpose(Image.open(io.BytesIO(cell['bytes']))))


@pytest.mark.slow
def test_a_hundred_megapixels_and_far_too_many(recwarn):
    large = encoded(Image.new('L', (11000, 9100), 90), 'PNG')
    assert decode(large).size == (11000, 9100) and not recwarn
    with pytest.raises(OSError, match='it has 200 megapixels, above the limit of 179'):
        decode(encoded(Image.new('1', (20000, 10000)), 'PNG'))
