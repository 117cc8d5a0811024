"""Table VII: the paper's t-test with its arithmetic corrected, and the same question asked of our own seeds."""
import shlex
from typing import Any, Dict, List, Tuple

import numpy as np
from scipy import stats

from .pages import cell
from .rows import GATED, PLAIN, printed_figures
from .scores import Scores

__all__ = ['table7_lines']

RUNS = 10  # of each network, in the paper
# of the ten figures that the paper prints for each network, in percent; it prints 0.0224 and 0.0064
SUMS_OF_SQUARES = {'ResNet50': 0.224, 'ARL-CNN50': 0.064}
PAIRS = (('arl_cnn14', 'resnet14'), ('arl_cnn14', 'ran14'), (GATED, PLAIN))


def table7_lines(
        args: Any,
        scores: Dict[str, Scores],
        columns: Dict[str, Dict[str, Any]],
) -> Tuple[List[Dict[str, str]], Dict[str, str]]:
    """Lines of table7.csv.

    Args:
        args: Arguments of reproduce_tables.py.
        scores, columns: Those of table3, as read_scores gives them.
    """
    command = 'python benchmarks/reproduce_tables.py table7 ' + shlex.join([
        *(['--data', args.data] if args.data else []), '--output-dir', args.output_dir, '--seeds',
        *map(str, args.seeds)])
    printed = printed_figures('table7')
    means = [printed['printed', f'mean of {name} (%)'] for name in SUMS_OF_SQUARES]
    pooled = float(np.sqrt(sum(SUMS_OF_SQUARES.values()) / (2 * RUNS - 2)))
    again = {
        **{f'mean of {name} (%)': mean for name, mean in zip(SUMS_OF_SQUARES, means)},
        **{f'sum of squares of {name}': value for name, value in SUMS_OF_SQUARES.items()},
        's_w': pooled,
        't(18)': (means[0] - means[1]) / (pooled * np.sqrt(2 / RUNS)),
        'critical t(18) at 0.01': float(stats.t.ppf(0.01, 2 * RUNS - 2)),
    }
    note = ('the means are as printed, the sums of squares those of the printed runs, the rest follows from them; the '
            'conclusion stands, for noise between runs alone')
    lines = [cell('printed', label, printed['printed', label], (value,), note, command=command)
             for label, value in again.items()]
    for first, second in PAIRS:
        made = {**columns.get(first, {}), 'command': command}
        lines += _own_lines(scores, first, second, made)
    about = {'printed': 'ResNet50 against ARL-CNN50, ten runs each', **{
        f'{first} against {second}': 'our seeds of table3, mean test AUC in percent, paired by seed'
        for first, second in PAIRS}}
    return lines, about


def _own_lines(scores: Dict[str, Scores], first: str, second: str, made: Dict[str, Any]) -> List[Dict[str, str]]:
    """A paired t-test over the seeds: noise between runs, on these test images."""
    name = f'{first} against {second}'
    labels = ['mean difference (%)', 'standard deviation of the differences (%)', 't', 'p, two-sided']
    apart = scores[first] - scores[second] if first in scores and second in scores else None
    if apart is None or len(apart.seeds) < 2:
        why = 'fewer than two seeds of both are there: make table3 first, and pass its --data and --output-dir'
        return [cell(name, label, note=why) for label in labels]
    differences = 100 * apart.values['mean'][:, 0]
    if differences.std() == 0:
        return [cell(name, label, note='the differences of all seeds are the same') for label in labels]
    test = stats.ttest_1samp(differences, 0)
    interval = test.confidence_interval()
    figures = [(float(differences.mean()), float(interval.low), float(interval.high)),
               (float(differences.std(ddof=1)),), (float(test.statistic),), (float(test.pvalue),)]
    made = {**made, 'seeds': ' '.join(map(str, apart.seeds))}
    return [cell(name, label, None, figure, **made) for label, figure in zip(labels, figures)]
