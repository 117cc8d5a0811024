"""Images read one by one: what is wrong with an image is its own, what is wrong with the machine is not."""
import os
import resource
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile
from predict_program import rows

from timm_arl.isic.images import decode
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.pictures import Pictures
from timm_arl.predictor import Cutter, Predictor, read_picture


@pytest.fixture
def pictures(tmp_path):
    draw_lesion('nevus', np.random.default_rng(0), 96).save(tmp_path / 'a.jpg')
    (tmp_path / 'bad.jpg').write_bytes(b'\xff\xd8\xff')
    return Pictures(Cutter(64, 'center', False, 0), str(tmp_path), False)


def test_an_image_is_not_damaged_because_the_machine_has_no_room(pictures):
    assert len(pictures['a.jpg', 'a'].crops) == 1
    bad = pictures['bad.jpg', 'bad']
    assert bad.reason and not bad.stop
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))  # no file can be opened now
    try:
        found = pictures['a.jpg', 'a']
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found.stop and found.reason == 'Too many open files'


def test_a_disk_that_fails_stops_the_run(predict, tiny, tmp_path):
    """And so does one that is gone: the rows would say of all its images that they do not exist."""
    (tmp_path / 'p').mkdir()
    os.symlink('/proc/self/mem', tmp_path / 'p' / 'a.jpg')  # an error of input and output, as soon as it is read
    draw_lesion('nevus', np.random.default_rng(0), 96).save(tmp_path / 'b.png')
    shutil.copy(tmp_path / 'b.png', tmp_path / 'p')
    done = predict('p', '--model', tiny)
    assert done.returncode == 2 and 'p/a.jpg cannot be read now (Input/output error). If a resumed run' in done.stderr
    os.rename(tmp_path / 'p', tmp_path / 'away')
    done = predict('p', '--model', tiny, '--resume')
    assert done.returncode == 2 and 'The folder p is gone: bring it back' in done.stderr, done.stderr
    os.rename(tmp_path / 'away', tmp_path / 'p')
    (tmp_path / 'p' / 'a.jpg').unlink()
    done = predict('p', '--model', tiny, '--resume')
    assert done.returncode == 1
    assert [row['error'] for row in rows(tmp_path / 'out')] == ['No such file or directory', '']


def test_overlays_are_drawn_on_small_copies(tiny, tmp_path):
    """Which are all that a batch holds, and look as if they were drawn on the picture."""
    draw_lesion('melanoma', np.random.default_rng(1)).resize((1801, 1203)).save(tmp_path / 'a.png')
    predictor = Predictor(tiny)
    seen = Pictures(predictor.cutter, str(tmp_path), True)['a.png', 'a']
    assert seen.picture.size == (1024, 684)
    maps = predictor.explain_crops(seen.picture, predictor.normalise(seen.crops), seen.boxes, ())
    expected = predictor.explain(read_picture(tmp_path / 'a.png'), gates=False, image_id='a')
    assert maps.keys() == expected.keys()
    assert all(np.array_equal(maps[label], expected[label]) for label in maps)


@pytest.mark.parametrize('form, remark', [
    ('TIFF', 'frames'), ('GIF', 'frames'), ('PNG', 'frames'), ('WEBP', 'frames'), ('MPO', '')])
def test_of_several_frames_the_first_is_used_and_said_so(pictures, tmp_path, form, remark):
    one, two = (draw_lesion('nevus', np.random.default_rng(seed), 200).resize((200, 150)) for seed in range(2))
    one.save(tmp_path / 'several', form, save_all=True, append_images=[two])
    one.save(tmp_path / 'single', form)
    seen = {name: pictures[name, name] for name in ('several', 'single')}
    assert (seen['several'].remark, seen['single'].remark) == (remark, ''), seen['several'].reason
    assert (seen['several'].crops.float() - seen['single'].crops).abs().mean() < 4


def test_no_other_program_is_started_for_an_image():
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(OSError, match='it is EPS, which is not opened'):
        decode({'bytes': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n', 'path': None})


@pytest.mark.parametrize('content, remedy', [
    (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', ', but HEIC: convert it to JPEG'),
    (b'PK\3\4' + bytes(40), ', but a ZIP file: unpack it'),
    ('Läsionen.jpg\n'.encode() * 100, ', but plain text'),
    (b'\xff\xd8\xff', ''), (b'\0\1\2', '')])
def test_a_file_that_is_no_image_is_called_what_it_is(tmp_path, content, remedy):
    (tmp_path / 'a.jpg').write_bytes(content)
    for cell in {'bytes': content, 'path': None}, {'bytes': None, 'path': str(tmp_path / 'a.jpg')}:
        with pytest.raises(OSError) as refused:
            decode(cell)
        assert str(refused.value) == f'it is not an image in a format that Pillow knows{remedy}'


@pytest.mark.parametrize('error', [EOFError, OSError])
def test_an_error_without_words_is_told_by_its_kind(monkeypatch, error):
    class Odd(ImageFile.ImageFile):
        """A plugin of Pillow that gives up without a word, as some do on damaged files."""
        format = 'ODD'

        def _open(self):
            self._size, self._mode, self.tile = (20, 20), 'RGB', []

        def load(self):
            raise error

    Image.init()
    monkeypatch.setattr(Image, 'ID', [*Image.ID, 'ODD'])
    monkeypatch.setitem(Image.OPEN, 'ODD', (lambda file, name: Odd(file, name), lambda head: head.startswith(b'ODD')))
    with pytest.raises(OSError, match=rf'^it is damaged \({error.__name__}\)$'):
        decode({'bytes': b'ODD' + bytes(40), 'path': None})
