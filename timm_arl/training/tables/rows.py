"""The rows of the paper's tables: which network, from which weights, trained on which images."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Tuple

from ...files import read_rows

__all__ = ['GATED', 'MASKS', 'PLAIN', 'Row', 'TABLES', 'TITLES', 'pairs_of', 'printed_figures']

PLAIN, GATED = 'tf_efficientnet_lite0', 'arl_tf_efficientnet_lite0'
PEAKED = 0.25  # a start for T: with masks of 0.94 to 0.98 effective share at T = 1, F has a deviation of 0.2 to 0.35
MASKS = 'lesion_masks'  # of segment_lesions.py: their run, and the line that says how good they are


@dataclass(frozen=True)
class Row:
    """One system of a table.

    Args:
        name: Of the row, of its runs and of its predictions. Rows of the same name in two tables are the same runs.
        model: timm name; '' for a system that is only printed.
        weights: The network whose ImageNet weights it starts from; '' for random weights.
        flags: What else finetune_isic.py is told.
        alpha_zero_of: The row whose trained networks are scored again with every alpha at 0.
        lesion_crop: Whether images are cropped to the lesion, by the masks of segment_lesions.py.
        about: What it is, in a few words.
    """
    name: str
    model: str = ''
    weights: str = ''
    flags: Tuple[str, ...] = ()
    alpha_zero_of: str = ''
    lesion_crop: bool = False
    about: str = ''


def _alpha_zero(row: Row) -> Row:
    return replace(row, name=f'{row.name}_alpha_zero', alpha_zero_of=row.name,
                   about=f'{row.about}, trained with its gate, scored with every alpha at 0')


SCRATCH = [
    Row('resnet14', 'resnet14', about='from random weights'),
    Row('seresnet14', 'seresnet14', about='from random weights'),
    Row('ran14', 'ran14', about='from random weights'),
    Row('arl_cnn14', 'arl_cnn14', about='spatial attention, from random weights'),
]
LITE0 = [
    Row(PLAIN, PLAIN, PLAIN, about='from ImageNet weights'),
    Row(GATED, GATED, PLAIN, about='spatial attention, from ImageNet weights'),
]
DEEP = [Row(name, name, weights, about='from ImageNet weights') for name, weights in (
    ('resnet50', 'resnet50'), ('seresnet50', 'seresnet50'), ('ran50', 'resnet50'), ('arl_cnn50', 'resnet50'))]


def _attentions(base: Row) -> List[Row]:
    """The base, the other masks of the same network, one that attends to few places, and each with alpha at 0."""
    start = 'from ImageNet weights' if base.weights else 'from random weights'
    rows = []
    for scale in ('softmax', 'mean1'):
        for attention in ('spatial', 'channel', 'mixed'):
            suffix = '' if attention == 'spatial' else f'_{attention}'
            suffix += '' if scale == 'softmax' else '_mean1'
            flags = ('--model-kwargs', f'attention={attention}', f'mask_scale={scale}') if suffix else ()
            about = f'{attention} attention, mask {"as printed" if scale == "softmax" else "with a mean of 1"}, {start}'
            row = replace(base, name=base.name + suffix, flags=flags, about=about)
            rows += [row, _alpha_zero(row)]
    row = replace(
        base, name=f'{base.name}_temperature',
        flags=('--model-kwargs', f'mask_temperature={PEAKED}', 'learn_temperature=True'),
        about=f'spatial attention, mask of F / T with T learned from {PEAKED} on (not in the paper), {start}')
    return [*rows, row, _alpha_zero(row)]


def _variant(row: Row, suffix: str, about: str, **changes) -> Row:
    return replace(row, name=f'{row.name}_{suffix}', about=f'{row.about}, {about}', **changes)


def _with_crops(rows: List[Row]) -> List[Row]:
    return [each for row in rows for each in (row, _variant(row, 'crop', 'cropped to the lesion', lesion_crop=True))]


def _with_grey_world(rows: List[Row]) -> List[Row]:
    return [each for row in rows for each in (
        row, _variant(row, 'grey', 'grey-world colour constancy', flags=('--grey-world',)))]


TITLES = {
    'table1': 'Tables I and II: architectures',
    'table3': 'Table III: ARL-CNN beside other networks',
    'table4': "Table IV: beside the challenge's records",
    'table5': 'Table V: spatial, channel and mixed attention',
    'table6': 'Table VI: with and without lesion crops',
    'table7': 'Table VII: is the gain more than noise between runs?',
    'constancy': 'Colour constancy (Section V)',
    'masks': 'How flat the masks of trained gates are',
    'maps': 'Where trained networks look: class activation maps against outlined lesions',
}
TABLES: Dict[str, List[Row]] = {
    'table3': [*SCRATCH, *LITE0, *DEEP],
    'table4': [Row(f'challenge_{k}', about=f'entry of rank {k} in the challenge, known as printed alone')
               for k in range(1, 7)] + [DEEP[3], LITE0[1], SCRATCH[3]],
    'table5': [*_attentions(LITE0[1]), *_attentions(SCRATCH[3]),
               *(row for row in _attentions(DEEP[3]) if not (
                   row.alpha_zero_of or 'mean1' in row.name or 'temperature' in row.name))],
    'table6': _with_crops([*LITE0, DEEP[0], DEEP[3]]),
    'constancy': _with_grey_world([*LITE0, DEEP[3]]),
}


def pairs_of(table: str) -> List[Tuple[str, str]]:
    """Rows whose difference a table is about, (minuend, subtrahend)."""
    names = [row.name for row in TABLES[table]]
    if table == 'table3':
        return [('arl_cnn14', 'resnet14'), ('arl_cnn14', 'seresnet14'), ('arl_cnn14', 'ran14'), (GATED, PLAIN),
                ('arl_cnn50', 'resnet50'), ('arl_cnn50', 'seresnet50'), ('arl_cnn50', 'ran50')]
    if table == 'table5':
        bases = [GATED, 'arl_cnn14', 'arl_cnn50']
        return [*((row.alpha_zero_of, row.name) for row in TABLES[table] if row.alpha_zero_of),
                *((name, base) for base in bases for name in names
                  if name.startswith(f'{base}_') and not name.endswith('_alpha_zero'))]
    suffix = {'table6': '_crop', 'constancy': '_grey'}.get(table)
    return [(name, name[:-len(suffix)]) for name in names if suffix and name.endswith(suffix)]


def printed_figures(table: str) -> Dict[Tuple[str, str], float]:
    """The paper's figures of a table, as printed, by row and label."""
    rows = read_rows(Path(__file__).with_name('printed.csv'))
    return {(row['row'], row['label']): float(row['printed']) for row in rows if row['table'] == table}
