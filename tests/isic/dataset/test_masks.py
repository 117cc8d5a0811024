"""Lesion masks: as they are read, prepared, and given to a copy of a data set."""
import io

import datasets
import numpy as np
import pytest
from PIL import Image
from small_data import WITH_ASPECT, jpeg, rows, write
from test_sources import challenge

from timm_arl.isic.dataset import load_splits
from timm_arl.isic.dataset.__main__ import main
from timm_arl.isic.dataset.masks import write_with_masks
from timm_arl.isic.images import decode, decode_mask
from timm_arl.isic.loading import IsicSplit


def mask(size, box=None):
    picture = Image.new('1', size)
    if box:
        picture.paste(1, box)
    return picture


def test_image_files_become_shards_with_masks(tmp_path):
    source = challenge(tmp_path / 'isic', count=5)
    before = load_splits(str(source))
    given = [mask((120, 80), (60, 20, 100, 60))] * 4 + [mask((120, 80))]  # twice as large as the images
    write_with_masks(tmp_path / 'copy', before, {'test': given}, card='Masks by hand.')
    after = load_splits(str(tmp_path / 'copy'))
    for name in before:
        assert after[name].column_names == before[name].column_names
        about = [column for column in before[name].column_names if column not in ('image', 'mask')]
        assert after[name].select_columns(about).to_list() == before[name].select_columns(about).to_list()
        for old, new in zip(before[name], after[name]):
            with open(old['image']['path'], 'rb') as file:
                assert new['image']['bytes'] == file.read()
    assert [cell is None for cell in after['train']['mask']] == [False, True, True, True, True]
    with open(before['train'][0]['mask']['path'], 'rb') as file:
        assert after['train'][0]['mask']['bytes'] == file.read()
    stored = decode(after['test'][0]['mask'])
    assert stored.size == (60, 40) and stored.convert('L').getbbox() == (30, 10, 50, 30)
    others = datasets.load_dataset(str(tmp_path / 'copy'), cache_dir=str(tmp_path / 'cache'))
    assert isinstance(others['test'][0]['mask'], Image.Image)
    assert 'Masks by hand.' in (tmp_path / 'copy' / 'README.md').read_text()


def test_lesions_are_cut_out_of_squashed_copies_and_an_empty_mask_leaves_the_image_whole(tmp_path):
    cells = {row: {'bytes': jpeg(size=(100, 100)), 'path': None} for row in range(4)}
    content = rows(first=200, image=cells, aspect_ratio={0: 1.5, 1: 1.5, 2: 0.5})
    splits = load_splits(write(tmp_path / 'd', features=WITH_ASPECT, test=content))
    given = [mask((150, 100), (60, 30, 90, 50)), mask((150, 100)), mask((50, 100), (0, 0, 50, 100)), mask((9, 6))]
    for _ in range(2):  # the second time in place of the first
        write_with_masks(tmp_path / 'copy', splits, {'test': given})
    test = load_splits(str(tmp_path / 'copy'))['test']
    assert all(picture.width == picture.height for picture in map(decode, test['mask']))  # as the images are
    images = IsicSplit(test, None, crop_to_lesion=True)
    cut = images.picture(0).size
    assert np.allclose(cut, (45, 45), atol=2)  # 30 px, and a margin of a quarter at each end
    assert images.picture(1).size == (150, 100) and images.picture(2).size == (50, 100)
    assert {path.name for path in tmp_path.iterdir()} == {'d', 'copy'}


def test_masks_of_0_and_1_are_not_taken_for_empty_ones():
    """As programs write them that number what they outline: a lesion would be nearly black."""
    def cell(values):
        file = io.BytesIO()
        Image.fromarray(np.array(values, np.uint8)).save(file, 'PNG')
        return {'bytes': file.getvalue(), 'path': None}
    with pytest.raises(OSError, match='the largest value of its mask is 1, but a lesion is white, 255: multiply'):
        decode_mask(cell([[0, 1], [0, 0]]), (2, 2))
    assert decode_mask(cell([[0, 0], [0, 0]]), (2, 2)).getextrema() == (0, 0)
    assert decode_mask(cell([[0, 255], [0, 90]]), (2, 2)).getpixel((1, 0)) == 255


def test_masks_whose_lesion_is_dark_are_not_taken_for_empty_ones():
    """In percent, and in the first colour of a VOC palette, whose grey is 38."""
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), 'P')
    palette.putpalette([0, 0, 0, 128, 0, 0])
    for picture, largest in ((Image.fromarray(np.array([[0, 100], [0, 0]], np.uint8)), 100), (palette, 38)):
        file = io.BytesIO()
        picture.save(file, 'PNG')
        with pytest.raises(OSError, match=f'the largest value of its mask is {largest}, .*: store masks in grey, with'):
            decode_mask({'bytes': file.getvalue(), 'path': None}, (2, 2))


def test_prepared_masks_have_the_edge_of_the_given_ones(tmp_path):
    """Dithering scatters pixels around a soft edge."""
    source = challenge(tmp_path / 'isic', count=5)
    ramp = np.clip(np.linspace(-200, 455, 60), 0, 255)[None].repeat(40, 0).astype(np.uint8)
    for file in (source / 'ISIC-2017_Training_Part1_GroundTruth').iterdir():
        Image.fromarray(ramp).save(file)
    assert main(['prepare', str(source), str(tmp_path / 'out'), '--workers', '1']) == 0
    masks = [decode(cell).convert('L') for cell in load_splits(str(tmp_path / 'out'))['train']['mask'] if cell]
    assert masks and all(np.array_equal(np.asarray(made) > 127, ramp > 127) for made in masks)
