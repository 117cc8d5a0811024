"""Originals to Parquet shards of a size that trains: parallel, and resumable after a kill."""
import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import datasets
import pyarrow.parquet
from PIL import Image
from tqdm import tqdm

from ... import arguments
from ...files import hold, replacing, write_json
from ..images import decode, decode_mask, reason_of
from ..task import ISIC2017, DataError, Task, label_words
from .data import SPLITS
from .duplicates import read_pairs
from .names import column_named
from .options import add_data_arguments, wanted_of
from .sources import CHALLENGE_ZIPS, image_files, number, read_table, years_of
from .splits import load_data

__all__ = ['add_arguments', 'prepare']

SHARD = 256  # images
LOCK = '.lock'
JPEG_QUALITY = 92
MEASURES = {
    'width': datasets.Value('int32'), 'height': datasets.Value('int32'), 'aspect_ratio': datasets.Value('float32')}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('source', metavar='SRC', help="the challenge's folders and CSVs, what `isic image download` wrote, any --data")
    add('target', metavar='DST', help='folder for the Parquet shards; run the command again to continue after a kill')
    add('--longest-side', type=int, default=768, metavar='PX', help='of a stored image (default: %(default)s)')
    add('--extra-ids', metavar='LIST.csv',
        help='add the images of this list to train (columns image_id and the labels, as 0 and 1)')
    add('--extra-images', metavar='DIR', help='the image files of --extra-ids, named ID.jpg (default: in SRC)')
    add('--drop-duplicates', metavar='LIST.csv',
        help='leave images out of train that are twins of others by this list of pairs (image_id_a, image_id_b)')
    add('--skip-bad-images', action='store_true', help='leave out images that cannot be read instead of stopping')
    add('--workers', type=int, default=os.cpu_count(), help='processes (default: %(default)s)')
    add('--seed', type=arguments.number(int, 0, 2 ** 32 - 1), default=0,
        help='of the splits, where the data have none (default: %(default)s)')
    add_data_arguments(parser)


def prepare(args: argparse.Namespace) -> int:
    """Write the shards, prepare.json and a card.

    Raises:
        DataError: A source that cannot be used, a damaged zip, an image that cannot be read, or a target that holds
            something else.
    """
    if args.extra_images and not args.extra_ids:
        raise DataError('--extra-images needs --extra-ids, the list of the images to add.')
    if args.longest_side < 64 or args.workers < 1:
        raise DataError('--longest-side must be at least 64 and --workers at least 1.')
    target = Path(args.target)
    _check_zips(Path(args.source))
    data = load_data(args.source, wanted_of(args), args.seed, needed=())
    task = data.task
    print(data.summary(args.source))
    splits = {name: _renamed(split, [*task.labels, data.groups]) for name, split in data.splits.items()}
    features = _features(splits, task)
    splits = {name: _select(split, features) for name, split in splits.items()}
    for flag, value in (('--extra-ids', args.extra_ids), ('--drop-duplicates', args.drop_duplicates)):
        if value and 'train' not in splits:
            raise DataError(f'{flag} changes the training images, and {args.source} has none: leave it out.')
    if args.extra_ids:
        splits['train'] = datasets.concatenate_datasets([splits['train'], _extra(args, splits, task)])
    dropped: List[str] = []
    if args.drop_duplicates:
        dropped = _twins(args.drop_duplicates, splits)
        splits['train'] = splits['train'].select(
            [i for i, image_id in enumerate(splits['train']['image_id']) if image_id not in set(dropped)])

    tables = [str(split.remove_columns([c for c in ('image', 'mask') if c in split.column_names]).to_dict())
              for split in splits.values()]
    plan = {
        'longest_side': args.longest_side, 'shard': SHARD, 'skip_bad_images': args.skip_bad_images,
        'images': {name: len(split) for name, split in splits.items()},
        'table': hashlib.sha256('\n'.join(tables).encode()).hexdigest(),
        **({} if task.config() is None else {'task': task.config()}),
        **({'groups': data.groups} if data.groups and args.group_column else {}),
    }
    _check_target(target, plan)
    target.mkdir(parents=True, exist_ok=True)
    with _alone_in(target):
        _write_shards(args, target, plan, splits, features, task)
    skipped = _skipped(target, splits)
    counts = _write_card(target, args, dropped, skipped, task)
    if skipped:
        print(f'Left out, since they cannot be read: {", ".join(skipped)}. To include them, fix them, remove {target} '
              f'and run the command again.')
    print(f'Written: {target} ({", ".join(f"{n} {name}" for name, n in counts.items())}); use it with --data {target}')
    return 0


def _write_shards(
        args: argparse.Namespace,
        target: Path,
        plan: Dict[str, Any],
        splits: Dict[str, datasets.Dataset],
        features: datasets.Features,
        task: Task,
) -> None:
    write_json(target / 'prepare.json', plan)
    (target / 'data').mkdir(exist_ok=True)
    for leftover in (target / 'data').glob('.*.tmp'):
        leftover.unlink()

    jobs = []
    for name, split in splits.items():
        shards = -(-len(split) // SHARD)
        for i in range(shards):
            jobs.append((target / 'data' / f'{name}-{i:05d}-of-{shards:05d}.parquet', split, i * SHARD))
    open_jobs = [job for job in jobs if not job[0].exists()]
    if len(open_jobs) < len(jobs):
        print(f'Continuing: {len(jobs) - len(open_jobs)} of {len(jobs)} shards are there.')
    total = sum(len(range(start, min(start + SHARD, len(split)))) for _, split, start in open_jobs)
    with (ProcessPoolExecutor(args.workers, initializer=_end_with_parent) as pool,
          tqdm(total=total, unit='image') as bar):
        try:
            futures = [
                pool.submit(_write_shard, path, split.select(range(start, min(start + SHARD, len(split)))),
                            args.longest_side, args.skip_bad_images, features, task)
                for path, split, start in open_jobs]
            for future in as_completed(futures):
                bar.update(future.result())
        except BrokenProcessPool as error:
            raise DataError(f'A process was killed, which mostly means that the memory is full: run the same command '
                            f'again with fewer --workers than {args.workers}; finished shards are kept.') from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    """Refuse a folder that another process is writing to: each would remove what the other has not finished."""
    path = target / LOCK
    try:
        lock = hold(path)
    except BlockingIOError:
        raise DataError(f'Another process is writing to {target}: let it finish, or end it.') from None
    try:
        yield
    finally:
        if lock:
            path.unlink(missing_ok=True)
            lock.close()


def _end_with_parent() -> None:
    """Let a worker end when the program is killed: it would wait for work forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_zips(source: Path) -> None:
    for name, expected in CHALLENGE_ZIPS.items():
        path = source / name
        if not path.is_file():
            continue
        digest = hashlib.md5(usedforsecurity=False)
        with path.open('rb') as file, tqdm(
                total=path.stat().st_size, unit='B', unit_scale=True, desc=f'md5 of {name}', leave=False) as bar:
            while block := file.read(2 ** 20):
                digest.update(block)
                bar.update(len(block))
        if digest.hexdigest() != expected:
            raise DataError(f'{path} has the md5 {digest.hexdigest()}, not {expected}: it is damaged or not the '
                            f'official file; download and unpack it again.')
        if not (source / path.stem).is_dir():
            raise DataError(f'{path} is there, but not unpacked: unzip it in {source}.')


def _renamed(split: datasets.Dataset, others: Sequence[str]) -> datasets.Dataset:
    """The split with the columns of age and sex called as in the shards, whatever they are called, as 'Sex' and 'age'.

    Args:
        split: It.
        others: Columns that are something else.
    """
    for name in ('age_approximate', 'sex'):
        found = column_named([column for column in split.column_names if column not in others], name)
        if found and name == 'age_approximate' and (isinstance(split.features[found], datasets.ClassLabel) or any(
                cell not in (None, '') and years_of(cell) is None for cell in split[found])):
            continue  # ages in words stay as they are
        split = split.rename_column(found, name) if found and name not in split.column_names else split
    return split


def _features(splits: Dict[str, datasets.Dataset], task: Task) -> datasets.Features:
    """Columns of the shards: those that we know, and all others of the data that hold numbers, words or classes."""
    features: Dict[str, Any] = {
        'image': datasets.Image(), 'image_id': datasets.Value('string'),
        **{label: datasets.Value('int8') for label in task.labels},
        'age_approximate': datasets.Value('float32'), 'sex': datasets.Value('string'),
        'mask': datasets.Image(), **MEASURES}
    for split in splits.values():
        for column, feature in split.features.items():
            if isinstance(feature, (datasets.Value, datasets.ClassLabel)):
                features.setdefault(column, feature)
            if column == 'sex' and isinstance(feature, datasets.ClassLabel):  # as a word it would be its number
                features['sex'] = feature
    return datasets.Features(features)


def _select(split: datasets.Dataset, features: datasets.Features) -> datasets.Dataset:
    split = split.select_columns([c for c in features if c in split.column_names])
    for column in ('image', 'mask'):
        if column in split.column_names:
            split = split.cast_column(column, datasets.Image(decode=False))
    return split


def _extra(args: argparse.Namespace, splits: Dict[str, datasets.Dataset], task: Task) -> datasets.Dataset:
    table = read_table(Path(args.extra_ids), ('image_id', *task.labels))
    for image_id, row in table.items():
        values = [row[label] for label in task.labels]
        if not set(values) <= {'0', '1', '0.0', '1.0'} or (task.exclusive and sum(map(float, values)) > 1):
            at_most = ', at most one of them 1,' * task.exclusive
            raise DataError(f'{args.extra_ids}: the labels of {image_id} must be 0 or 1{at_most} but are '
                            f'{" and ".join(values)}.')
    folder = Path(args.extra_images or args.source)
    if not folder.is_dir():
        raise DataError(f'No folder {folder}: --extra-images is where the files of --extra-ids are.')
    files = image_files(folder)
    missing = [i for i in table if i not in files]
    if missing:
        raise DataError(f'{folder} lacks {len(missing)} of the {len(table)} images of {args.extra_ids}, for example '
                        f'{missing[0]}: download them, or pass --extra-images.')
    known = {i for split in splits.values() for i in split['image_id']}
    twice = [i for i in table if i in known]
    if twice:
        raise DataError(f'{args.extra_ids} names {twice[0]}, which {args.source} already has ({len(twice)} such '
                        f'images): remove such lines.')
    features = splits['train'].features
    columns: Dict[str, List[Any]] = {c: [None] * len(table) for c in features}
    columns['image_id'] = list(table)
    columns['image'] = [{'bytes': None, 'path': str(files[i])} for i in table]
    for label in task.labels:
        columns[label] = [float(row[label]) for row in table.values()]
    return datasets.Dataset.from_dict(columns, features=features)


def _twins(path: str, splits: Dict[str, datasets.Dataset]) -> List[str]:
    """Training images with a twin in another split, and the second of each pair within train."""
    train = set(splits['train']['image_id'])
    elsewhere = {i for name, split in splits.items() if name != 'train' for i in split['image_id']}
    dropped: List[str] = []
    for a, b in read_pairs(path, train | elsewhere):
        for one, other in ((a, b), (b, a)):
            if one in train and (other in elsewhere or (one == b and other in train and other not in dropped)):
                dropped.append(one)
    return sorted(set(dropped))


def _check_target(target: Path, plan: Dict[str, Any]) -> None:
    record = target / 'prepare.json'
    if record.is_file():
        try:
            saved = json.loads(record.read_text(encoding='utf-8'))
            if not isinstance(saved, dict):
                raise ValueError
        except ValueError:
            raise DataError(f'{record} is damaged: remove {target}, and run the same command again.') from None
        changed = ['table of ids, labels, age and sex' if key == 'table' else key for key in plan
                   if saved.get(key) != plan[key] and not (key == 'skip_bad_images' and plan[key])]
        if changed:
            raise DataError(f'{target} was prepared with another {" and ".join(changed)}: choose another folder, or '
                            f'remove this one.')
    elif target.exists() and (not target.is_dir() or any(path.name != LOCK for path in target.iterdir())):
        raise DataError(f'{target} exists and was not made by this command: choose another folder.')


def _resized(image: Image.Image, longest_side: int, resample: Image.Resampling) -> Image.Image:
    scale = longest_side / max(image.size)
    if scale >= 1:
        return image
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image.resize(size, resample, reducing_gap=3)


def _bytes(image: Image.Image, fmt: str, **options: Any) -> Dict[str, Any]:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return {'bytes': file.getvalue(), 'path': None}


def _write_shard(
        path: Path,
        rows: datasets.Dataset,
        longest_side: int,
        skip_bad_images: bool,
        features: datasets.Features,
        task: Task,
) -> int:
    """Returns the number of images, including those that were left out."""
    content = []
    for row in rows:
        try:
            image = decode(row['image'])
            if not 0.1 <= image.width / image.height <= 10:
                raise OSError(f'it has {image.width} x {image.height} px, which is no photograph')
            mask = row.get('mask')
            if mask is not None:
                mask = decode_mask(mask, image.size).convert('1', dither=Image.Dither.NONE)
                mask = _resized(mask, longest_side, Image.Resampling.NEAREST)
        except OSError as error:
            if skip_bad_images:
                continue
            raise DataError(f'The image of {row["image_id"]}{", or its mask," * bool(row.get("mask"))} cannot be '
                            f'used ({reason_of(error)}): fix it, or leave such images out with '
                            f'--skip-bad-images.') from error
        squashed = image.width == image.height and 'aspect_ratio' in row  # also where it is not known
        content.append({
            **{column: row.get(column) for column in features},
            'age_approximate': years_of(row.get('age_approximate')),
            **{label: int(row[label]) for label in task.labels},
            'image': _bytes(_resized(image, longest_side, Image.Resampling.BICUBIC), 'JPEG', quality=JPEG_QUALITY),
            'mask': None if mask is None else _bytes(mask, 'PNG'),
            'width': _pixels(row.get('width'), image.width), 'height': _pixels(row.get('height'), image.height),
            'aspect_ratio': row['aspect_ratio'] if squashed else image.width / image.height,
        })
    with replacing(path) as temporary:
        datasets.Dataset.from_list(content, features=features).to_parquet(temporary)
    return len(rows)


def _pixels(cell: Any, stored: int) -> int:
    """The side of an original that a cell tells, or of the picture as it is stored, where that is larger."""
    return max(int(number(cell) or 0), stored)


def _skipped(target: Path, splits: Dict[str, datasets.Dataset]) -> List[str]:
    """Ids of images that no shard has, including shards of an earlier, interrupted command."""
    paths = [str(path) for path in (target / 'data').glob('*.parquet')]
    written = set(pyarrow.parquet.read_table(paths, columns=['image_id'])['image_id'].to_pylist())
    return [str(i) for split in splits.values() for i in split['image_id'] if str(i) not in written]


def _write_card(
        target: Path,
        args: argparse.Namespace,
        dropped: List[str],
        skipped: List[str],
        task: Task,
) -> Dict[str, int]:
    """Write README.md and return how many images each split has."""
    lines = ['---', f'pretty_name: {task.title}, prepared by timm-arl', 'task_categories:', '- image-classification',
             'configs:', '- config_name: default', '  data_files:']
    others = task.kind == 'multilabel' or bool(task.rest)
    columns = ['split', 'images', *map(label_words, task.labels),
               *['neither' if len(task.labels) == 2 else 'none of them'] * others, 'masks', 'age known', 'sex known']
    table = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    written = {}
    for name in [name for name in SPLITS if any((target / 'data').glob(f'{name}-*.parquet'))]:
        lines += [f'  - split: {name}', f'    path: data/{name}-*.parquet']
        counts = _counts(sorted((target / 'data').glob(f'{name}-*.parquet')), task)
        written[name] = counts[0]
        table.append(f'| {name} | ' + ' | '.join(map(str, counts)) + ' |')
    command = shlex.join(['python', '-m', 'timm_arl.isic.dataset', *sys.argv[1:]])
    lines += ['---', '', f'# {task.title}', '',
              f'Longest side {args.longest_side} px at most, aspect kept, JPEG quality {JPEG_QUALITY}; `width` and '
              f'`height` are those of the originals. Made by `{command}` on {time.strftime("%Y-%m-%d")}.', '', *table]
    if dropped:
        lines += ['', f'Left out of train as twins of other images: {", ".join(dropped)}.']
    if skipped:
        lines += ['', f'Left out, since they cannot be read: {", ".join(skipped)}.']
    lines += ['', 'The licence is that of the source' + (
        ': the 2017 challenge data are CC0; external images have their own.' if task.name == ISIC2017.name else '.')]
    with replacing(target / 'README.md') as temporary:
        temporary.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return written


def _counts(paths: List[Path], task: Task) -> Tuple[int, ...]:
    about = ['mask', 'age_approximate', 'sex']
    table = pyarrow.parquet.read_table([str(p) for p in paths], columns=[*task.labels, *about])
    positives = [sum(table[label].to_pylist()) for label in task.labels]
    known = [table.num_rows - table[column].null_count for column in about]
    neither = [table.num_rows - sum(map(any, zip(*(table[label].to_pylist() for label in task.labels))))]
    return table.num_rows, *positives, *neither * (task.kind == 'multilabel' or bool(task.rest)), *known
