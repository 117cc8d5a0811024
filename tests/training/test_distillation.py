"""What is learned beside the labels."""
import numpy as np
import pytest
import timm
import torch
from test_finetune_isic import SMALL, read_csv

from timm_arl.training.distillation import mask_loss

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
