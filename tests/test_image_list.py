"""Which images a program is given, listed in order whatever their names and however many they are."""
import io
import os
import tracemalloc

import numpy as np
import pytest
from dicom_files import dataset, save

from timm_arl import image_list
from timm_arl.image_list import InputError, OwnImages, write_image_list


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """What a call lists, in a folder of files that are made empty: names, or (name, stem) with pictures."""
    monkeypatch.chdir(tmp_path)

    def make(*files):
        for file in files:
            os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
            open(file, 'w').close()

    def call(*arguments, lines='', pictures=False):
        count = write_image_list(tmp_path / 'list', arguments, io.StringIO(lines), tmp_path / 'out', pictures)
        found = list(OwnImages(tmp_path / 'list', count))
        assert len(found) == count
        return found if pictures else [name for name, _ in found]

    call.make = make
    return call


def test_a_folder_with_all_below_it(listed):
    listed.make('p/b.JPG', 'p/a.png', 'p/sub/z.tiff', 'p/sub/deep/x.heic', 'p/notes.txt', 'p/Thumbs.db', 'p/README',
                'p/.hidden.jpg', 'p/.git/a.jpg', 'p/ISIC_1_superpixels.png', 'p/ISIC_1_segmentation.png', 'p/c/1.webp')
    os.symlink('sub', 'p/link')
    os.symlink('gone.jpg', 'p/broken.jpg')
    expected = ['p/a.png', 'p/b.JPG', 'p/broken.jpg', 'p/c/1.webp', 'p/sub/deep/x.heic', 'p/sub/z.tiff']
    assert listed('p') == listed('p/') == expected
    assert listed('.') == [f'./{name}' for name in expected]


def test_dicom_without_an_ending(listed, tmp_path):
    listed.make('p/IM0002', 'p/1.2.840')
    for name in ('p/IM0001', 'p/1.2.841', 'p/scan.txt', 'p/DICOMDIR'):
        save(dataset(np.zeros((4, 4), np.uint8), 'MONOCHROME2'), tmp_path / name)
    assert listed('p') == ['p/1.2.841', 'p/IM0001']


def test_the_output_is_not_an_input(listed):
    listed.make('a.jpg', 'out/overlays/a.png')
    assert listed('.') == ['./a.jpg']


def test_what_earlier_runs_have_drawn_is_not_an_input(listed):
    listed.make('a.jpg', 'old/predictions.json', 'old/overlays/a.png', 'old/mine.jpg', 'overlays/b.jpg')
    assert listed('.') == ['./a.jpg', './old/mine.jpg', './overlays/b.jpg']  # those of the user are taken
    listed.make('predictions.json')  # of a run with --output-dir .
    assert listed('.') == ['./a.jpg', './old/mine.jpg']
    assert listed('old/overlays') == ['old/overlays/a.png']  # what is named is taken


def test_files_patterns_and_lists(listed):
    listed.make('a.jpg', 'b[1].jpg', 'p/c.png', 'p/d.jpg', 'p/q/e.jpg', 'notes.txt')
    assert listed('b[1].jpg', 'a.jpg', 'notes.txt') == ['b[1].jpg', 'a.jpg', 'notes.txt']  # what is named is taken
    assert listed('p/*.jpg') == ['p/d.jpg'] and listed('p/*') == ['p/c.png', 'p/d.jpg']
    assert listed('**/*.jpg') == ['a.jpg', 'b[1].jpg', 'p/d.jpg', 'p/q/e.jpg']
    lines = '\ufeffa.jpg\r\n\n  \np\nnot there.jpg\n[0-9].jpg\np/*.png'
    assert listed('-', lines=lines) == [
        'a.jpg', 'p/c.png', 'p/d.jpg', 'p/q/e.jpg', 'not there.jpg', '[0-9].jpg', 'p/c.png']
    assert listed('a.jpg', '-', 'a.jpg', lines='p/c.png') == ['a.jpg', 'p/c.png', 'a.jpg']


def test_a_pattern_finds_an_image_once_whatever_links_lead_to_it(listed):
    listed.make('p/z.jpg', 'p/sub/a.jpg', 'q/c.jpg')
    os.symlink('.', 'p/loop')
    os.symlink('sub', 'p/l')
    os.symlink('../q', 'p/outside')
    assert listed('p/**/*.jpg') == ['p/outside/c.jpg', 'p/sub/a.jpg', 'p/z.jpg']
    assert listed('p/l/*.jpg') == ['p/l/a.jpg']


@pytest.mark.parametrize('arguments, words', [
    (['none.jpg'], 'No file or folder none.jpg'), (['empty'], 'empty holds no images: it is searched'),
    (['-'], 'empty'), (['a.jpg', 'x*.jpg'], r'No file matches x\*.jpg'), ([''], 'an empty name')])
def test_what_is_refused(listed, tmp_path, arguments, words):
    listed.make('a.jpg', 'empty/notes.txt')
    with pytest.raises(InputError, match=words):
        listed(*arguments)
    assert not (tmp_path / 'list').exists() and not (tmp_path / '.list.tmp').exists()


def test_lines_that_are_not_names(listed):
    for lines, words in (('a.jpg\0b.jpg\0', 'separated by NUL: .*find -print, not -print0'),
                         *((os.fsdecode('\ufeffa.jpg\næ.jpg\n'.encode(name)), 'is in UTF-16: save the list as UTF-8')
                           for name in ('utf-16-le', 'utf-16-be')),
                         ('a.jpg ' * 10_000, 'has 60000 characters: give one name on each line')):
        with pytest.raises(InputError, match=words):
            listed('-', lines=lines)


def test_the_output_folder_itself_is_refused(listed):
    listed.make('out/a.jpg', 'b.jpg')
    os.symlink('out', 'link')
    for name in ('out', './out/', 'link'):
        for arguments in ([name], ['b.jpg', '-']):
            with pytest.raises(InputError, match=f'{name} is also the output folder, .* choose another --output-dir'):
                listed(*arguments, lines=f'b.jpg\n{name}\n')


def test_folders_nested_deeper_than_python_calls(listed):
    """Names beyond the longest path that the system takes are no subject here: 1050 folders are below it."""
    names = ['d/' * depth for depth in range(1, 1051)]
    for name in names:
        os.mkdir(name)
    listed.make('d/b.jpg')
    os.rename('d/b.jpg', f'{names[-1]}b.jpg')
    listed.make('d/e.jpg', 'd/a.jpg')
    try:
        assert listed('d') == ['d/a.jpg', f'{names[-1]}b.jpg', 'd/e.jpg']
    finally:  # shutil.rmtree would fail as well
        os.remove(f'{names[-1]}b.jpg')
        for name in reversed(names[1:]):
            os.rmdir(name)


def test_odd_names(listed):
    odd = ['a,b.jpg', 'a\nb.jpg', '"quoted".jpg', ' blank .jpg', 'æøå 皮膚.jpg', os.fsdecode(b'\xff\xfe.jpg')]
    listed.make(*(f'p/{name}' for name in odd))
    assert sorted(listed('p')) == sorted(f'p/{name}' for name in odd)


def test_pictures_have_names_of_their_own(listed):
    listed.make('p/a.jpg', 'p/A.png', 'q/a.jpg', 'q/a-2.jpg', f'q/{"x" * 251}.jpg')
    found = listed('p', 'q', 'p/a.jpg', pictures=True)
    stems = [stem.lower() for _, stem in found]
    assert found[0][1] == 'A' and len(set(stems)) == len(stems) == 6
    assert all(len(stem) <= 210 for stem in stems) and {'a', 'a-1', 'a-2'} <= set(stems)


def test_shares_of_processes(listed, tmp_path):
    listed.make(*(f'p/{k}.jpg' for k in range(8)))
    listed('p')
    shares = [[name for name, _ in OwnImages(tmp_path / 'list', 8, 1 + rank, 3)] for rank in range(3)]
    assert shares == [['p/1.jpg', 'p/4.jpg', 'p/7.jpg'], ['p/2.jpg', 'p/5.jpg'], ['p/3.jpg', 'p/6.jpg']]


def test_sorted_beyond_memory(monkeypatch):
    monkeypatch.setattr(image_list, 'AT_ONCE', 10)
    names = [f'{k * 7919 % 1000:03d}\n' for k in range(95)]
    assert list(image_list._sorted(names)) == sorted(names)
    assert list(image_list._sorted(names[:20])) == sorted(names[:20]) and list(image_list._sorted([])) == []


def test_memory_does_not_grow_with_the_list(tmp_path):
    peaks = []
    for count in (5_000, 50_000):
        lines = (f'a/folder/that/is/not/there/ISIC_{k:07d}.jpg\n' for k in range(count))
        tracemalloc.start()
        assert write_image_list(tmp_path / 'list', ['-'], lines, tmp_path / 'out') == count
        assert sum(1 for _ in OwnImages(tmp_path / 'list', count)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000
