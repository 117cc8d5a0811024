"""One place that knows the outputs: numbers and names as the challenges have them, and refusals in words."""
import dataclasses

import numpy as np
import pytest
import timm
import torch

import timm_arl  # noqa: F401  registers the models
from timm_arl.isic.task import ISIC2017, LABELS, TASKS, DataError, Task, balancing_weights, probabilities_of

OWN = Task('own', ('a', 'b', 'c'), 'multiclass', 'else')
SEVERAL = Task('several', ('scar', 'ulcer', 'hair'))


def test_isic_2017_is_as_it_was():
    assert ISIC2017.labels == LABELS == ('melanoma', 'seborrheic_keratosis') and ISIC2017.outputs == LABELS
    softmax = ISIC2017.with_head('softmax')
    assert softmax.outputs == ('nevus', 'melanoma', 'seborrheic_keratosis')
    for task in (ISIC2017, softmax):
        logits = torch.randn(5, len(task.outputs), generator=torch.Generator().manual_seed(0))
        assert torch.equal(task.probabilities(logits), probabilities_of(logits))
        assert torch.equal(probabilities_of(logits), logits.sigmoid() if task is ISIC2017 else logits.softmax(1)[:, 1:])
        assert task.config() is None and Task.of_config({'label_names': list(task.outputs)}, len(task.outputs)) == task
    assert Task.of_config({}, 2) is None and Task.of_config({}, 2, LABELS) == ISIC2017


def test_outputs_that_nobody_named_have_no_labels_but_for_networks_of_this_package():
    ours, other = (timm.create_model(name, num_classes=2) for name in ('resnet14', 'test_resnet'))
    assert Task.of_network(ours) == ISIC2017 and Task.of_network(other) is None
    assert Task.of_network(other, {'label_names': list(LABELS)}) == ISIC2017
    assert Task.of_network(timm.create_model('resnet14', num_classes=3)) is None
    assert ISIC2017.assumption('OUT', ours) == (
        'The outputs of OUT are taken for melanoma and seborrheic keratosis, because its config.json has no '
        'label_names.')
    assert ISIC2017.assumption('OUT', ours, {'label_names': list(LABELS)}) == ''


@pytest.mark.parametrize('name, labels, classes', [
    ('isic2018', 7, 7), ('isic2019', 8, 8), ('isic2020', 1, 2), ('isic2024', 1, 2), ('ham10000', 7, 7)])
def test_known_tasks(name, labels, classes):
    task = TASKS[name]
    assert (len(task.labels), len(task.classes)) == (labels, classes)
    assert task.is_softmax == (labels > 1)
    assert Task.from_json(task.to_json()) == dataclasses.replace(task, column='')
    assert Task.of_config({'task': task.to_json()}, labels).labels == task.labels
    assert Task.of_config({'task': task.to_json()}, labels + 1) is None


def test_probabilities_and_classes():
    logits = torch.randn(4, 3)
    assert torch.allclose(OWN.probabilities(logits).sum(1), torch.ones(4))
    assert torch.equal(OWN.with_head('sigmoid').probabilities(logits), logits.sigmoid())
    labels = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]])
    for of in (labels, torch.tensor(labels, dtype=torch.float32)):
        assert OWN.class_numbers(of).tolist() == [0, 2, -1]
    assert [OWN.diagnosis(row) for row in labels] == ['a', 'c', 'else']
    assert SEVERAL.diagnosis([1, 1, 0]) == 'scar and ulcer' and SEVERAL.diagnosis([0, 0, 0]) == 'none of the labels'


def test_classes_are_balanced_also_where_an_image_has_several_labels():
    labels = np.array([[1, 0, 0]] * 6 + [[1, 1, 0]] * 2 + [[0, 0, 0]] * 4, np.float32)
    weights = balancing_weights(labels, SEVERAL)
    own = SEVERAL.image_weights(torch.tensor(labels), torch.tensor(weights)).numpy()
    assert np.allclose(own, SEVERAL.image_weights(labels, weights)) and np.isclose(own.mean(), 1)
    assert np.isclose(own[:6].sum(), own[6:8].sum()) and np.isclose(own[6:8].sum(), own[8:].sum())
    one = np.eye(3)[[0] * 8 + [1, 2]]
    assert np.allclose(OWN.image_weights(one, balancing_weights(one, OWN)), [10 / 24] * 8 + [10 / 3] * 2)


@pytest.mark.parametrize('make, message', [
    (lambda: Task('t', ('a', 'a')), 'The label a is named twice'),
    (lambda: Task('t', ('a', 'b'), 'multiclass', 'b'), 'The label b is named twice'),
    (lambda: Task('t', ('a',), 'multiclass'), 'needs at least 2 labels'),
    (lambda: Task('t', ()), 'needs at least 1 labels'),
    (lambda: Task('t', ('a/b', 'c')), "'a/b' is no usable label"),
    (lambda: Task('t', ('', 'c')), "'' is no usable label"),
    (lambda: Task('t', ('image', 'c')), 'image cannot be a label'),
    (lambda: Task('t', ('a', 'b'), 'multilable'), 'multilabel or multiclass, not'),
    (lambda: SEVERAL.with_head('softmax'), '--head softmax needs images with one label at most'),
    (lambda: Task('t', ('a', 'b'), aliases=(('x', 'c'),)), 'A word stands for c'),
    (lambda: Task.from_json({'labels': ['a'], 'colour': 'red'}), 'is damaged'),
])
def test_labels_that_cannot_be_used_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()
