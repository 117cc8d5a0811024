"""Several runs of finetune_isic.py in one folder: the folds of a cross-validation, and seeds."""
import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from timm_arl.isic import LABELS
from timm_arl.isic.dataset import DataError, diagnosis_array, label_array
from timm_arl.isic.duplicates import read_pairs
from timm_arl.isic.metrics import auc_table, score_split
from timm_arl.isic.results import read_predictions, write_json, write_predictions, write_rows


def fold_rows(split, folds: int, seed: int, duplicates: str = '') -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, for each fold; each diagnosis as frequent in one as in another.

    Args:
        split: A split of load_splits.
        folds: How many.
        seed: Seed of the division.
        duplicates: List of pairs of images (image_id_a, image_id_b) that must not be parted, or ''.

    Raises:
        DataError: A list that cannot be read, or a diagnosis with fewer images than folds.
    """
    diagnoses = diagnosis_array(label_array(split))
    rarest = np.bincount(diagnoses.astype(int))
    if rarest[rarest > 0].min() < folds:
        raise DataError(
            f'--folds {folds} needs {folds} images of each diagnosis, but one has {rarest[rarest > 0].min()}.')
    row_of = {image_id: row for row, image_id in enumerate(split['image_id'])}
    pairs = [(row_of[a], row_of[b]) for a, b in (read_pairs(duplicates) if duplicates else ())
             if a in row_of and b in row_of]
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    _, groups = connected_components(coo_array(
        (np.ones(len(pairs)), (first, second)), shape=(len(row_of), len(row_of))), directed=False)
    yield from StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(groups, diagnoses, groups)


def run_each(args: Any, accelerator: Any, splits: Dict[str, Any], out: Path, train: Callable) -> None:
    """Train a network for each seed and fold, each in a folder of its own, and put their scores together.

    Finished ones are left alone, so that a killed cross-validation goes on where it was.
    """
    seeds = args.seeds or [args.seed]
    held_out: Dict[str, List[np.ndarray]] = {}
    rows = []
    for seed in seeds:
        parts = [('', splits)]
        if args.folds:
            divided = fold_rows(splits['train'], args.folds, args.seed, args.duplicates)
            parts = [(f'fold-{k}', {'train': splits['train'].select(kept), 'validation': splits['train'].select(rest)})
                     for k, (kept, rest) in enumerate(divided)]
        for fold, part in parts:
            name = '/'.join(filter(None, [f'seed-{seed}' * bool(args.seeds), fold]))
            folder = out / name
            run = copy.copy(args)
            run.seed, run.seeds, run.folds, run.output_dir = seed, None, 0, str(folder)
            if args.folds:  # the held-out images choose nothing
                run.keep, run.patience = 'last', 0
            run.resume = (folder / 'run.json').exists()
            if not (folder / 'metrics.json').exists():
                accelerator.print(f'--- {name}')
                train(run, accelerator, part, folder)
                accelerator.free_memory()
            metrics = json.loads((folder / 'metrics.json').read_text())
            rows.append({'run': name, 'seed': seed, **{
                f'{split}_{key}': scores[key] if key == 'mean_auc' else scores[key]['auc']
                for split, scores in metrics.items() for key in (*LABELS, 'mean_auc')}})
            if args.folds:
                ids = list(part['validation']['image_id'])
                for image_id, p in zip(ids, read_predictions(folder / 'predictions_validation.csv', ids)):
                    held_out.setdefault(image_id, []).append(p)
    if not accelerator.is_main_process:
        return
    write_rows(out / 'runs.csv', rows)
    metrics = {}
    if args.folds:
        ids = list(splits['train']['image_id'])
        probabilities = np.array([np.mean(held_out[image_id], axis=0) for image_id in ids])
        metrics['cross_validation'] = score_split(label_array(splits['train']), probabilities, seed=args.seed)
        write_predictions(out / 'predictions_cross_validation.csv', ids, probabilities)
        print('AUC [95 % interval] of all held-out images together, each scored by the networks that did not see it')
        print(auc_table(metrics))
    columns = [column for column in rows[0] if column.endswith(('auc', *LABELS))]
    metrics['runs'] = {
        column: {'mean': float(np.mean([row[column] for row in rows])),
                 'sd': float(np.std([row[column] for row in rows], ddof=1)) if len(rows) > 1 else None,
                 'runs': len(rows)} for column in columns}
    print('Means of the runs, each by itself:')
    for column, value in metrics['runs'].items():
        spread = f' (sd {value["sd"]:.3f} of {len(rows)} runs)' if len(rows) > 1 else ''
        print(f'{column:36} {value["mean"]:.3f}{spread}')
    write_json(out / 'metrics.json', metrics)
    print(f'In {out}: runs.csv, metrics.json, and a folder for each run')

