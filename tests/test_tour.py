"""The notebook docs/tour.ipynb, run as Jupyter runs it."""
import copy
import re

import nbformat
import pytest
from nbclient import NotebookClient


def texts(notebook):
    """What each cell printed, of those that print."""
    printed = [''.join(output['text'] for output in cell.get('outputs', ()) if output.get('name') == 'stdout')
               for cell in notebook.cells]
    return [text for text in printed if text.strip()]


def probability_of(text, label):
    return float(re.search(rf"'{label}': ([\d.e-]+)", text)[1])


def pictures(notebook):
    return [output['data'] for cell in notebook.cells for output in cell.get('outputs', ())
            if 'image/jpeg' in output.get('data', {})]


@pytest.mark.slow
def test_tour_runs_from_install_to_overlay(repo, tmp_path):
    shown = nbformat.read(repo / 'docs' / 'tour.ipynb', as_version=4)
    nbformat.validate(shown)
    assert 'synthetic' in shown.cells[0].source and 'not a medical device' in shown.cells[0].source
    notebook = copy.deepcopy(shown)
    NotebookClient(
        notebook, timeout=200, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert len(pictures(notebook)) == len(pictures(shown)) == 3
    for label in ('melanoma', 'seborrheic_keratosis'):  # what the page shows is what it gives
        found, said = (probability_of(texts(each)[0], label) for each in (notebook, shown))
        assert found == pytest.approx(said, abs=1e-3)
    assert texts(notebook)[1] == texts(shown)[1] and len(texts(notebook)) == 4
    factors = texts(notebook)[2].splitlines()
    assert [line.split()[0] for line in factors] == ['0', '1', '3', '10'] and factors[0] != factors[-1]
