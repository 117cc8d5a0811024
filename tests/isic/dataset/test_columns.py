"""Columns of 0 and 1: which task they are."""
import pytest
from any_data import lines, picture

from timm_arl.isic.dataset import DataError, Wanted, load_data
from timm_arl.isic.task import Task


def one_hot_table(folder, labels, words):
    """A table of columns of 0 and 1, of images with these digits."""
    for k in range(len(words)):
        picture(folder / f'{k}.png', k)
    return str(lines(folder / 'mine.csv', ('image', *labels), [(k, *word) for k, word in enumerate(words)]))


@pytest.mark.parametrize('slip, told', [('110', '4 has 2'), ('000', '4 has none')])
def test_one_slip_among_columns_of_classes_does_not_make_another_task(tmp_path, slip, told):
    wanted = Wanted(labels=('nevus', 'melanoma', 'bcc'))
    words = ['100', '010', '001'] * 20
    assert load_data(one_hot_table(tmp_path, wanted.labels, words), wanted).task.kind == 'multiclass'
    words[4] = slip
    data = one_hot_table(tmp_path, wanted.labels, words)
    with pytest.raises(DataError, match=f'59 of 60 images have exactly one of the labels nevus, melanoma, bcc, but '
                                        f'{told}: correct these rows .* kind: multilabel .* in a --task FILE.yaml'):
        load_data(data, wanted)
    (tmp_path / 'mine.yaml').write_text('kind: multilabel\nlabels: [nevus, melanoma, bcc]\n')
    assert load_data(data, Wanted(task=str(tmp_path / 'mine.yaml'))).task.labels == wanted.labels
    network = Task('mine', wanted.labels)  # which is to be scored, and was trained so
    assert load_data(data, wanted, expected=network).task.kind == 'multilabel'
    words[5:13] = ['110'] * 8
    assert load_data(one_hot_table(tmp_path, wanted.labels, words), wanted).task.kind == 'multilabel'


def test_a_label_beside_those_of_a_challenge_is_pointed_out(tmp_path):
    labels = ('melanoma', 'seborrheic_keratosis', 'bcc', 'nevus', 'sex', 'biopsy')
    words = [*['100011'] * 10, *['010001'] * 10, *['001011'] * 8, *['000101'] * 10]
    data = load_data(one_hot_table(tmp_path, labels, words))
    assert data.task.name == 'isic2017' and data.summary('mine').endswith(
        '8 images that count as nevus have 1 in bcc: if these are diagnoses too, pass --labels melanoma '
        'seborrheic_keratosis bcc nevus.')
    data = load_data(one_hot_table(tmp_path, labels, words), Wanted(labels=labels[:4]))
    assert data.task.labels == labels[:4] and data.task.kind == 'multiclass' and not data.notes
    assert not load_data(one_hot_table(tmp_path, labels, words), Wanted(task='isic2017')).notes  # the user knows
