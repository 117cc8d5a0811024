"""What README, docs and CONTRIBUTING show works as shown."""
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import timm
from accelerate.commands.launch import launch_command_parser
from loopback_hub import Hub
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import timm_arl  # noqa: F401  registers the models
from timm_arl.isic.metrics import interval_text
from timm_arl.isic.task import LABELS

REPO = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(REPO)): path.read_text(encoding='utf-8') for path in (
    *(REPO / name for name in ('README.md', 'RESULTS.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'hub_cards/README.md')),
    *sorted((REPO / 'docs').glob('*.md')))}
COMMANDS = ('accelerate', 'make', 'pip', 'python', 'torchrun')
NOT_OURS = ('git', 'hf', 'isic', 'pre-commit', 'source')  # of other projects and the shell
NOT_OUR_FLAGS = {'--device-modules'}  # of timm's train.py

SHOW = """
print('SHAPES', *features.shape, *logits.shape)
print('SUM', model.conv1.weight.double().sum().item())
print('ALPHAS', len(alphas), *set(alphas.values()))
"""
RUN = """
import json
for page, blocks in json.load(open('pages.json')):
    names = {}
    for line, block in blocks:
        exec(compile('\\n' * line + block, page, 'exec'), names)
"""


def blocks_of(page, language):
    """(line number, content) of the code blocks in one language."""
    return [(page.count('\n', 0, match.start(1)), match[1])
            for match in re.finditer(rf'^```{language}\n(.*?)^```', page, re.DOTALL | re.MULTILINE)]


def prose(page):
    """A page without its code blocks, whose lines are left empty."""
    return re.sub(r'^```.*?^```', lambda m: '\n' * m[0].count('\n'), page, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_python_blocks_run_with_weights_from_a_hub_and_from_disk(run, staged, resnet50_file, tmp_path):
    pages = [(name, blocks_of(page, 'python')) for name, page in PAGES.items()]
    assert [len(blocks) for name, blocks in pages if name == 'README.md'] == [2]
    for name, blocks in pages:
        if name == 'docs/models.md':
            blocks[0] = blocks[0][0], blocks[0][1] + SHOW
    (tmp_path / 'pages.json').write_text(json.dumps([page for page in pages if page[1]]))
    Image.new('RGB', (600, 450), (200, 150, 130)).save(tmp_path / 'lesion.jpg')
    (tmp_path / 'model.safetensors').symlink_to(resnet50_file)
    (tmp_path / 'R').symlink_to(run)
    published = {path.name: path for path in staged.iterdir()}
    with Hub({'timm/resnet50.a1_in1k': {'model.safetensors': resnet50_file}, 'user/model': published}) as hub:
        env = dict(os.environ, **hub.env(tmp_path / 'hf', HF_HUB_OFFLINE='0'))
        done = subprocess.run(
            [sys.executable, '-c', RUN], env=env, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    probabilities = json.loads(lines[0].replace("'", '"'))  # README's only line
    assert tuple(probabilities) == LABELS and all(0 < p < 1 for p in probabilities.values())
    for label, p in probabilities.items():  # docs/models.md says the same of the same image, and judges it
        said, = [line for line in lines if line.startswith(f'{label}: ')]
        threshold = float(said.split()[-1])
        assert said == f'{label}: {p:.3f}, {"above" if p > threshold else "not above"} its threshold of {threshold:.3f}'
    shown = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines if line.split()[0].isupper()}
    assert shown['SHAPES'] == [1, 2048, 7, 7, 1, 2]
    assert shown['ALPHAS'] == [16, pytest.approx(1e-3)]
    expected = safetensors.torch.load_file(resnet50_file)['conv1.weight'].double().sum().item()
    assert shown['SUM'] == [pytest.approx(expected, abs=1e-9)]
    # safetensors files, each once, and never a pickle
    asked = {match.groups() for match in (re.search(r'/(\w+/[\w.]+)/resolve/[^/]+/(\S+)', r) for r in hub.requests)
             if match}
    assert asked == {('timm/resnet50.a1_in1k', 'model.safetensors'), ('user/model', 'config.json'),
                     ('user/model', 'model.safetensors')}
    assert len([r for r in hub.requests if 'GET /_cdn' in r]) == 2


def commands_of(page):
    """The commands of a page: lines of its shell blocks, and code in its text that begins like one."""
    for _, block in blocks_of(page, 'bash'):
        yield from filter(None, (shlex.split(line, comments=True) for line in block.replace('\\\n', ' ').splitlines()))
    for code in re.findall(r'`([^`]+)`', prose(page)):
        if code.startswith(COMMANDS) and ' ' in code and '...' not in code:
            yield shlex.split(code)


@functools.cache
def options_of(*program):
    """The flags that a program's --help lists; program is a file or -m MODULE, and a subcommand where it has some."""
    out = io.StringIO()
    words = program[1:] if program[0] == '-m' else program
    path = [str(REPO / 'benchmarks'), *sys.path]
    with mock.patch.object(sys, 'argv', [*words, '--help']), mock.patch.object(sys, 'path', path), redirect_stdout(out):
        with pytest.raises(SystemExit) as stopped:
            if program[0] == '-m':
                sys.modules.pop(f'{words[0]}.__main__', None)
                runpy.run_module(words[0], run_name='__main__', alter_sys=True)
            else:
                runpy.run_path(str(REPO / words[0]), run_name='__main__')
    assert not stopped.value.code, program
    return frozenset(re.findall(r'(?:^ +|, )(?:-\w, )?(--[a-z][\w-]*)', out.getvalue(), re.MULTILINE))


def flags_in(words):
    return {word.partition('=')[0] for word in words if word.startswith('--')}


def unknown_flags(words):
    """What a command line has that its programs do not know."""
    words = [word for word in words if not re.match(r'[A-Z_]+=', word)]
    program, *rest = [Path(words[0]).name, *words[1:]]
    if program in NOT_OURS or words[:2] == ['accelerate', 'config']:
        return set()
    if program == 'make':
        return {word for word in rest if not re.search(rf'^{word}:', (REPO / 'Makefile').read_text(), re.MULTILINE)}
    if program == 'pip':
        extras = re.search(r'\[project.optional-dependencies\]\n(.*?)\n\n', (REPO / 'pyproject.toml').read_text(), re.S)
        known = re.findall(r'^(\w+) =', extras[1], re.MULTILINE)
        return {extra for word in rest for extra in re.findall(r'\[(\w+)\]', word) if extra not in known}
    if program in ('accelerate', 'torchrun'):
        at = next((i for i, word in enumerate(rest) if word.endswith('.py') or word == '-m'), None)
        known = (launch_command_parser() if program == 'accelerate' else torchrun_parser())._option_string_actions
        return (flags_in(rest[:at]) - set(known)) | (set() if at is None else unknown_flags(['python', *rest[at:]]))
    assert program == 'python', words
    if rest[:2] == ['-m', 'venv']:
        return set()
    if rest[:2] == ['-m', 'pytest']:
        return {word for word in rest[2:] if word.endswith('.py') and not (REPO / word).is_file()}
    if rest[:2] == ['-m', 'timm_arl']:
        options_of('-m', 'timm_arl')
        return set()  # the flags are another script's
    own, rest = (rest[:2], rest[2:]) if rest[0] == '-m' else (rest[:1], rest[1:])
    if own[-1] in ('timm_arl.hub', 'timm_arl.isic.dataset') and rest:
        own, rest = [*own, rest[0]], rest[1:]
    return flags_in(rest) - options_of(*own)


@pytest.mark.parametrize('name', PAGES)
def test_commands_exist_with_their_flags(name):
    for words in commands_of(PAGES[name]):
        assert not unknown_flags(words), shlex.join(words)


def test_flags_in_the_text_are_flags_of_some_program():
    programs = [('benchmarks/finetune_isic.py',), ('benchmarks/evaluate_isic.py',), ('benchmarks/throughput.py',),
                ('benchmarks/segment_lesions.py',), ('benchmarks/reproduce_tables.py',),
                ('benchmarks/input_speed.py',), ('benchmarks/average_runs.py',), ('benchmarks/make_weights.py',),
                ('-m', 'timm_arl.export'), ('-m', 'timm_arl.predict')]
    programs += [('-m', 'timm_arl.hub', command) for command in ('stage', 'card', 'push', 'verify')]
    programs += [('-m', 'timm_arl.isic.dataset', command) for command in ('prepare', 'check', 'demo')]
    known = frozenset.union(*(options_of(*program) for program in programs))
    for name, page in PAGES.items():
        said = {flag for code in re.findall(r'`([^`]+)`', prose(page)) if not code.startswith(COMMANDS)
                for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*', code)}
        if name != 'CONTRIBUTING.md':  # which makes one up
            assert said <= known | NOT_OUR_FLAGS, (name, said - known)


def anchors_of(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r'^#+ (.*)', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', h)).strip().lower().replace(' ', '-')
            for h in headings}


@pytest.mark.parametrize('name', PAGES)
def test_links_and_paths_lead_somewhere(name):
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(PAGES[name])):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        there = (REPO / name).parent / path if path else REPO / name
        assert there.resolve().is_relative_to(REPO) and there.exists(), target
        assert not anchor or anchor in anchors_of(there.read_text(encoding='utf-8')), target
    for path in re.findall(r'`((?:benchmarks|docs|hub_cards|tests|timm_arl)/[\w./-]+)`', prose(PAGES[name])):
        assert (REPO / path).exists() or 'NAME' in path, path


def test_pages_fit_the_screen():
    assert len((REPO / 'README.md').read_bytes()) <= 9000
    for name, page in PAGES.items():
        long = [number for number, line in enumerate(page.splitlines(), 1) if len(line) > 120 and not (
            name.startswith('docs/') and line.startswith('|'))]
        assert not long, (name, long)


def test_versions_are_those_that_pip_asks_for():
    bounds = dict(re.findall(r'^ +"([a-z-]+)>=([\d.]+)"', (REPO / 'pyproject.toml').read_text(), re.MULTILINE))
    for name in ('README.md', 'CHANGELOG.md'):
        assert f'PyTorch {bounds["torch"]} ' in PAGES[name] and f'timm {bounds["timm"]} or newer' in PAGES[name]


@pytest.mark.parametrize('name', ['arl_cnn14_isic2017', 'arl_tf_efficientnet_lite0_isic2017'])
def test_scores_are_those_of_the_measured_run(name):
    results = REPO / 'benchmarks' / 'results' / name
    rows = {}
    for file, split in (('metrics.json', 'validation'), ('metrics.json', 'test'), ('metrics_alpha_zero.json', 'test')):
        scores = json.loads((results / file).read_text())[split]
        aucs = [interval_text(scores[label]['auc'], scores[label]['auc_ci95']) for label in LABELS]
        rows[file, split] = [*aucs, interval_text(scores['mean_auc'], scores['mean_auc_ci95'])]
    for (_, split), cells in rows.items():
        assert ' | '.join(cells) in PAGES['docs/evaluation.md']
        assert split != 'test' or ' | '.join(cells[:2]) in PAGES['README.md']


def test_model_table():
    rows = re.findall(r'^\| (`.*?) \| ([\d-]+) \| .*? \| (.*?) \|', PAGES['docs/models.md'], re.MULTILINE)
    seen = []
    for names, blocks, parameters in rows:
        numbers = [float(n) for n in re.findall(r'([\d.]+) M', parameters)]
        for i, name in enumerate(re.findall(r'`(\w+)`', names)):
            model = timm.create_model(name, num_classes=2, device='meta')
            alphas = [p for n, p in model.named_parameters() if n.endswith('.alpha')]
            total = sum(p.numel() for p in model.parameters()) - len(alphas)
            assert round(total / 1e6, 2) == numbers[min(i, len(numbers) - 1)], name
            assert blocks == '-'.join(str(len(getattr(model, f'layer{n}'))) for n in (1, 2, 3, 4))
            assert not alphas or f'+ {len(alphas)}' in parameters
            seen.append(name)
    assert sorted(seen) == sorted([*timm.list_models('arl_cnn*'), 'resnet14', 'seresnet14'])
