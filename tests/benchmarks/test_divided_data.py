"""What a run has divided or learned stays apart: when it is scored, scored elsewhere, and resumed."""
import csv
import json
import shutil
from argparse import Namespace

import pytest
from any_data import lines, table

from timm_arl.hub import stage
from timm_arl.isic.dataset import load_splits
from timm_arl.training.arguments import RunError
from timm_arl.training.folds import check_unseen

pytestmark = pytest.mark.usefixtures('no_pictures')

QUICK = ('--model', 'test_resnet', '--epochs', 1, '--batch-size', 8, '--img-size', 64, '--start-size', 64, '--crops',
         'center', '--workers', 0, '--tracker', 'none')


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def source(tmp_path):
    return table(tmp_path / 'd', 30, head=('image', 'label', 'case'), more=lambda k: (f'p{k // 2 * 2 + k % 2}',))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp('trained')


@pytest.fixture
def run(tmp_path, call, source, trained):
    """Makes a run on the source in out, which is trained by the first test that asks for it, and copied for others."""
    def make(name, *flags):
        out, folder = tmp_path / 'out', trained / name
        if folder.exists():
            shutil.copytree(folder / 'out', out)
            record, of = (out / 'run.json').read_text(), (folder / 'of').read_text()
            (out / 'run.json').write_text(record.replace(of, str(tmp_path)))
            return out
        done = call('finetune_isic', '--data', source, *flags, *QUICK, '--output-dir', out)
        assert done.returncode == 0, done.stderr
        shutil.copytree(out, folder / 'out')
        (folder / 'of').write_text(str(tmp_path))
        return out

    return make


def test_an_image_that_was_left_out_gives_no_training_image_away(tmp_path, call, source):
    (source.parent / 'images' / '3.png').write_bytes(b'')
    out, flags = tmp_path / 'out', ('--data', source, '--skip-bad-images')
    done = call('finetune_isic', *flags, *QUICK, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    assert len(rows(out / 'splits.csv')) == 30 and sum(
        len(rows(out / f'predictions_{name}.csv')) for name in ('validation', 'test')) < 12
    done = call('evaluate_isic', *flags, '--checkpoint', out, '--output-dir', tmp_path / 'e', '--workers', 0)
    assert done.returncode == 0, done.stderr
    tested = [row['image_id'] for row in rows(out / 'predictions_test.csv')]
    assert [row['image_id'] for row in rows(tmp_path / 'e' / 'predictions_test.csv')] == tested
    # another table of these images, with some left out
    lines(source.parent / 'other.csv', ('image', 'label'), [
        (f'images/{k}.png', ('melanoma', 'nevus')[k % 2]) for k in range(4, 30)])
    flags = ('--data', source.parent / 'other.csv', '--checkpoint', out, '--workers', 0)
    done = call('evaluate_isic', *flags, '--output-dir', tmp_path / 'o')
    assert 'divided as in' in done.stdout and 'no training' not in done.stdout
    assert {row['image_id'] for row in rows(tmp_path / 'o' / 'predictions_test.csv')} == {
        i for i in tested if int(i) > 3}
    done = call('evaluate_isic', *flags, '--output-dir', tmp_path / 'p', '--other-data')
    count = sum(row['split'] == 'train' and int(row['image_id']) > 3 for row in rows(out / 'splits.csv'))
    assert f'{count} of the 26 test images have names of training images' in done.stdout
    for flag in '--teacher', '--init-checkpoint':  # its training images are scored by a run of another seed
        done = call('finetune_isic', '--data', source, '--skip-bad-images', '--seed', 1, *QUICK, flag, out,
                    '--output-dir', tmp_path / 'second')
        assert done.returncode == 2 and f'{flag} {out} was trained on ' in done.stderr
        assert f'divide the data as it did, with --splits {out / "splits.csv"}' in done.stderr
    done = call('finetune_isic', '--data', source, '--skip-bad-images', '--folds', 2, *QUICK, '--teacher', out,
                '--output-dir', tmp_path / 'second')
    assert done.returncode == 2 and 'of the train images: start from other weights' in done.stderr
    # folds of data with splits of their own hold out images of train alone
    for start in out, out / 'last' / 'kept':
        args = Namespace(init_checkpoint=str(start), teacher=None, pretrained=False, model='arl_cnn14',
                         data=str(source), folds=2)
        of_out = {name: {'image_id': [row['image_id'] for row in rows(out / 'splits.csv') if row['split'] == name]}
                  for name in ('train', 'test')}
        with pytest.raises(RunError, match=f'was trained on {len(of_out["train"]["image_id"])} of the train images'):
            check_unseen(args, of_out)
        check_unseen(args, {'train': of_out['test'], 'test': of_out['train']})
    # another run takes over the division, and keeps it too
    lines(tmp_path / 's.csv', ('image_id', 'split'), [(row['image_id'], row['split']) for row in rows(
        out / 'splits.csv')])
    done = call('finetune_isic', '--data', source, '--skip-bad-images', '--splits', tmp_path / 's.csv', '--seed', 1,
                *QUICK, '--teacher', out, '--output-dir', tmp_path / 'second')
    assert done.returncode == 0 and (tmp_path / 'second' / 'splits.csv').read_text() == (
        out / 'splits.csv').read_text()


def test_splits_that_were_given_hold_against_those_of_the_data(tmp_path, call, few):
    """Recipes are chosen on held-out training images: the evaluation must not look at the left-out test split."""
    ids = {name: list(split['image_id']) for name, split in load_splits(few).items()}
    lines(tmp_path / 's.csv', ('image_id', 'split'), [
        (i, {'train': ('train', 'test')[k % 2], 'validation': 'validation', 'test': 'none'}[name])
        for name, those in ids.items() for k, i in enumerate(those)])
    out, flags = tmp_path / 'out', ('--data', few, '--workers', 0)
    done = call('finetune_isic', *flags, '--splits', tmp_path / 's.csv', *QUICK[:-4], '--tracker', 'none',
                '--output-dir', out)
    assert done.returncode == 0, done.stderr
    held_out = ids['train'][1::2]
    assert [row['image_id'] for row in rows(out / 'predictions_test.csv')] == held_out
    assert {row['image_id'] for row in rows(out / 'splits.csv') if row['split'] == 'none'} == set(ids['test'])
    (tmp_path / 's.csv').unlink()
    done = call('evaluate_isic', *flags, '--checkpoint', out, '--output-dir', tmp_path / 'e')
    assert done.returncode == 0 and 'divided as in' in done.stdout, done.stderr
    assert [row['image_id'] for row in rows(tmp_path / 'e' / 'predictions_test.csv')] == held_out


def test_a_run_s_groups_hold_in_a_renamed_table(tmp_path, call, source):
    out = tmp_path / 'out'
    done = call('finetune_isic', '--data', source, '--group-column', 'case', *QUICK, '--output-dir', out)
    assert done.returncode == 0 and 'Images of one case stay together' in done.stdout, done.stderr
    source.rename(source.parent / 'renamed.csv')
    done = call('evaluate_isic', '--data', source.parent / 'renamed.csv', '--checkpoint', out, '--output-dir',
                tmp_path / 'e', '--workers', 0)
    assert done.returncode == 0 and 'Images of one case stay together' in done.stdout, done.stderr
    assert json.loads((tmp_path / 'e' / 'metrics.json').read_text())['test']['intervals_over'] == 'groups of case'


@pytest.mark.parametrize('old, new', [
    ('12.png,melanoma', '12.png,nevus'), ('nevus', 'mole'), ('melanoma', 'zz'), ('p12', 'p14')])
def test_resuming_with_other_labels_or_groups_is_refused(tmp_path, call, source, run, old, new):
    lines(tmp_path / 's.csv', ('image_id', 'split'), [(k, ('train', 'validation')[k % 10 > 6]) for k in range(30)])
    out = run('of groups', '--group-column', 'case', '--splits', tmp_path / 's.csv')
    (out / 'metrics.json').unlink()  # as if it had been killed before the end
    before = (out / 'run.json').read_text()
    content = source.read_text()
    source.write_text(content.replace(old, new))
    refused = call('finetune_isic', '--output-dir', out, '--resume')
    assert refused.returncode == 2 and 'had other labels, groups, or validation or test images' in refused.stderr
    source.write_text(content)
    assert (out / 'run.json').read_text() == before and len(json.loads(before)['arguments']['content']) == 64
    if old == 'p12':  # the slowest part
        assert call('finetune_isic', '--output-dir', out, '--resume').returncode == 0


@pytest.mark.parametrize('what', [
    'an average', 'a staged average of an old run', 'a staged folder', 'a staged folder of other images',
    'one of several seeds', 'a fold'])
def test_weights_that_were_made_of_a_run_are_not_scored_on_its_training_images(tmp_path, call, source, run, what):
    several = {'one of several seeds': ('--seeds', 2), 'a fold': ('--folds', 2)}.get(what, ())
    out = run(' '.join(map(str, several)) or 'of a seed', '--seed', 1, *several)
    out = out / {'one of several seeds': 'seed-2', 'a fold': 'fold-1'}.get(what, '')
    if what == 'a staged average of an old run':
        record = json.loads((out / 'run.json').read_text())
        del record['arguments']['division_seed']
        (out / 'run.json').write_text(json.dumps(record))
        done = call('average_runs', '--runs', out, '--half', '--data', source, '--workers', 0, '--output-dir',
                    tmp_path / 'average')
        assert done.returncode == 0, done.stderr
        stage(tmp_path / 'average', tmp_path / 'made')
    elif what == 'an average':
        done = call('average_runs', '--runs', out, '--half', '--data', source, '--workers', 0, '--output-dir',
                    tmp_path / 'made')
        assert done.returncode == 0 and (tmp_path / 'made' / 'splits.csv').read_text() == (
            out / 'splits.csv').read_text(), done.stderr
    else:
        stage(out, tmp_path / 'made')
        assert not (tmp_path / 'made' / 'splits.csv').exists()  # names of a clinic's images are not published
    source.rename(source.parent / 'moved.csv')
    if what == 'a staged folder of other images':
        source = table(source.parent / 'other', 12)
    else:
        source = source.parent / 'moved.csv'
    done = call('evaluate_isic', '--data', source, '--checkpoint', tmp_path / 'made', '--output-dir', tmp_path / 'e',
                '--workers', 0)
    if what == 'a fold':
        assert done.returncode == 2 and 'are training images of the run' in done.stderr
        return
    assert done.returncode == 0, done.stderr
    tested = [row['image_id'] for row in rows(tmp_path / 'e' / 'predictions_test.csv')]
    if what == 'a staged folder of other images':
        assert len(tested) == 12 and 'External validation' in done.stdout
    else:
        assert tested == [row['image_id'] for row in rows(out / 'predictions_test.csv')] and len(tested) < 10
        assert 'Its images are those of the run' in done.stdout


def test_an_evaluation_sees_the_crops_of_the_run(tmp_path, call, few):
    """Which are drawn with its seed, or its predictions could not be compared, and no folder be staged."""
    out = tmp_path / 'out'
    done = call('finetune_isic', '--data', few, *QUICK, '--crops', 'paper', '--seed', 3, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    done = call('evaluate_isic', '--data', few, '--checkpoint', out, '--output-dir', tmp_path / 'e', '--workers', 0)
    assert done.returncode == 0, done.stderr
    first, again = ([float(row['melanoma']) for row in rows(folder / 'predictions_validation.csv')]
                    for folder in (out, tmp_path / 'e'))
    assert again == pytest.approx(first, abs=1e-6)
    stage(out, tmp_path / 'staged', evaluation=tmp_path / 'e')


def test_folds_that_cannot_be_used_are_told_before_the_first_is_trained(tmp_path, call):
    """Two patients have all melanomas, so that some of five folds have none."""
    rows = [(f'images/{k}.png', 'melanoma' if k < 12 else 'nevus', f'p{k // 6 if k < 12 else k}') for k in range(60)]
    table(tmp_path / 'd', 60)
    source = lines(tmp_path / 'd' / 'mine.csv', ('image', 'label', 'patient_id'), rows)
    (tmp_path / 's.csv').write_text('\n'.join(['image_id,split', *(f'{k},train' for k in range(60))]) + '\n')
    done = call('finetune_isic', '--data', source, '--splits', tmp_path / 's.csv', *QUICK, '--folds', 5, '--output-dir',
                tmp_path / 'out')
    assert done.returncode == 2 and '--folds 5 leaves a fold without images' in done.stderr, done.stderr
    assert not (tmp_path / 'out').exists()
