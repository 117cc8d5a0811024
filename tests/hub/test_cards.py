"""Model cards: their figures are those of the results, and their snippets run and do what the results say."""
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import yaml
from loopback_hub import Hub
from PIL import Image
from timm.models import save_for_hf

from timm_arl import hub as publishing
from timm_arl.download import sha256_of
from timm_arl.factory import save_network, tensors_sha256
from timm_arl.files import write_json, write_rows
from timm_arl.hub.publish import _named
from timm_arl.hub.staging import pretrained_names
from timm_arl.isic.dataset import decode, load_splits
from timm_arl.isic.dataset.sources import CHALLENGE_IDS, ids_digest
from timm_arl.isic.metrics import interval_text, score_split
from timm_arl.isic.predictions import write_predictions
from timm_arl.isic.task import Task
from timm_arl.isic.transforms import eval_transform, grey_world


def front_matter(card):
    return yaml.safe_load(card.split('---\n')[1])


def test_figures_of_the_card_are_those_of_the_results(staged):
    card, results = (staged / 'README.md').read_text(), json.loads((staged / 'results.json').read_text())
    assert results['kept_epoch'] == 2
    for split, scores in results['metrics'].items():
        for label in ('melanoma', 'seborrheic_keratosis'):
            text = interval_text(scores[label]['auc'], scores[label]['auc_ci95'])
            row = f'| {label.replace("_", " ")} | {text} |'
            assert card.partition(f'### {split.capitalize()}, 30 images of isic2017\n')[2].count(row) >= 1
    assert card.index('### Test') < card.index('### Validation') < card.index('These images chose the epoch')
    found = {(r['dataset']['split'], m['name']): m['value']
             for r in front_matter(card)['model-index'][0]['results'] for m in r['metrics']}
    assert found == {(split, 'AUC, ' + label.replace('_', ' ')): results['metrics'][split][label]['auc']
                     for split in results['metrics'] for label in ('melanoma', 'seborrheic_keratosis')}
    assert front_matter(card)['library_name'] == 'timm' and front_matter(card)['license'] == 'unknown'
    for part in ('Not a medical device', 'finetune_isic.py --data isic2017', 'abcdef123456', 'looked at once',
                 'Known leakage', sha256_of(staged / 'model.safetensors'), '| seed | 7 |', '0.125'):
        assert part in card, part
    assert '\n\n\n' not in card and '/me' not in card + (staged / 'results.json').read_text()


def test_only_the_images_of_the_challenge_have_its_licence_and_population(run, tmp_path):
    """Not those of a clinic that has the same two labels."""
    copy = shutil.copytree(run, tmp_path / 'run')
    for train_ids, official in (('0', False), (CHALLENGE_IDS['train'], True)):
        record = json.loads((copy / 'run.json').read_text())
        write_json(copy / 'run.json', {**record, 'arguments': {**record['arguments'], 'train_ids': train_ids}})
        card = (publishing.stage(copy, tmp_path / str(official)) / 'README.md').read_text()
        assert (front_matter(card)['license'] == 'apache-2.0') == official
        assert ('come from a few clinics' in card) == official
        assert ('which is not the whole training set of ISIC 2017' in card) != official


def test_what_an_evaluation_adds(run, tmp_path):
    with open(run / 'metrics.json') as file:
        metrics = json.load(file)
    for scores in metrics.values():
        for label, threshold in (('melanoma', 0.25), ('seborrheic_keratosis', 0.375)):
            scores[label]['operating_points'] = [{**scores[label], 'name': 'youden on validation',
                                                  'threshold': threshold}]
            scores[label]['calibration'] = {'ece': 0.03125, 'temperature': 1.5, 'bias': -0.5,
                                            'ece_calibrated': 0.015625, 'mean_calibrated': 0.25}
    for name, of in (('r', metrics), ('r0', {'test': {**metrics['test'], 'comparison': {
            key: dict(difference=0.0625, difference_ci95=[-0.125, 0.25], p_value=0.5)
            for key in ('melanoma', 'seborrheic_keratosis', 'mean_auc')}}})):
        (tmp_path / name).mkdir()
        for label in ('melanoma', 'seborrheic_keratosis') if name == 'r0' else ():
            of['test'][label] = {**of['test'][label], 'auc': of['test'][label]['auc'] + 0.0625}
        write_json(tmp_path / name / 'metrics.json', of)
        write_json(tmp_path / name / 'evaluation.json', {
            'alpha_zero': name == 'r0', 'tensors_sha256': tensors_sha256(run / 'model.safetensors')})
        for split in ('validation', 'test'):
            shutil.copy(run / f'predictions_{split}.csv', tmp_path / name)
    (tmp_path / 'r' / 'roc_test.png').write_bytes(b'png')
    for wrong, message in ((dict(evaluation=tmp_path / 'r0'), 'is an evaluation with every alpha at 0'),
                           (dict(alpha_zero=tmp_path / 'r'), 'is not an output folder of evaluate_isic.py --alpha-z')):
        with pytest.raises(publishing.HubError, match=message):
            publishing.stage(run, tmp_path / 's', **wrong)
    others = json.loads((tmp_path / 'r' / 'evaluation.json').read_text())
    shutil.copytree(tmp_path / 'r', tmp_path / 'part')
    write_json(tmp_path / 'part' / 'evaluation.json', {
        **json.loads((tmp_path / 'r' / 'evaluation.json').read_text()), 'duplicates_left_out': {'test': 9}})
    with pytest.raises(publishing.HubError, match='leaves images out .--drop-duplicates.: pass an evaluation of all'):
        publishing.stage(run, tmp_path / 's', tmp_path / 'part')
    for name in ('r', 'r0'):
        shutil.copytree(tmp_path / name, tmp_path / f'{name}-of-another')
        write_json(tmp_path / f'{name}-of-another' / 'evaluation.json', {
            **others, 'alpha_zero': name == 'r0', 'tensors_sha256': 'f' * 64})
    for wrong in (dict(evaluation=tmp_path / 'r-of-another'), dict(alpha_zero=tmp_path / 'r0-of-another')):
        with pytest.raises(publishing.HubError, match='is an evaluation of other weights than those of'):
            publishing.stage(run, tmp_path / 's', **wrong)
    folder = publishing.stage(run, tmp_path / 's', tmp_path / 'r', alpha_zero=tmp_path / 'r0')
    config = json.loads((folder / 'config.json').read_text())
    assert config['thresholds']['youden on validation'] == {'melanoma': 0.25, 'seborrheic_keratosis': 0.375}
    assert config['temperatures'] == {'melanoma': 1.5, 'seborrheic_keratosis': 1.5}
    assert config['biases'] == {'melanoma': -0.5, 'seborrheic_keratosis': -0.5}
    card = (folder / 'README.md').read_text()
    assert '| melanoma, youden on validation | 0.250 |' in card and '![ROC curves on test](roc_test.png)' in card
    assert "{'melanoma': 0.25, 'seborrheic_keratosis': 0.375}  # youden on validation" in card
    assert '| melanoma | +0.062 [-0.125, +0.250] | 0.500 |' in card
    with open(run / 'predictions_test.csv') as file:
        values = [float(line.split(',')[1]) for line in file.readlines()[1:]]
    positives, mean = metrics['test']['melanoma']['positives'] / 30, sum(values) / 30
    assert f'| melanoma | {positives:.3f} | {mean:.3f} | 0.250 | 0.031 | 0.016 | 1.500 | -0.500 |' in card
    assert f'**Probabilities of melanoma are too high** here, by {mean - positives:.3f} on average' in card
    assert 'These images chose the epoch that was kept, thresholds and calibration: their' in card
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 2


def changed(run, folder, command='finetune_isic.py', **arguments):
    """A copy of a run with another command and other arguments."""
    shutil.copytree(run, folder)
    record = json.loads((run / 'run.json').read_text())
    record['arguments'].update(arguments)
    write_json(folder / 'run.json', dict(record, command=command))
    return folder


@pytest.mark.parametrize('model, start, base', [
    ('arl_cnn50.tv_in1k', 'timm/resnet50.tv_in1k', 'timm/resnet50.tv_in1k'),
    ('tv_resnet50', 'timm/resnet50.tv_in1k', 'timm/resnet50.tv_in1k'),  # a name of before
    ('HF-HUB:user/model@v1', 'user/model', 'user/model'),
    ('local-dir:/home/me/first', 'local-dir:first', None),
])
def test_a_card_tells_what_a_run_started_from(run, tmp_path, model, start, base):
    copy = changed(run, tmp_path / 'run', model=model, pretrained=True, command=f'finetune_isic.py --model {model}')
    folder = publishing.stage(copy, tmp_path / 's')
    card = (folder / 'README.md').read_text()
    assert f'| started from | `{start}` |' in card and front_matter(card).get('base_model') == base
    assert '/home/me' not in card + (folder / 'results.json').read_text()


@pytest.mark.parametrize('teachers, row', [
    (['/home/me/a', '/home/me/b', 'arl_cnn50.isic2017'], '| learned from | `a`, `b`, `arl_cnn50.isic2017` |'),
    (['/home/me/W/network', '/home/me/V/network'], '| learned from | `W/network`, `V/network` |')])
def test_a_card_names_the_teachers(run, tmp_path, teachers, row):
    folder = publishing.stage(changed(run, tmp_path / 'run', teacher=teachers), tmp_path / 's')
    assert row in (folder / 'README.md').read_text()
    assert '/home/me' not in (folder / 'README.md').read_text() + (folder / 'results.json').read_text()


def test_words_that_would_break_a_card(run, tmp_path):
    copy = changed(run, tmp_path / 'run', command='finetune_isic.py --data "a|b"', init_checkpoint='a|b')
    card = (publishing.stage(copy, tmp_path / "it's", note='256 px | squashed\nand cut') / 'README.md').read_text()
    assert '256 px \\| squashed and cut |' in card
    table = card.partition('## Training\n')[2].partition('\n## ')[0]
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in table.splitlines() if line} == {3}
    assert 'timm.create_model("local-dir:it\'s", pretrained=True)' in card
    assert b'timm.create_model(\'hf-hub:u/m\', pretrained=True)' in _named(tmp_path / "it's", 'hf-hub:u/m')


def test_scores_that_say_little_are_said_to(run, staged, tmp_path):
    card = (staged / 'README.md').read_text()
    for split, scores in json.loads((run / 'metrics.json').read_text()).items():
        part = card.partition(f'### {split.capitalize()}')[2].partition('\n## ')[0].partition('### ')[0]
        for label in ('melanoma', 'seborrheic_keratosis'):
            warned = f'The AUC of {label.replace("_", " ")} cannot be told from chance' in part
            interval = scores[label]['auc_ci95']
            assert warned == bool(interval and interval[0] <= 0.5)
    assert 'cannot be told from chance' in card
    assert 'These images chose the epoch that was kept: their figures' in card  # no thresholds without an evaluation
    assert '`isic2017`, split train, 1,234 images |' in card


def test_a_card_calls_isic_2017_what_is_isic_2017(run, staged, tmp_path, monkeypatch):
    card = (staged / 'README.md').read_text()
    assert 'trained on `isic2017`, which is not the whole training set of ISIC 2017' in card
    assert 'datasets' not in front_matter(card)
    assert '| started from | scratch |' in card and 'base_model' not in front_matter(card)
    monkeypatch.setitem(CHALLENGE_IDS, 'train', '0')
    monkeypatch.setitem(CHALLENGE_IDS, 'test', ids_digest(f'test{k}' for k in range(30)))
    card = (publishing.stage(run, tmp_path / 's', note='copies at 256 px') / 'README.md').read_text()
    assert 'trained on ISIC 2017.' in card and 'training images of the challenge, copies at 256 px' in card
    assert '### Test, 30 images of ISIC 2017 Part 3\n' in card and '### Validation, 30 images of isic2017\n' in card
    assert front_matter(card)['datasets'] == ['isic-2017']


def snippets(card):
    return '\n'.join(re.findall(r'```python\n(.*?)```', card, re.DOTALL))


def save_lesion(folder, picture=None):
    picture = picture or Image.new('RGB', (600, 450), (200, 150, 130))
    exif = Image.Exif()
    exif[274] = 6  # of a camera that was held upright
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / 'lesion.jpg', format='PNG', exif=exif)  # without a loss


def run_snippets(card, folder, **env):
    save_lesion(folder)
    return subprocess.run([sys.executable, '-c', snippets(card)], cwd=folder, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=200)


def run_snippets_here(card, folder, picture=None):
    """Lines printed by the snippets, run in this process with no names but their own."""
    save_lesion(folder, picture)
    before, out = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(snippets(card), 'card', 'exec'), {})
    finally:
        os.chdir(before)
    return out.getvalue().splitlines()


@pytest.fixture(scope='module')
def clinic(tmp_path_factory):
    """A finished run on a clinic's own three classes, two images of each patient."""
    folder, task = tmp_path_factory.mktemp('clinic') / 'out', Task('mine', ('scar', 'ulcer', 'mole'), 'multiclass')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    save_network(model, folder, task.outputs, timm.data.resolve_model_data_config(model), task.config())
    truth = torch.eye(3)[torch.arange(60).div(2).long().remainder(3)].numpy()
    truth[54:] = torch.eye(3)[2].numpy()
    p = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)).softmax(1).numpy()
    groups = [f'P{k // 2}' for k in range(60)]
    write_json(folder / 'metrics.json', {name: score_split(truth, p, task=task, groups=groups, unit='patients')
                                         for name in ('validation', 'test')})
    for name in ('validation', 'test'):
        write_predictions(folder / f'predictions_{name}.csv', [f'{name}{k}' for k in range(60)], p, task, groups)
    write_rows(folder / 'summary.csv', [{'epoch': 1, 'validation_mean_auc': .5}])
    write_rows(folder / 'looks.csv', [
        {'checkpoint': 'out', 'command': f'evaluate_isic.py --data {data}', 'other_data': data.replace('mine.csv', '')}
        for data in ('mine.csv', 'other.csv', 'mine.csv')])
    write_json(folder / 'run.json', {
        'command': 'finetune_isic.py --data mine.csv', 'arguments': {
            'data': 'mine.csv', 'recipe': 'modern', 'seed': 0, 'keep': 'best', 'train_ids': '0', 'crops': 'center',
            'mask_weight': 0.5, 'group_column': 'patient_id'},
        'launch': {'processes': 1, 'mixed_precision': 'no', 'device': 'cpu'}, 'versions': {'timm_arl': '0.1.0'}})
    return folder


def test_only_looks_at_its_own_test_split_count(clinic, tmp_path):
    folder = publishing.stage(clinic, tmp_path / 's')
    assert 'The test split was looked at twice with these weights.' in (folder / 'README.md').read_text()
    looks = json.loads((folder / 'results.json').read_text())['looks']
    assert [look['command'].split()[-1] for look in looks] == ['mine.csv', 'mine.csv']


def test_masks_are_named_where_there_were_masks(clinic, tmp_path):
    assert 'lesion masks' not in (publishing.stage(clinic, tmp_path / 's') / 'README.md').read_text()
    copy = shutil.copytree(clinic, tmp_path / 'run')
    write_rows(copy / 'summary.csv', [{'epoch': 1, 'validation_mean_auc': .5, 'train_mask_loss': .1}])
    card = (publishing.stage(copy, tmp_path / 't') / 'README.md').read_text()
    assert 'lesion masks | learned beside the diagnosis, weight 0.5' in card


def test_a_clinics_card_speaks_of_no_challenge(clinic, tmp_path):
    card = (publishing.stage(clinic, tmp_path / 's') / 'README.md').read_text()
    for word in ('challenge', 'official', 'Known leakage', 'ISIC', 'HAM10000', 'apache'):
        assert word not in card.partition('---\n')[2].replace('finetune_isic.py', ''), word
    assert 'At the threshold of 0.5:' in card and '| scar, 0.5 | 0.500 |' in card
    assert 'call' in card and 'the most probable class' in card and front_matter(card)['license'] == 'unknown'
    assert '\n\n\n' not in card
    assert 'Only 9 patients have scar (18 images): figures from so few are uncertain.' in card


def test_the_licence_is_said_or_asked_for(clinic, call, tmp_path):
    done = call('timm_arl.hub.__main__', 'stage', clinic, tmp_path / 's')
    assert done.returncode == 0 and 'The card gives no licence' in done.stdout, done.stderr
    done = call('timm_arl.hub.__main__', 'stage', clinic, tmp_path / 's', '--license', 'cc-by-nc-4.0')
    assert done.returncode == 0 and 'no licence' not in done.stdout, done.stderr
    assert front_matter((tmp_path / 's' / 'README.md').read_text())['license'] == 'cc-by-nc-4.0'
    assert json.loads((tmp_path / 's' / 'config.json').read_text())['pretrained_cfg']['license'] == 'cc-by-nc-4.0'
    done = call('timm_arl.hub.__main__', 'stage', clinic, tmp_path / 't', '--license', 'ours: all')
    assert done.returncode == 2 and 'is no licence as the Hub abbreviates it' in done.stderr


def test_thresholds_of_the_run_travel_without_an_evaluation(clinic, tmp_path):
    copy, labels = shutil.copytree(clinic, tmp_path / 'run'), ('scar', 'ulcer', 'mole')
    write_json(copy / 'home.json', {'thresholds': {'youden on validation': dict.fromkeys(labels, .3)},
                                    'temperatures': dict.fromkeys(labels, 2.), 'biases': dict.fromkeys(labels, -1.),
                                    'shown': {'crops': 'center'}})
    folder = publishing.stage(copy, tmp_path / 's')
    config = json.loads((folder / 'config.json').read_text())
    assert config['thresholds']['youden on validation']['mole'] == .3 and config['temperatures']['mole'] == 2.
    assert config['biases']['mole'] == -1.
    assert "'mole': 0.3" in (folder / 'README.md').read_text()


def test_snippets_run(staged, tmp_path):
    card = (staged / 'README.md').read_text()
    assert "'local-dir:arl_cnn14.isic2017'" in card
    (tmp_path / 'arl_cnn14.isic2017').symlink_to(staged)
    *labels, shapes, cam = run_snippets_here(card, tmp_path)
    assert [line.partition(':')[0] for line in labels] == ['melanoma', 'seborrheic_keratosis']
    assert cam == '(5, 1, 64, 64)' and '(5, 256)' in shapes


@pytest.mark.parametrize('changes', [dict(crops='center'), dict(crops='multiscale', grey_world=True),
                                     dict(crops='multiscale', aspect='squash')])
def test_the_snippet_gives_the_probabilities_of_the_results(run, isic_sample, repo, tmp_path, changes):
    copy = changed(run, tmp_path / 'run', **changes)
    weights = safetensors.torch.load_file(copy / 'model.safetensors')
    weights['fc.weight'] *= 30  # an untrained network says nearly the same of all crops
    safetensors.torch.save_file(weights, copy / 'model.safetensors')
    card = (publishing.stage(copy, tmp_path / 's') / 'README.md').read_text()
    assert ('by the mean of all crops' in card) == (changes['crops'] != 'center')
    cell = load_splits(isic_sample)['validation'][3]
    picture = square = decode(cell['image'])
    if changes.get('aspect') == 'squash':
        picture = picture.resize((400, 256), Image.Resampling.NEAREST)  # as before it was squashed
        square = picture.resize((256, 256))
    folder = tmp_path / 'here'
    folder.mkdir()
    (folder / 's').symlink_to(tmp_path / 's')
    lines = run_snippets_here(card, folder, picture)
    found = [float(line.split()[1].rstrip(',')) for line in lines[:2]]
    model = timm.create_model(f'local-dir:{copy}', pretrained=True).eval()
    cfg = model.pretrained_cfg
    shown = grey_world(square) if changes.get('grey_world') else square
    crops = eval_transform(64, cfg['mean'], cfg['std'], changes['crops'])(shown)
    with torch.inference_mode():
        assert found == pytest.approx(model(crops).sigmoid().mean(0).tolist(), abs=6e-4)
        other = eval_transform(64, cfg['mean'], cfg['std'], 'center' if len(crops) > 1 else 'multiscale')(shown)
        assert found != pytest.approx(model(other).sigmoid().mean(0).tolist(), abs=6e-4)


def test_the_card_of_another_network(staged, tmp_path):
    shutil.copytree(staged, tmp_path / 's')
    model = timm.create_model('resnet18', num_classes=2)
    save_for_hf(model, tmp_path / 's', safe_serialization=True, model_config=dict(
        label_names=['melanoma', 'seborrheic_keratosis']))
    text = publishing.card(tmp_path / 's').read_text()
    assert 'resnet18, trained on' in text and 'Attention Residual' not in text and 'activation' not in text


def test_a_card_does_not_replace_another_readme(call, tmp_path):
    (tmp_path / 'README.md').write_text('# Mine')
    arguments = 'timm_arl.hub.__main__', 'card', 'arl_cnn50.a1_in1k', '--output', tmp_path
    done = call(*arguments)
    assert done.returncode == 2 and 'is there already and says something else' in done.stderr
    assert (tmp_path / 'README.md').read_text() == '# Mine'
    assert call(*arguments, '--overwrite').returncode == 0 and (tmp_path / 'README.md').read_text() != '# Mine'
    assert call(*arguments).returncode == 0  # the same again


@pytest.mark.parametrize('name', [name for name in pretrained_names() if name.endswith('_in1k')])
def test_cards_of_timms_weights_are_there_and_show_no_figure(call, repo, tmp_path, name):
    done = call('timm_arl.hub.__main__', 'card', name, '--output', tmp_path / 'c')
    assert done.returncode == 0, done.stderr
    card = (tmp_path / 'c' / 'README.md').read_text()
    assert card == (repo / 'hub_cards' / name / 'README.md').read_text()  # else generate it again
    matter = front_matter(card)
    assert matter['base_model'].startswith('timm/resnet') and 'model-index' not in matter
    assert matter['license'] == ('bsd-3-clause' if '.tv_' in name else 'apache-2.0')
    assert 'this card shows no figure' in card and 'AUC' not in card


@pytest.mark.slow
def test_snippets_with_timms_weights_run(repo, resnet50_file, tmp_path):
    with Hub({'timm/resnet50.a1_in1k': {'model.safetensors': resnet50_file}}) as server:
        done = run_snippets((repo / 'hub_cards' / 'arl_cnn50.a1_in1k' / 'README.md').read_text(), tmp_path,
                            **server.env(tmp_path / 'home'))
    assert done.returncode == 0 and '(1, 2048)' in done.stdout, done.stderr
