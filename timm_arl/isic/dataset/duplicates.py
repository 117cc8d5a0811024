"""Images that occur twice: the same bytes, or nearly the same pixels up to a flip or a quarter turn."""
import argparse
import hashlib
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Set, Tuple, Union

import numpy as np
from tqdm import tqdm

from ...files import read_rows, write_rows
from ..images import decode, reason_of
from ..task import DataError
from .options import add_data_arguments, wanted_of
from .splits import load_data

__all__ = ['add_arguments', 'check', 'find_duplicates', 'pairs_among', 'read_pairs', 'twins_of_training',
           'without_known', 'without_twins']

SIDE = 32  # px of the copies that are compared
AGAINST = 'against '  # begins the names of splits of another data set
COLUMNS = ('image_id_a', 'split_a', 'image_id_b', 'split_b', 'kind', 'correlation')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', metavar='SRC', help='any --data')
    add_data_arguments(parser)
    parser.add_argument('--against', metavar='OTHER',
                        help='another --data, such as that of a network: only the pairs with one of its images')
    parser.add_argument('--output', metavar='LIST.csv', help='write the pairs, for --drop-duplicates')
    parser.add_argument('--correlation', type=float, default=0.985,
                        help='of 32 px copies from which on images count as near-identical (default: %(default)s)')


def check(args: argparse.Namespace) -> int:
    """Print, and write where asked to, the pairs of images that are the same or nearly so."""
    if not 0 < args.correlation <= 1:
        raise DataError('--correlation must be above 0 and at most 1.')
    if args.output and not Path(args.output).parent.is_dir():  # told before the work, not after it
        raise DataError(f'No folder {Path(args.output).parent} for {args.output}: make it first.')
    data = load_data(args.source, wanted_of(args), needed=(), whole='train')
    print(data.summary(args.source))
    splits = data.splits
    if args.against:
        other = load_data(args.against, needed=(), whole='train').splits
        splits = {**splits, **{f'{AGAINST}{name}': split for name, split in other.items()}}
    pairs = [pair for pair in find_duplicates(splits, args.correlation) if not args.against
             or pair['split_b'].startswith(AGAINST) and not pair['split_a'].startswith(AGAINST)]
    across = [p for p in pairs if p['split_a'] != p['split_b']]
    for p in pairs:
        print('{split_a} {image_id_a}  {split_b} {image_id_b}  {kind}  {correlation:.4f}'.format(**p))
    print(f'{len(pairs)} pairs with images of {args.against}.' if args.against else
          f'{len(pairs)} pairs, {len(across)} of them across splits.')
    if args.output:
        write_rows(args.output, pairs, COLUMNS)
        print(f'Written: {args.output}')
    return 0


def find_duplicates(splits: Dict[str, Any], correlation: float = 0.985) -> List[Dict[str, Any]]:
    """Pairs of images, within and across splits.

    Args:
        splits: By name, with the columns image and image_id.
        correlation: Of the pixels of 32 x 32 copies, under the best of the eight flips and quarter turns.

    Returns:
        A dict of COLUMNS for each pair; kind is 'byte_identical' or 'near_identical'.

    Raises:
        DataError: An image that cannot be read.
    """
    names, digests, copies = [], [], []
    for name, split in splits.items():
        for row in tqdm(split.select_columns(['image', 'image_id']), desc=f'reading {name}', leave=False):
            try:
                small = np.asarray(decode(row['image']).resize((SIDE, SIDE)), np.float32)
            except OSError as error:
                raise DataError(f'The image of {row["image_id"]} cannot be read: {reason_of(error)}') from error
            cell = row['image']
            digests.append(hashlib.sha256(cell['bytes'] or Path(cell['path']).read_bytes()).hexdigest())
            names.append((row['image_id'], name))
            copies.append(small)
    pictures = np.stack(copies)
    unit = _unit(pictures)
    _, numbers = np.unique(digests, return_inverse=True)
    pairs = []
    for start in range(0, len(names), 512):  # a block of rows against all later ones
        block = pictures[start:start + 512]
        best = np.max([
            _unit(np.rot90(flipped, turns, (1, 2))) @ unit.T
            for flipped in (block, block[:, :, ::-1]) for turns in range(4)], axis=0)
        same = numbers[start:start + 512, None] == numbers[None]
        for i, j in np.argwhere((best >= correlation) | same):
            a, b = start + int(i), int(j)
            if a < b:
                pairs.append(dict(zip(COLUMNS, (
                    *names[a], *names[b], 'byte_identical' if same[i, j] else 'near_identical',
                    round(float(best[i, j]), 5)))))
    return pairs


def read_pairs(path: Union[str, Path], ids: Optional[Collection[str]] = None) -> List[Tuple[str, str]]:
    """The pairs of a list of duplicates.

    Args:
        path: The list, a CSV with the columns image_id_a and image_id_b.
        ids: Those of the data, of which the list must name one; None: any.

    Raises:
        DataError: No such file, or one without these columns, or of other data.
    """
    try:
        pairs = [(row['image_id_a'], row['image_id_b']) for row in read_rows(path) if row['image_id_a']]
    except (OSError, KeyError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f'{"no column " * isinstance(error, KeyError)}{error}'
        raise DataError(
            f'{path} cannot be read as a list of pairs (columns image_id_a, image_id_b): {why}.') from error
    if ids is not None and pairs and not any(image_id in ids for pair in pairs for image_id in pair):
        raise DataError(f'{path} names no image of these data (it has {pairs[0][0]}, they have '
                        f'{next(iter(ids), "none")}): make a list of them, with python -m timm_arl.isic.dataset check.')
    return pairs


def pairs_among(path: Union[str, Path], ids: Collection[str]) -> List[Tuple[str, str]]:
    """The pairs of a list of which both images are among these.

    Raises:
        DataError: As read_pairs does.
    """
    known = set(ids)
    return [pair for pair in read_pairs(path) if known.issuperset(pair)]


def twins_of_training(splits: Dict[str, Any], path: Union[str, Path]) -> Set[str]:
    """The ids of the images outside of train that have a twin in it.

    Args:
        splits: By name, with the column image_id; train among them.
        path: As for read_pairs.

    Raises:
        DataError: As read_pairs does; also a list of other data.
    """
    train = set(splits['train']['image_id'])
    known = {image_id for split in splits.values() for image_id in split['image_id']}
    return {a for pair in read_pairs(path, known) for a, b in (pair, pair[::-1]) if b in train and a not in train}


def without_twins(splits: Dict[str, Any], path: Union[str, Path]) -> Tuple[Dict[str, Any], Dict[str, int]]:
    """The splits without the images that are twins of training images, and how many each has lost.

    Args:
        splits, path: As for twins_of_training.

    Raises:
        DataError: As twins_of_training does.
    """
    twins = twins_of_training(splits, path)
    rows = {name: [row for row, image_id in enumerate(split['image_id']) if image_id not in twins]
            for name, split in splits.items() if name != 'train'}
    return ({**splits, **{name: splits[name].select(kept) for name, kept in rows.items()}},
            {name: len(splits[name]) - len(kept) for name, kept in rows.items()})


def is_against(path: Union[str, Path]) -> bool:
    """Whether a list of pairs has some with another data set, by check --against it.

    Args:
        path: As for read_pairs.

    Raises:
        DataError: As read_pairs does.
    """
    read_pairs(path)
    return any((row.get('split_b') or '').startswith(AGAINST) for row in read_rows(path))


def without_known(splits: Dict[str, Any], path: Union[str, Path]) -> Tuple[Dict[str, Any], Dict[str, int]]:
    """The splits without the images that have a twin in another data set, by a list that was made --against it.

    Args:
        splits: By name, with the column image_id.
        path: As for read_pairs.

    Returns:
        The splits, and how many images each but train has lost.

    Raises:
        DataError: As read_pairs does; also a list without such pairs, or of other data.
    """
    read_pairs(path)
    known = {row['image_id_a'] for row in read_rows(path) if (row.get('split_b') or '').startswith(AGAINST)}
    rows = {name: [row for row, image_id in enumerate(split['image_id']) if image_id not in known]
            for name, split in splits.items() if name != 'train'}
    left_out = {name: len(splits[name]) - len(kept) for name, kept in rows.items()}
    if known.isdisjoint(image_id for split in splits.values() for image_id in split['image_id']):
        raise DataError(f'{path} names no image of these data with a twin in the data of the network: make it with '
                        f'python -m timm_arl.isic.dataset check OTHER --against HOME --output LIST.csv; if it finds '
                        f'none, leave out --drop-duplicates.')
    return {**splits, **{name: splits[name].select(kept) for name, kept in rows.items()}}, left_out


def _unit(pictures: np.ndarray) -> np.ndarray:
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
