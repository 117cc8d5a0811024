"""The programs on each kind of data and task, as docs/data.md says: train, score again, publish, predict."""
import contextlib
import csv
import io
import json

import pytest
from any_data import KINDS, SEVEN, class_folders, isic2018, lines, make, table

from timm_arl.export.__main__ import main as export
from timm_arl.hub.__main__ import main as hub
from timm_arl.isic.dataset.__main__ import main as dataset
from timm_arl.predict import main as predict

QUICK = ('--model', 'test_resnet', '--epochs', 1, '--batch-size', 8, '--img-size', 64, '--start-size', 64, '--crops',
         'center', '--workers', 0, '--tracker', 'none')


def done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def read(path):
    return json.loads(path.read_text())


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


ALIKE = ('classes', 'isic2024', 'isic2018')  # once loaded: as csv, as isic2020, as in the test of seven classes


@pytest.mark.slow
@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind not in ALIKE])
def test_train_and_score_each_kind(tmp_path, call, kind):
    source, (_, name, labels, groups) = make(kind, tmp_path / 'data'), KINDS[kind]
    out, again = tmp_path / 'out', tmp_path / 'again'
    said = done(call('finetune_isic', '--data', source, *QUICK, '--output-dir', out))
    assert f'Task {name}: {", ".join(labels)}' in said and ('stay together' in said) == bool(groups)
    assert read(out / 'config.json')['task']['name'] == name
    metrics, predictions = read(out / 'metrics.json'), rows(out / 'predictions_test.csv')
    assert list(metrics['test'])[:len(labels)] == list(labels)
    assert list(predictions[0]) == ['image_id', *labels, *['group'] * bool(groups)]
    if len(labels) > 1:  # an image has one of the labels
        assert all(abs(sum(float(row[label]) for label in labels) - 1) < 1e-5 for row in predictions)
    assert (out / 'splits.csv').exists() == ('has no splits' in said) == (kind != 'splits of classes')
    # the same images are scored again, also where the run has divided them
    done(call('evaluate_isic', '--data', source, '--checkpoint', out, '--output-dir', again, '--workers', 0))
    assert [row['image_id'] for row in rows(again / 'predictions_test.csv')] == [row['image_id'] for row in predictions]
    for label in labels:
        assert read(again / 'metrics.json')['test'][label]['auc'] == pytest.approx(
            metrics['test'][label]['auc'], abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures('no_pictures')
def test_seven_classes_to_the_end(tmp_path, call):
    """From small shards of ISIC 2018, as prepare writes them, whose columns tell the task."""
    out, evaluation, staged, seven = (tmp_path / name for name in ('out', 'evaluation', 'staged', 'small'))
    assert dataset(['prepare', str(isic2018(tmp_path / 'originals')), str(seven), '--longest-side', '64', '--workers',
                    '1']) == 0
    done(call('finetune_isic', '--data', seven, *QUICK, '--output-dir', out, '--balance', 'weights', '--mixup', .2))
    done(call('evaluate_isic', '--data', seven, '--checkpoint', out, '--output-dir', evaluation, '--workers', 0,
              '--report'))
    epochs, record = rows(out / 'summary.csv'), read(out / 'run.json')
    assert record['arguments']['select'] == 'balanced_accuracy' and 'validation_balanced_accuracy' in epochs[0]
    scores = read(evaluation / 'metrics.json')['test']
    assert scores['intervals_over'] == 'lesions' and scores['groups'] == 21
    assert sum(map(sum, scores['confusion_matrix']['counts'])) == scores['NV']['images']
    page = (evaluation / 'report.html').read_text()
    assert 'Confusion matrix' in page and 'bootstrap intervals over lesions' in page
    assert all(f'AUC, {label}' in page for label in SEVEN) and 'lesion ISIC_00002' in page and 'add up to 1' in page
    assert hub(['stage', str(out), str(staged), '--evaluation', str(evaluation)]) == 0
    card = (staged / 'README.md').read_text()
    assert 'MEL, NV, BCC, AKIEC, BKL, DF and VASC' in card and 'one `lesion_id` are in one split' in card
    assert 'melanoma, one of seborrheic' not in card and 'softmax(1)' in card
    code = card[card.index('```python') + 9:].split('```')
    image = next((tmp_path / 'originals').rglob('*.jpg'))
    program = (code[0] + code[2].removeprefix('python')).replace("'lesion.jpg'", repr(str(image)))
    program = program.replace('local-dir:staged', f'local-dir:{staged}')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    found = said.getvalue().splitlines()
    assert [line.partition(':')[0] for line in found] == [*SEVEN, 'most probable']
    assert export(['--model', str(staged), '--output', str(tmp_path / 'm.onnx'), '--with-preprocessing']) == 0
    for name, flag, network in (('p', '--model', staged), ('o', '--onnx', tmp_path / 'm.onnx')):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert predict([*map(str, (image, flag, network, '--output-dir', tmp_path / name, '--workers', 0))]) == 0
        assert f'most probable {found[-1].split()[-1]}; MEL ' in said.getvalue()
    one, other = (rows(tmp_path / name / 'predictions.csv')[0] for name in 'po')
    for label, line in zip(SEVEN, found):
        assert float(one[label]) == pytest.approx(float(other[label]), abs=1e-3)
        assert float(line.split()[1].rstrip(',')) == pytest.approx(float(one[label]), abs=2e-3)
        assert one[f'{label}_decision'] in '01'
    assert one['most_probable'] == other['most_probable'] == max(SEVEN, key=lambda label: float(one[label]))


@pytest.mark.slow
@pytest.mark.usefixtures('no_pictures')
def test_several_labels_folds_and_a_teacher(tmp_path, call):
    source = table(tmp_path, 40, (0, 1), ('image', 'scar', 'ulcer', 'patient_id'),
                   lambda k: (int(k % 3 == 0), f'p{k // 2 * 2 + (k // 2) % 2}'))
    flags = ('--data', source, '--labels', 'scar', 'ulcer', *QUICK)
    teacher = tmp_path / 'teacher'
    said = done(call('finetune_isic', *flags, '--output-dir', teacher, '--balance', 'weights', '--select', 'auc:ulcer',
                     '--epochs', 3, '--lr', .01))
    best = max(rows(teacher / 'summary.csv'), key=lambda row: float(row['validation_auc_ulcer']))
    assert f'of epoch {best["epoch"]}, the best of 3 by validation AUC of ulcer' in said
    assert read(teacher / 'run.json')['arguments']['select'] == 'auc:ulcer'
    assert read(teacher / 'config.json')['task']['kind'] == 'multilabel'
    done(call('finetune_isic', *flags, '--output-dir', tmp_path / 'student', '--teacher', teacher))
    done(call('finetune_isic', *flags, '--output-dir', tmp_path / 'folds', '--folds', 2))
    held_out = rows(tmp_path / 'folds' / 'predictions_cross_validation.csv')
    assert len(held_out) == 40 and set(held_out[0]) == {'image_id', 'scar', 'ulcer', 'group'}
    folds = [{row['group'] for row in rows(tmp_path / 'folds' / f'fold-{k}' / 'predictions_validation.csv')}
             for k in (0, 1)]
    assert not folds[0] & folds[1]
    refused = call('finetune_isic', *flags, '--output-dir', tmp_path / 'x', '--head', 'softmax')
    assert refused.returncode == 2 and 'softmax needs images with one label at most' in refused.stderr
    # without a validation split no threshold is chosen: other data with the same labels get those of home
    lines(tmp_path / 'other.csv', ('image', 'scar', 'ulcer', 'clinic'), [
        (f'images/{k}.png', k % 2, k % 3 % 2, ('Ulm', '')[k % 5 == 0]) for k in range(30)])
    said = done(call('evaluate_isic', '--data', tmp_path / 'other.csv', '--checkpoint', teacher, '--output-dir',
                     tmp_path / 'e', '--workers', 0, '--report', '--subgroups', 'Clinic', '--other-data'))
    assert 'External validation on' in said and 'Thresholds and calibration are those of home' in said
    metrics = read(tmp_path / 'e' / 'metrics.json')
    assert list(metrics) == ['test'] and metrics['test']['external']['map'] == {'scar': ['scar'], 'ulcer': ['ulcer']}
    assert [point['name'] for point in metrics['test']['scar']['operating_points']] == [
        'youden on home validation', 'sensitivity 0.9 on home validation']
    assert 'teacher on other.csv, test' in (tmp_path / 'e' / 'report.html').read_text()
    looks = [row['other_data'] for row in rows(teacher / 'looks.csv')]
    assert looks == ['', str(tmp_path / 'other.csv')]
    assert [(row['group'], row['label'], row['images']) for row in metrics['test']['subgroups']] == [
        ('clinic ulm', 'scar', 24), ('clinic ulm', 'ulcer', 24), ('clinic unknown', 'scar', 6),
        ('clinic unknown', 'ulcer', 6)]
    refused = call('evaluate_isic', '--data', tmp_path / 'other.csv', '--checkpoint', teacher, '--output-dir',
                   tmp_path / 'x', '--subgroups', 'hospital', '--other-data')
    assert refused.returncode == 2 and 'no numbers or words in a column hospital' in refused.stderr
    refused = call('finetune_isic', *flags, '--output-dir', tmp_path / 'x', '--select', 'balanced_accuracy')
    assert refused.returncode == 2 and 'choose mean_auc, auc:scar, auc:ulcer' in refused.stderr
    refused = call('evaluate_isic', '--data', class_folders(tmp_path / 'photos'), '--checkpoint', teacher,
                   '--output-dir', tmp_path / 'x')
    assert refused.returncode == 2 and 'knows scar, ulcer' in refused.stderr


@pytest.mark.parametrize('program', ['finetune_isic', 'evaluate_isic', 'prepare', 'check'])
def test_bad_data_stop_every_program(tmp_path, call, capsys, program):
    source = table(tmp_path / 'd', 8)
    source.write_text(source.read_text().replace('images/3.png,nevus', 'images/3.png,'))
    if program in ('prepare', 'check'):
        with pytest.raises(SystemExit) as stopped:
            dataset([program, str(source), *[str(tmp_path / 'out')] * (program == 'prepare')])
        status, said = stopped.value.code, capsys.readouterr().err
    else:
        more = ('--checkpoint', 'arl_cnn14.isic2017') if program == 'evaluate_isic' else QUICK
        stopped = call(program, '--data', source, *more, '--output-dir', tmp_path / 'out')
        status, said = stopped.returncode, stopped.stderr
    assert status == 2 and 'label is missing for image 3 (1 such images): fill it in' in said
    assert not (tmp_path / 'out').exists()
