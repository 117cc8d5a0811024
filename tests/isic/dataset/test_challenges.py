"""Folders of the challenges, and what lies beside them."""
from any_data import isic2018, lines, make, picture

from timm_arl.isic.dataset import load_data


def test_images_of_another_challenge_in_a_folder_are_not_left_out_without_a_word(tmp_path):
    folder = make('ham10000', tmp_path)
    assert not load_data(folder).notes
    picture(tmp_path / 'ISIC2018_Task3_Test_Images' / 'ISIC_1.jpg')
    lines(tmp_path / 'ISIC2018_Task3_Test_GroundTruth.csv', ('lesion_id', 'image_id', 'dx'), [('H', 'ISIC_1', 'nv')])
    assert load_data(folder).summary(folder).endswith(
        'Not used: ISIC2018_Task3_Test_Images, which is of ISIC 2018 Task 3 (to have both, write a CSV of all images '
        'with a column split).')
    isic2018(tmp_path / 'without')
    (tmp_path / 'without' / 'ISIC2018_Task3_Test_GroundTruth').rename(tmp_path / 'elsewhere')
    notes = load_data(str(tmp_path / 'without'), needed=('train', 'validation')).notes
    assert notes[0] == 'Not used: ISIC2018_Task3_Test_Input, whose ground truth is not there.'
