"""What is learned beside the labels."""
import numpy as np
import pytest
import timm
import torch
from test_finetune_isic import SMALL, read_csv
from torch.nn.functional import interpolate

from timm_arl.factory import save_network
from timm_arl.isic.task import ISIC2017, Task
from timm_arl.training.arguments import RunError
from timm_arl.training.distillation import Teachers, mask_loss


@pytest.mark.slow
@pytest.mark.usefixtures('no_pictures')
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


CONFIG = dict(input_size=(3, 64, 64), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
NAMES = ['arl_cnn14.isic2017', 'arl_tf_efficientnet_lite0.isic2017']


@pytest.mark.parametrize('weight, feature_weight', [(0.5, 2.), (0., 2.), (0.5, 0.)])
def test_several_teachers(weight, feature_weight):
    """The mean of their probabilities, and the features of each, at the sizes of their training; computed again."""
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    teachers = Teachers(NAMES, CONFIG, ISIC2017, weight, feature_weight)
    logits, features = torch.tensor([[1., -2.], [0., 3.], [-1., 0.5]]), torch.rand(3, 2048 + 1280)
    found = teachers.loss(torch.tensor(5.), logits, features if teachers.width else None,
                          teachers(normalized(CONFIG['mean'], CONFIG['std'])))

    probabilities, pooled = [], []
    for name, side in zip(NAMES, (128, 224)):
        network = timm.create_model(name, pretrained=True).eval()
        images = interpolate(
            normalized(network.pretrained_cfg['mean'], network.pretrained_cfg['std']),
            (side, side), mode='bilinear')
        with torch.no_grad():
            probabilities.append(network(images).sigmoid())
            vectors = network.forward_head(network.forward_features(images), pre_logits=True)
        pooled.append(vectors / vectors.norm(dim=1, keepdim=True))
    target, theirs = (probabilities[0] + probabilities[1]) / 2, torch.cat(pooled, 1)
    entropy = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log()).mean()
    cosine = (features * theirs).sum(1) / features.norm(dim=1) / theirs.norm(dim=1)
    expected = (1 - weight) * 5 + weight * entropy + feature_weight * (1 - cosine).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture(scope='module')
def of_tasks(tmp_path_factory):
    """Folders of small networks by the task that they have learned."""
    folder, tasks = tmp_path_factory.mktemp('teachers'), {
        'other': Task('other', ('x', 'y')), 'sigmoid': ISIC2017, 'softmax': ISIC2017.with_head('softmax'),
        'three': Task('three', ('melanoma', 'seborrheic_keratosis'), 'multiclass')}
    for name, task in tasks.items():
        torch.manual_seed(0)
        network = timm.create_model('arl_cnn14', num_classes=len(task.outputs), channels=[8, 16, 32, 64])
        save_network(network, folder / name, task.outputs, dict(
            timm.data.resolve_model_data_config(network), input_size=(3, 64, 64)), task=task.config(),
            channels=[8, 16, 32, 64])
    return {name: str(folder / name) for name in tasks}, tasks


def test_the_features_alone_of_a_teacher_with_other_labels(of_tasks):
    folders, _ = of_tasks
    images = torch.rand(2, 3, 64, 64)
    both, one = (Teachers([folders[name] for name in names], CONFIG, ISIC2017, 0.5, 1.)
                 for names in (('other', 'sigmoid'), ('sigmoid',)))
    assert (both.width, one.width) == (512, 256)
    assert torch.equal(both(images)[1], one(images)[1])
    softmax = ISIC2017.with_head('softmax')
    student = Teachers([folders['softmax']], CONFIG, softmax, 0.5, 1.)
    assert student(images)[1].shape == (2, 3)
    assert one(images)[1].shape == Teachers([folders['softmax']], CONFIG, ISIC2017, 0.5, 1.)(images)[1].shape


@pytest.mark.parametrize('teacher, task, weights, sentence', [
    ('other', 'sigmoid', (0.5, 0.), 'Nothing would be learned from the teacher .*: leave it out, raise'),
    ('sigmoid', 'softmax', (0.5, 1.), 'has one sigmoid per label, and a softmax over the diagnoses cannot learn'),
    ('three', 'softmax', (0.5, 1.), 'has the outputs .*: leave it out, or pass --distill-weight 0'),
])
def test_a_teacher_that_cannot_teach_is_named(of_tasks, teacher, task, weights, sentence):
    folders, tasks = of_tasks
    with pytest.raises(RunError, match=sentence):
        Teachers([folders['softmax'], folders[teacher]], CONFIG, tasks[task], *weights)
