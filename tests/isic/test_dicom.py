"""DICOM files of every colour interpretation look like the picture that they were made from."""
import io
import sys
import tracemalloc

import numpy as np
import pytest
from dicom_files import dataset, save
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from timm_arl.isic.dicom import is_dicom, read_dicom


@pytest.fixture
def read(tmp_path):
    def made(*args, **kwargs):
        picture = read_dicom(save(dataset(*args, **kwargs), tmp_path / 'a.dcm'))
        assert picture.mode == 'RGB'
        return np.asarray(picture)

    return made


@pytest.fixture(scope='module')
def colours():
    """A smooth colourful picture, uint8 (24, 32, 3): colour differences survive being stored at half size."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 7 + 20, y * 8 + 30, 200 - x * 3 - y * 2], -1).astype(np.uint8)


@pytest.fixture(scope='module')
def ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(array):
    assert (array[..., 0] == array[..., 1]).all() and (array[..., 0] == array[..., 2]).all()
    return array[..., 0]


def test_colour(read, colours):
    assert (read(colours, 'RGB') == colours).all()
    planes = np.moveaxis(colours, -1, 0).tobytes()
    assert (read(colours, 'RGB', PlanarConfiguration=1, PixelData=planes) == colours).all()
    luminance = convert_color_space(colours, 'RGB', 'YBR_FULL')
    assert np.abs(read(luminance, 'YBR_FULL').astype(int) - colours).max() <= 3
    assert np.abs(luminance.astype(int) - colours).max() > 50  # so the conversion was needed


def test_colour_stored_at_half_size(read, colours):
    y, b, r = np.moveaxis(convert_color_space(colours, 'RGB', 'YBR_FULL'), -1, 0)
    pairs = np.stack([y[:, ::2], y[:, 1::2], b[:, ::2], r[:, ::2]], -1)
    found = read(colours, 'YBR_FULL_422', PixelData=pairs.tobytes())
    assert np.abs(found.astype(int) - colours).max() <= 16


@pytest.mark.parametrize('photometric', ['YBR_FULL_422', 'YBR_FULL'])
def test_jpeg_as_the_challenge_of_2020_has_it(read, colours, photometric):
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, 'JPEG', quality=100, subsampling='4:4:4' if photometric == 'YBR_FULL' else 1)
    found = read(encapsulate([buffer.getvalue()]), photometric, syntax=JPEGBaseline8Bit, Rows=24, Columns=32)
    assert np.abs(found.astype(int) - np.asarray(Image.open(buffer).convert('RGB'))).max() <= 2


def test_rle(tmp_path, colours):
    ds = dataset(colours, 'RGB')
    ds.compress(RLELossless)
    assert (np.asarray(read_dicom(save(ds, tmp_path / 'a.dcm'))) == colours).all()


def test_16_bits_of_colour(read, colours):
    assert (read(colours.astype(np.uint16) * 257, 'RGB', bits=16) == colours).all()


@pytest.mark.parametrize('bits', [8, 16])
def test_palette(read, bits):
    table = np.random.default_rng(0).integers(0, 256, (256, 3))
    dtype, scale = (np.uint8, 1) if bits == 8 else (np.uint16, 257)
    lut = {}
    for k, name in enumerate(('Red', 'Green', 'Blue')):
        lut[f'{name}PaletteColorLookupTableDescriptor'] = [256, 0, bits]
        lut[f'{name}PaletteColorLookupTableData'] = (table[:, k] * scale).astype(dtype).tobytes()
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (read(indices, 'PALETTE COLOR', **lut) == table[indices]).all()


def test_grey_and_its_inverse(read, ramp):
    assert (grey(read(ramp, 'MONOCHROME2')) == ramp).all()
    assert (grey(read(ramp, 'MONOCHROME1')) == 255 - ramp).all()


def test_12_bits_in_16(read, ramp):
    values = (ramp * (4095 / 255)).round().astype(np.uint16)
    assert (grey(read(values, 'MONOCHROME2', bits=16, stored=12)) == ramp).all()


def test_window(read, ramp):
    """Values of 1000 to 1255, shown from 1000 (black) to 1255 (white); all beyond is cut off."""
    values = ramp.astype(np.uint16) + 1000
    window = dict(WindowCenter=1128, WindowWidth=256)
    assert np.abs(grey(read(values, 'MONOCHROME2', bits=16, **window)).astype(int) - ramp).max() <= 1
    assert np.abs(grey(read(values, 'MONOCHROME1', bits=16, **window)).astype(int) - (255 - ramp)).max() <= 1
    narrow = grey(read(values, 'MONOCHROME2', bits=16, WindowCenter=1128, WindowWidth=2))
    assert set(np.unique(narrow)) <= {0, 255} and (narrow == 255).sum() == pytest.approx(128, abs=1)
    several = read(values, 'MONOCHROME2', bits=16, WindowCenter=[1128, 40], WindowWidth=[256, 400])
    assert np.abs(grey(several).astype(int) - ramp).max() <= 1  # the first is shown


def test_rescale_and_signed_values(read, ramp):
    """The window is in units after the rescale."""
    rescaled = dict(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=-744, WindowWidth=512)
    assert np.abs(grey(read(ramp.astype(np.uint16), 'MONOCHROME2', bits=16, **rescaled)).astype(int) - ramp).max() <= 1
    signed = ramp.astype(np.int16) - 128
    found = read(signed, 'MONOCHROME2', bits=16, PixelRepresentation=1, WindowCenter=0, WindowWidth=256)
    assert np.abs(grey(found).astype(int) - ramp).max() <= 1
    without = read((ramp.astype(np.int16) - 128) * 256, 'MONOCHROME2', bits=16, PixelRepresentation=1)
    assert np.abs(grey(without).astype(int) - ramp).max() <= 1


def test_look_up_table_of_the_shown_values(read, ramp):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 16], ((255 - np.arange(256)) * 257).astype(np.uint16).tolist()
    for element in ('LUTDescriptor', 'LUTData'):
        item[element].VR = 'US'
    assert (grey(read(ramp, 'MONOCHROME2', VOILUTSequence=Sequence([item]))) == 255 - ramp).all()


def refused(path):
    with pytest.raises(OSError) as caught:
        read_dicom(path)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(tmp_path, ramp, monkeypatch):
    frames = dataset(np.stack([ramp] * 3).reshape(48, 16), 'MONOCHROME2', Rows=16, NumberOfFrames=3)
    assert 'it holds 3 frames' in refused(save(frames, tmp_path / 'f.dcm'))
    report = dataset(ramp, 'MONOCHROME2')
    del report.PixelData
    assert refused(save(report, tmp_path / 'r.dcm')) == 'it holds no picture, as reports and indexes (DICOMDIR) do not'
    report.FloatPixelData = np.zeros((16, 16), np.float32).tobytes()
    assert refused(save(report, tmp_path / 'p.dcm')) == 'it has floating-point pixels'
    short = dataset(ramp, 'MONOCHROME2', PixelData=ramp.tobytes()[:100])
    assert 'cannot be decoded' in refused(save(short, tmp_path / 's.dcm'))
    whole = save(dataset(ramp, 'MONOCHROME2'), tmp_path / 'w.dcm').read_bytes()
    (tmp_path / 't.dcm').write_bytes(whole[:200])
    assert refused(tmp_path / 't.dcm')
    (tmp_path / 'x.dcm').write_text('no DICOM')
    assert refused(tmp_path / 'x.dcm') == 'it is not a DICOM file'
    flat = dataset(ramp, 'MONOCHROME2', RescaleSlope=0, RescaleIntercept=5)
    assert 'is its RescaleSlope 0' in refused(save(flat, tmp_path / 'z.dcm'))
    lossless = dataset(encapsulate([b'\xff\xd8\xff\xd9']), 'RGB', syntax=JPEGLSLossless, Rows=16, Columns=16)
    assert 'cannot be decoded' in refused(save(lossless, tmp_path / 'l.dcm'))
    bomb = dataset(ramp, 'MONOCHROME2', syntax=DeflatedExplicitVRLittleEndian)  # can grow a thousandfold
    assert 'compressed as a whole (deflated)' in refused(save(bomb, tmp_path / 'd.dcm'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert 'above the limit' in refused(tmp_path / 'w.dcm')


def test_a_film_is_refused_without_its_pixels_in_memory(tmp_path):
    film = save(dataset(np.zeros((12_000, 1000), np.uint8), 'MONOCHROME2', Rows=1000, NumberOfFrames=12),
                tmp_path / 'f.dcm')
    tracemalloc.start()
    try:
        assert 'it holds 12 frames' in refused(film)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_they_are_known_by_their_content(tmp_path, ramp):
    assert is_dicom(save(dataset(ramp, 'MONOCHROME2'), tmp_path / 'IM0001'))
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    (tmp_path / 'empty').touch()
    assert not is_dicom(tmp_path / 'a.png') and not is_dicom(tmp_path / 'empty')


def test_without_pydicom_the_reason_names_it(tmp_path, ramp, monkeypatch):
    save(dataset(ramp, 'MONOCHROME2'), tmp_path / 'a.dcm')
    monkeypatch.setitem(sys.modules, 'pydicom', None)  # as if it were not installed
    assert refused(tmp_path / 'a.dcm').startswith(
        "pydicom is not installed: in a checkout, pip install -e '.[dicom]'")
