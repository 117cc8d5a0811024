"""timm-arl: the ARL-CNN family for timm. Importing it registers the models: ``timm.create_model('arl_cnn50')``."""
from . import arl_cnn, arl_efficientnet, baselines, residual_attention
from .arl_cnn import ARLCNN, ARLBottleneck
from .attention import attention_mask, attention_residual
from .download import WeightsError

__version__ = '0.1.0'
__all__ = [
    'ARLCNN', 'ARLBottleneck', 'WeightsError', 'arl_cnn', 'arl_efficientnet', 'attention_mask', 'attention_residual',
    'baselines', 'residual_attention',
]
