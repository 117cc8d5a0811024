"""The images of a report: the right ones, with maps that lie where the network looked."""
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_data import WITH_ASPECT, rows, write

import timm_arl  # noqa: F401  registers the models
from timm_arl.explain import scaled_alphas
from timm_arl.isic.dataset import load_splits
from timm_arl.isic.loading import IsicSplit
from timm_arl.isic.task import LABELS
from timm_arl.isic.transforms import EvalCrops, eval_transform, normalisation
from timm_arl.training.examples import most_certain, most_different, most_wrong, report_examples

MEAN_STD = (0.5,) * 3, (0.25,) * 3


def test_the_most_wrong_and_the_most_certain():
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0])
    p = np.array([.9, .1, .6, .3, .5, .7, .51, .01, .2])  # 0.5 is not called positive
    assert most_wrong(truth, p) == [1, 3, 5, 6]
    assert most_certain(truth, p) == [0, 2, 7, 8]
    assert most_certain(truth, p, 9) == [0, 2, 7, 8, 4] and most_wrong(truth, p, 1) == [1, 5]
    assert most_wrong(truth, truth.astype(float)) == []
    assert most_different(p, p + [0, .1, 0, 0, 0, -.5, 0, .2, 0], 2) == [5, 7]
    assert most_different(p, p) == []


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    """Eight images of random colours, square copies."""
    pictures = {}
    for k in range(8):
        pixels = np.random.default_rng(k).integers(0, 255, (6, 6, 3), np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(file, 'PNG')
            pictures[k] = {'bytes': file.getvalue(), 'path': None}
    folder = write(tmp_path_factory.mktemp('data') / 'd', WITH_ASPECT, test=rows(8, 200, image=pictures, aspect_ratio={
        k: 1.5 for k in range(8)}))
    return load_splits(folder)['test']


def network(name='arl_cnn14', **kwargs):
    torch.manual_seed(0)
    kwargs = {'zero_init_last': False, 'alpha_init': 2., **kwargs} if name.startswith('arl') else kwargs
    if 'cnn14' in name or 'resnet14' in name:
        kwargs = {'channels': [16, 32, 64, 128], **kwargs}
    return timm.create_model(name, num_classes=kwargs.pop('num_classes', len(LABELS)), **kwargs).eval()


def shown(model, split, crops='center', other=None, probabilities=None, img_size=64):
    images = IsicSplit(split, eval_transform(img_size, *MEAN_STD, crops), every_epoch=False)
    if probabilities is None:
        probabilities = np.linspace(0, 1, 16).reshape(8, 2).astype(np.float32)
    return report_examples(model, images, EvalCrops(img_size, crops), normalisation(*MEAN_STD), probabilities, other)


def pictures(examples):
    return [example.pictures for group in examples.groups + examples.differing for example in group.examples]


def test_beside_each_image_its_map_and_the_mask_of_a_gate(split):
    examples = shown(network(), split)
    assert [group.title for group in examples.groups] == [
        f'{label}: most {kind}' for label in ('melanoma', 'seborrheic keratosis') for kind in ('wrong', 'certain')]
    assert examples.differing == [] and examples.note == '' and examples.square_copies and examples.side == 96
    for group in examples.groups:
        assert [scale[0] for scale in group.scales] == ['class activation map', 'attention mask']
        assert group.scales[0][1] == -group.scales[0][2] < 0 and 'grey is 0' in group.scales[0][3]
        for example in group.examples:
            k = int(example.image_id[-1])
            assert example.diagnosis == ('nevus', 'melanoma', 'nevus', 'seborrheic keratosis')[k % 4]
    assert pictures(examples)
    for image, cam, mask in pictures(examples):
        assert image.image.size == cam.image.size == mask.image.size == (360, 240)  # stretched back to its shape
        whole, over = (np.asarray(each.image, float) for each in (image, cam))
        changed = np.abs(whole - over).max(-1) > 2
        # the centre crop is 7/8 of the height; what it does not see is left as it is
        rows_seen, columns_seen = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        assert np.allclose((rows_seen[[0, -1]], columns_seen[[0, -1]]), ((15, 224), (75, 284)), atol=4)
    assert [block[0] for block in examples.blocks] == ['layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']
    assert all(alpha == 2 and 0 < share and 0 < effective <= 1 for _, alpha, share, effective in examples.blocks)


def test_the_maps_are_those_of_the_crops_that_were_scored(split):
    class Recorded(EvalCrops):
        seen = {}

        def with_boxes(self, image):
            cut, boxes = super().with_boxes(image)
            self.seen[np.asarray(image).tobytes()] = cut
            return cut, boxes

    images = IsicSplit(split, eval_transform(64, *MEAN_STD, 'paper'), seed=3, every_epoch=False)  # random patches
    normalise = normalisation(*MEAN_STD)
    report_examples(network(), images, Recorded(64, 'paper'), normalise, np.full((8, 2), 0.7, np.float32))
    scored = {images.picture(row).tobytes(): images[row][0] for row in range(8)}
    assert len(Recorded.seen) >= 4
    for picture, cut in Recorded.seen.items():
        assert torch.equal(normalise(cut), scored[picture])


def test_two_networks(split):
    ours = np.full((8, 2), 0.25, np.float32)
    theirs = ours.copy()
    theirs[[1, 6], 0] = 0.75, 0.5
    examples = shown(network(), split, other=theirs, probabilities=ours)
    first, second = examples.differing
    assert [e.image_id[-1] for e in first.examples] == ['1', '6'] and second.examples == []
    assert first.examples[0].verdict == 'missed'
    assert first.examples[0].text == 'probability of melanoma 0.250, by the other network 0.750'


@pytest.mark.parametrize('name, kwargs, count, note, img_size', [
    ('resnet14', {}, 2, '', 64),
    ('arl_cnn14', {'num_classes': 3}, 3, '', 64),  # a softmax over diagnoses
    ('vit_tiny_patch16_224', {'depth': 1}, 1, 'This network has no class activation map', 224)])
def test_other_networks(split, name, kwargs, count, note, img_size):
    examples = shown(network(name, **kwargs), split, img_size=img_size)
    assert {len(each) for each in pictures(examples)} == {count}
    assert examples.note.startswith(note) and bool(examples.note) == bool(note)
    assert bool(examples.blocks) == name.startswith('arl')


@pytest.mark.parametrize('attention', ['spatial', 'channel', 'mixed'])
def test_the_scale_of_a_mask_spans_it(split, attention):
    examples = shown(network(attention=attention), split)
    for group in examples.groups:
        _, (name, low, high, words) = group.scales
        assert name == 'attention mask' and words.startswith('of layer')
        assert (low, high) == (0, 1) if attention == 'mixed' else low <= 0.5 and high >= 1.5 and '1 is a flat' in words


@pytest.mark.parametrize('alpha, word', [(2., 'alpha 2: lighter is strength'), (-.5, 'alpha -0.5: lighter is weak')])
def test_what_a_mask_does_depends_on_the_sign_of_alpha(split, alpha, word):
    assert word in shown(network(alpha_init=alpha), split).groups[0].scales[1][3]


def test_masks_that_change_nothing_are_not_shown(split):
    model = network()
    with scaled_alphas(model, 0):
        examples = shown(model, split)
    assert {len(each) for each in pictures(examples)} == {2}
    assert examples.note == 'Every alpha is 0: the attention masks change nothing and are not shown.'


def test_no_image_is_wrong(split):
    truth = np.array([[row % 4 == 1, row % 4 == 3] for row in range(8)], np.float32)
    examples = shown(network(), split, probabilities=truth)
    assert [bool(group.examples) for group in examples.groups] == [False, True] * 2
