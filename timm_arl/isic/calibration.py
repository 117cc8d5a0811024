"""Whether a probability of 30 % means three in ten, and how scores differ between groups of patients."""
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..extras import require

require('train', __name__)

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from .dataset.sources import number, years_of
from .intervals import delong_interval, groups_suffice
from .metrics import operating_point, score_task
from .task import ISIC2017, OFFICIAL_THRESHOLD, DataError, Task, calibrate, label_words

__all__ = [
    'AGE_BANDS', 'LEAST_TEMPERATURE', 'MOST_TEMPERATURE', 'calibrate', 'calibration_scores',
    'expected_calibration_error', 'fit_calibration', 'reliability', 'subgroup_table', 'subgroups',
]

AGE_BANDS = ((0, 30), (30, 50), (50, 70), (70, 200))  # years; the upper end is not part of the band
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.
MANY = 50  # groups of one column
Subgroup = Tuple[str, np.ndarray]


def reliability(truth: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> List[Dict[str, float]]:
    """Mean probability and share of positives in bins of equal width; empty bins are left out.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: In [0, 1], shape (N,).
        bins: Number of bins between 0 and 1.

    Returns:
        A dict of images, probability and positives (shares) for each bin.
    """
    which = np.clip((np.asarray(probabilities) * bins).astype(int), 0, bins - 1)
    return [
        {'images': int((which == b).sum()), 'probability': float(probabilities[which == b].mean()),
         'positives': float(truth[which == b].mean())}
        for b in range(bins) if (which == b).any()
    ]


def expected_calibration_error(truth: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Mean distance between probability and share of positives, over the bins of reliability, weighted by images."""
    rows = reliability(truth, probabilities, bins)
    return sum(r['images'] * abs(r['probability'] - r['positives']) for r in rows) / len(truth)


def fit_calibration(
        truth: np.ndarray,
        probabilities: np.ndarray,
        prevalence: Optional[float] = None,
) -> Tuple[float, float]:
    """Temperature T and bias b that give sigmoid(logit / T + b) the smallest cross-entropy.

    Platt, `Probabilities for SV Machines`, 2000; the temperature alone is that of https://arxiv.org/abs/1706.04599.

    Args:
        truth: 0 or 1, shape (N,), both of them.
        probabilities: Shape (N,).
        prevalence: The share of positives that the result is for; images are weighted to have it. Of 0, 1 or None:
            theirs.

    Returns:
        T, between LEAST_TEMPERATURE and MOST_TEMPERATURE, and b, between -20 and 20. At an end of its range, T is not
        determined by the images: they are all told apart, or the order of the probabilities is wrong.
    """
    logits = logit(np.clip(np.asarray(probabilities, np.float64), 1e-12, 1 - 1e-12))
    positive = np.asarray(truth, bool)
    share = prevalence if prevalence and prevalence < 1 else positive.mean()
    weights = np.where(positive, share / positive.sum(), (1 - share) / (~positive).sum())

    def cross_entropy(parameters: np.ndarray) -> Tuple[float, np.ndarray]:
        slope, bias = parameters
        z = slope * logits + bias
        errors = weights * (expit(z) - positive)
        return float(weights @ np.logaddexp(0, np.where(positive, -z, z))), np.array([errors @ logits, errors.sum()])
    # bounds, which LogisticRegression lacks: a slope below 0 would turn the order round
    slopes = 1 / MOST_TEMPERATURE, 1 / LEAST_TEMPERATURE
    found = minimize(cross_entropy, [1., 0.], jac=True, bounds=[slopes, (-20, 20)], method='L-BFGS-B')
    return 1 / float(found.x[0]), float(found.x[1])


def calibration_scores(
        truth: np.ndarray,
        probabilities: np.ndarray,
        calibration: Optional[Tuple[float, float]],
) -> Dict[str, Optional[float]]:
    """The expected calibration error of a label, before and after calibration.

    Args:
        truth: 0 or 1, shape (N,).
        probabilities: Shape (N,).
        calibration: As fit_calibration gives it, or None: then all but ece are None.

    Returns:
        ece, temperature, bias, ece_calibrated and mean_calibrated, the mean of the calibrated probabilities.
    """
    scores: Dict[str, Optional[float]] = {
        'ece': expected_calibration_error(truth, probabilities),
        **dict.fromkeys(('temperature', 'bias', 'ece_calibrated', 'mean_calibrated'))}
    if calibration:
        calibrated = calibrate(probabilities, *calibration)
        scores.update(
            temperature=calibration[0], bias=calibration[1],
            ece_calibrated=expected_calibration_error(truth, calibrated), mean_calibrated=float(calibrated.mean()))
    return scores


def subgroups(columns: Mapping[str, Sequence[Any]]) -> List[Subgroup]:
    """The groups of images that columns of the data tell apart; images where a cell is empty are groups too.

    Args:
        columns: By name, N cells each. 'age_approximate' is divided by AGE_BANDS (an age in none of them is not known),
            other columns with more than ten different numbers at their quartiles; the others have a group for each
            word. One with no entry is left out.

    Returns:
        For each group its name, such as 'sex male', and which images are in it, shape (N,).

    Raises:
        DataError: A column of more than MANY different words.
    """
    found: List[Subgroup] = []
    for column, cells in columns.items():
        name, years = ('age', True) if column == 'age_approximate' else (label_words(column), False)
        unknown = np.array([cell is None or cell == '' or cell != cell for cell in cells], dtype=bool)
        known = {cell for cell, empty in zip(cells, unknown) if not empty}
        if years or (len(known) > 10 and all(isinstance(cell, (int, float)) for cell in known)):
            numbers = np.array([(years_of if years else number)(cell) for cell in cells], float)  # None becomes NaN
            if years:  # -1, 999 and the like stand for an age that is not known
                numbers[(numbers < AGE_BANDS[0][0]) | (numbers >= AGE_BANDS[-1][1])] = np.nan
            unknown = np.isnan(numbers)
            if unknown.all():
                continue
            bands: List[Tuple[float, float, str]]
            if years:
                bands = [(low, high, f'{low} to {high - 1}' if high < 200 else f'{low} and above')
                         for low, high in AGE_BANDS]
            else:
                ends = np.unique(np.quantile(numbers[~unknown], [0, 0.25, 0.5, 0.75, 1]))
                said = _written(ends.tolist())
                bands = [(low, high, f'{first} to below {last}')
                         for low, high, first, last in zip(ends, ends[1:], said, said[1:])]
                bands[-1] = (ends[-2], np.inf, f'{said[-2]} to {said[-1]}')
            found += [(f'{name} {words}', (numbers >= low) & (numbers < high)) for low, high, words in bands]
        elif known:
            floats = [cell for cell in known if isinstance(cell, float)]
            said_of = dict(zip(floats, _written(floats)))
            texts = np.array(['' if empty else said_of[cell] if isinstance(cell, float) else str(cell).lower()
                              for cell, empty in zip(cells, unknown)])
            words_found = sorted(set(texts[~unknown]))
            if len(words_found) > MANY:
                raise DataError(f'The column {column} has {len(words_found)} different entries, but scores are given '
                                f'for {MANY} groups at most: choose another column.')
            found += [(f'{name} {word}', texts == word) for word in words_found]
        else:
            continue
        found.append((f'{name} unknown', unknown))
    merged: Dict[str, np.ndarray] = {}
    for name, which in found:  # the word 'unknown', and an empty cell
        merged[name] = merged.get(name, False) | which
    return [(name, which) for name, which in merged.items() if which.any()]


def _written(numbers: Sequence[float]) -> List[str]:
    """Numbers in words: with six digits, or as many as tell all of them apart and need no exponent."""
    for digits in (6, 15, 17):
        words = [f'{value:.{digits}g}' for value in numbers]
        if len(set(words)) == len(set(numbers)) and 'e+' not in ' '.join(words):
            break
    return words


def subgroup_table(
        truth: np.ndarray,
        probabilities: np.ndarray,
        parts: Sequence[Subgroup],
        task: Task = ISIC2017,
        groups: Optional[Sequence[str]] = None,
) -> List[Dict[str, Any]]:
    """Scores at the official threshold of 0.5 by sex, age band and other groups of images.

    Args:
        truth: 0 or 1, shape (N, labels), columns in the order of the task's labels.
        probabilities: Shape (N, labels).
        parts: Of subgroups.
        task: Whose labels they are.
        groups: N names of patients or lesions, whose images are not independent; None: all images are.

    Returns:
        A row for each group and label: group, label, score_task's scores, and auc_ci95 by DeLong or, with groups,
        Obuchowski (None with fewer than LEAST_GROUPS images, or patients or lesions, of a class, and for an AUC of 0
        or 1, where the interval has no width). In a multiclass task, where few probabilities exceed a threshold, the
        most probable label is called, and threshold is None.
    """
    names: Any = None if groups is None else np.asarray(groups)
    called = np.eye(len(task.labels))[probabilities.argmax(1)] if task.kind == 'multiclass' else None
    return [
        {'group': name, 'label': label, **score_task(t, p, OFFICIAL_THRESHOLD),
         **({} if called is None else {**operating_point(t, called[which, k], OFFICIAL_THRESHOLD), 'threshold': None}),
         'auc_ci95': _interval(t, p, None if names is None else names[which])}
        for name, which in parts
        for k, (label, t, p) in enumerate(zip(task.labels, truth[which].T, probabilities[which].T))]


def _interval(
        truth: np.ndarray,
        probabilities: np.ndarray,
        groups: Optional[Sequence[Any]],
) -> Optional[Tuple[float, float]]:
    if not groups_suffice(truth, groups):
        return None
    low, high = delong_interval(truth, probabilities, groups=groups)
    return (low, high) if high - low > 1e-9 else None
