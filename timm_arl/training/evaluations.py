"""The folders that evaluate_isic.py reads and fills, its groups of images, and what it says of another clinic's."""
import contextlib
import os
import shutil
from pathlib import Path

import datasets

from ..files import alone_in, read_rows, same_place
from ..isic.calibration import subgroups
from ..isic.dataset import label_array
from ..isic.dataset.columns import words_of
from ..isic.dataset.demo import DEMO_TASKS
from ..isic.dataset.groups import read_split_file
from ..isic.dataset.names import column_named
from ..isic.dataset.sources import ids_digest
from ..isic.metrics import interval_text
from ..isic.task import label_words
from .arguments import RunError
from .runs import check_output_dir, looks_in

__all__ = [
    'check_free', 'epochs_of', 'is_home', 'print_drift', 'print_mapping', 'print_replaced',
    'replacing_evaluation', 'seed_of_data', 'subgroups_of', 'training_names']

FILES = {  # all that this program may leave, apart from looks.csv, which grows
    'metrics.json', 'metrics.md', 'evaluation.json', 'report.html', 'curves.png', 'alphas.png',
    'report.md',  # of 0.1
    *(name.format(split) for split in ('validation', 'test')
      for name in ('predictions_{}.csv', 'roc_{}.png', 'reliability_{}.png'))}


def epochs_of(folder, accelerator):
    """Rows of the summary.csv of a run; none where there is none."""
    path = folder / 'summary.csv'
    if not path.is_file():
        return []
    try:
        rows = read_rows(path)
    except ValueError:
        rows = []
    if not rows or 'validation_mean_auc' not in rows[0]:
        accelerator.print(f'{path} is not from a run of finetune_isic.py: no curves.png and no alphas.png.')
        return []
    return rows


def training_names(folder, image_ids):
    """Those ids that were training images of a run that made its splits."""
    if not (folder / 'splits.csv').is_file():
        return []
    by_id = read_split_file(folder / 'splits.csv')
    return [image_id for image_id in image_ids if by_id.get(image_id) == 'train']


def seed_of_data(args, saved):
    """Seed by which data without splits are divided, the run's; and of generated images, the run's own or --seed.

    Args:
        args: Of the program.
        saved: Arguments of the checkpoint's run.
    """
    if args.data in DEMO_TASKS and (args.seed is not None or saved.get('data') != args.data):
        return args.seed or 0
    seed = saved.get('division_seed')  # which older runs have not recorded
    return saved.get('seed', args.seed or 0) if seed is None else seed


def is_home(data, split, folder, saved, splits, mapped):
    """Whether data are those of a checkpoint's run, wherever they lie now; also where that is not known.

    Args:
        data: As the program was told.
        split: Name of the split to be scored.
        folder: Of the checkpoint.
        saved: Arguments of its run; empty where they are not known.
        splits: Of the data.
        mapped: Whether they have other labels, so that the run's splits.csv was not compared with them.
    """
    if 'train_ids' not in saved or same_place(data, saved.get('data')):
        return True
    if 'train' in splits and ids_digest(splits['train']['image_id']) == saved['train_ids']:
        return True
    if not mapped and (folder / 'splits.csv').is_file():
        by_id = read_split_file(folder / 'splits.csv')
        return any(by_id.get(str(image_id)) == split for image_id in splits[split]['image_id'])
    predicted = folder / f'predictions_{split}.csv'  # of a copy without its training images
    return predicted.is_file() and ids_digest(
        row['image_id'] for row in read_rows(predicted)) == ids_digest(splits[split]['image_id'])


def check_free(out, compared):
    """Refuse an output folder with a run, with the predictions to compare, or with files that we would overwrite."""
    check_output_dir(out)
    if compared and Path(compared).resolve().parent == out.resolve():
        raise RunError(f'{compared} would be replaced: choose another --output-dir than the folder of --compare.')
    for name in ('run.json', 'model.safetensors'):
        if (out / name).exists():
            raise RunError(f'{out} holds a run or weights ({name}): choose another --output-dir for the evaluation.')
    looks_in(out)  # a fault in it is told before the work
    theirs = [] if (out / 'evaluation.json').exists() else sorted(name for name in FILES if (out / name).exists())
    if theirs:
        raise RunError(f'{out} holds a {theirs[0]} that is not from an evaluation: choose another --output-dir.')


@contextlib.contextmanager
def replacing_evaluation(out):
    """Give an empty folder to fill; its files then replace those of an earlier evaluation in `out`.

    metrics.json goes first and comes last, so that it is never beside the files of another evaluation.
    """
    new = out / '.evaluation'
    with alone_in(out):  # of two at once, the second waits here
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed
        new.mkdir()
        try:
            yield new
            written = {path.name for path in new.iterdir()}
            for name in ('metrics.json', *FILES - written):
                (out / name).unlink(missing_ok=True)
            for name in ('evaluation.json', *sorted(written - {'evaluation.json', 'metrics.json'}), 'metrics.json'):
                os.replace(new / name, out / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def print_replaced(out, digest):
    """Say that an evaluation of other weights was in a folder that is about to be filled."""
    path = out / 'evaluation.json'
    if path.is_file() and f'"{digest}"' not in path.read_text(encoding='utf-8'):
        print(f'{out} held an evaluation of other weights: it is replaced, and looks.csv goes on.')


def subgroups_of(split, args, task, needed):
    """The groups of images that get scores of their own.

    Args:
        split: Whose images they are.
        args: Of evaluate_isic.py.
        task: Whose labels are no groups.
        needed: Whether each column of --subgroups must give some.

    Raises:
        RunError: A column that is not there, or (needed) of which nothing can be read.
    """
    columns = [c for c, kind in split.features.items() if isinstance(kind, (datasets.Value, datasets.ClassLabel))]
    found = {name: column_named(columns, name) for name in args.subgroups or ()}
    missing = [name for name, column in found.items() if not column]
    if missing:
        raise RunError(f'--subgroups: {args.data} has no numbers or words in a column {", ".join(missing)}: choose '
                       f'among {", ".join(c for c in columns if c not in ("image_id", *task.labels))}.')
    usual = {column_named(columns, name): name for name in ('sex', 'age_approximate')}
    wanted = dict.fromkeys(found.values() or filter(None, usual))
    parts = {column: subgroups({usual.get(column, column): words_of(split, column) if isinstance(
        split.features[column], datasets.ClassLabel) else list(split[column])}) for column in wanted}
    unread = [name for name, column in found.items() if not parts[column]]
    if unread and needed:
        raise RunError(f'--subgroups: {args.data} has no entry in its column {", ".join(unread)} that can be read: '
                       f'fix it, or leave it out.')
    return sum(parts.values(), [])


def print_mapping(accelerator, mapped, home, args, how):
    """Say what is scored, what is not, and where thresholds and calibration come from."""
    scored = '; '.join(f'{label} = {", ".join(words)}' for label, words in mapped.sources.items())
    accelerator.print(f'External validation on {args.data}: {scored}.' + (
        f' Negative throughout: {", ".join(mapped.negative)}.' if mapped.negative else ''))
    if mapped.not_scored:
        accelerator.print(f'Not scored, since --map does not name them: {", ".join(mapped.not_scored)}.')
    truth = label_array(mapped.data.splits[args.split], mapped.data.task)
    one_class = [label for label, t in zip(mapped.sources, truth.T) if t.min() == t.max()]
    if one_class:
        accelerator.print(f'No AUC of {", ".join(one_class)}: all images are of one class.')
    accelerator.print(
        'Thresholds and calibration are those of home' + ', where alphas were not 0' * args.alpha_zero + '.'
        if 'temperatures' in home else
        'Thresholds of home are known, its calibration is not.' if home.get('thresholds') else
        f'No thresholds and no calibration of home are known, so decisions are at 0.5: score {args.checkpoint} on its '
        f'own data first, which records them.')
    differ = [f'{name} {value}' for name, value in home.get('shown', {}).items() if how.get(name) not in (None, value)]
    if differ:
        accelerator.print(f'The thresholds of home belong to {", ".join(differ)}, which is not what is used here.')


def print_drift(drift):
    """Say how far the probabilities of each label are from what was observed."""
    for label, here in drift.items():
        text = '; '.join(
            f'{words} expected {of["expected"]:.1f} (ratio {interval_text(of["ratio"], of["ratio_ci95"])}), ECE '
            f'{of["ece"]:.3f}, Brier {of["brier"]:.3f}'
            for words, of in (('as given', here['as_given']), ('calibrated', here['calibrated'])) if of)
        print(f'Calibration of {label_words(label)}: {here["positives"]} positives observed; {text}')
