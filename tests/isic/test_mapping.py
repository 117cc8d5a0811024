"""Labels of another clinic in the words of a network."""
import datasets
import numpy as np
import pytest

from timm_arl.isic.dataset import Data, DataError
from timm_arl.isic.mapping import map_labels, read_map
from timm_arl.isic.task import ISIC2017, TASKS, Task

SEVEN = TASKS['isic2018']


def data_of(diagnoses, task=SEVEN):
    """A split with a column of 0 and 1 for each label."""
    return Data(task, {'test': datasets.Dataset.from_dict({
        'image_id': [f'i{k}' for k in range(len(diagnoses))],
        **{label: [int(each == label) for each in diagnoses] for label in task.labels}})})


def mapped(diagnoses, *entries, network=ISIC2017, task=SEVEN):
    return map_labels(data_of(diagnoses, task), network, read_map(entries, network, 'OUT'), 'test', 'OTHER')


def test_an_image_is_positive_with_any_of_the_words():
    found = mapped(['MEL', 'NV', 'BCC', 'BKL', 'DF'], 'melanoma=MEL,mel,BCC')
    split = found.data.splits['test']
    assert split['melanoma'] == [1, 0, 1, 0, 0]
    assert found.sources == {'melanoma': ['MEL', 'BCC']} and found.not_scored == ['seborrheic_keratosis']
    assert found.negative == ['NV', 'AKIEC', 'BKL', 'DF', 'VASC']
    assert found.data.task.labels == ('melanoma',) and found.data.task.kind == 'multilabel'
    assert mapped(['MEL', 'NV'], 'melanoma=mel').sources == {'melanoma': ['MEL']}


def test_labels_of_the_network_in_other_case():
    home = Task('home', ('MEL', 'NV'), 'multiclass')
    assert read_map(['mel=melanoma'], home, 'OUT') == {'MEL': ['melanoma']}


def test_labels_come_in_the_order_of_the_network_and_the_rest_is_a_word():
    found = mapped(['MEL', 'NV', 'BKL'], 'seborrheic_keratosis=BKL', 'melanoma=MEL')
    assert found.data.task.labels == ('melanoma', 'seborrheic_keratosis') and not found.not_scored
    home = Task('mine', ('nevus', 'cancer'), 'multiclass')  # from data where a nevus is neither of two labels
    found = mapped(['melanoma', 'none', 'seborrheic_keratosis'], 'cancer=melanoma', 'nevus=nevus,seborrheic_keratosis',
                   network=home, task=ISIC2017)
    assert found.data.splits['test']['nevus'] == [0, 1, 1] and found.data.task is home  # each image has one
    found = mapped(['melanoma', 'none', 'seborrheic_keratosis'], 'cancer=melanoma', 'nevus=nevus', network=home,
                   task=ISIC2017)
    assert found.data.task.kind == 'multilabel'  # one image has none of its classes


def test_columns_of_the_same_name_are_read_before_they_are_replaced():
    swapped = Task('x', ('a', 'b'))
    found = mapped(['a', 'b', 'b'], 'a=b', 'b=a', network=swapped, task=Task('y', ('a', 'b')))
    split = found.data.splits['test']
    assert np.array_equal([split['a'], split['b']], [[0, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize('entries, message', [
    (['nevus=NV'], '--map nevus=NV: OUT has no label nevus, it knows melanoma, seborrheic_keratosis.'),
    (['melanoma=MEL,MEL'], '--map gives MEL to melanoma twice'),
    (['melanoma=MEL', 'melanoma=MEL'], '--map gives MEL to melanoma twice'),
    (['melanoma=MEL', 'seborrheic_keratosis=BKL,mel'], '--map gives mel to melanoma and to seborrheic_keratosis'),
    (['melanoma=scc'], 'OTHER has no label scc, it has MEL, NV, BCC, AKIEC, BKL, DF, VASC.'),
    (['melanoma'], '--map melanoma is not LABEL=WORD,WORD'), (['melanoma=MEL,'], 'is not LABEL=WORD,WORD'),
    (['melanoma=DF', 'seborrheic_keratosis=VASC'], 'test images: 0 of melanoma, 0 of seborrheic_keratosis), so that'),
    (['melanoma=MEL,NV'], '(of 2 test images: 2 of melanoma), so that there is no AUC'),
])
def test_what_cannot_be_mapped(entries, message):
    with pytest.raises(DataError) as error:
        mapped(['MEL', 'NV'], *entries)
    assert message in str(error.value)


def test_a_word_with_a_comma_is_in_quotes():
    words = read_map(['melanoma="Melanoma, NOS",mel'], ISIC2017, 'OUT')
    assert words == {'melanoma': ['Melanoma, NOS', 'mel']}
