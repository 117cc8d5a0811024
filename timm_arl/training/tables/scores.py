"""The figures of a table from the predictions of several seeds, with intervals over images and seeds."""
from typing import Dict, List, Optional, Tuple

import numpy as np

from ...isic.intervals import RESAMPLES, percentile_interval, resampled_indices
from ...isic.metrics import OFFICIAL_THRESHOLD, auc
from ...isic.task import LABELS

__all__ = ['Figure', 'Scores', 'labels_of', 'measure']

Figure = Tuple[float, float, float]  # value, and the ends of its 95 % interval
SEED_OF_IMAGES, SEED_OF_SEEDS = 0, 1


class Scores:
    """Figures of one row: for each seed the value, and its bootstrap distribution over images.

    Args:
        truth: 0 or 1, shape (images, labels).
        predictions: By seed, probabilities of shape (images, labels).
    """

    def __init__(self, truth: np.ndarray, predictions: Dict[int, np.ndarray]) -> None:
        self.seeds = sorted(predictions)
        index = resampled_indices(len(truth), RESAMPLES, SEED_OF_IMAGES)
        # row 0 of the values is the images as they are, the others are resampled
        index = np.concatenate([np.arange(len(truth))[None], index])
        self.values: Dict[str, np.ndarray] = {}  # by label, shape (seeds, 1 + RESAMPLES)
        for k, label in enumerate(LABELS):
            t = truth[index, k] == 1
            p = [predictions[seed][:, k][index] for seed in self.seeds]
            self.values[label] = np.stack([auc(t, each) for each in p])
            called = [each > OFFICIAL_THRESHOLD for each in p]
            with np.errstate(invalid='ignore'):
                self.values[f'{label} accuracy'] = np.stack([(c == t).mean(-1) for c in called])
                self.values[f'{label} sensitivity'] = np.stack([(c & t).sum(-1) / t.sum(-1) for c in called])
                self.values[f'{label} specificity'] = np.stack([(~c & ~t).sum(-1) / (~t).sum(-1) for c in called])
        self.values['mean'] = np.mean([self.values[label] for label in LABELS], axis=0)

    def __sub__(self, other: 'Scores') -> Optional['Scores']:
        """Differences on the same images and seeds; None where they have no seed in common."""
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        if not seeds:
            return None
        result = object.__new__(Scores)
        result.seeds = seeds
        result.values = {
            label: self.values[label][[self.seeds.index(seed) for seed in seeds]]
            - other.values[label][[other.seeds.index(seed) for seed in seeds]] for label in self.values}
        return result

    def figure(self, label: str) -> Figure:
        """Mean over the seeds, and its 95 % interval over images and, where there are several, seeds."""
        return measure(self.values[label])


def measure(values: np.ndarray) -> Figure:
    """The mean over seeds, with a percentile interval.

    Seeds are drawn with replacement, as images are, and independently of them: the interval covers another set of
    images and other runs. The same draws serve all rows, so that differences are paired.

    Args:
        values: Shape (seeds, 1 + resamples of the images); the first column is of the images as they are.
    """
    seeds, columns = values.shape
    drawn = np.random.default_rng(SEED_OF_SEEDS).integers(seeds, size=(columns - 1, seeds))
    resampled = values[drawn, np.arange(1, columns)[:, None]].mean(1)
    return (float(values[:, 0].mean()), *percentile_interval(resampled))


def labels_of(table: str) -> List[str]:
    """The labels that a table has a figure for: AUCs, and what else the paper prints there."""
    points = [f'{label} {name}' for label in LABELS for name in ('accuracy', 'sensitivity', 'specificity')]
    return [*LABELS, 'mean', *points * (table in ('table3', 'table4'))]
