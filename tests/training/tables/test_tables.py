"""The figures of the paper's tables: against scikit-learn, SciPy and the paper's own arithmetic."""
import datasets
import numpy as np
import pytest
import timm
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

import timm_arl  # noqa: F401  registers the models
from timm_arl.files import write_json
from timm_arl.isic.predictions import write_predictions
from timm_arl.isic.task import LABELS
from timm_arl.training.arguments import RunError
from timm_arl.training.tables.lines import table_lines
from timm_arl.training.tables.pages import cell, differences, markdown_page, write_table
from timm_arl.training.tables.rows import TABLES, TITLES, pairs_of, printed_figures
from timm_arl.training.tables.scores import Scores, labels_of
from timm_arl.training.tables.t_test import table7_lines


@pytest.fixture(scope='module')
def truth():
    labels = np.zeros((80, 2))
    labels[:20, 0] = labels[20:40, 1] = 1
    return labels


def predictions(truth, seed, quality=0.5):
    noise = np.random.default_rng(seed).random(truth.shape)
    return quality * truth * 0.6 + (1 - quality * 0.6) * noise


def test_figures_are_means_over_seeds(truth):
    by_seed = {seed: predictions(truth, seed) for seed in (0, 1, 2)}
    scores = Scores(truth, by_seed)
    for k, label in enumerate(LABELS):
        t, ps = truth[:, k], [p[:, k] for p in by_seed.values()]
        expected = {label: [roc_auc_score(t, p) for p in ps],
                    f'{label} accuracy': [accuracy_score(t, p > 0.5) for p in ps],
                    f'{label} sensitivity': [recall_score(t, p > 0.5) for p in ps],
                    f'{label} specificity': [recall_score(1 - t, p <= 0.5) for p in ps]}
        for name, values in expected.items():
            value, low, high = scores.figure(name)
            assert value == pytest.approx(np.mean(values))
            assert low < value < high
    assert scores.figure('mean')[0] == pytest.approx(np.mean([scores.figure(label)[0] for label in LABELS]))


def test_interval_covers_noise_between_seeds(truth):
    alike = Scores(truth, {seed: predictions(truth, 0) for seed in range(4)}).figure('mean')
    apart = Scores(
        truth, {seed: predictions(truth, seed, quality=0.2 + 0.2 * seed) for seed in range(4)}).figure('mean')
    assert apart[2] - apart[1] > 1.3 * (alike[2] - alike[1])


def test_differences_are_paired(truth):
    """Two networks that rank alike differ by nothing, with certainty, however uncertain each of them is."""
    by_seed = {seed: predictions(truth, seed) for seed in (0, 1)}
    first = Scores(truth, by_seed)
    second = Scores(truth, {seed: p ** 3 for seed, p in by_seed.items()})
    assert (first - second).figure('mean') == (0, 0, 0)
    better = Scores(truth, {seed: np.clip(p + 0.2 * truth, 0, 1) for seed, p in by_seed.items()})
    assert (better - first).figure('mean')[1] > 0
    assert (first - Scores(truth, {1: by_seed[1], 5: by_seed[0]})).seeds == [1]
    assert first - Scores(truth, {7: by_seed[0]}) is None


def test_rows_of_one_name_are_the_same_run():
    runs = {}
    for table, rows in TABLES.items():
        assert len({row.name for row in rows}) == len(rows), table
        for row in rows:
            made = (row.model, row.weights, row.flags, row.alpha_zero_of, row.lesion_crop)
            assert runs.setdefault(row.name, made) == made, row.name
            assert not row.model or timm.is_model(row.model)
            assert not row.alpha_zero_of or row.alpha_zero_of in [each.name for each in rows]


@pytest.mark.parametrize('table', TABLES)
def test_pairs_and_printed_figures_are_of_rows(table):
    names = [row.name for row in TABLES[table]]
    assert {name for pair in pairs_of(table) for name in pair} <= set(names)
    assert {row for row, _ in printed_figures(table)} <= set(names)
    assert {label for _, label in printed_figures(table)} <= set(labels_of(table))


def test_printed_figures_of_the_papers_headline():
    printed = printed_figures('table3')
    assert (printed['arl_cnn14', 'melanoma'], printed['arl_cnn14', 'seborrheic_keratosis']) == (0.777, 0.875)
    assert printed['arl_cnn50', 'melanoma'] - printed['resnet50', 'melanoma'] == pytest.approx(0.018)


class Arguments:
    data, output_dir, seeds = None, 'O', [0, 1, 2]
    drop_duplicates, left_out = None, set()
    table, digest, stored, files = 'table3', 'd', '256 x 256 px', {}
    epochs, img_size, mixed_precision, cpu_threads = None, None, 'no', None


@pytest.fixture
def runs(truth, tmp_path):
    """Predictions of two rows, as their runs keep them, and what the program knows of the data."""
    ids = [f'ISIC_{k}' for k in range(len(truth))]
    for folder in ('predictions', 'runs'):
        (tmp_path / folder).mkdir()
    for row in ('arl_cnn14', 'resnet14'):
        for seed in (0, 1):
            path = tmp_path / 'predictions' / f'{row}-seed{seed}.csv'
            write_predictions(path, ids, predictions(truth, seed))
            write_json(path.with_suffix('.json'), {
                'settings': ['--mixed-precision=no'], 'origin': {'data': 'd', 'images': '256 x 256 px', 'weights': ''},
                'columns': dict(image_size=96, epochs=20, precision='fp32', commit='abc', kernels='')})
    args = Arguments()
    args.splits = {'test': datasets.Dataset.from_dict({
        'image_id': ids, **{label: truth[:, k].tolist() for k, label in enumerate(LABELS)}})}
    return args, tmp_path


def change(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_seeds_that_are_missing_have_each_their_reason(runs):
    args, out = runs
    for seed, why in ((0, 'no network'), (1, 'no network'), (2, 'the loss is nan')):
        (out / 'runs' / f'seresnet14-seed{seed}.reason').write_text(why)
    (out / 'runs' / 'arl_cnn14-seed2.reason').write_text('no space left')
    notes = {line['row']: line['note'] for line in table_lines(args, out)[0]}
    assert notes['seresnet14'] == 'seed 0, 1: no network; seed 2: the loss is nan'
    assert notes['arl_cnn14'] == 'seed 2: no space left'
    assert notes['resnet14'] == 'seed 2: not run: --row resnet14 makes it'
    assert notes['arl_cnn50'] == 'seed 0, 1, 2: not run: --row arl_cnn50 makes it'
    (out / 'runs' / 'resnet50-seed0.reason').write_text('no Hub')
    (out / 'runs' / 'resnet50-seed0.refused').touch()  # before it began
    (out / 'runs' / 'resnet50-seed1.reason').write_text('no space left')
    notes = {line['row']: line['note'] for line in table_lines(args, out)[0]}
    assert notes['arl_cnn50'].startswith('seed 0: no Hub; seed 1, 2')  # which starts from the same weights


@pytest.mark.parametrize('before, after, says', [
    ('256 x 256 px', '512 x 512 px', 'images of 512 x 512 px, and those of None have 256 x 256 px'),
    ('"weights": ""', '"weights": "hub"', 'was made with other origin than'),
    ('--mixed-precision=no', '--mixed-precision=bf16', 'was made with other settings than'),
])
def test_a_seed_that_was_made_otherwise_is_not_averaged(runs, before, after, says):
    args, out = runs
    change(out / 'predictions' / 'arl_cnn14-seed1.json', before, after)
    with pytest.raises(RunError, match=says):
        table_lines(args, out)


def test_rows_of_different_budgets_are_not_subtracted(runs):
    args, out = runs
    for seed in (0, 1):
        change(out / 'predictions' / f'arl_cnn14-seed{seed}.json', '"epochs": 20', '"epochs": 40')
    with pytest.raises(RunError, match='arl_cnn14 and resnet14 cannot be compared: their epochs is 40 and 20'):
        table_lines(args, out)


def test_images_with_a_twin_are_left_out_of_every_figure(runs, truth):
    """An AUC of the images that are left, computed here by its definition."""
    args, out = runs
    whole = {(line['row'], line['label']): line for line in table_lines(args, out)[0]}
    args.left_out, args.drop_duplicates = {'ISIC_0', 'ISIC_3', 'not of test'}, 'twins.csv'
    lines = {(line['row'], line['label']): line for line in table_lines(args, out)[0]}
    left = [k for k in range(len(truth)) if k not in (0, 3)]
    values = []
    for seed in (0, 1):
        scores, found = predictions(truth, seed)[left, 0], truth[left, 0]
        pairs = scores[found == 1][:, None] - scores[found == 0][None]
        values.append(((pairs > 0) + (pairs == 0) / 2).mean())
    line = lines['arl_cnn14', 'melanoma']
    assert line['measured'] == f'{np.mean(values):.8f}' != whole['arl_cnn14', 'melanoma']['measured']
    assert line['images'] == lines['arl_cnn14 - resnet14', 'mean']['images'] == str(len(left))
    assert line['command'].endswith('--seeds 0 1 2 --drop-duplicates twins.csv')
    assert (line['ci_low'], line['ci_high']) != tuple(whole['arl_cnn14', 'melanoma'][k] for k in ('ci_low', 'ci_high'))


def test_t_test_of_the_paper_is_corrected(truth):
    """t(18) from the ten printed runs is -24.75, not -78.26, which follows from a slip in the sums of squares."""
    figures = {line['label']: (float(line['printed']), float(line['measured']))
               for line in table7_lines(Arguments, {}, {})[0] if line['row'] == 'printed'}
    assert figures['s_w'] == (0.04, pytest.approx(0.1265, abs=5e-5))
    assert figures['t(18)'] == (-78.26, pytest.approx(-24.75, abs=0.005))
    assert figures['critical t(18) at 0.01'] == (-2.5176, pytest.approx(-2.5524, abs=5e-5))


def test_t_test_of_our_seeds(truth):
    from scipy.stats import ttest_rel
    first, second = ({seed: predictions(truth, seed + shift) for seed in range(4)} for shift in (0, 50))
    made = dict(images=600, image_size=96, epochs=20, precision='bf16', kernels='native', commit='abc', seeds='0 1 2 3')
    lines, about = table7_lines(Arguments, {
        'arl_cnn14': Scores(truth, first), 'resnet14': Scores(truth, second)}, {'arl_cnn14': made})
    page = markdown_page('table7', lines, about, 'some data')
    assert ('Measured on the test images of some data, by networks that see 96 px. 95 % intervals of the paired '
            't-test over the seeds 0 1 2 3; 20 epochs, precision bf16, commit abc.') in page
    assert 'Measured' not in markdown_page('table7', table7_lines(Arguments, {}, {})[0], about, 'some data')
    ours = {line['label']: line['measured'] for line in lines if line['row'] == 'arl_cnn14 against resnet14'}
    means = [[100 * roc_auc_score(truth, p) for p in each.values()] for each in (first, second)]
    expected = ttest_rel(*means)
    assert float(ours['t']) == pytest.approx(expected.statistic, abs=1e-4)
    assert float(ours['p, two-sided']) == pytest.approx(expected.pvalue, abs=1e-4)
    other = [line for line in lines if 'lite0' in line['row']]
    assert other and all(line['measured'] == '' and 'table3' in line['note'] for line in other)


def test_t_test_of_seeds_that_do_not_differ(truth):
    scores = Scores(truth, dict.fromkeys(range(3), predictions(truth, 0)))
    lines = table7_lines(Arguments, {'arl_cnn14': scores, 'resnet14': scores}, {})[0]
    ours = [line for line in lines if line['row'] == 'arl_cnn14 against resnet14']
    assert ours and all(line['measured'] == '' and 'the same' in line['note'] for line in ours)


def test_check_finds_a_copied_number(tmp_path):
    lines = [cell('arl_cnn14', 'mean', 0.826, (0.8, 0.77, 0.83), seeds='0 1 2', images=600),
             cell('resnet14', 'mean', note='not run')]
    write_table(tmp_path, 'table3', lines, {})
    path = tmp_path / 'table3.csv'
    assert differences(path, lines, {}, '') == []
    before, page = path.read_text(), path.with_suffix('.md')
    path.write_text(before.replace('0.80000000', '0.90000000'))
    assert differences(path, lines, {}, '') == [
        'arl_cnn14 mean: measured is 0.90000000, computed again it is 0.80000000']
    assert len(differences(path, lines[:1], {}, '')) == 2
    forged = [*before.splitlines()]
    path.write_text('\n'.join([forged[0], forged[1].replace('0.80000000', '0.99900000'), *forged[1:]]) + '\n')
    assert differences(path, lines, {}, '') == ['arl_cnn14 mean: 2 lines']
    path.write_text(before)
    page.write_text(page.read_text().replace('0.800', '0.999'))
    assert differences(path, lines, {}, '') == [f'{page} is not the page of table3.csv']


@pytest.mark.parametrize('table', TITLES)
def test_page_shows_every_figure_and_reason(table, tmp_path):
    lines = [cell('a', 'mean', 0.5, (0.6, 0.5, 0.7), images=600, command='python x'),
             cell('b', 'mean', note='no weights')]
    write_table(tmp_path, table, lines, {'a': 'one network'})
    page = (tmp_path / f'{table}.md').read_text()
    assert '0.600 [0.500, 0.700] (printed 0.5)' in page
    assert 'one network' in page and 'b: no weights' in page and 'python x' in page


def test_page_says_what_its_intervals_are_over():
    several = cell('a', 'pointing game', None, (0.6, 0.5, 0.7), images=72, seeds='0 1 2')
    one = cell('b', 'pointing game', None, (0.6, 0.5, 0.7), images=72, seeds='0')
    assert 'with 95 % intervals over images and seeds (bootstrap);' in markdown_page('maps', [several], {}, 'some data')
    for table in ('maps', 'table3'):
        page = markdown_page(table, [several, one], {}, 'some data')
        assert 'with 95 % intervals over images and seeds (bootstrap, of images alone for one seed);' in page


def test_page_of_crops_tells_how_good_the_masks_are(tmp_path):
    lines = [cell('a', 'mean', None, (0.6, 0.5, 0.7), images=600),
             *(cell('lesion_masks', key, None, (0.8, 0.7, 0.9), images=150) for key in ('dice', 'iou'))]
    write_table(tmp_path, 'table6', lines, {})
    page = (tmp_path / 'table6.md').read_text()
    assert 'a Dice of 0.800 [0.700, 0.900] and an IoU of 0.800 [0.700, 0.900] on 150 validation images' in page
    assert '| lesion_masks' not in page and 'on the 600 test images' in page


def test_figures_are_rounded_once():
    """0.86246 is 0.862, though 0.8625 would be 0.863."""
    page = markdown_page('table3', [cell('a', 'mean', None, (0.86246, 0.64249, 0.90253), images=600)], {}, 'x')
    assert '0.862 [0.642, 0.903]' in page


def test_table7_is_not_written_without_the_scores_that_it_has(call, tmp_path):
    (tmp_path / 'predictions').mkdir()
    (tmp_path / 'predictions' / 'resnet14-seed0.csv').touch()
    done = call('reproduce_tables', 'table7', '--output-dir', tmp_path)
    assert done.returncode == 2 and f'table7 needs --data here: its labels score the predictions in {tmp_path}' in (
        done.stderr)
