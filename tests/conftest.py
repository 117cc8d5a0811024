import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def repo() -> Path:
    return REPO


@pytest.fixture(scope='session')
def isic_sample() -> str:
    """A sixteenth of ISIC 2017 (96/24/48 images), which lies beside the checkout."""
    folder = Path(os.environ.get('ISIC2017_SAMPLE', REPO.parent / 'shared' / 'isic2017-sample'))
    if not folder.is_dir():
        pytest.skip(f'no ISIC 2017 sample at {folder} (set ISIC2017_SAMPLE)')
    return str(folder)
