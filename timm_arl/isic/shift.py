"""What a run keeps of its validation images, and how another clinic's images and scores differ from it."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np

from .calibration import LEAST_TEMPERATURE, MOST_TEMPERATURE, calibrate, expected_calibration_error, fit_calibration
from .images import decode, stored_size
from .intervals import LEAST_GROUPS, group_counts, percentile_interval, resampled_times
from .metrics import threshold_for_sensitivity, youden_threshold
from .task import ISIC2017, DataError, Task

__all__ = [
    'HOME_FILE', 'STAGED', 'STATISTICS', 'Home', 'calibration_doubts', 'calibration_drift', 'chosen', 'home_of',
    'home_record', 'image_statistics', 'probability_counts', 'standard_difference',
]

HOME_FILE = 'home.json'
CHOOSERS = {'youden on validation': youden_threshold, 'sensitivity 0.9 on validation': threshold_for_sensitivity}
MOST_IMAGES = 1000  # whose pixels are read
SIDE = 64  # px that the pixels' means need
STATISTICS: Dict[str, Tuple[str, np.ndarray]] = {  # what it is, with its unit; edges of its bins
    'shorter_side': ('shorter side, px', 2 ** np.arange(5, 14.25, 0.25)),
    'brightness': ('brightness, 0 to 1', np.linspace(0, 1, 26)),
    'red': ('red, mean of the image', np.linspace(0, 1, 26)),
    'green': ('green, mean of the image', np.linspace(0, 1, 26)),
    'blue': ('blue, mean of the image', np.linspace(0, 1, 26)),
}
STAGED = ('shown', 'images', 'labels')  # of a home record, in results.json; config.json has the rest
PROBABILITY_BINS = np.linspace(0, 1, 21)

Home = Dict[str, Any]  # what home_record gives; may lack any key


def image_statistics(images: Any) -> Dict[str, Any]:
    """Size, brightness and colour of images as they are stored, without their pixels.

    Args:
        images: A split of load_data whose images can be read; of many, 1,000 at equal distances are looked at.

    Returns:
        images (their number), and for each of STATISTICS its mean, sd, median, and counts in its bins (what lies
        outside is counted at the ends). Brightness is the luma of ITU-R BT.601.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).round().astype(int))
    cells = images.select_columns(['image'])
    found = np.array([_of_image(cells[int(row)]['image']) for row in rows])
    summary: Dict[str, Any] = {'images': len(found)}
    for values, (name, (_, edges)) in zip(found.T, STATISTICS.items()):
        summary[name] = {'mean': float(values.mean()), 'sd': float(values.std()), 'median': float(np.median(values)),
                         'counts': np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()}
    return summary


def _of_image(cell: Dict[str, Any]) -> Tuple[float, ...]:
    side = min(stored_size(cell))
    picture = decode(cell, SIDE)
    red, green, blue = np.asarray(picture, np.float64).mean((0, 1)) / 255
    return side, 0.299 * red + 0.587 * green + 0.114 * blue, red, green, blue


def probability_counts(probabilities: np.ndarray) -> Any:
    """How many probabilities lie in each of the bins of PROBABILITY_BINS."""
    return np.histogram(probabilities, PROBABILITY_BINS)[0].tolist()


def standard_difference(here: Dict[str, float], home: Dict[str, float]) -> Optional[float]:
    """The difference of two means in standard deviations of home; None where home does not vary."""
    return (here['mean'] - home['mean']) / home['sd'] if home['sd'] > 1e-9 else None


def chosen(
        truth: np.ndarray,
        probabilities: np.ndarray,
        task: Task = ISIC2017,
        learned: Optional[np.ndarray] = None,
) -> Home:
    """Thresholds, temperatures and biases by validation images, as config.json of published weights has them.

    Args:
        truth: 0 or 1, shape (N, labels), both classes of each.
        probabilities: Shape (N, labels).
        task: Whose labels they are.
        learned: 0 or 1 of the training images, shape (M, labels). Calibration is for their prevalence.
    """
    each = list(zip(task.labels, truth.T, probabilities.T))
    shares = [None] * len(each) if learned is None else np.asarray(learned, np.float64).mean(0).tolist()
    fitted = {label: fit_calibration(t, p, share) for (label, t, p), share in zip(each, shares)}
    return {'thresholds': {name: {label: chooser(t, p) for label, t, p in each} for name, chooser in CHOOSERS.items()},
            'temperatures': {label: temperature for label, (temperature, _) in fitted.items()},
            'biases': {label: bias for label, (_, bias) in fitted.items()}}


def calibration_doubts(
        truth: np.ndarray,
        probabilities: np.ndarray,
        choice: Home,
        groups: Optional[Sequence[str]] = None,
) -> Dict[str, str]:
    """A sentence about each label whose calibration its validation images do not determine, by label.

    Args:
        truth, probabilities: Of chosen.
        choice: What it gave.
        groups: Patient or lesion of each image; None: each image is a group.
    """
    doubts = {}
    for (label, temperature), t, p in zip(choice['temperatures'].items(), truth.T, probabilities.T):
        positive, negative = group_counts(t, groups)
        why = ''
        if min(positive, negative) < LEAST_GROUPS:
            what = 'validation images' if groups is None else 'patients or lesions'
            why = f'{positive} {what} have it and {negative} do not, but {LEAST_GROUPS} of each are needed'
        elif p[t == 1].min() > p[t == 0].max():
            why = 'all validation images with it have higher probabilities than those without'
        elif not 1.001 * LEAST_TEMPERATURE < temperature < MOST_TEMPERATURE / 1.001:
            why = f'its temperature is at the end of its range, {temperature:.3g}'
        if why:
            doubts[label] = f'Do not use the calibration of {label}: {why}.'
    return doubts


def home_record(
        images: Any,
        truth: np.ndarray,
        probabilities: np.ndarray,
        task: Task,
        shown: Dict[str, Any],
        groups: Optional[Sequence[str]] = None,
        learned: Optional[np.ndarray] = None,
) -> Home:
    """What home.json of a run holds: what its validation images chose, and statistics of them.

    Args:
        images: The split.
        truth, probabilities: Of chosen.
        task: Whose labels they are.
        shown: How the images were prepared: crops and so on.
        groups: Of calibration_drift.
        learned: Of chosen.
    """
    choice = chosen(truth, probabilities, task, learned)
    doubts = calibration_doubts(truth, probabilities, choice, groups)
    return {**choice, 'doubts': list(doubts.values()), 'shown': shown, 'images': image_statistics(images), 'labels': {
        label: {'counts': probability_counts(p), **calibration_drift(
            t, p, (choice['temperatures'][label], choice['biases'][label]), groups)}
        for label, t, p in zip(task.labels, truth.T, probabilities.T)}}


def home_of(folder: Path, settings: Dict[str, Any], staged: Optional[Home] = None) -> Home:
    """The record of a run or, where there is none, what published weights come with; may lack any key.

    Args:
        folder: Of the checkpoint.
        settings: Of Checkpoint.settings.
        staged: Of Checkpoint.home.

    Raises:
        DataError: A record that is damaged.
    """
    path = folder / HOME_FILE
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            if not {'thresholds', 'temperatures', 'biases', 'labels', 'images'} <= content.keys():
                raise ValueError('it lacks some of its keys')
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f'{path} is damaged ({error}): delete it, and score the checkpoint on its own data again, '
                            f'which writes it.') from error
        return content
    own = {key: dict(settings[key]) for key in ('thresholds', 'temperatures', 'biases') if settings.get(key)}
    own.get('thresholds', {}).pop('official', None)
    if staged and set(STAGED) <= staged.keys():
        own.update({key: dict(staged[key]) for key in STAGED})
    return own


def calibration_drift(
        truth: np.ndarray,
        probabilities: np.ndarray,
        calibration: Optional[Tuple[float, float]],
        groups: Optional[Sequence[str]] = None,
        seed: int = 0,
) -> Dict[str, Any]:
    """How many positives the probabilities of a label promise, and how many there are.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,).
        calibration: Temperature and bias of home; None: not known.
        groups: Patient or lesion of each image, resampled as a whole; None: images are.
        seed: Of the bootstrap.

    Returns:
        images, positives, and, as_given and calibrated, expected (positives), ratio (expected to observed, with
        ratio_ci95; None without a positive, and the interval with fewer than LEAST_GROUPS groups, or images, that have
        one), ece and brier; calibrated is None where it is not known.
    """
    times = resampled_times(len(truth), seed=seed, groups=groups)

    def of(p: np.ndarray) -> Dict[str, Any]:
        tops, bottoms = times @ p, times @ np.asarray(truth, np.float64)
        ratios = np.where(bottoms > 0, tops / np.maximum(bottoms, 1), np.nan)
        some, enough = bool(truth.sum()), group_counts(truth, groups)[0] >= LEAST_GROUPS
        return {'expected': float(p.sum()), 'ratio': float(p.sum() / truth.sum()) if some else None,
                'ratio_ci95': percentile_interval(ratios) if enough else None,
                'ece': expected_calibration_error(truth, p), 'brier': float(np.mean((p - truth) ** 2))}
    p = np.asarray(probabilities, np.float64)
    return {'images': len(truth), 'positives': int(truth.sum()), 'as_given': of(p),
            'calibrated': of(calibrate(p, *calibration)) if calibration else None}
