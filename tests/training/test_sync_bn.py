"""--sync-bn, which needs GPUs to run; what it makes of a network does not."""
import pytest
import timm
import torch


@pytest.mark.parametrize('name', ['arl_cnn14', 'arl_tf_efficientnet_lite0', 'regnety_002'])
def test_synchronised_batch_norms_keep_their_activations(benchmarks, name):
    """timm's BatchNormAct2d is a batch norm and an activation; PyTorch's own converter keeps the first alone."""
    from finetune_isic import convert_sync_batchnorm
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=2).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = model(images)
        model = convert_sync_batchnorm(model)
        assert torch.equal(model(images), before)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
