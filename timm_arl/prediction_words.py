"""What `timm_arl.predict` tells: captions of pictures, the rows and thresholds, what could not be read, the caveats."""
import sys
from typing import Any, Dict, List, Optional, TextIO

from huggingface_hub.utils import tqdm  # of the core: it comes with timm

from .isic.task import calibrate, label_words
from .prediction_files import MOST_PROBABLE, PredictionFiles

__all__ = ['CAVEATS', 'NAMED', 'captions', 'report', 'say', 'thresholds_shown']

SHOWN = 20  # rows that are also printed, if there are no more
NAMED = 3  # images that could not be read
CAVEATS = (
    'Not a medical device: for research only. A probability is not the risk of having the disease.',
    'Above a threshold does not mean diseased: many such images are false alarms. Any other lesion, and any picture of '
    'something else, is answered as if it showed one of the diagnoses.',
    'How often the network is right was measured on few images: see the card of published weights (docs/predict.md), '
    'or metrics.json of your run.',
)


def say(text: str, file: Optional[TextIO] = None) -> None:
    """Print a line, above the progress bar; what a terminal would obey in the name of a file is escaped."""
    tqdm.write(''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text), file=file)


def thresholds_shown(settings: Dict[str, Any]) -> Dict[str, float]:
    """The thresholds in the unit of the probabilities that are written."""
    return {label: float(calibrate(p, settings['temperatures'][label], settings['biases'][label]))
            if settings['calibrated'] else p for label, p in settings['thresholds'].items()}


def captions(files: PredictionFiles, row: Dict[str, Any], thresholds: Dict[str, float]) -> List[str]:
    """For each label what was found: 'melanoma 0.031 (not above 0.277)'."""
    texts = []
    for label, decision in zip(files.labels, files.decisions):
        digits = 3 if f'{row[label]:.3f}' != f'{thresholds[label]:.3f}' else 6  # or they would look the same
        texts.append(f'{label_words(label)} {row[label]:.{digits}f} ({"above" if row[decision] else "not above"} '
                     f'{thresholds[label]:.{digits}f})')
    return texts


def report(files: PredictionFiles, record: Dict[str, Any], speed: float) -> None:
    """Print what was found, what could not be read, and what the numbers are not."""
    settings = record['settings']
    thresholds = thresholds_shown(settings)
    for row in files.read() if record['images'] <= SHOWN and files.rows == files.path else ():
        called = row.get(MOST_PROBABLE)
        say(f'{row["image"]}: ' + (row['error'] or (f'most probable {label_words(called)}; ' if called else '')
                                   + ', '.join(captions(files, row, thresholds))))
    say(f'Thresholds: {settings["threshold_name"]}, ' + ', '.join(
        f'{label_words(label)} {p:.3f}' for label, p in thresholds.items()) + '.')
    counted = f'{record["images"]} image' + 's' * (record['images'] != 1)
    say(f'Written: {files.path} ({counted}' + (f', {speed:.1f} images/s)' if speed else ')'))
    if settings['overlays']:
        say(f'Written: {files.overlays}')
    for caveat in CAVEATS:
        say(caveat)
    if record['failed']:
        named = '; '.join(record['first_failed']) + '; ...' * (record['failed'] > NAMED)
        say(f'{record["failed"]} of {counted} could not be read ({named}): see the column error.',
            file=sys.stderr)
