"""What is learned beside the labels."""
import numpy as np
import pytest
import timm
import torch
from test_finetune_isic import SMALL, read_csv, run

from timm_arl.training.distillation import mask_loss


@pytest.mark.slow
def test_masks_are_learned_beside_the_diagnoses(repo, isic_sample, tmp_path):
    args = ['--data', isic_sample, *SMALL, '--model', 'resnet14', '--tracker', 'none', '--mask-weight', 1]
    done = run(repo, *args, '--epochs', 3, '--ema', 0, '--mixup', 0.2, '--output-dir', tmp_path / 'out')
    assert done.returncode == 0 and "The lesions' masks are learned too" in done.stdout, done.stderr
    losses = [float(row['train_mask_loss']) for row in read_csv(tmp_path / 'out' / 'summary.csv')]
    assert losses[2] < losses[0]
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert not [name for name, _ in model.named_parameters() if 'mask' in name]


def test_loss_of_masks():
    logits = torch.tensor([[[[0., 2.]]], [[[5., -5.]]]])
    masks = torch.zeros(2, 1, 2, 4)
    masks[0, 0, :, 2:], masks[1] = 1., torch.nan  # the left half without lesion, the right half lesion; one unknown
    expected = (np.log(2) + np.log1p(np.exp(-2))) / 2
    assert mask_loss(logits, masks).item() == pytest.approx(expected, rel=1e-6)
    assert mask_loss(logits, torch.full_like(masks, torch.nan)).item() == 0
