"""Several runs of finetune_isic.py in one folder, cross-validation and seeds, and what a run may start from."""
import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from ..factory import Checkpoint
from ..files import same_place, write_json, write_rows
from ..isic.dataset import Data, DataError, label_array
from ..isic.dataset.duplicates import pairs_among
from ..isic.dataset.sources import ids_digest
from ..isic.intervals import unit_of
from ..isic.metrics import auc_table, score_split
from ..isic.predictions import read_predictions, write_predictions
from ..isic.task import ISIC2017, Task, label_words
from .arguments import RunError
from .evaluations import training_names


def fold_rows(
        split,
        folds: int,
        seed: int,
        duplicates: Optional[str] = None,
        task: Task = ISIC2017,
        groups: str = '',
) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, for each fold; all folds have about the same share of each diagnosis.

    Args:
        split: A split of load_splits.
        folds: Number of folds.
        seed: Seed of the division.
        duplicates: CSV of pairs of images (image_id_a, image_id_b) that stay in the same fold, or None.
        task: Whose labels it has.
        groups: Column of patients or lesions that stay in the same fold; '': none.

    Raises:
        DataError: A list that cannot be read, or too few images of a diagnosis, or groups, for so many folds.
    """
    labels = label_array(split, task)
    diagnoses = task.strata(labels)
    counts = np.bincount(diagnoses)
    rarest = counts[counts > 0].min()
    if rarest < folds:
        raise DataError(f'--folds {folds} needs {folds} images of each diagnosis, but the rarest has {rarest}: choose '
                        f'at most {rarest} folds.')
    row_of = {image_id: row for row, image_id in enumerate(split['image_id'])}
    pairs = [(row_of[a], row_of[b]) for a, b in (pairs_among(duplicates, row_of) if duplicates else ())]
    if groups:
        first_of: Dict[str, int] = {}
        pairs += [(first_of.setdefault(group, row), row) for row, group in enumerate(split[groups])]
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    _, parts = connected_components(coo_array(
        (np.ones(len(pairs)), (first, second)), shape=(len(row_of), len(row_of))), directed=False)
    if parts.max() < folds - 1:
        raise DataError(f'--folds {folds} needs {folds} images or groups of images that may be parted, but there are '
                        f'{parts.max() + 1}: choose fewer folds.')
    # shuffled here, since scikit-learn < 1.8 mixes the groups up when it shuffles
    parts = np.argsort(np.random.RandomState(seed).permutation(parts.max() + 1))[parts]
    for kept, rest in StratifiedGroupKFold(folds).split(parts, diagnoses, parts):
        if not all(0 < labels[rows, k].sum() < len(rows) for rows in (kept, rest) for k in range(len(task.labels))):
            raise DataError(f'--folds {folds} leaves a fold without images of '
                            f'{" or of ".join(map(label_words, task.labels))}: choose fewer.')
        yield kept, rest


def check_start(args: Any, task: Task = ISIC2017) -> None:
    """Refuse to cross-validate from a network that was trained on the images of all folds.

    Args:
        args: Arguments of finetune_isic.py.
        task: Of the data.

    Raises:
        RunError: --init-checkpoint, --teacher or --pretrained name one that learned from the same data.
    """
    for flag, name, paths in _starts(args):
        checkpoint = Checkpoint(name, paths)
        saved = checkpoint.arguments(published=False)
        knows_labels = not saved and tuple(checkpoint.label_names()) in (task.labels, task.classes)
        if knows_labels or saved.get('train_ids') == args.train_ids:
            raise RunError(f'{flag} {name} was trained on images that --folds would hold out, and its scores would be '
                           f'too high: start from other weights.')


def _starts(args: Any) -> List[Tuple[str, str, bool]]:
    """Networks that a run learns from: the flag, the name, and whether it may be a path."""
    starts = [('--init-checkpoint', args.init_checkpoint, True),
              ('--pretrained', args.model if args.pretrained else None, False),
              *(('--teacher', name, True) for name in args.teacher or ())]
    return [start for start in starts if start[1]]


def check_unseen(args: Any, splits: Dict[str, Any]) -> None:
    """Refuse to learn from a network that was trained on images which this run scores, as other seeds divide them.

    Args:
        args: Arguments of finetune_isic.py.
        splits: Of the data.

    Raises:
        RunError: --init-checkpoint, --teacher or --pretrained name such a network.
    """
    for flag, name, paths in _starts(args):
        checkpoint = Checkpoint(name, paths)
        folder = checkpoint.run_folder() or checkpoint.folder
        data = checkpoint.arguments(published=False).get('data')
        if not folder or not same_place(args.data, data):  # ids may mean other images
            continue
        for split in ['train'] if args.folds else sorted(splits.keys() - {'train'}):  # folds hold out images of train
            seen = training_names(folder, map(str, splits[split]['image_id']))
            if seen:
                raise RunError(f'{flag} {name} was trained on {len(seen)} of the {split} images: ' + (
                    'start from other weights.' if args.folds else
                    f'divide the data as it did, with --splits {folder / "splits.csv"}.'))


def rows_of_folds(args: Any, data: Data) -> List[Tuple[np.ndarray, np.ndarray]]:
    """As fold_rows, of all folds at once, so that a fold that cannot be used is told before the first is trained.

    Args:
        args: Arguments of finetune_isic.py.
        data: As load_data gives it.
    """
    return list(fold_rows(data.splits['train'], args.folds, args.seed, args.duplicates, data.task, data.groups))


def _parts(args: Any, data: Data) -> Iterator[Tuple[str, Data]]:
    """Names and data of the folds, one after the other, so that only one keeps its crops; or all splits."""
    if not args.folds:
        yield '', data
        return
    train = data.splits['train']
    for k, (kept, rest) in enumerate(rows_of_folds(args, data)):
        parts = {'train': train.select(kept), 'validation': train.select(rest)}
        yield f'fold-{k}', data._replace(splits=parts, division=parts if set(data.splits) == {'train'} else {})


def run_each(args: Any, accelerator: Any, data: Data, out: Path, train: Callable) -> None:
    """Train a network for each seed and fold, each in its own folder, and collect their scores.

    Finished runs are skipped, so that a killed cross-validation can be resumed.
    """
    seeds, task = args.seeds or [args.seed], data.task
    scores: Dict[str, Any] = {}
    rows = []
    for seed in seeds:
        held_out: Dict[str, np.ndarray] = {}
        for fold, part in _parts(args, data):
            name = '/'.join(filter(None, [f'seed-{seed}' * bool(args.seeds), fold]))
            folder = out / name
            run = copy.copy(args)
            run.seed, run.seeds, run.folds, run.output_dir = seed, None, 0, str(folder)
            if args.folds:  # the held-out images choose nothing
                run.fold, run.keep, run.patience = fold, 'last', 0
                run.fold_ids = ids_digest(part.splits['train']['image_id'])
            run.resume = (folder / 'run.json').exists()
            if run.resume and args.folds:
                saved = json.loads((folder / 'run.json').read_text(encoding='utf-8'))['arguments']
                if saved.get('fold_ids', run.fold_ids) != run.fold_ids:  # which older runs have not recorded
                    raise RunError(f'{folder} was trained on other images than {fold} has now, since the list of '
                                   f'duplicates or the images that can be read have changed: undo that, or start '
                                   f'again in another --output-dir.')
            if not (folder / 'metrics.json').exists():
                accelerator.print(f'--- {name}')
                train(run, accelerator, part, folder)
                for tracker in accelerator.trackers:  # or the next run is logged as more of this one
                    tracker.finish()
                accelerator.trackers = []
                accelerator.free_memory()
            metrics = json.loads((folder / 'metrics.json').read_text())
            rows.append({'run': name, 'seed': seed, **{
                f'{split}_{key}': values[key] if key == 'mean_auc' else values[key]['auc']
                for split, values in metrics.items() for key in (*task.labels, 'mean_auc')}})
            if args.folds:
                ids = list(part.splits['validation']['image_id'])
                held_out.update(zip(ids, read_predictions(folder / 'predictions_validation.csv', ids, task)))
        if args.folds:
            name = 'cross_validation' + f'_seed-{seed}' * bool(args.seeds)
            ids = list(data.splits['train']['image_id'])
            probabilities = np.array([held_out[image_id] for image_id in ids])
            scores[name] = score_split(
                label_array(data.splits['train'], task), probabilities, seed=args.seed, task=task,
                groups=data.group_ids('train'), unit=unit_of(data.groups))
            if accelerator.is_main_process:
                write_predictions(
                    out / f'predictions_{name}.csv', ids, probabilities, task, data.group_ids('train'))
    if not accelerator.is_main_process:
        return
    write_rows(out / 'runs.csv', rows)
    if scores:
        print('AUC [95 % interval] of all held-out images together, each scored by the network that did not see it')
        print(auc_table(scores, task))
    scores['runs'] = {}
    print('Means of the runs, each by itself:')
    for column in [column for column in rows[0] if column not in ('run', 'seed')]:
        values = [row[column] for row in rows if row[column] is not None]  # undefined where a split lacks a class
        mean = float(np.mean(values)) if values else None
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        scores['runs'][column] = {'mean': mean, 'sd': sd, 'runs': len(values)}
        print(f'{column:36} ' + ('undefined' if mean is None else f'{mean:.3f}')
              + ('' if sd is None else f' (sd {sd:.3f} of {len(values)} runs)'))
    write_json(out / 'metrics.json', scores)
    print(f'In {out}: runs.csv, metrics.json, and a folder for each run')
