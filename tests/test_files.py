"""Files appear whole or not at all."""
import csv
import json

import numpy as np
import pytest

from timm_arl.files import git_commit, parts_of, read_rows, replacing, same_place, write_json, write_rows
from timm_arl.isic.predictions import read_predictions, write_predictions


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'metrics.json'
    write_json(path, {'a': 1})
    with pytest.raises(ValueError):
        write_json(path, {'a': float('nan')})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text('half')
        raise RuntimeError
    assert json.loads(path.read_text()) == {'a': 1} and [p.name for p in tmp_path.iterdir()] == ['metrics.json']


def test_names_that_are_not_utf8_do_not_keep_a_table_from_being_written(tmp_path):
    """A look at the test split is recorded with its command, at the end of a run of hours."""
    write_rows(tmp_path / 'looks.csv', [{'command': b'--output-dir caf\xe9'.decode(errors='surrogateescape')}])
    assert read_rows(tmp_path / 'looks.csv') == [{'command': '--output-dir caf\\udce9'}]


def test_predictions_give_float32_back(tmp_path):
    values = np.random.default_rng(0).random((5, 2)).astype(np.float32) ** 9
    ids = [f'ISIC_{i:07d}' for i in range(4)] + ['odd, "id"']
    write_predictions(tmp_path / 'p.csv', ids, values)
    with open(tmp_path / 'p.csv', newline='') as file:
        header, *rows = csv.reader(file)
    assert header == ['image_id', 'melanoma', 'seborrheic_keratosis'] and [r[0] for r in rows] == ids
    assert np.array_equal(np.array([r[1:] for r in rows], dtype=np.float32), values)


@pytest.mark.parametrize('delimiter', ';\t')
def test_predictions_as_excel_writes_them_elsewhere(tmp_path, delimiter):
    """With semicolons or tabs, and an id with a comma in it."""
    write_predictions(tmp_path / 'p.csv', ['a', 'b,c'], [[.25, .5], [1, 0]])
    with open(tmp_path / 'p.csv', newline='') as file:
        rows = list(csv.reader(file))
    with open(tmp_path / 'p.csv', 'w', newline='') as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert read_predictions(tmp_path / 'p.csv', ['b,c', 'a']).tolist() == [[1, 0], [.25, .5]]


def test_git_commit(tmp_path):
    assert git_commit(tmp_path / 'file.py') is None


def test_the_same_data_by_another_path(tmp_path, monkeypatch):
    """Else the --columns and --labels of a run would be forgotten, and other columns scored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.csv').touch()
    for data in ('mine.csv', './mine.csv', str(tmp_path / 'mine.csv')):
        assert same_place(data, 'mine.csv')
    assert same_place('user/hub', 'user/hub') and not same_place('other.csv', 'mine.csv')
    assert not same_place('.', '') and not same_place('.', None)


def test_labels_with_semicolons_in_them(tmp_path):
    write_rows(tmp_path / 'p.csv', [{'image_id': 'a', 'nevus; blue; cellular': 0.5}])
    assert read_rows(tmp_path / 'p.csv') == [{'image_id': 'a', 'nevus; blue; cellular': '0.5'}]


def test_commits_of_a_run_that_was_resumed_after_an_update():
    later = {'commit': 'b-dirty', 'kernels': 'torch'}
    record = {'commit': 'a', 'kernels': 'native', 'resumed': [{'commit': 'a'}, later]}
    assert parts_of(record, 'commit') == 'a b-dirty' and parts_of(record, 'kernels') == 'native torch'
    assert parts_of({'commit': 'a'}, 'commit') == 'a' and parts_of({'commit': None}, 'commit') == ''
