"""Masks and maps of the trained networks of the other tables, on the validation images."""
import shlex
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from PIL import Image
from tqdm import tqdm

from ...attention import alphas_of
from ...factory import tensors_sha256
from ...files import make_folder, read_rows, write_rows
from ...isic.dataset import decode
from ...isic.dataset.sources import ids_digest
from ...isic.transforms import restore_aspect
from ..arguments import RunError
from .lines import check_record, read_record
from .maps import GAUSSIAN, Rows, gaussian_rows, map_lines, map_rows, mask_lines, mask_rows
from .rows import TABLES, pairs_of

__all__ = ['network_lines', 'picture_of']


def network_lines(
        args: Any,
        out: Path,
        opened: Callable[[Path], Any],
) -> Tuple[List[Dict[str, str]], Dict[str, str]]:
    """The lines of masks.csv or maps.csv, and what each row is; networks are measured that were not, or are others now.

    Args:
        args: Of reproduce_tables.py.
        out: Its output folder.
        opened: Gives the Predictor of a run's folder.

    Raises:
        RunError: There is no trained network, or a file is of other images.
    """
    split = args.splits['validation']
    digest = ids_digest(split['image_id'])
    table_rows = {row.name: row for table in ('table3', 'table5') for row in TABLES[table] if not row.alpha_zero_of}
    found: Rows = {}
    columns: Dict[str, Dict[str, Any]] = {}
    for name, seed in [(name, seed) for name in table_rows for seed in args.seeds]:
        folder, path = out / 'runs' / f'{name}-seed{seed}', out / args.table / f'{name}-seed{seed}.csv'
        record = out / 'predictions' / f'{name}-seed{seed}.json'
        if not record.exists():
            continue
        check_record(args, table_rows[name], record, images_alone=True)
        rows = read_rows(path) if path.exists() else []
        there = not args.check and (folder / 'metrics.json').exists() and (folder / 'model.safetensors').exists()
        weights = tensors_sha256(folder / 'model.safetensors') if there else ''
        if there and not (rows and (rows[0].get('images'), rows[0].get('weights')) == (digest, weights)):
            predictor = opened(folder)
            network: Any = predictor.network
            if args.table == 'masks' and not alphas_of(network):
                continue
            progress = partial(tqdm, desc=f'{args.table}, {name}, seed {seed}', leave=False)
            rows = (map_rows(network, predictor.prepare, split, progress) if args.table == 'maps' else
                    mask_rows(network, predictor.prepare, (picture_of(split, k) for k in progress(range(len(split))))))
            write_rows(make_folder(path.parent) / path.name, [
                {**row, 'images': digest, 'weights': weights} for row in rows])
            rows = read_rows(path)
        if rows and rows[0].get('images') != digest:
            raise RunError(f'{path} is of other validation images than {args.data}: remove it, and run the same '
                           f'command without --check.')
        if rows:
            found.setdefault(name, {})[seed] = rows
            columns[name] = read_record(record, 'columns')
    if not found:
        raise RunError(f'No trained network of table3 or table5{" with gates" * (args.table == "masks")} is in '
                       f'{out / "runs"}: make one first, with table3 --row arl_cnn14.')
    command = 'python benchmarks/reproduce_tables.py ' + shlex.join([
        args.table, '--data', str(args.data), '--output-dir', args.output_dir, '--seeds', *map(str, args.seeds)])

    def how(name):
        return {'seeds': ' '.join(map(str, found[name])), 'command': command, **columns.get(name, {})}

    about = {name: row.about for name, row in table_rows.items()}
    if args.table == 'masks':
        for name, by_seed in found.items():
            blocks = max(([row['block'] for row in rows] for rows in by_seed.values()), key=len)
            _check_complete(out / args.table, {name: by_seed}, 'block', blocks)
        return mask_lines(found, how), about
    pairs = [*pairs_of('table3'), *((name, GAUSSIAN) for name in found)]
    gaussian = gaussian_rows(split)
    _check_complete(out / args.table, found, 'image_id', [row['image_id'] for row in gaussian])
    found[GAUSSIAN] = dict.fromkeys(args.seeds, gaussian)
    return map_lines(found, pairs, how), {**about, GAUSSIAN: 'a map that has not seen the picture'}


def _check_complete(folder: Path, found: Rows, key: str, wanted: List[str]) -> None:
    """Refuse a file that lacks rows, which would be compared with others of other images."""
    for name, by_seed in found.items():
        for seed, rows in by_seed.items():
            if [row.get(key) for row in rows] != wanted:
                raise RunError(f'{folder / f"{name}-seed{seed}.csv"} is damaged: it should have {len(wanted)} rows, as '
                               f'others have. Restore it, or remove it and measure its network again.')


def picture_of(split: Any, row: int) -> Image.Image:
    """The picture of an image, in its own shape."""
    return restore_aspect(decode(split[row]['image']), split[row].get('aspect_ratio', 1.))
