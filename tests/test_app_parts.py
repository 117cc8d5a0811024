"""What the page is made of, without a browser: its words, networks with less to show, the Space, what cannot start."""
import asyncio
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import yaml
from packaging.requirements import Requirement
from PIL import Image

from timm_arl.export import export_onnx
from timm_arl.export.preprocessing import add_preprocessing
from timm_arl.extras import missing
from timm_arl.factory import create_trained, save_network
from timm_arl.isic import LABELS, probabilities_of

if missing('app'):  # asked without importing Gradio, which takes seconds
    pytest.skip(missing('app'), allow_module_level=True)
pytestmark = pytest.mark.slow


def test_the_space_installs_what_the_package_needs(repo):
    project = (repo / 'pyproject.toml').read_text()
    core, dicom, app = (re.findall(r'"([^"]+)"', re.search(rf'^{key} = \[(.*?)\]', project, re.M | re.S).group(1))
                        for key in ('dependencies', 'dicom', 'app'))
    lines = (repo / 'space' / 'requirements.txt').read_text().splitlines()
    assert [line for line in lines if not line.startswith('#')] == core + dicom
    front = yaml.safe_load((repo / 'space' / 'README.md').read_text().split('---\n')[1])
    assert front['sdk'] == 'gradio' and (repo / 'space' / front['app_file']).is_file()
    assert Requirement(app[0]).name == 'gradio' and Requirement(app[0]).specifier.contains(front['sdk_version'])
    assert len(front['short_description']) <= 60  # the Hub's limit


def test_thresholds_and_masks_in_words(tiny):
    from timm_arl.app import views
    from timm_arl.app.analysis import Analyst

    analyst = Analyst(str(tiny))
    analysis, aim = analyst.look_at_synthetic('nevus'), 'sensitivity 0.9 on validation'
    analyst.predictor.thresholds[aim] = {'melanoma': 0.25, 'seborrheic_keratosis': 0.9999}  # Youden's for one label
    measured = {**analyst.measured, 'melanoma': {**analyst.measured['melanoma'], 'operating_points': [
        {'name': aim, 'sensitivity': 0.82, 'specificity': 0.52}]}}
    melanoma, keratosis = (re.findall(r'<th scope="row">(.*?)</th>', card) for card in views.found(
        analysis, analyst.predictor, measured).split('</article>')[:2])
    words = 'aimed at a sensitivity of 0.9 (on validation)'
    assert melanoma == ["Youden's", 'official', words] and keratosis == [f"Youden's; {words}", 'official']
    assert '(0.82 of melanoma on the test images below)' in views.found(analysis, analyst.predictor, measured)
    analyst.predictor.task = dataclasses.replace(analyst.predictor.task, name='mine')  # no challenge's
    found = views.found(analysis, analyst.predictor, None)
    assert 'official' not in found and '<th scope="row">0.5</th>' in found and 'chosen on no images' in found
    picture = analysis.picture
    for alpha, share, expected in ((-1.5, 0.97, ('lighter is weakened more', 'it prefers almost no position')),
                                   (2., 0.25, ('lighter is strengthened more', 'weight on 25 % of the positions'))):
        block = analysis.blocks['layer1.0']._replace(alpha=alpha, effective_share=share)
        html = views.maps({'layer1.0': picture}, analysis._replace(blocks={'layer1.0': block}), analyst.predictor)
        assert 'Attention mask of layer1.0' in html and all(part in html for part in expected)


def test_a_space_without_gradio(repo, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text("import sys\nsys.modules['gradio'] = None\n")
    done = subprocess.run([sys.executable, 'space/app.py'], cwd=repo, capture_output=True, text=True, env={
        **os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{repo}'})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: gradio is not installed: in a checkout, pip install -e '.[app]'")


def test_figures_of_a_downloaded_folder_are_escaped(tiny):
    """A results.json may hold anything, and the page runs scripts."""
    from timm_arl.app import views
    from timm_arl.app.analysis import Analyst

    predictor, script = Analyst(str(tiny)).predictor, '<img src=x onerror=alert(1)>'
    measured = {'split': 'test', 'data': script, 'images': script, 'mean_auc': 0.5, **{
        label: {'auc': 0.5, 'positives': script} for label in predictor.labels}}
    assert '<img' not in views.about(predictor, measured, None)


def test_networks_that_have_less_to_show(tiny, tmp_path):
    """A plain ResNet has no masks and no alphas; an ONNX file has no maps either."""
    from timm_arl.app import views
    from timm_arl.app.analysis import Analyst
    from timm_arl.app.page import build

    plain = timm.create_model('resnet14', num_classes=2, channels=[8, 16, 32, 64])
    save_network(plain, tmp_path / 'plain', LABELS, dict(
        timm.data.resolve_model_data_config(plain), input_size=(3, 64, 64)), channels=[8, 16, 32, 64])
    export_onnx(create_trained(str(tiny)), tmp_path / 'tiny.onnx', 64)
    for name, maps in ((tmp_path / 'plain', list(LABELS)), (tmp_path / 'tiny.onnx', [])):
        analyst = Analyst(str(name))
        analysis = analyst.look_at_synthetic('nevus')
        assert not analysis.blocks and analysis.without is None and list(analyst.maps(analysis)) == maps
        with zipfile.ZipFile(io.BytesIO(analyst.download(analysis, 1.))) as archive:
            assert {name for name in archive.namelist() if name.startswith('overlays/')} == {
                f'overlays/{name}.png' for name in ('picture', *maps)}
            assert 'blocks' not in json.loads(archive.read('result.json'))
        assert 'no class activation map' in views.maps({}, analysis, analyst.predictor)
        assert 'how good they are is not known' in views.about(analyst.predictor, analyst.measured, analyst.repo)
        build(analyst)  # as a page
    # of a large picture a small copy is kept, also where the network cuts pictures itself and so is given the whole one
    add_preprocessing(tmp_path / 'tiny.onnx', tmp_path / 'whole.onnx', probabilities_of, LABELS)
    content = io.BytesIO()
    Image.new('RGB', (1600, 1200), (200, 150, 130)).save(content, 'PNG')
    analysis = Analyst(str(tmp_path / 'whole.onnx')).look_at_file('a.png', content.getvalue())
    assert analysis.picture.size == (720, 540) and analysis.crops.shape == (1, 3, 540, 720)


@pytest.mark.parametrize('arguments, sentence', [
    (['--port', 'TAKEN'], 'Port TAKEN of 127.0.0.1 is taken by another program: choose another with --port.'),
    (['--model', 'no/such', '--port', '0'], 'No folder no/such'),
    (['--host', '203.0.113.1', '--port', '0'], '--host 203.0.113.1 --port 0 cannot be used: '),
    (['--port', '99999'], 'must be between 0 and 65535, not 99999'),
    (['--port', 'x'], "invalid int value: 'x'"),
])
def test_what_cannot_start_is_a_sentence(call, arguments, sentence):
    handler = signal.getsignal(signal.SIGTERM)
    limit = Image.MAX_IMAGE_PIXELS
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call('timm_arl.app.__main__', *(part.replace('TAKEN', port) for part in arguments))
    signal.signal(signal.SIGTERM, handler)
    Image.MAX_IMAGE_PIXELS = limit
    assert done.returncode == 2 and sentence.replace('TAKEN', port) in done.stderr and not done.stdout
    assert 'Traceback' not in done.stderr and len(done.stderr.splitlines()[-1:]) == 1


def test_no_room_for_temporary_files_is_a_sentence(call, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'gone'))
    done = call('timm_arl.app.__main__', '--port', '0')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f'error: The page cannot start: No such file or directory: {tmp_path / "gone"}' in done.stderr


def test_the_first_of_several_frames_is_said_so(tiny):
    from timm_arl.app.analysis import Analyst

    content, picture = io.BytesIO(), Image.new('RGB', (96, 80), (200, 150, 130))
    picture.save(content, 'TIFF', save_all=True, append_images=[picture])
    assert Analyst(str(tiny)).look_at_file('a.tif', content.getvalue()).remark.startswith('holds several pictures')


def result_of(coroutine):
    """By a loop in a thread of its own: the browser of other tests keeps one running in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def test_gradio_keeps_nothing_that_was_shown(tiny):
    from gradio.state_holder import SessionState

    from timm_arl.app.analysis import Analyst
    from timm_arl.app.page import build
    from timm_arl.app.server import create_app

    page = build(Analyst(str(tiny)))
    create_app(page)
    session = SessionState(page)
    before = str(session.config_values)
    look = next(of for of in page.fns.values() if of.api_name == 'look')
    answer = result_of(page.process_api(look, [{'example': 'nevus'}], state=session))
    assert 'data:image' in str(answer['data'])
    after = str(session.config_values)
    assert after.count('data:image') == before.count('data:image') and 'arl-p' not in after


def test_a_failing_network_is_not_called_a_damaged_file(tiny, monkeypatch):
    from timm_arl.app.analysis import Analyst, PictureError

    analyst, content = Analyst(str(tiny)), io.BytesIO()
    Image.new('RGB', (64, 64)).save(content, 'PNG')
    with pytest.raises(PictureError, match='a.png cannot be '):
        analyst.look_at_file('a.png', content.getvalue()[:60])

    def fail(tensors):
        raise RuntimeError('not enough memory')

    monkeypatch.setattr(analyst.predictor, 'probabilities', fail)
    with pytest.raises(RuntimeError, match='not enough memory'):
        analyst.look_at_file('a.png', content.getvalue())


def test_bodies_are_refused_that_would_fill_the_memory_together():
    from timm_arl.app.server import LARGEST_BODY, LARGEST_TOGETHER, OnlyThePage

    statuses = []

    async def post(gate, size):
        async def send(message):
            statuses.append(message.get('status'))

        await gate({'type': 'http', 'method': 'POST', 'path': '/gradio_api/call/look',
                    'headers': [(b'content-length', b'%d' % size)]}, None, send)

    async def many():
        done = asyncio.Event()

        async def app(scope, receive, send):
            await done.wait()

        gate, count = OnlyThePage(app), LARGEST_TOGETHER // LARGEST_BODY
        waiting = [asyncio.ensure_future(post(gate, LARGEST_BODY)) for _ in range(count)]
        await asyncio.sleep(0)
        await post(gate, LARGEST_BODY)
        assert statuses == [503, None]  # of the answer's start and its body
        done.set()
        await asyncio.gather(*waiting)
        await post(gate, LARGEST_BODY)
        assert statuses == [503, None]

    result_of(many())


@pytest.mark.parametrize('content', ['{"test": {"mean_auc": 0.9}}', '[1]', '{"metrics": 3}', '{"test": null}'])
def test_scores_of_another_program_do_not_stop_the_page(tiny, tmp_path, content):
    from timm_arl.app.analysis import Analyst

    shutil.copytree(tiny, tmp_path / 'out')
    (tmp_path / 'out' / 'metrics.json').write_text(content)
    assert Analyst(str(tmp_path / 'out')).measured is None


def test_masks_are_shown_where_there_is_no_class_activation_map(tmp_path):
    from timm_arl.app.analysis import Analyst

    model = timm.create_model('arl_cnn14_channel', num_classes=2, channels=[8, 16, 32, 64], global_pool='avgmax')
    save_network(model, tmp_path, LABELS, channels=[8, 16, 32, 64])
    analyst = Analyst(str(tmp_path))
    analysis = analyst.look_at_synthetic('nevus')
    assert list(analyst.maps(analysis, 'layer1.0')) == ['layer1.0']
    assert analyst.maps(analysis) == {}
