"""Tables I and II: parameters, multiply-accumulates and the shapes of the stages."""
import shlex
from typing import Any, Dict, List, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .pages import cell
from .rows import GATED, PLAIN, printed_figures

__all__ = ['SYSTEMS', 'SIDE', 'table1_lines']

SYSTEMS = ('resnet14', 'ran14', 'seresnet14', 'arl_cnn14', 'resnet50', 'ran50', 'seresnet50', 'arl_cnn50', PLAIN, GATED)
SIDE = 224  # pixels, as in the paper


def table1_lines(args: Any) -> Tuple[List[Dict[str, str]], Dict[str, str]]:
    """Lines of table1.csv: each network with the two outputs of the task.

    Args:
        args: Arguments of reproduce_tables.py.
    """
    printed = printed_figures('table1')
    command = 'python benchmarks/reproduce_tables.py ' + shlex.join(['table1', '--output-dir', args.output_dir])
    lines, about = [], {}
    for name in tqdm(SYSTEMS, desc='table1', leave=False):
        model = timm.create_model(name, num_classes=2).eval()
        x = torch.zeros(1, 3, SIDE, SIDE)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            features, stages = model.forward_intermediates(x)
            model.forward_head(features)
        about[name] = 'outputs of the stages: ' + ', '.join(
            f'{c} x {h} x {w}' for c, h, w in (stage.shape[1:] for stage in stages))
        figures = {'parameters (millions)': sum(p.numel() for p in model.parameters()) / 1e6,
                   'MACs (billions)': counter.get_total_flops() / 2e9}
        for label, value in figures.items():
            lines.append(cell(name, label, printed.get((name, label)), (value,), image_size=SIDE, command=command))
    return lines, about
