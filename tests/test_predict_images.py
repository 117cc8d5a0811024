"""Strangers' files: odd images, odd names, and what the program remarks on."""
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from dicom_files import dataset, save
from PIL import Image
from predict_program import rows, values

from timm_arl.isic.synthetic import draw_lesion
from timm_arl.pictures import Pictures
from timm_arl.predict import main
from timm_arl.predictor import Cutter, read_picture


def odd_files(folder):
    """Name -> picture, and what its row says: None for probabilities, else words of the error."""
    rng = np.random.default_rng(1)
    lesion = draw_lesion('melanoma', rng)
    turned = Image.Exif()
    turned[0x0112] = 6
    lesion.convert('CMYK').save(folder / 'cmyk.jpg')
    lesion.convert('P').save(folder / 'palette.png')
    lesion.convert('RGBA').save(folder / 'alpha.webp')
    Image.fromarray(np.asarray(lesion.convert('L')).astype(np.uint16) * 257).save(folder / 'grey16.png')
    Image.fromarray(np.asarray(lesion.convert('L')).astype(np.float32)).save(folder / 'float.tiff')
    lesion.resize((200, 160)).save(folder / 'turned.jpg', exif=turned)
    lesion.resize((200, 160)).save(folder / 'upright.jpg')
    buffer = io.BytesIO()
    lesion.save(buffer, 'JPEG')
    (folder / 'truncated.jpg').write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    (folder / 'empty.jpg').touch()
    (folder / 'text.jpg').write_text('a list of things\n' * 100)
    (folder / 'noise.png').write_bytes(b'\x89PNG\r\n\x1a\n' + rng.bytes(5000))
    Image.new('RGB', (1, 1)).save(folder / 'dot.png')
    Image.new('RGB', (20_000, 20)).save(folder / 'thread.png')
    (folder / 'folder.jpg').mkdir()
    os.mkfifo(folder / 'pipe.jpg')
    os.symlink('nowhere.jpg', folder / 'gone.jpg')
    save(dataset(np.asarray(lesion), 'RGB'), folder / 'scan.dcm')
    save(dataset(np.asarray(lesion.convert('L')), 'MONOCHROME1'), folder / 'IM1')
    save(dataset(np.zeros((60, 20, 3), np.uint8), 'RGB', Rows=20, NumberOfFrames=3), folder / 'film.dcm')
    return {
        'cmyk.jpg': None, 'palette.png': None, 'alpha.webp': None, 'grey16.png': None, 'turned.jpg': None,
        'upright.jpg': None, 'scan.dcm': None, 'IM1': None, 'float.tiff': 'floating-point',
        'truncated.jpg': 'truncated', 'empty.jpg': 'it is empty', 'text.jpg': 'format', 'noise.png': '',
        'dot.png': '1 x 1 px', 'thread.png': '20000 x 20',
        'pipe.jpg': 'no file', 'gone.jpg': 'No such file', 'film.dcm': '3 frames'}


def test_odd_images(predict, tmp_path):
    (tmp_path / 'odd').mkdir()
    expected = odd_files(tmp_path / 'odd')
    done = predict('odd', workers=1)
    assert done.returncode == 1 and f'{sum(e is not None for e in expected.values())} of 18 images' in done.stderr
    found = {row['image'][4:]: row for row in rows(tmp_path / 'out')}
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        row = found[name]
        if words is None:
            assert row['error'] == '' and 0 <= float(row['melanoma']) <= 1, row
        else:
            assert row['error'] and words in row['error'] and str(tmp_path) not in row['error'], row
            assert not any(row[column] for column in list(row)[1:-1])
    turned, upright = (read_picture(tmp_path / 'odd' / name) for name in ('turned.jpg', 'upright.jpg'))
    assert turned.size == upright.size[::-1] == (160, 200)


def test_odd_names(predict, photographs, tiny, tmp_path):
    names = ['a,b.jpg', 'a\nb.jpg', 'c\rd.jpg', '\x1b[2J.jpg', '"q".jpg', 'æ 皮膚.jpg', os.fsdecode(b'\xff.jpg')]
    (tmp_path / 'p').mkdir()
    for name in names:
        shutil.copy(photographs / 'lesion3.jpg', tmp_path / 'p' / name)
    done = predict('p', '--model', tiny, '--overlays')
    assert done.returncode == 0, done.stderr
    assert {row['image'] for row in rows(tmp_path / 'out')} == {
        f'p/{name}'.encode(errors='backslashreplace').decode() for name in names}
    assert len(os.listdir(tmp_path / 'out' / 'overlays')) == len(names)
    assert r'p/\x1b[2J.jpg: melanoma' in done.stdout and r'p/c\rd.jpg: melanoma' in done.stdout
    assert not set('\x1b\r') & set(done.stdout + done.stderr)
    done = predict('p', '--model', tiny, '--overlays', '--resume')
    assert done.returncode == 0 and f'{len(names)} of {len(names)} images were done before' in done.stdout
    done = predict('\x1b[2J.jpg')
    assert done.returncode == 2 and '\x1b' not in done.stderr


def test_names_that_the_terminal_has_no_letters_for(photographs, tmp_path, monkeypatch):
    shutil.copy(photographs / 'lesion3.jpg', tmp_path / '皮膚.jpg')
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='cp1252'))
    assert main([str(tmp_path / '皮膚.jpg'), '--output-dir', str(tmp_path / 'out'), '--workers', '0']) == 0
    sys.stdout.flush()
    assert rb'/\u76ae\u819a.jpg: melanoma ' in sys.stdout.buffer.getvalue()


@pytest.mark.filterwarnings('ignore:Invalid value for VR')  # as in a damaged file
def test_what_a_damaged_file_says_is_one_clean_line(predict, tmp_path):
    save(dataset(np.zeros((20, 20, 3), np.uint8), 'RGB\x1b[2J'), tmp_path / 'a.dcm')
    done = predict('a.dcm')
    assert done.returncode == 1 and rows(tmp_path / 'out')[0]['error'].isprintable()
    assert 'RGB [2J' in rows(tmp_path / 'out')[0]['error']


def test_remarks_are_made_once(predict, tiny, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(2):
        draw_lesion('nevus', rng).convert('L').save(tmp_path / f'grey{k}.png')
        draw_lesion('nevus', rng).resize((70, 60)).save(tmp_path / f'small{k}.png')
        Image.new('RGB', (300, 300), (250, 240, 235)).save(tmp_path / f'white{k}.png')
        draw_lesion('nevus', rng).save(tmp_path / f'pages{k}.png', save_all=True, append_images=[
            draw_lesion('nevus', rng)])
    done = predict('.', '--model', tiny)
    assert done.returncode == 0
    first, *lines = done.stderr.splitlines()
    assert 'How ' in first and 'was evaluated is not known (no run.json or results.json)' in first
    assert len(lines) == 4 and all('note: ' in line and '0.png' in line for line in lines), lines
    assert json.loads((tmp_path / 'out' / 'predictions.json').read_text())['remarks'] == [first.removeprefix('note: ')]
    assert './pages0.png holds several pictures (frames or pages), of which the first is used' in done.stderr
    assert 'no colours' in done.stderr and '64 x 64 px' in done.stderr and 'nearly one colour' in done.stderr


def test_squashed_copies_are_stretched_back(predict, tmp_path):
    """A square copy gets other probabilities than its original, a note says so, and --restore-aspect helps."""
    original = draw_lesion('melanoma', np.random.default_rng(1), 300).resize((450, 300))
    for name, picture in (('original', original), ('copy', original.resize((300, 300)))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / 'a.png')
    found = {}
    for name, flags in (('original', ()), ('copy', ()), ('copy', ('--restore-aspect', '3/2'))):
        done = predict(tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        assert ('exactly square' in done.stderr) == (name == 'copy' and not flags)
        found[name, flags] = values(rows(tmp_path / 'out'))
        shutil.rmtree(tmp_path / 'out')
    expected, squashed, restored = found.values()
    assert np.abs(restored - expected).max() < 0.5 * np.abs(squashed - expected).max()
    for ratio in '9', '3/0', '0/0':
        done = predict(tmp_path / 'copy', '--restore-aspect', ratio)
        assert done.returncode == 2 and 'between 0.2 and 5' in done.stderr
    done = predict(tmp_path / 'copy', '--restore-aspect', '3:2')
    assert done.returncode == 2 and 'must be width / height, such as 1.5 or 3/2, not 3:2' in done.stderr


def test_a_copy_of_a_tall_picture_keeps_the_pixels_that_the_network_needs(tmp_path):
    """It is made narrower, so its JPEG must not be decoded as small as others are."""
    cutter = Cutter(64, 'center')
    draw_lesion('melanoma', np.random.default_rng(1), 800).save(tmp_path / 'a.jpg')
    seen = Pictures(cutter, str(tmp_path), True, 0.5)['a.jpg', 'a']
    assert seen.picture.height == 2 * seen.picture.width and cutter.shorter_side <= seen.picture.width < 400
