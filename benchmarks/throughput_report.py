"""A table, the growth of time and memory, and a bar chart from results files of throughput.py, old ones too.

    python benchmarks/throughput_report.py benchmarks/results/arl_cnn50_infer.csv MORE.csv --chart docs/throughput.png
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Tuple

from timm_arl.extras import require

require('train', __name__)

from timm_arl.files import replacing

__all__ = ['bar_chart', 'columns_of', 'growth_table', 'markdown_table']

SOME = {'p50 ms': 'latency_p50_ms', 'p95 ms': 'latency_p95_ms', 'kernels': 'kernels'}  # columns by title


def columns_of(row: Dict[str, Any]) -> str:
    """What the columns of a row begin with: requests of latency are inference."""
    return 'train' if row['mode'] == 'train' else 'infer'


def setting_of(row: Dict[str, Any]) -> Tuple[str, str, int, int]:
    kind = columns_of(row)
    return row['mode'], row['precision'], row[f'{kind}_batch_size'], row[f'{kind}_img_size']


def label_of(row: Dict[str, Any]) -> str:
    notes = [row['backend']] if row['backend'] != 'eager' else []
    if row['compile']:
        notes.append('compiled' if row.get('compile_mode') in (None, 'default') else row['compile_mode'])
    return row['model'] + (f' ({", ".join(notes)})' if notes else '')


def number(value: Any) -> str:
    return '' if value is None else value if isinstance(value, str) else f'{value:,}'


def markdown_table(rows: List[Dict[str, Any]]) -> str:
    """One line per row: speed, ratio and memory, and what only some files or rows have."""
    some = {title: column for title, column in SOME.items() if any(row.get(column) is not None for row in rows)}
    titles = ['model', 'mode', 'precision', 'batch x px', 'samples/s', 'ms/step', 'spread', 'ratio', 'peak MB',
              'saved for backward MB', 'GMACs', *some]
    lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    for row in rows:
        mode, precision, batch_size, img_size = setting_of(row)
        kind = columns_of(row)
        ratio = f'{row["ratio"]:.3f} of {row["relative_to"]}'
        cells = [label_of(row), mode, precision, f'{batch_size} x {img_size}', number(row[f'{kind}_samples_per_sec']),
                 number(row[f'{kind}_step_time']), f'{row["spread"]:.1%}', ratio, number(row.get('peak_memory_mb')),
                 number(row.get('saved_memory_mb')), f'{row["infer_gmacs"]:.2f}',
                 *(number(row.get(column)) for column in some.values())]
        lines.append(f'| {" | ".join(cells)} |')
    devices = sorted({f'{row["device"]}, {row["threads"]} threads, {row["processes"]} process(es); {row["versions"]}; '
                      f'{settings_of(row)}; commit {row["commit"]}' for row in rows})
    return '\n'.join(lines) + '\n\n' + '\n'.join(devices) + '\n'


def settings_of(row: Dict[str, Any]) -> str:
    """The switches of a row that are known: a CPU has no TF32, and older files have fewer columns."""
    names = ('compile', 'compile_mode', 'channels_last', 'tf32', 'cudnn_benchmark', 'side_by_side')
    return ', '.join(f'{name} {row[name]}' for name in names if row.get(name) is not None)


def growth_table(rows: List[Dict[str, Any]]) -> str:
    """Time and memory per pixel of a batch against those of the smallest batch; '' unless a sweep was run."""
    series: Dict[Tuple[str, ...], List[Dict[str, Any]]] = {}
    for row in (row for row in rows if row['mode'] != 'latency'):
        series.setdefault((label_of(row), row['mode'], row['precision']), []).append(row)
    if all(len(s) == 1 for s in series.values()):
        return ''
    lines = [
        '', 'Growth: 1.00 means linear in the pixels of a batch.', '',
        '| model | mode | precision | batch x px | time per pixel | saved per pixel |', '|---|---|---|---|---|---|']
    for (label, mode, precision), members in series.items():
        members = sorted(members, key=pixels)
        first = members[0]
        for row in members:
            time, kept = (
                '' if not row.get(column) else f'{row[column] / pixels(row) / (first[column] / pixels(first)):.2f}'
                for column in (f'{mode}_step_time', 'saved_memory_mb'))
            lines.append(f'| {label} | {mode} | {precision} | {row[f"{mode}_batch_size"]} x {row[f"{mode}_img_size"]} '
                         f'| {time} | {kept} |')
    return '\n'.join(lines) + '\n'


def pixels(row: Dict[str, Any]) -> int:
    _, _, batch_size, img_size = setting_of(row)
    return batch_size * img_size ** 2


def bar_chart(rows: List[Dict[str, Any]], path: Path) -> None:
    """Step time of each row relative to the first of its setting, bars grouped by setting, spread as whiskers.

    A panel for each machine and environment; its title has the variables that the others do not have.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    machines: Dict[Tuple[str, FrozenSet[str]], List[Dict[str, Any]]] = {}
    for row in rows:
        environment = frozenset((row.get('environment') or '').split())
        machines.setdefault((f'{row["device"]}, {row["threads"]} threads', environment), []).append(row)
    shared = frozenset.intersection(*(environment for _, environment in machines))
    labels = list(dict.fromkeys(label_of(r) for r in rows))
    groups = [list(dict.fromkeys(setting_of(r) for r in members)) for members in machines.values()]
    widths = [max(4., 1.2 + 1.1 * len(settings) * max(2, len(labels)) / 2) for settings in groups]
    figure, panels = plt.subplots(
        1, len(machines), figsize=(sum(widths), 3.6), width_ratios=widths, sharey=True, squeeze=False,
        layout='constrained')
    width = 0.8 / len(labels)
    colors = ['#b8bcc4', '#c2452d', '#6a7f9c', '#d99a3d', '#4f9d8b', '#8a6bb1']
    for axes, ((machine, environment), own), settings in zip(panels[0], machines.items(), groups):
        for i, label in enumerate(labels):
            members = [(settings.index(setting_of(r)), r) for r in own if label_of(r) == label]
            at = [k + (i - (len(labels) - 1) / 2) * width for k, _ in members]
            heights = [r['ratio'] for _, r in members]
            axes.bar(at, heights, width * 0.92, label=label, color=colors[i % len(colors)],
                     yerr=[r['ratio'] * r['spread'] / 2 for _, r in members], error_kw=dict(lw=0.8, ecolor='#444'))
            for x, height in zip(at, heights):
                axes.text(x, 0.02, f'{height:.2f}', ha='center', va='bottom', fontsize=7)
        axes.axhline(1., color='#444', lw=0.8, ls=':')
        axes.set_xticks(range(len(settings)), [f'{m}, {p}\n{b} x {s} px' for m, p, b, s in settings], fontsize=8)
        axes.set_title('\n'.join([machine, ' '.join(sorted(environment - shared))]).strip(), fontsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0][0].set_ylabel('time of a step, relative', fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=len(labels),
                  loc='outside upper center')
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format='png')
    plt.close(figure)


def read_csv(path: Path) -> List[Dict[str, Any]]:
    """The rows of a results file, with numbers and booleans as such and empty cells as None."""

    def value(cell: str) -> Any:
        try:
            return json.loads({'True': 'true', 'False': 'false', '': 'null'}.get(cell, cell))
        except json.JSONDecodeError:
            return cell

    with open(path, newline='', encoding='utf-8') as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description='The table and the chart of one or more results files.')
    parser.add_argument('results', nargs='+', type=Path, help='CSV files of throughput.py')
    parser.add_argument('--chart', type=Path, required=True, metavar='FILE.png', help='picture to write')
    args = parser.parse_args()
    try:
        rows = [row for path in args.results for row in read_csv(path)]
        table = markdown_table(rows) + growth_table(rows)
        bar_chart(rows, args.chart)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        parser.error(f'cannot read results of throughput.py: {error}')
    print(f'{table}\nwritten: {args.chart}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
