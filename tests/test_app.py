"""The page, in a real browser and over HTTP, served by a process of its own."""
import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from dicom_files import dataset, save
from PIL import Image
from predict_program import hears_ctrl_c

from timm_arl.attention import alphas_of
from timm_arl.extras import missing
from timm_arl.isic import LABELS
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.predictor import Predictor, read_picture

if missing('app'):  # asked without importing Gradio, which takes seconds
    pytest.skip(missing('app'), allow_module_level=True)
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(command, folder, **env):
    """A page served by a program; its temporary files lie in folder / 'tmp'."""
    (folder / 'tmp').mkdir()
    with open(folder / 'stderr', 'w') as stderr, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder, preexec_fn=hears_ctrl_c,
            env={**os.environ, 'TMPDIR': str(folder / 'tmp'), 'OMP_NUM_THREADS': '1', **env}) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith('Open http://'), (folder / 'stderr').read_text()
            yield SimpleNamespace(url=line.split()[1], pid=process.pid, process=process, folder=folder,
                                  errors=lambda: (folder / 'stderr').read_text())
        finally:
            process.terminate()


@pytest.fixture(scope='module')
def served(tiny, repo, tmp_path_factory):
    command = [sys.executable, '-m', 'timm_arl.app', '--model', str(tiny), '--port', '0']
    with serving(command, tmp_path_factory.mktemp('served'), PYTHONPATH=str(repo), MALLOC_ARENA_MAX='1') as page:
        yield page  # one arena: with one for each thread, glibc takes 5 to 15 MiB a round for the first 20 rounds


@pytest.fixture(scope='module')
def predictor(tiny):
    return Predictor(tiny)


@pytest.fixture
def open_page(served, browser):
    """Opens the page, with what it asks for, in a window of a width."""
    with contextlib.ExitStack() as stack:
        def open_page(width=1280):
            context = stack.enter_context(contextlib.closing(browser.new_context(viewport={
                'width': width, 'height': 800}, accept_downloads=True)))
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.asked, page.problems, page.said = [], [], []
            page.on('request', lambda request: page.asked.append(request.url))
            page.on('console', lambda message: page.said.append(message.text))
            page.on('pageerror', lambda error: page.problems.append(str(error)))
            page.goto(served.url)
            page.wait_for_selector('[data-ready]')  # its script has run
            return page
        yield open_page


def picture_file(path, seed=0, size=(300, 200), **arguments):
    draw_lesion('melanoma', np.random.default_rng(seed), 300).resize(size).save(path, **arguments)
    return path


def drop(page, *paths):
    page.set_input_files('input[type=file]', [str(path) for path in paths])


def answered(page):
    page.wait_for_selector('#maps img')
    return [float(text) for text in page.locator('.arl-p').all_inner_texts()]


def expected(predictor, picture, factor=None, image_id=''):
    tensor, _ = predictor.prepare(picture, image_id)
    before = {}
    if factor is not None:
        for name, alpha in alphas_of(predictor.network).items():
            before[name] = alpha.detach().clone()
            alpha.data *= factor
    values = predictor.probabilities(tensor).tolist()
    for name, value in before.items():
        alphas_of(predictor.network)[name].data = value
    return values


def ask(url, value):
    """The answer to a picture over HTTP, as a dict of the outputs' texts."""
    body = json.dumps({'data': [value]}).encode()
    request = Request(f'{url}/gradio_api/call/look', body, {'Content-Type': 'application/json'})
    with urlopen(request, timeout=240) as answer:
        event = json.load(answer)['event_id']
    with urlopen(f'{url}/gradio_api/call/look/{event}', timeout=240) as answer:
        text = answer.read().decode()
    assert 'event: complete' in text, text[:500]
    return text[text.index('event: complete'):]


def data_url(content):
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def probabilities_in(answer):
    return [float(p) for p in re.findall(r'arl-p\\">([\d.]+)<', answer)]


def test_a_picture_is_dropped(open_page, served, predictor, tmp_path):
    page = open_page()
    drop(page, picture_file(tmp_path / 'a <b>lesion.jpg', size=(1300, 900)))
    found = answered(page)
    values = expected(predictor, read_picture(tmp_path / 'a <b>lesion.jpg', predictor.cutter.shorter_side))
    assert found == [pytest.approx(p, abs=6e-4) for p in values]
    assert page.inner_text('.arl-found h2') == 'a <b>lesion.jpg' and '1300 x 900 px' in page.inner_text('.arl-found')
    rows = page.locator('.arl-card tr.arl-default').all_inner_texts()  # Youden's, which decides
    assert [row.split('\t')[:3] for row in rows] == [["Youden's", '0.000', 'above'], ["Youden's", '1.000', 'not above']]
    assert '0.31/0.93' in page.locator('.arl-card').first.inner_text()  # measured at the official threshold
    assert page.locator('.arl-thumbs img').count() == 5 and page.locator('.arl-framed rect').count() > 5
    assert page.locator('.arl-maps > figure').count() == 4  # crops, two labels, the mask of a block
    assert 'Not a medical device' in page.inner_text('.arl-warning')
    about = page.inner_text('#about')
    assert '0.777 [0.711, 0.833]' in about and '100 test images' in about and '64 px' in about
    assert 'too high on those images, by 0.250' in about
    assert {url.split('/')[2] for url in page.asked if not url.startswith('data:')} == {served.url.split('/')[2]}
    outside = page.evaluate("fetch('https://127.0.0.2/').catch(error => error.message)")
    assert 'Content Security Policy' in ' '.join(page.said) and outside == 'Failed to fetch'
    assert not page.problems and 'Traceback' not in served.errors()


def test_a_generated_picture_and_another_block(open_page):
    page = open_page()
    assert page.locator('[data-example]').all_inner_texts() == ['nevus', 'melanoma', 'seborrheic keratosis']
    assert 'SYNTHETIC' in page.inner_text('.arl-drop')
    page.click('[data-example=melanoma]')
    answered(page)
    assert 'square' not in page.inner_text('.arl-found')  # it was drawn so
    assert 'SYNTHETIC' in page.inner_text('.arl-found') and 'synthetic melanoma' in page.inner_text('.arl-found h2')
    page.click('#block input')
    options = page.get_by_role('option').all_inner_texts()
    assert [re.search(r'layer\d\.0 \(alpha 2\)', option) is None for option in options] == [False] * 4
    page.get_by_role('option').filter(has_text='layer2.0').click()
    page.wait_for_selector('figcaption:text("Attention mask of layer2.0")')
    mask = page.locator('.arl-maps > figure').filter(has_text='layer2.0').inner_text()
    assert 'alpha is 2: lighter is strengthened more' in mask


def test_the_map_is_within_the_first_screen_and_the_slider_scales_alpha(open_page, predictor, tmp_path):
    page = open_page()
    drop(page, picture_file(tmp_path / 'lesion.png', seed=1))
    trained = answered(page)
    assert page.locator('#maps img').first.bounding_box()['y'] < 650 and not page.evaluate('scrollY')
    text = page.inner_text('.arl-maps > p')
    assert 'yellow speaks for the diagnosis and blue against it' in text and 'a blob in the centre' in text
    assert page.locator('.arl-thumbs img').count() == 5 and 'squashed' not in page.inner_text('.arl-found')
    picture = Image.open(tmp_path / 'lesion.png')
    by_factor = {factor: expected(predictor, picture, factor) for factor in (0, 7.5)}
    assert abs(by_factor[7.5][0] - trained[0]) > 0.01  # else the test shows nothing

    def table():
        return [[float(cell) for cell in row.split('\t')[1:]]
                for row in page.locator('#change tbody tr').all_inner_texts()]

    assert [row[:3] for row in table()] == [
        [pytest.approx(none, abs=6e-4), p, p] for none, p in zip(by_factor[0], trained)]
    page.fill('#factor input[type=number]', '7.5')
    page.keyboard.press('Enter')
    page.wait_for_function("document.querySelector('#change').innerText.includes('alpha x 7.5')")
    assert [row[2] for row in table()] == [pytest.approx(p, abs=6e-4) for p in by_factor[7.5]]
    assert [row[3] for row in table()] == [
        pytest.approx(p - q, abs=1.1e-3) for p, q in zip(by_factor[7.5], trained)]
    page.locator('#factor input[type=range]').focus()
    page.keyboard.press('Home')
    page.wait_for_function("document.querySelectorAll('#change th')[3].innerText.includes('x 0')")
    assert [row[2] for row in table()] == [row[0] for row in table()]
    drop(page, picture_file(tmp_path / 'square.png', size=(200, 200)))
    page.wait_for_selector('text=The image is exactly square')
    page.wait_for_selector('text=Crops 1, 4, 5 are the same')
    assert page.locator('.arl-thumbs img').count() == 3


def test_the_result_is_downloaded_and_nothing_is_kept_on_disk(open_page, served, predictor, tmp_path):
    page = open_page()
    drop(page, picture_file(tmp_path / 'lesion.png'))
    answered(page)
    with page.expect_download() as download:
        page.click('#download')
    with zipfile.ZipFile(download.value.path()) as archive:
        names = set(archive.namelist())
        row, = csv.DictReader(io.StringIO(archive.read('predictions.csv').decode()))
        result = json.loads(archive.read('result.json'))
        sizes = {Image.open(io.BytesIO(archive.read(name))).size[0] for name in names if name.endswith('.png')}
    blocks = [f'layer{k}.0' for k in range(1, 5)]
    assert names == {'predictions.csv', 'result.json', *(f'overlays/{n}.png' for n in ('picture', *LABELS, *blocks))}
    values = expected(predictor, Image.open(tmp_path / 'lesion.png'))
    assert [float(row[label]) for label in LABELS] == [pytest.approx(p, abs=1e-6) for p in values]
    assert (row['image'], row['melanoma_decision'], row['seborrheic_keratosis_decision']) == ('lesion.png', '1', '0')
    assert result['operating_points']['youden on validation']['melanoma'] == {'threshold': 0.0001, 'above': True}
    assert set(result['probabilities_by_factor_of_alpha']) == {'0', '1'} and set(result['blocks']) == set(blocks)
    assert 'Not a medical device' in result['not_for'] and not result['synthetic'] and sizes == {300, 360}
    assert [path for path in (served.folder / 'tmp').rglob('*') if not path.is_dir()] == []
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--x--\r\n'
    for path, status in (('upload', 404), ('process_recording', 404), ('file=/etc/hostname', 404),
                         ('deep_link?session_hash=x', 404), ('proxy=http://127.0.0.1/', 404)):
        get = '=' in path
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(f'{served.url}/gradio_api/{path}', None if get else body, {
                'Content-Type': 'multipart/form-data; boundary=x'}), timeout=60)
        assert refused.value.code == status, path
    assert [path for path in (served.folder / 'tmp').rglob('*') if not path.is_dir()] == []


@pytest.mark.parametrize('name, content, sentence', [
    ('notes.jpg', b'no picture at all', 'notes.jpg cannot be used: it is not a picture of the formats JPEG, '),
    ('page.svg', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'it is not a picture of the formats'),
    ('print.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n', 'it is not a picture of the formats'),
    ('thread.png', 'thread', 'it has 500 x 20 px, which is no picture of a lesion'),
    ('large.png', 'large', 'it has 56 megapixels, above the limit of 50'),
    ('cut.png', 'cut', 'cut.png cannot be used: '),
    ('empty.dcm', b'', 'empty.dcm cannot be used: it is not a DICOM file'),
])
def test_a_bad_file_is_a_sentence(served, name, content, sentence):
    if isinstance(content, str):
        buffer = io.BytesIO()
        Image.new('RGB', {'thread': (500, 20), 'large': (8000, 7000), 'cut': (90, 90)}[content]).save(buffer, 'PNG')
        content = buffer.getvalue()[:None if content != 'cut' else 80]
    answer = ask(served.url, {'name': name, 'data': data_url(content)})
    assert sentence in answer and 'role=\\"alert\\"' in answer and not probabilities_in(answer)
    assert 'Traceback' not in served.errors()


@pytest.mark.parametrize('value', [
    None, 'x', {}, {'name': 'a.png'}, {'data': 'https://example.com/a.png'}, {'data': 'data:image/png;base64,***'},
    {'example': '../secret'}, {'example': ['nevus']}])
def test_a_request_that_the_page_would_not_send(served, value):
    answer = ask(served.url, value)
    assert ('did not arrive' in answer or 'no generated picture' in answer) and 'Traceback' not in served.errors()


def test_bad_files_in_the_browser(open_page, tmp_path):
    page = open_page()
    (tmp_path / 'notes.jpg').write_text('no picture')
    drop(page, tmp_path / 'notes.jpg')
    page.wait_for_selector('.arl-problem')
    assert 'notes.jpg cannot be used' in page.inner_text('[role=alert]') and not page.locator('.arl-p').count()
    (tmp_path / 'large.png').write_bytes(bytes(20_000_001))
    count = len(page.asked)
    drop(page, tmp_path / 'large.png')
    page.wait_for_selector('text=large.png has 20.0 MB, above the limit of 20 MB.')
    assert len(page.asked) == count  # it was not sent
    drop(page, picture_file(tmp_path / 'good.png'))  # and the page goes on
    assert len(answered(page)) == 2 and not page.locator('.arl-problem').count()


def test_dicom(served, predictor, tmp_path):
    pixels = np.asarray(draw_lesion('melanoma', np.random.default_rng(2), 120))
    save(dataset(pixels, 'RGB'), tmp_path / 'lesion')  # by its first bytes, not by its name
    answer = ask(served.url, {'name': 'lesion', 'data': data_url((tmp_path / 'lesion').read_bytes())})
    assert probabilities_in(answer) == [
        pytest.approx(p, abs=6e-4) for p in expected(predictor, Image.fromarray(pixels))]


def test_a_phone_and_a_screen_reader(open_page, tmp_path):
    page = open_page(390)
    widest = 'document.documentElement.scrollWidth'
    assert page.evaluate(widest) == 390
    drop(page, picture_file(tmp_path / f'{"long_name" * 12}.png'))
    answered(page)
    for width in (1200, 1024, 390, 360):
        page.set_viewport_size({'width': width, 'height': 800})
        page.wait_for_timeout(300)
        assert page.evaluate(widest) == width
        assert page.locator('.arl-card').evaluate_all('all => all.every(card => card.scrollWidth <= card.clientWidth)')
    assert page.locator('img:not([alt])').count() == 0
    for alt in page.locator('#maps img').evaluate_all('images => images.map(image => image.alt)'):
        assert len(alt) > 5
    tree = page.locator('body').aria_snapshot()
    for part in ('heading "What does the network see?"', 'button "melanoma"', 'img "Probability of melanoma: 0.',
                 'slider "', 'button "Download the result (zip)"'):
        assert part in tree, part
    assert page.get_by_label('Drop an image here').count() == 1 and page.get_by_label('Attention mask of').count()


def test_many_at_once_get_their_own_answers(served, predictor):
    contents, values = [], []
    for seed in range(10):
        buffer = io.BytesIO()
        draw_lesion('melanoma', np.random.default_rng(seed), 100).save(buffer, 'PNG')
        contents.append(buffer.getvalue())
        values.append(expected(predictor, Image.open(buffer)))
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda k: ask(served.url, {
            'name': f'{k}.png', 'data': data_url(contents[k % 10])}), range(24)))
    for k, answer in enumerate(answers):
        assert probabilities_in(answer) == [pytest.approx(p, abs=6e-4) for p in values[k % 10]], k
        assert f'>{k}.png<' in answer


def test_memory_does_not_grow(served):
    """A picture kept of each request would add 12 MiB in every round; the allocator's own growth ends after one."""
    content = io.BytesIO()
    draw_lesion('melanoma', np.random.default_rng(0), 400).save(content, 'PNG')
    value = {'name': 'a.png', 'data': data_url(content.getvalue())}
    sizes = []
    with ThreadPoolExecutor(4) as pool:
        while len(sizes) < 3 or (len(sizes) < 8 and sizes[-1] - sizes[-2] >= 6):  # the first fills what is kept
            list(pool.map(lambda _: ask(served.url, value), range(25)))
            sizes.append(psutil.Process(served.pid).memory_info().rss / 2**20)
    assert min(np.diff(sizes)) < 6, f'{sizes} MiB'


@pytest.mark.parametrize('path', ['FILE', 'http://127.0.0.1:1/a.png'])
def test_values_that_name_a_file_or_an_address_are_refused(served, tmp_path, path):
    """Gradio would copy the one and fetch the other, and so write to the disk."""
    (tmp_path / 'secret.txt').write_text('secret')
    path = path.replace('FILE', str(tmp_path / 'secret.txt'))
    file, before = {'path': path, 'meta': {'_type': 'gradio.FileData'}}, served.errors()

    def send(name, value):
        body = json.dumps({'data': [value], 'session_hash': f'files{len(path)}'}).encode()
        request = Request(f'{served.url}/gradio_api/call/{name}', body, {'Content-Type': 'application/json'})
        with urlopen(request) as call:
            event = json.load(call)['event_id']
        with urlopen(f'{served.url}/gradio_api/call/{name}/{event}', timeout=60) as answer:
            return answer.read().decode()

    for name, value in (('look', file), ('look', {'name': 'a.png', 'data': [file]})):
        assert 'event: error' in send(name, value)
    assert 'event: complete' in send('look', {'example': 'nevus'})  # which gives the session parts of its own
    for name in ('block', 'scale', 'download'):
        assert 'event: error' in send(name, file)
    assert [path for path in (served.folder / 'tmp').rglob('*') if not path.is_dir()] == []
    assert len(probabilities_in(ask(served.url, {'example': 'nevus'}))) == 2 and served.errors() == before


@pytest.mark.parametrize('headers, status, sentence', [
    (b'Content-Length: 99000000', b' 413 ', b'The limit is 20 MB.'),
    (b'Content-Length: 10\r\nTransfer-Encoding: chunked', b' 411 ', b'how long the request is')])
def test_a_large_request_is_refused_unread(served, headers, status, sentence):
    host, port = served.url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b'POST /gradio_api/call/look HTTP/1.1\r\nHost: x\r\n' + headers + b'\r\n\r\n')
        answer = part = connection.recv(4000)
        while part and sentence not in answer:
            part = connection.recv(4000)
            answer += part
    assert status in answer.splitlines()[0] and sentence in answer


def test_the_folder_goes_when_the_page_stops(tiny, repo, tmp_path):
    """And a Space is the folder space/ with the package beside it."""
    shutil.copytree(repo / 'space', tmp_path / 'space')
    shutil.copytree(repo / 'timm_arl', tmp_path / 'space' / 'timm_arl')
    command = [sys.executable, str(tmp_path / 'space' / 'app.py'), '--model', str(tiny), '--port', '0']
    with serving(command, tmp_path, PYTHONPATH='') as page:
        assert 'note: other machines can open this page' in page.errors()
        assert len(list((tmp_path / 'tmp').glob('timm-arl-*'))) == 1
        answer = ask(page.url.replace('0.0.0.0', '127.0.0.1'), {'example': 'nevus'})
        assert len(probabilities_in(answer)) == 2
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(60) == 0 and 'Traceback' not in page.errors()
        assert page.process.stdout.read() == '\nStopped.\n'
    assert not list((tmp_path / 'tmp').iterdir())
