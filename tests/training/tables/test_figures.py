"""The paper's pictures for networks of any head."""
import timm
import torch
from PIL import Image

from timm_arl.factory import save_network
from timm_arl.isic.task import ISIC2017
from timm_arl.predictor import Predictor
from timm_arl.training.tables import figures
from timm_arl.training.tables.figures import Shown, draw_figures


def test_the_map_of_a_softmax_head_is_that_of_the_label(tmp_path, monkeypatch):
    """Its outputs are the classes, of which the first is no label: the map of another class would be shown."""
    maps = {}

    def remember(picture, heat, legend, scale):
        maps.setdefault(legend, []).append(heat)
        return picture

    monkeypatch.setattr(figures, 'overlay', remember)
    predictors = []
    torch.manual_seed(0)
    model = timm.create_model('resnet14', channels=[8, 16, 32, 64])
    for head in ('sigmoid', 'softmax'):
        task = ISIC2017.with_head(head)
        model.reset_classifier(len(task.outputs))
        classifier = model.get_classifier()
        torch.nn.init.zeros_(classifier.weight)
        with torch.no_grad():  # all features say melanoma, and nothing says anything else
            classifier.weight[task.outputs.index('melanoma')] = 1.
            classifier.bias[:] = torch.tensor([5. * (name == 'melanoma') for name in task.outputs])
        save_network(model, tmp_path / head, task.outputs, dict(
            timm.data.resolve_model_data_config(model), input_size=(3, 64, 64)), task=task.config(),
            channels=[8, 16, 32, 64])
        predictors.append(Predictor(tmp_path / head))
    picture = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 50).convert('RGB')
    draw_figures(tmp_path, predictors, [Shown('a', lambda: picture)], 1)
    (legend, found), = maps.items()
    assert legend.startswith('Evidence for melanoma') and abs(found[0]).max() > 0
    for sigmoid, softmax in zip(found[::2], found[1::2]):
        assert abs(sigmoid - softmax).max() <= 1e-4 * abs(sigmoid).max()
