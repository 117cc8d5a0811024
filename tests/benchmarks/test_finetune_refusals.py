"""What the training program refuses, with one sentence and nothing left behind."""
import datasets
import numpy as np
import pytest
from test_finetune_isic import OUTPUTS, SMALL, read_csv


@pytest.mark.parametrize('args, message', [
    (['--model', 'arl_cnn15'], 'Unknown model arl_cnn15: did you mean'),
    (['--model', 'resnet14', '--pretrained'], 'No pretrained weights exist for resnet14'),
    (['--data', 'no/such/folder'], 'No folder no/such/folder'),
    (['--init-checkpoint', 'nowhere'], 'No weights at nowhere'),
    (['--pretrained', '--init-checkpoint', 'x'], 'not allowed with argument --pretrained'),
    (['--recipe', 'moden'], 'No recipe moden: choose modern, paper, tables, weights, or a YAML file'),
    (['--tracker', 'wandbb'], 'Accelerate has no tracker wandbb'),
    (['--init-checkpoint', ''], '--init-checkpoint is empty: give it a value, or leave it out'),
    (['--model', ''], '--model is empty'),
    (['--sync-bn'], '--sync-bn works on CUDA devices, not on cpu'),
    (['--teacher', 'nowhere'], 'No folder nowhere, and no model of that name'),
    (['--teacher', 'nowhere', ''], '--teacher is empty'),
    (['--teacher', 'out', './out'], '--teacher names a network twice'),
    (['--mask-weight', '1', '--augmentation', 'paper'], '--augmentation paper does not transform masks'),
    (['--resume'], '--resume needs --output-dir'),
    (['--folds', '1'], 'must be at least 2, not 1'),
    (['--mixed-precision', 'fp16'], 'fp16 does not work on a CPU: choose bf16 or no'),
    (['--model-kwargs', 'mask_scale=mean1', 'mask_size=3'], "take --model-kwargs mask_scale=mean1 mask_size=3: "),
    (['--model-kwargs', 'mask_scale=mean2'], 'arl_cnn14 does not take --model-kwargs mask_scale=mean2: '),
    (['--model-kwargs', 'num_classes=3'], '--model-kwargs num_classes: leave it out'),
    (['--model-kwargs', 'in_chans=1'], '--model-kwargs in_chans: leave it out'),
    (['--model-kwargs', 'global_pool='], 'arl_cnn14 cannot be trained with --model-kwargs global_pool=: '),
    (['--model-kwargs', 'mask_temperature=warm'], 'mask_temperature must be a number from 1e-6 to 1e6'),
    (['--resume', '--output-dir', 'typo'], 'no run to resume in typo'),
    (['--model', 'vit_tiny_patch16_224', '--img-size', '96'], 'does not take images of 96 px'),
])
def test_bad_arguments_get_one_sentence_and_leave_nothing(call, few, tmp_path, args, message):
    done = call('finetune_isic', '--data', few, *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_start_is_named_and_leaves_nothing(call, few, tmp_path):
    from timm_arl.isic.dataset import load_splits
    args = ['--data', few, *SMALL, '--batch-size', 8, '--tracker', 'tensorboard', '--balance', 'none',
            '--mask-weight', 0, '--output-dir', tmp_path / 'out', '--epochs', 1]
    done = call('finetune_isic', *args, '--lr', 1e30, '--clip-grad', 0)
    assert done.returncode == 2 and 'The loss is nan at epoch 1, step 2; lower --lr' in done.stderr
    train = load_splits(few)['train']['image_id']
    order = np.random.default_rng((0, 0)).permutation(32)[8:16]  # the images of that step, by seed and epoch
    assert done.stderr.rstrip().endswith(f'of this batch: {", ".join(train[row] for row in order.tolist())}')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').touch()
    done = call('finetune_isic', *args, '--folds', 100)
    assert done.returncode == 2 and '--folds 100 needs 100 images of each diagnosis' in done.stderr
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine.txt']
    done = call('finetune_isic', *args)  # corrected, in the same folder
    assert done.returncode == 0, done.stderr
    done = call('finetune_isic', *args, '--lr', 1e30)  # over which a failed start has no rights
    assert done.returncode == 2 and 'already holds a run' in done.stderr
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {*OUTPUTS, 'mine.txt'}


@pytest.mark.slow
def test_a_run_that_began_meanwhile_keeps_its_folder(repo, call, few, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(repo / 'benchmarks')
    import finetune_isic

    def slow_check(*args):  # as long as it takes another run to begin
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out' / 'run.json').write_text('{}')

    monkeypatch.setattr(finetune_isic, 'check_images', slow_check)
    done = call('finetune_isic', '--data', few, *SMALL, '--epochs', 1, '--output-dir', tmp_path / 'out')
    assert done.returncode == 2 and 'already holds a run' in done.stderr
    assert (tmp_path / 'out' / 'run.json').read_text() == '{}'


@pytest.mark.slow
def test_bad_images_stop_the_run_unless_skipped(call, few, tmp_path):
    splits = datasets.load_dataset(few)
    for name, split in splits.items():
        split = split.cast_column('image', datasets.Image(decode=False)).remove_columns('mask')
        content = split.to_list()
        if name == 'train':
            for row in (3, 17):
                content[row]['image']['bytes'] = content[row]['image']['bytes'][:500]
            bad = [content[row]['image_id'] for row in (3, 17)]
        (tmp_path / 'd').mkdir(exist_ok=True)
        features = split.features
        datasets.Dataset.from_list(content, features=features).cast_column('image', datasets.Image()).to_parquet(
            tmp_path / 'd' / f'{name}-00000-of-00001.parquet')
    args = ['--data', tmp_path / 'd', *SMALL, '--epochs', 1, '--output-dir', tmp_path / 'out']
    done = call('finetune_isic', *args)
    assert done.returncode == 2, done.stderr
    assert f'2 of 32 train images cannot be read: {bad[0]}, {bad[1]} ({bad[0]}: ' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = call('finetune_isic', *args, '--skip-bad-images')
    assert done.returncode == 0 and f'Leaving out 2 of 32 train images that cannot be read: {bad[0]}' in done.stdout
    assert '30 train' in done.stdout


@pytest.mark.slow
def test_what_the_training_images_lack_is_said(call, few, tmp_path):
    splits = datasets.load_dataset(few)
    for folder, change in (('unmasked', {'mask': None}), ('one', {'melanoma': 0.})):
        (tmp_path / folder).mkdir()
        for name, split in splits.items():
            if name == 'train':
                features = split.features
                split = split.map(lambda _: change, features=features)  # noqa: B023  called at once
            split.to_parquet(tmp_path / folder / f'{name}-00000-of-00001.parquet')
    args = [*SMALL, '--epochs', 1, '--output-dir', tmp_path / 'out']
    done = call('finetune_isic', '--data', tmp_path / 'one', *args)
    assert done.returncode == 2 and 'split train, has 0 images of melanoma out of 32' in done.stderr
    done = call('finetune_isic', '--data', tmp_path / 'unmasked', *args, '--lesion-crop')
    assert done.returncode == 2 and '--lesion-crop needs lesion masks, but the train images of' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = call('finetune_isic', '--data', few, *args, '--lesion-crop', '--preview', tmp_path / 'sheet.png')
    assert done.returncode == 0 and 'The test images have no masks: --lesion-crop leaves them whole.' in done.stdout
    done = call('finetune_isic', '--data', tmp_path / 'unmasked', *args)
    assert done.returncode == 0 and 'The training images have no lesion masks' in done.stdout, done.stderr
    assert "the masks')" not in done.stdout and 'train_mask_loss' not in read_csv(tmp_path / 'out' / 'summary.csv')[0]


@pytest.mark.slow
def test_sizes_of_the_recipe_give_way_to_a_model_of_one_size(call, few, tmp_path):
    args = ['--data', few, '--model', 'vit_tiny_patch16_224', '--crops', 'center', '--preview', tmp_path / 'sheet.png']
    own = 'does not take the 128 px images of recipe modern: training at its own 224 px.'
    start = 'cannot start with images of 64 px, as recipe modern does: all epochs have 224 px.'
    done = call('finetune_isic', *args)
    assert done.returncode == 0 and own in done.stdout and start in done.stdout, done.stderr
    done = call('finetune_isic', *args, '--img-size', 224, '--start-size', 64)
    assert done.returncode == 2 and 'does not take images of 64 px' in done.stderr


@pytest.mark.parametrize('place, flags', [('seed-0', ('--seeds', 0, 1)), ('fold-1', ('--folds', 2)),
                                          ('seed-5/fold-0', ('--seeds', 5, '--folds', 2))])
def test_the_run_of_another_command_is_not_taken_for_one_of_several(call, few, tmp_path, place, flags):
    record = tmp_path / 'out' / place / 'run.json'
    record.parent.mkdir(parents=True)
    record.write_text('{}')
    done = call('finetune_isic', '--data', few, *SMALL, *flags, '--output-dir', tmp_path / 'out')
    assert done.returncode == 2 and f'{record.parent} holds a run of another command' in done.stderr
    assert record.read_text() == '{}'


@pytest.mark.slow
def test_a_constant_learning_rate(call, few, tmp_path):
    """Which timm has from 1.0.31 on: only `make test-oldest` can fail here."""
    done = call('finetune_isic', '--data', few, *SMALL, '--schedule', 'constant', '--warmup-epochs', 0, '--epochs', 2,
                '--lr', 0.01, '--output-dir', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert {float(row['lr']) for row in read_csv(tmp_path / 'out' / 'summary.csv')} == {0.01}
