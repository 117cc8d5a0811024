"""Settings of real machines that keep a client from a Hub, each named with its remedy; and Xet, off only meanwhile."""
import json
import os
import re
import subprocess
import sys
import threading

import huggingface_hub
import pytest
from loopback_hub import Hub

from timm_arl.download import plain_http

# a process per setting, since huggingface_hub reads the environment when it is imported; the slow imports are shared
LOAD = """
import json, os, sys
import torchvision
assert 'huggingface_hub' not in sys.modules
for settings in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    os.environ.update(settings)
    import timm, timm_arl
    try:
        timm.create_model('arl_cnn14', pretrained=True, pretrained_cfg_overlay=dict(
            hf_hub_id='user/model', hf_hub_filename='model.safetensors'))
    except timm_arl.WeightsError as error:
        print(error)
    break
"""
KEEP_AWAY = [
    ({'ALL_PROXY': 'socks://127.0.0.1:9', 'NO_PROXY': ''}, 'the proxy cannot be used .* fix or unset ALL_PROXY'),
    ({'HF_ENDPOINT': 'mirror.example.org'}, 'HF_ENDPOINT is not an address; let it start with https:// or http://'),
    ({'HF_TOKEN': 'hf_\u00e9'}, '(the token holds a character that no token has|the token is wrong)[;:] log in'),
]
if not huggingface_hub.__version__.startswith('0.'):  # requests has no such failure
    KEEP_AWAY.append(({'SSL_CERT_FILE': '/nowhere/ca.pem'},
                      'SSL_CERT_FILE names /nowhere/ca.pem, which does not exist; fix or unset'))


@pytest.mark.slow
def test_settings_that_keep_a_client_away(tmp_path):
    with Hub({'user/model': {'model.safetensors': b'x'}}) as server:
        done = subprocess.run([sys.executable, '-c', LOAD, json.dumps([settings for settings, _ in KEEP_AWAY])],
                              capture_output=True, text=True,
                              env={**os.environ, **server.env(tmp_path), 'PYTHONIOENCODING': 'utf-8'})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(KEEP_AWAY), (done.stdout, done.stderr)
    for line, (_, message) in zip(lines, KEEP_AWAY):
        assert re.search(message, line) and 'user/model' in line, (line, done.stderr)


def test_plain_http_is_over_when_the_last_thread_is_done():
    before = huggingface_hub.constants.HF_HUB_DISABLE_XET
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with plain_http():
            entered.set()
            leave.wait(30)
            seen.append(huggingface_hub.constants.HF_HUB_DISABLE_XET)

    thread = threading.Thread(target=other)
    with plain_http():
        thread.start()
        entered.wait(30)
    leave.set()
    thread.join(30)
    assert seen == [True] and huggingface_hub.constants.HF_HUB_DISABLE_XET == before
