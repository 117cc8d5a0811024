"""Networks whose every parameter has a value of its own, as if trained: for tests."""
import timm
import torch
from torch import nn

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def create(name, **kwargs):
    """A network in which every norm, alpha and bias has a value of its own, as if trained on IMAGES."""
    if name.startswith(('arl_cnn14', 'arl_cnn26', 'resnet14', 'seresnet14')):
        kwargs.setdefault('channels', [16, 32, 64, 128])
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 2, **kwargs}).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.
    for number, (key, p) in enumerate(model.named_parameters()):
        if key.endswith('.alpha'):
            nn.init.constant_(p, 0.5 + 0.3 * number % 2)
    if model.num_classes:
        nn.init.normal_(model.get_classifier().bias)
    with torch.no_grad():
        model(IMAGES)
    return model.eval()
