"""Pictures as a reader sees them: nothing covered or cut, whole epochs, every marker visible, and the right words."""
import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from timm_arl.isic import plots
from timm_arl.isic.calibration import expected_calibration_error
from timm_arl.isic.metrics import score_split
from timm_arl.isic.task import ISIC2017, LABELS, Task, label_words


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a picture, and give its figure after a look at the file and at what is common to all of them."""
    figures, save = [], Figure.savefig

    def kept(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    def draw(plot, *args, **kwargs):
        kwargs.update({'resamples': 20} if plot is plots.roc_plot else {})
        plot(tmp_path / 'picture.png', *args, 'a title', **kwargs)
        with Image.open(tmp_path / 'picture.png') as picture:
            assert picture.format == 'PNG' and len(np.unique(np.asarray(picture.convert('L')))) > 10
        assert [path.name for path in tmp_path.iterdir()] == ['picture.png']
        figure = figures[-1]
        width, height = figure.bbox.size
        for axes in figure.axes:
            legend = axes.get_legend()
            if legend:
                assert not legend.get_window_extent().overlaps(axes.get_window_extent())
            box = axes.get_tightbbox()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        return figure

    monkeypatch.setattr(Figure, 'savefig', kept)
    return draw


def words(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def summary(epochs, alphas=4):
    rng = np.random.default_rng(0)
    return [{
        'epoch': str(epoch), 'train_loss': '0.9', 'validation_loss': str(0.5 + rng.random()),
        **{f'validation_auc_{label}': str(rng.random()) for label in LABELS},
        'validation_mean_auc': str(0.9 if epoch == 2 else 0.5),
        **{f'layer1.{k}.alpha': str(rng.normal()) for k in range(alphas)}} for epoch in range(1, epochs + 1)]


def scored(images=60, points=(0.3, 0.2), positives=(0.3, 0.2)):
    rng = np.random.default_rng(0)
    truth = (rng.random((images, len(LABELS))) < np.resize(positives, len(LABELS))).astype(np.float32)
    probabilities = (rng.random(truth.shape) * 0.7 + 0.3 * truth).astype(np.float32)
    scores = score_split(truth, probabilities, 20, operating_points={
        name: [point] * len(LABELS) for name, point in zip(('one', 'another'), points)})
    for k, (label, t, p) in enumerate(zip(LABELS, truth.T, probabilities.T)):
        scores[label]['calibration'] = {
            'ece': expected_calibration_error(t, p), 'temperature': 1.234 + k, 'bias': -0.5,
            'ece_calibrated': 0.0671}
    return truth, probabilities, scores


@pytest.mark.parametrize('epochs', [1, 2, 3, 160])
def test_curves(drawn, epochs):
    figure = drawn(plots.curve_plot, summary(epochs))
    losses, aucs = figure.axes
    best = 'best mean AUC: ' + ('0.500, epoch 1' if epochs == 1 else '0.900, epoch 2')
    assert words(losses) == ['training', 'validation', best]
    assert words(aucs) == [*map(label_words, LABELS), 'mean', best]
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        low, high = axes.get_xlim()
        assert any(low <= tick <= high for tick in axes.get_xticks())
        assert all(line.get_marker() == 'o' for line in axes.lines[:2]) == (epochs < 15)  # a lone point has no line


def test_a_loss_with_that_of_masks_says_so(drawn):
    rows = [{**row, 'train_mask_loss': '0.4'} for row in summary(2)]
    assert words(drawn(plots.curve_plot, rows).axes[0])[0] == 'training, masks included'


@pytest.mark.parametrize('epochs, alphas', [(1, 1), (1, 4), (2, 4), (90, 16), (90, 50)])
def test_alphas_say_what_a_negative_one_means(drawn, epochs, alphas):
    rows = summary(epochs, alphas)
    figure = drawn(plots.alpha_plot, rows, [column for column in rows[0] if column.endswith('.alpha')])
    (axes,), note = figure.axes, figure.get_supxlabel()
    assert 'y = x + F + alpha n(F) x' in note and 'below 0, it weakens it there' in note
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert len(axes.lines) == alphas + 1 and words(axes)[0] == 'layer1.0'
    assert len(words(axes)) == alphas if alphas < 20 else 10 < len(words(axes)) <= 20


@pytest.mark.parametrize('points', [(0.3, 0.2), (0.5, 0.5)])
def test_operating_points_are_told_once_and_seen_where_they_coincide(drawn, points):
    truth, probabilities, scores = scored(points=points)
    figure = drawn(plots.roc_plot, truth, probabilities, scores)
    for axes, label in zip(figure.axes, LABELS):
        auc = scores[label]
        assert axes.get_title() == '{}: AUC {:.3f} [{:.3f}, {:.3f}]'.format(
            label_words(label), auc['auc'], *auc['auc_ci95'])
        assert words(axes) == ['0.50, official', f'{points[0]:.2f}, one', f'{points[1]:.2f}, another']
        markers = [line for line in axes.lines if line.get_marker() not in ('', 'None', None)]
        sizes = [line.get_markersize() for line in markers]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3  # the smaller ones lie on top
        assert len({line.get_marker() for line in markers}) == 3


def test_a_label_of_one_class_has_no_curve(drawn):
    truth, probabilities, scores = scored(positives=(0, 0.3))
    empty, full = drawn(plots.roc_plot, truth, probabilities, scores).axes
    assert 'all images are of one class' in empty.get_title() and 'AUC 0.' in full.get_title()
    drawn(plots.reliability_plot, truth, probabilities, scores)


@pytest.mark.parametrize('images, example', [(3, 1), (60, 10), (600, 100)])
def test_reliability_tells_calibration_error_and_what_circles_are(drawn, images, example):
    truth, probabilities, scores = scored(images)
    for k, axes in enumerate(drawn(plots.reliability_plot, truth, probabilities, scores).axes):
        calibration = scores[LABELS[k]]['calibration']
        assert words(axes) == [
            f'as given, ECE {calibration["ece"]:.3f}', f'calibrated (T = {k + 1}.23, b = -0.50), ECE 0.067',
            f'{example} images']


def test_one_label(drawn):
    truth, probabilities, scores = scored()
    one = dataclasses.replace(ISIC2017, labels=LABELS[:1])
    for plot in (plots.roc_plot, plots.reliability_plot):
        assert len(drawn(plot, truth[:, :1], probabilities[:, :1], scores, task=one).axes) == 1
    assert words(drawn(plots.curve_plot, summary(2), task=one).axes[1])[1] == 'mean'


def test_many_labels_are_drawn_in_rows(drawn):
    task = Task('own', tuple('abcdefg'), 'multiclass')
    rng = np.random.default_rng(0)
    truth, probabilities = np.eye(7)[np.arange(70) % 7], rng.random((70, 7))
    figure = drawn(plots.roc_plot, truth, probabilities, score_split(truth, probabilities, 20, task=task), task=task)
    assert len(figure.axes) == 7 and figure.bbox.width < 4000


def test_a_panel_for_a_page_is_of_its_ink_and_loads_nothing():
    truth, probabilities, scores = scored()
    first, second = (plots.inline_svg(
        lambda axes: plots.draw_roc(axes, LABELS[0], truth[:, 0], probabilities[:, 0], scores[LABELS[0]], 20),
        'a "curve"', name) for name in ('one', 'two'))
    root = ElementTree.fromstring(first)
    assert root.get('role') == 'img' and root.get('aria-label') == 'a "curve"' and root.get('viewBox')
    assert {'sensitivity', '0.30, one', '0.20, another'} <= {text.text.strip() for text in root.iter('text')}
    assert 'http' not in first and '<style' not in first
    assert not re.search('#000|#fff|black|white', first) and 'currentColor' in first and 'var(--ground)' in first
    ids, others = (set(re.findall(' id="([^"]+)"', svg)) for svg in (first, second))
    assert len(ids) == len(re.findall(' id="', first)) and not ids & others
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', first)) <= ids
    # the page's ground shows through: nothing covers all of it
    assert all('var(--ground)' not in (path.get('style') or '') for path in list(root.iter('path'))[:2])


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    summary = [{'epoch': epoch, 'train_loss': 1, 'validation_loss': 1, 'validation_mean_auc': .5,
                'validation_auc_melanoma': .5, 'validation_auc_seborrheic_keratosis': .5} for epoch in (1, 2)]
    plots.curve_plot(tmp_path / 'p.png', summary, 'runs/c$x^$')
    assert (tmp_path / 'p.png').stat().st_size > 1000
