"""The report as a reader meets it: its figures, what it says first, and how it stands on screens and paper."""
import re

import numpy as np
import pytest
from pages import Page
from PIL import Image
from sklearn.metrics import auc as area_under

from timm_arl.isic.calibration import expected_calibration_error, subgroup_table, subgroups
from timm_arl.isic.html_report import Comparison, Example, Examples, Group, Shown, Training, html_report
from timm_arl.isic.metrics import compare, interval_text, score_split
from timm_arl.isic.report import groups_table
from timm_arl.isic.task import LABELS, Task, label_words

EVIL = 'a<script>alert(1)</script>&"\''


def examples(image_id='ISIC_1', side=256, **changes):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 360, 3), np.uint8))
    group = Group('melanoma: most wrong', 'The worst.', [
        Example(image_id, 'nevus', 'false alarm', 'probability of melanoma 0.9', [
            Shown(picture, 'image', f'Dermoscopic image {image_id}, nevus.'),
            Shown(picture, 'class activation map', f'Class activation map on {image_id}.')])] * 2,
        [('class activation map', -1.5, 2.25, 'of melanoma')])
    return Examples(**{**dict(
        groups=[group, Group('melanoma: most certain', 'The best.', [], [])], differing=[], note='',
        blocks=[('layer1.0', -0.5, 0.0123, 0.987)], side=side, square_copies=True), **changes})


def evaluation(images=60, positives=0.3, seed=0):
    """Truth, probabilities (one is exactly 0.5), and scores as metrics.json has them."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, len(LABELS))) < positives).astype(np.float32)
    probabilities = (rng.random(truth.shape) * 0.7 + 0.3 * truth).astype(np.float32)
    probabilities[0] = 0.5
    scores = score_split(truth, probabilities, 50, operating_points={
        'youden on validation': [0.4] * len(LABELS), 'sensitivity 0.9 on validation': [0.2] * len(LABELS)})
    for label, t, p in zip(LABELS, truth.T, probabilities.T):
        scores[label]['calibration'] = {
            'ece': expected_calibration_error(t, p), 'temperature': 1.5, 'bias': -0.5, 'ece_calibrated': 0.0671,
            'mean_calibrated': 0.25}
    scores['subgroups'] = subgroup_table(
        truth, probabilities, subgroups({'sex': ['male', 'female'] * (images // 2)}))
    return truth, probabilities, scores


def render(name='arl_cnn14.isic2017', data='isic2017', other=None, training=None, positives=0.3, **changes):
    metrics, truth, probabilities = {}, {}, {}
    for k, split in enumerate(('validation', 'test')):
        truth[split], probabilities[split], metrics[split] = evaluation(60 - 10 * k, positives, k)
    if other:
        metrics['test']['comparison'] = {'first': other.name, 'second': name, **compare(
            truth['test'], other.probabilities, probabilities['test'], 50)}
    record = {'command': 'evaluate_isic.py --data ../isic2017', 'timm_arl': '1.2.3', 'img_size': 128, 'crops': 'center',
              'aspect': 'keep', 'seed': 0, 'alpha_zero': False}
    rows = [{'epoch': str(epoch), 'train_loss': '0.9', 'validation_loss': '0.5', 'validation_mean_auc': '0.75',
             **{f'validation_auc_{label}': '0.75' for label in LABELS}, 'layer1.0.alpha': '0.125'} for epoch in (1, 2)]
    html = html_report(
        name, data, 'test', metrics, truth, probabilities, record,
        training or Training(rows, ['layer1.0.alpha'], True, True), examples(**changes), other)
    return html, metrics, truth, probabilities


@pytest.fixture(scope='module')
def rendered():
    return render()


@pytest.fixture(scope='module')
def compared():
    return render(other=Comparison('OTHER/predictions_test.csv', evaluation(50, seed=7)[1]))


@pytest.mark.parametrize('which', ['rendered', 'compared'])
def test_structure(which, request):
    html = request.getfixturevalue(which)[0]
    page = Page(html)
    assert html.startswith('<!DOCTYPE html>') and page.of('html') == [{'lang': 'en'}] and page.of('title')
    assert not page.of('script', 'link', 'iframe', 'object', 'form', 'base')
    assert not re.search(r'https?:|\bon\w+=|@import|javascript:', html)
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert targets and {a or b for a, b in targets} <= set(ids)
    assert re.findall(r'(?:src|href)="(?!#|data:image/jpeg;base64,)[^"]*"', html) == []
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch('h[1-6]', name)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert page.of('img') and all(len(image['alt']) > 10 and image['width'] and image['height']
                                  for image in page.of('img'))
    for svg in page.of('svg'):
        assert svg.get('aria-hidden') == 'true' or svg['role'] == 'img' and len(svg['aria-label']) > 20
    assert all(head.get('scope') in ('col', 'row') for head in page.of('th'))
    assert "default-src 'none'" in html  # a browser loads nothing, whatever the page says


def test_figures_are_those_of_metrics_json(rendered):
    html, metrics, truth, probabilities = rendered
    page = Page(html)
    for split, scores in metrics.items():
        for row, label in zip(page.tables[f'AUC and other scores that need no threshold, {split}'][1:], LABELS):
            task = scores[label]
            assert row == [label_words(label), interval_text(task['auc'], task['auc_ci95']), str(task['positives']),
                           f'{task["average_precision"]:.3f}', f'{task["auc_sens_80"]:.3f}']
        points = page.tables[f'Scores at each threshold, {split}'][1:]
        for k, label in enumerate(LABELS):
            for point in ({'name': 'official', **scores[label]}, *scores[label]['operating_points']):
                row = points.pop(0)
                assert row == [f'{label_words(label)}, {point["name"]}', *(f'{point[key]:.3f}' for key in (
                    'threshold', 'accuracy', 'sensitivity', 'specificity', 'ppv', 'npv'))]
                _, positive, negative = page.tables[
                    f'{label_words(label)} on {split} at {point["threshold"]:.3f}, {point["name"]}']
                t, called = truth[split][:, k] == 1, probabilities[split][:, k] > point['threshold']
                assert [int(cell.split()[0]) for cell in positive[1:] + negative[1:]] == [
                    (t & called).sum(), (t & ~called).sum(), (~t & called).sum(), (~t & ~called).sum()]
                assert int(positive[1].split()[0]) / t.sum() == pytest.approx(point['sensitivity'])
        groups = page.tables[f'Scores by group, {split}'][1:]
        assert [row[0] for row in groups] == ['sex female'] * 2 + ['sex male'] * 2
        assert [row[6] for row in groups] == [f'{row["specificity"]:.3f}' for row in scores['subgroups']]
    assert f'Mean AUC {metrics["test"]["mean_auc"]:.3f} 95 % interval' in page.text
    assert page.tables['The gate of each block: means over the images above'][1] == [
        'layer1.0', '-0.5', '1.23 %', '0.987']


def test_two_networks_side_by_side(rendered, compared):
    html, metrics, truth, _ = compared
    page, pair = Page(html), metrics['test']['comparison']
    theirs = score_split(truth['test'], evaluation(50, seed=7)[1])
    rows = page.tables['AUCs with 95 % intervals, and paired differences, test'][1:]
    for row, label in zip(rows, LABELS):
        assert row == [label_words(label), *(interval_text(s[label]['auc'], s[label]['auc_ci95'])
                                             for s in (metrics['test'], theirs)),
                       interval_text(pair[label]['difference'], pair[label]['difference_ci95'], '+'),
                       f'{pair[label]["p_value"]:.3f}']
    # the coloured curve is this network's: the area below it is its AUC
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', html[html.index('pair-melanoma-'):], re.IGNORECASE)
    path = max(drawn[:2], key=len)  # the other is in the legend
    x, y = np.array(re.findall(r'[ML] ([\d.]+) ([\d.]+)', path), float).T
    area = area_under((x - x.min()) / np.ptp(x), 1 - (y - y.min()) / np.ptp(y))
    assert area == pytest.approx(metrics['test']['melanoma']['auc'], abs=1e-4) != theirs['melanoma']['auc']
    assert rows[-1][0] == 'mean' and 'OTHER/predictions_test.csv' in page.text
    assert sum(svg.get('aria-label', '').startswith('ROC curves of') for svg in page.of('svg')) == len(LABELS)
    assert 'Two networks' not in Page(rendered[0]).text


@pytest.fixture
def no_charts(monkeypatch):
    """Where words alone are read."""
    monkeypatch.setattr('timm_arl.isic.html_report.inline_svg', lambda draw, words, name, size=None: words)


def test_what_is_said_first(rendered, no_charts):
    text = Page(rendered[0]).text
    for words in ('Not a medical device', 'The validation images chose the epoch that was kept, the thresholds and',
                  'small copies of 256 px, squashed to a square', 'They leave this machine only if you send the file',
                  'This file holds 4 pictures', 'strictly above the threshold', 'There are none.'):
        assert words in text
    assert text.index('The validation images chose') < text.index('Mean AUC') and 'thresholds of their own' not in text
    assert 'SYNTHETIC' not in text and text.index('Not a medical device') < text.index('Summary')
    synthetic = Page(render(data='demo')[0]).text
    assert synthetic.index('SYNTHETIC images') < synthetic.index('Summary') and 'small copies' not in synthetic
    other = Page(render(side=1000, training=Training([], [], False), blocks=[], note='No maps here.')[0]).text
    assert 'small copies' not in other and 'No maps here.' in other
    assert "chosen on this data's validation images by this evaluation" in other and 'epoch that was kept' not in other
    assert 'Attention and training' not in other
    shipped = Page(render(training=Training([], [], True, False, True))[0]).text
    assert 'It is not known whether the weights were trained with this data. If they were, its val' in shipped
    assert 'The weights come with thresholds of their own' in shipped and 'images chose the epoch' not in shipped


def test_words_of_users_are_escaped():
    html = render(name=EVIL, data=EVIL, image_id=EVIL, other=Comparison(EVIL, evaluation(50, seed=7)[1]))[0]
    page = Page(html)
    assert not page.of('script') and EVIL in page.text
    assert page.of('img')[0]['alt'] == f'Dermoscopic image {EVIL}, nevus.'


def test_words_of_users_stay_in_their_cell_of_a_card():
    lines = groups_table([{
        'group': 'skin a|b\n<script>x', 'label': 'melanoma', 'images': 1, 'positives': 1, 'auc': None,
        'auc_ci95': None, 'sensitivity': 1., 'specificity': None}]).splitlines()
    assert len(lines) == 3 and lines[2].startswith('| skin a\\|b &lt;script>x | melanoma | 1 |')


def test_a_label_of_one_class_is_undefined_and_not_zero():
    page = Page(render(positives=[0, 0.3])[0])
    row = page.tables['AUC and other scores that need no threshold, test'][1]
    assert row[1:] == ['undefined', '0', 'undefined', 'undefined']
    assert 'All images are of one class.' in page.text and 'Sensitivity undefined.' in page.text


def page_of_groups(truth, p, groups):
    task = Task('mine', ('scar', 'ulcer'), 'multiclass')
    scores = score_split(truth, p, 50, task=task, groups=groups, unit='groups of case_no')
    for label in task.labels:
        scores[label]['calibration'] = {'ece': 0.1, 'temperature': None, 'bias': None, 'ece_calibrated': None,
                                        'mean_calibrated': None}
    scores['subgroups'] = subgroup_table(truth, p, subgroups({'sex': ['male'] * len(truth)}), task, groups)
    record = {'timm_arl': '1', 'img_size': 64, 'crops': 'center', 'aspect': 'keep', 'seed': 0, 'alpha_zero': False}
    return Page(html_report('OUT', 'mine.csv', 'test', {'test': scores}, {'test': truth}, {'test': p}, record,
                            Training([], [], False), examples(), None, task, {'test': groups}))


def test_few_groups_are_counted_and_have_no_interval(no_charts):
    p = np.random.default_rng(0).dirichlet([2, 2], 50).astype(np.float32)
    groups = [f'c{k}' for k in range(40)] + [f'd{k % 3}' for k in range(10)]
    page = page_of_groups(np.eye(2)[[0] * 40 + [1] * 10], p, groups)
    assert ('Only 3 groups of case_no have ulcer (10 images): figures from so few are uncertain, and below 5 there is '
            'no interval.') in page.text
    assert 'Too few groups of case_no for an interval.' in page.text and 'All images are of one class' not in page.text
    assert re.search(r'ulcer.*Sensitivity 0\.\d+, \d of 10\.', page.text)  # without brackets
    assert "Intervals are Obuchowski's" in page.text and 'those of calling the most probable class' in page.text
    assert 'official' not in page.text and 'challenge' not in page.text


def test_all_images_of_some_patients_are_found_but_that_is_not_certain(no_charts):
    """Wilson's interval of 6 of 6 is [0.610, 1], and patients with two images each count once."""
    truth = np.eye(2)[[0] * 40 + [1] * 12]
    p = np.where(truth == 1, 0.9, 0.1)
    page = page_of_groups(truth, p, [f'c{k}' for k in range(40)] + [f'd{k // 2}' for k in range(12)])
    assert 'Sensitivity 1.000 [0.610, 1.000], 12 of 12.' in page.text


def luminance(colour):
    digits = colour * 2 if len(colour) == 3 else colour
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (int(digits[k:k + 2], 16) / 255 for k in (0, 2, 4))]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_contrast(rendered):
    schemes = re.findall(r':root \{([^}]*)\}', rendered[0])
    assert len(schemes) == 3  # light, dark, paper
    light = {}
    for scheme in schemes:
        light = {**light, **dict(re.findall(r'--([\w-]+): #(\w+);', scheme))}
        for over, below in [(ink, ground) for ink in ('ink', 'muted', 'accent') for ground in ('ground', 'panel')] + [
                ('ink', 'warn'), ('ink', 'good'), ('ink', 'bad')]:
            high, low = sorted((luminance(light[over]), luminance(light[below])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (over, below)


@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (390, 'dark'), (320, 'light')])
def test_on_a_screen(browser, compared, tmp_path, width, scheme):
    (tmp_path / 'report.html').write_text(compared[0])
    page = browser.new_page(viewport={'width': width, 'height': 800}, color_scheme=scheme)
    messages, requests = [], []
    page.on('console', lambda message: messages.append(message.text))
    page.on('request', lambda request: requests.append(request.url))
    page.goto((tmp_path / 'report.html').as_uri())
    assert messages == [] and [url for url in requests if not url.startswith('data:')] == [page.url]
    assert page.evaluate('document.documentElement.scrollWidth') == width
    # nothing but a table in its own box reaches beyond the page, and each such box can be scrolled
    beyond = page.evaluate('''width => [...document.querySelectorAll('body *')].filter(
        e => e.getBoundingClientRect().right > width + 1 && !e.closest('.scroll')).map(e => e.outerHTML)''', width)
    assert beyond == []
    assert page.evaluate('''[...document.querySelectorAll('.scroll')].every(
        e => getComputedStyle(e).overflowX == 'auto' && e.tabIndex == 0)''')
    ground, ink, axis = page.evaluate('''[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.body).color, getComputedStyle(document.querySelector('.plot text')).fill]''')
    dark = {'light': False, 'dark': True}[scheme]
    assert (sum(map(int, re.findall(r'\d+', ground))) < 200) == dark and ink == axis != ground
    sizes = page.evaluate('''[...document.querySelectorAll('img')].map(
        e => [e.naturalWidth, e.getBoundingClientRect().width])''')
    assert all(natural == 360 and shown >= (120 if width > 560 else 280) for natural, shown in sizes)
    marks = page.evaluate('''[...document.querySelectorAll('.bar b')].map(e => [e.innerText, (
        e.getBoundingClientRect().x - e.parentElement.getBoundingClientRect().x) / e.parentElement.offsetWidth])''')
    assert marks and all(text == '0' and abs(at - 1.5 / 3.75) < 0.01 for text, at in marks)  # of -1.5 to 2.25
    said = page.evaluate('''[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).map(
        e => [e.scrollWidth > e.clientWidth,
              getComputedStyle(e.querySelector('caption span'), '::after').content.includes('scroll sideways')])''')
    assert all(scrolls <= says for scrolls, says in said) and any(says for _, says in said) == (width < 680)
    assert not page.is_visible('text=AUC and other scores that need no threshold, validation')
    page.click('text=Show the scores on validation')
    assert page.is_visible('text=AUC and other scores that need no threshold, validation')
    page.close()


@pytest.mark.slow
def test_on_paper(browser, compared, tmp_path):
    (tmp_path / 'report.html').write_text(compared[0])
    page = browser.new_page(viewport={'width': 688, 'height': 1000}, color_scheme='dark')  # A4 within its margins
    page.goto((tmp_path / 'report.html').as_uri())
    page.emulate_media(media='print')
    assert page.evaluate('document.documentElement.scrollWidth') == 688  # no table is cut off
    assert page.evaluate('''[...document.querySelectorAll('.scroll')].every(
        e => getComputedStyle(e).overflowX == 'visible' && e.scrollWidth <= e.clientWidth)''')
    assert page.is_visible('text=AUC and other scores that need no threshold, validation')  # which a screen folds
    assert page.evaluate("getComputedStyle(document.body).color") == 'rgb(0, 0, 0)'  # though the screen is dark
    assert page.evaluate('''[...document.querySelectorAll('figure, .confusion, tr')].every(
        e => getComputedStyle(e).breakInside == 'avoid')''')
    assert page.pdf(format='A4').startswith(b'%PDF')
    page.close()
