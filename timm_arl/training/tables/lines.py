"""The lines of a table, from the predictions of its runs, which must be of the same images, weights and flags."""
import json
import shlex
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from PIL import Image

from ...download import sha256_of
from ...isic.dataset import DataError, label_array
from ...isic.images import stored_size
from ...isic.predictions import read_predictions
from ..arguments import RunError
from .pages import cell
from .rows import MASKS, TABLES, Row, pairs_of, printed_figures
from .scores import Scores, labels_of

__all__ = [
    'budget_flags', 'check_flags', 'check_record', 'is_stale', 'origin', 'read_record', 'read_scores', 'recorded_sizes',
    'settings', 'stored_sizes', 'table_lines',
]


def budget_flags(args: Any) -> List[str]:
    """What the command line says about all runs, as flags of the programs."""
    return [f'--{name}={value}' for name, value in (('epochs', args.epochs), ('img-size', args.img_size)) if value]


def read_record(path: Path, *keys: str) -> Any:
    """What a JSON file of ours says under a key, or a key in that of another; without keys, all of it."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        for key in keys:
            found = found[key]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        what = path.parent if path.name in ('run.json', 'metrics.json') else path.with_suffix('.*')
        raise RunError(f'{path} is missing or damaged: remove {what}, and run the same command again.') from None


def settings(args: Any, row: Row) -> List[str]:
    """What the runs of a row have in common, beside the recipe."""
    return [*row.flags, *budget_flags(args), f'--mixed-precision={args.mixed_precision}']


def origin(args: Any, row: Row) -> Dict[str, str]:
    """Which images and weights a run is of."""
    return {'data': args.digest, 'images': args.stored, 'weights': row.weights and (
        sha256_of(Path(args.files[row.weights])) if row.weights in args.files else 'hub')}


def check_record(args: Any, row: Row, path: Path, images_alone: bool = False) -> None:
    """Refuse predictions that were made from other images, or with other weights or flags.

    Raises:
        RunError: They were, or the record is missing or damaged.
    """
    made, asked = read_record(path, 'origin'), origin(args, row)
    if read_record(path, 'origin', 'data') != asked['data']:
        raise RunError(f'{path} was made with other images than those of {args.data}: give the same --data, or another '
                       f'--output-dir.')
    if made.get('images', asked['images']) != asked['images']:  # the first records had none
        raise RunError(f'{path} was made with images of {made["images"]}, and those of {args.data} have '
                       f'{asked["images"]}: give the same --data, or another --output-dir.')
    if images_alone:
        return
    if read_record(path, 'origin', 'weights') != asked['weights']:
        raise RunError(f'{path} was made with other weights, {made["weights"]} and not {asked["weights"]}: give the '
                       f'same, or another --output-dir.')
    check_flags(args, row, path)


def check_flags(args: Any, row: Row, path: Path) -> None:
    """Refuse flags other than those that a run was made with.

    Raises:
        RunError: They are others, or the record is missing or damaged.
    """
    of, wanted = read_record(path, 'settings'), settings(args, row)
    if of != wanted:
        run = path.parent.parent / 'runs' / path.stem
        raise RunError(f'{path} was made with other flags, {of} and not {wanted}: give the same, or another '
                       f'--output-dir, or remove {path.with_suffix(".*")} and {run}.')


def is_stale(out: Path, row: Row, seed: int) -> bool:
    """Whether the predictions of a row without attention are of other weights than its network has now."""
    paths = [out / 'predictions' / f'{name}-seed{seed}.json' for name in (row.alpha_zero_of, row.name)]
    if not row.alpha_zero_of or not all(path.exists() for path in paths):
        return False
    network, scored = (read_record(path).get('tensors') for path in paths)  # the first records had none
    return network is not None and network != scored


def recorded_sizes(args: Any) -> str:
    """The sizes of the images that the predictions were made from, for what needs labels alone; '' for runs."""
    alone = args.check or args.drop_duplicates
    records = sorted(Path(args.output_dir, 'predictions').glob('[!.]*-seed*.json')) if alone else []
    return next((read_record(path, 'origin').get('images', '') for path in records), '')


def stored_sizes(splits: Sequence[Any]) -> str:
    """The smallest and the largest size of the stored images, in words.

    Raises:
        DataError: An image that cannot be read.
    """
    sizes = set()
    for split in splits:
        for image_id, image in zip(split['image_id'], split.select_columns('image')['image']):
            try:
                sizes.add(stored_size(image))
            except (OSError, Image.DecompressionBombError) as error:
                raise DataError(f'The image of {image_id} cannot be read ({error}): fix it.') from error
    return ' to '.join(f'{width} x {height}' for width, height in dict.fromkeys((min(sizes), max(sizes)))) + ' px'


def row_command(args: Any, *rows: Row) -> str:
    """The command that makes some rows, or scores those that are made."""
    if args.drop_duplicates:
        return 'python benchmarks/reproduce_tables.py ' + shlex.join([
            args.table, '--data', str(args.data), '--output-dir', args.output_dir, '--seeds', *map(str, args.seeds),
            '--drop-duplicates', args.drop_duplicates])
    names = dict.fromkeys(name for row in rows for name in (row.alpha_zero_of, row.name) if name)
    weights = dict.fromkeys(f'{row.weights}={args.files[row.weights]}' for row in rows if row.weights in args.files)
    return 'python benchmarks/reproduce_tables.py ' + shlex.join([
        args.table, '--data', str(args.data), '--output-dir', args.output_dir, '--seeds', *map(str, args.seeds),
        '--row', *names, *(['--weights', *weights] if weights else []), *budget_flags(args),
        *(['--mixed-precision', args.mixed_precision] if args.mixed_precision != 'no' else []),
        *(['--cpu-threads', str(args.cpu_threads)] if args.cpu_threads else [])])


def read_scores(args: Any, out: Path, table: str) -> Tuple[Dict[str, Scores], Dict[str, Dict[str, Any]]]:
    """Scores of the rows whose predictions are there, and the columns that tell how they were made."""
    test = args.splits['test']
    ids = list(test['image_id'])
    kept = [k for k, image_id in enumerate(ids) if image_id not in args.left_out]
    truth = label_array(test)[kept]
    scores: Dict[str, Scores] = {}
    columns: Dict[str, Dict[str, Any]] = {}
    started: Dict[str, Path] = {}  # by the network whose weights they started from
    for row in TABLES[table]:
        paths = {seed: out / 'predictions' / f'{row.name}-seed{seed}.csv' for seed in args.seeds}
        paths = {seed: path for seed, path in paths.items() if path.exists() and not is_stale(out, row, seed)}
        if not paths:
            continue
        for path in paths.values():
            check_record(args, row, path.with_suffix('.json'), images_alone=True)
        records = [path.with_suffix('.json') for path in paths.values()]
        _check_alike(*records)
        _check_weights(row.weights, started.setdefault(row.weights, records[0]), records[0])
        scores[row.name] = Scores(truth, {
            seed: read_predictions(path, ids)[kept] for seed, path in paths.items()})
        made = [read_record(path, 'columns') for path in records]
        columns[row.name] = {
            'seeds': ' '.join(map(str, paths)), 'images': len(kept), 'command': row_command(args, row),
            **{key: ' '.join(dict.fromkeys(str(each[key]) for each in made))
               for key in made[0]}}
    return scores, columns


def _check_alike(first: Path, *others: Path) -> None:
    """Refuse a row whose seeds were made in different ways: their mean would be of nothing that was run."""
    for key in ('settings', 'origin'):
        for other in others:
            if read_record(other, key) != read_record(first, key):
                raise RunError(f'{other} was made with other {key} than {first}, {read_record(other, key)} and not '
                               f'{read_record(first, key)}: remove {other.with_suffix(".*")} to make it again.')


def _check_weights(network: str, first: Path, second: Path) -> None:
    """Refuse to compare rows that started from different weights of the same network."""
    one, two = (read_record(path, 'origin', 'weights') for path in (first, second))
    if one != two:
        raise RunError(f'{first} and {second} cannot be compared: they started from different weights of {network}, '
                       f'{one} and {two}. Make both with the same --weights, in another --output-dir.')


def _check_budgets(first: str, second: str, columns: Dict[str, Dict[str, Any]]) -> None:
    """Refuse to subtract rows that were trained by different budgets."""
    for key in ('image_size', 'epochs', 'precision'):
        one, two = columns[first][key], columns[second][key]
        if one != two:
            raise RunError(f'{first} and {second} cannot be compared: their {key.replace("_", " ")} is {one} and '
                           f'{two}. Make both with the same flags, in another --output-dir.')


def reason_of(out: Path, name: str, seed: int) -> str:
    path = out / 'runs' / f'{name}-seed{seed}.reason'
    return path.read_text(encoding='utf-8') if path.is_file() else ''


def _unreachable(out: Path, table: str, row: Row, seed: int) -> str:
    """Why another row that starts from the same weights was not made, where none was."""
    others = [other for other in TABLES[table] if row.weights and other.weights == row.weights]
    made = any(path for other in others for path in (out / 'predictions').glob(f'{other.name}-seed*.csv'))
    refused = (out / 'runs' / f'{other.name}-seed{seed}.refused' for other in others)
    return '' if made else next((path.with_suffix('.reason').read_text(encoding='utf-8') for path in refused
                                 if path.exists() and path.with_suffix('.reason').exists()), '')


def table_lines(args: Any, out: Path) -> Tuple[List[Dict[str, str]], Dict[str, str]]:
    """The lines of tableN.csv, from the predictions that are there, and what each row is."""
    printed = printed_figures(args.table)
    scores, columns = read_scores(args, out, args.table)
    by_name = {row.name: row for row in TABLES[args.table]}
    lines = []
    for row in TABLES[args.table]:
        note = row.about
        if row.model:
            missing: Dict[str, List[int]] = {}
            for seed in args.seeds:
                if row.name not in scores or seed not in scores[row.name].seeds:
                    why = (f'scored with other weights than {row.alpha_zero_of} has now: --row {row.name} scores it '
                           f'again' if is_stale(out, row, seed) else
                           reason_of(out, row.name, seed) or reason_of(out, row.alpha_zero_of, seed)
                           or _unreachable(out, args.table, row, seed) or f'not run: --row {row.name} makes it')
                    missing.setdefault(why, []).append(seed)
            note = '; '.join(f'seed {", ".join(map(str, seeds))}: {why}' for why, seeds in missing.items())
        for label in labels_of(args.table):
            figure = scores[row.name].figure(label) if row.name in scores else None
            lines.append(cell(row.name, label, printed.get((row.name, label)), figure, note,
                              **columns.get(row.name, {})))
    path = out / 'predictions' / f'{MASKS}.json'
    if args.table == 'table6' and path.exists():
        found = read_record(path, 'validation')
        lines += [cell(MASKS, key, None, (found[key], *found[f'{key}_ci95']), 'on validation', images=found['images'])
                  for key in ('dice', 'iou')]
    for first, second in pairs_of(args.table):
        apart = scores[first] - scores[second] if first in scores and second in scores else None
        if apart:
            _check_budgets(first, second, columns)
        how = {**{key: ' '.join(dict.fromkeys(' '.join(str(columns[name][key]) for name in (first, second)).split()))
                  for key in columns[first]},
               'seeds': ' '.join(map(str, apart.seeds)),
               'command': row_command(args, by_name[first], by_name[second])} if apart else {}
        for label in labels_of(args.table):
            both = [printed[name, label] for name in (first, second) if (name, label) in printed]
            difference = round(both[0] - both[1], 4) if len(both) == 2 else None
            lines.append(cell(f'{first} - {second}', label, difference, apart.figure(label) if apart else None,
                              '' if apart else 'not both of its rows were measured', **how))
    return lines, {row.name: row.about for row in TABLES[args.table]}
