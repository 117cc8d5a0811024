"""What is learned beside the labels."""
import numpy as np
import pytest
import timm
import torch
from test_finetune_isic import SMALL, read_csv

from timm_arl.isic.task import ISIC2017, Task
from timm_arl.training.arguments import RunError
from timm_arl.training.distillation import Teachers, mask_loss

pytestmark = pytest.mark.usefixtures('threads')


@pytest.mark.slow
def test_masks_are_learned_beside_the_diagnoses(call, few, tmp_path):
    args = ['--data', few, *SMALL, '--model', 'resnet14', '--mask-weight', 1, '--mixed-precision', 'bf16',
            '--batch-size', 8, '--epochs', 6, '--ema', 0, '--mixup', 0.2, '--output-dir', tmp_path / 'out']
    done = call('finetune_isic', *args)
    assert done.returncode == 0 and "The lesions' masks are learned too" in done.stdout, done.stderr
    assert "of it the masks')" in done.stdout
    losses = [float(row['train_mask_loss']) for row in read_csv(tmp_path / 'out' / 'summary.csv')]
    assert losses[-1] < losses[0]
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert not [name for name, _ in model.named_parameters() if 'mask' in name]

    # scored in mixed precision, as the network is alone
    done = call('evaluate_isic', '--data', few, '--checkpoint', tmp_path / 'out', '--mixed-precision', 'bf16',
                '--workers', 0, '--output-dir', tmp_path / 'scores')
    assert done.returncode == 0, done.stderr
    ours, alone = (
        np.array([list(row.values())[1:] for row in read_csv(tmp_path / folder / 'predictions_test.csv')], float)
        for folder in ('out', 'scores'))
    assert np.abs(ours - alone).max() < 1e-6


def test_loss_of_masks():
    logits = torch.tensor([[[[0., 2.]]], [[[5., -5.]]]])
    masks = torch.zeros(2, 1, 2, 4)
    masks[0, 0, :, 2:], masks[1] = 1., torch.nan  # the left half without lesion, the right half lesion; one unknown
    expected = (np.log(2) + np.log1p(np.exp(-2))) / 2
    assert mask_loss(logits, masks).item() == pytest.approx(expected, rel=1e-6)
    assert mask_loss(logits, torch.full_like(masks, torch.nan)).item() == 0


@pytest.mark.parametrize('weight', [0.5, 0.])
def test_several_teachers(weight):
    """The mean of their probabilities, and the features of each; computed again by the networks alone."""
    names = ['arl_cnn14.isic2017', 'arl_tf_efficientnet_lite0.isic2017']
    config = dict(input_size=(3, 64, 64), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    teachers = Teachers(names, config, ISIC2017, weight, 2.)
    logits, features = torch.tensor([[1., -2.], [0., 3.], [-1., 0.5]]), torch.rand(3, teachers.width)
    found = teachers.loss(torch.tensor(5.), logits, features, normalized(config['mean'], config['std']))

    probabilities, pooled = [], []
    for name in names:
        network = timm.create_model(name, pretrained=True).eval()
        images = normalized(network.pretrained_cfg['mean'], network.pretrained_cfg['std'])
        with torch.no_grad():
            probabilities.append(network(images).sigmoid())
            vectors = network.forward_head(network.forward_features(images), pre_logits=True)
        pooled.append(vectors / vectors.norm(dim=1, keepdim=True))
    target, theirs = (probabilities[0] + probabilities[1]) / 2, torch.cat(pooled, 1)
    entropy = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log()).mean()
    cosine = (features * theirs).sum(1) / features.norm(dim=1) / theirs.norm(dim=1)
    expected = (1 - weight) * 5 + weight * entropy + 2 * (1 - cosine).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_that_would_teach_nothing_is_named():
    config = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    other = Task('other', ('a', 'b'), 'multilabel')
    with pytest.raises(RunError, match='Nothing would be learned from the teacher arl_cnn14.isic2017'):
        Teachers(['arl_cnn14.isic2017'], config, other, 0.5, 0.)
