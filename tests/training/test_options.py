"""The flags of finetune_isic.py and its recipes."""
import json

import pytest

from timm_arl.training import options
from timm_arl.training.arguments import RunError

NUMBERS = ['lr', 'alpha-lr', 'weight-decay', 'warmup-epochs', 'clip-grad', 'mask-weight', 'mixup', 'distill-features']


@pytest.fixture
def parser():
    return options.build_parser('About.\n\nMore.')


def refused(parser, capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        options.parse_args(parser, argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize('value', ['inf', '-inf', 'nan', '1e999'])
@pytest.mark.parametrize('flag', NUMBERS)
def test_a_number_is_finite(parser, capsys, flag, value):
    assert f'argument --{flag}: {value} is not a finite number' in refused(parser, capsys, f'--{flag}={value}')


def test_bounds_of_numbers(parser, capsys):
    assert '--epochs: must be at least 1, not 0' in refused(parser, capsys, '--epochs', '0')
    assert '--momentum: must be between 0 and 1, not 2' in refused(parser, capsys, '--momentum', '2')
    assert "--epochs: invalid int value: '1.5'" in refused(parser, capsys, '--epochs', '1.5')
    assert '--batch-size: must be at least 1, not -' in refused(parser, capsys, '--batch-size', f'-{10 ** 400}')


def test_model_kwargs(parser, capsys):
    args = options.parse_args(parser, ['--model-kwargs', 'mask_scale=mean1', 'alpha_init=0.01', 'channels=(8, 16)'])
    assert args.model_kwargs == {'mask_scale': 'mean1', 'alpha_init': 0.01, 'channels': [8, 16]}
    for value in ('mean1', 'a={1, 2}', 'a=1e999'):
        assert f'argument --model-kwargs: {value} is not KEY=VALUE' in refused(parser, capsys, '--model-kwargs', value)


def test_recipes_and_their_flags(parser, tmp_path):
    paper = options.parse_args(parser, ['--recipe', 'paper'])
    # as printed: SGD, batch 32, 0.01 from scratch and 1e-4 fine-tuning, halved every 30 epochs, at most 100 epochs
    assert (paper.optimizer, paper.batch_size, paper.lr) == ('momentum', 32, 0.01)
    assert options.parse_args(parser, ['--recipe', 'paper', '--pretrained']).lr == 1e-4
    assert (paper.schedule, paper.decay_epochs, paper.decay_rate, paper.epochs) == ('step', 30, 0.5, 100)
    assert (paper.augmentation, paper.crops, paper.ema, paper.mixup) == ('paper', 'paper', 0, 0)
    assert options.parse_args(parser, ['--recipe', 'paper', '--epochs', '7']).epochs == 7
    (tmp_path / 'mine.yaml').write_text((options.RECIPES / 'paper.yaml').read_text().replace(
        'lr: 0.01', 'lr: 0.02').replace('epochs: 100', 'epochs: 3\ngrey-world: true'))
    recipe = ['--recipe', str(tmp_path / 'mine.yaml')]
    mine = options.parse_args(parser, recipe)
    assert (mine.epochs, mine.lr, mine.grey_world) == (3, 0.02, True)
    mine = options.parse_args(parser, ['--epochs', '7', *recipe, '--no-grey-world'])  # a flag wins, wherever it is
    assert (mine.epochs, mine.lr, mine.grey_world) == (7, 0.02, False)


@pytest.mark.parametrize('content, message', [
    ('epocs: 3', 'sets epocs: 3, but a recipe sets one value each of epochs,'),
    ('data: x', 'sets data: x, but a recipe sets'), ('epochs: [1, 2]', 'sets epochs'),
    ('epoch: 3', 'sets epoch: 3, but a recipe sets'), ('from-scratch: 3', 'below from-scratch and from-weights'),
    ('epochs: 3', 'nor a flag sets --batch-size'), ('grey-world: maybe', 'must be true or false'),
    ('- 3', 'must hold lines of the form'), ('a: [', 'cannot be read')])
def test_bad_recipes(parser, tmp_path, content, message):
    (tmp_path / 'r.yaml').write_text(content)
    with pytest.raises(RunError) as raised:
        options.parse_args(parser, ['--recipe', str(tmp_path / 'r.yaml')])
    assert message in str(raised.value)


@pytest.mark.parametrize('content, message', [
    ('epochs: many', "argument --epochs: invalid int value: 'many'"),
    ('lr: .inf', 'argument --lr: invalid float value'),
    ('lr: inf', 'argument --lr: inf is not a finite number'), ('ema: 2', 'argument --ema: must be between 0 and'),
    ('schedule: cos', "argument --schedule: invalid choice: 'cos'")])
def test_bad_values_of_a_recipe_name_it(parser, capsys, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'r.yaml').write_text(content)
    error = refused(parser, capsys, '--recipe', 'r.yaml')
    assert f'recipe r.yaml: error: {message}' in error and error.count('\n') == 1


def test_a_resumed_run_keeps_its_arguments(parser, tmp_path):
    started = options.parse_args(parser, ['--model-kwargs', 'mask_scale=mean1', '--epochs', '3'])
    (tmp_path / 'run.json').write_text(json.dumps({'arguments': {
        k: v for k, v in vars(started).items() if k in ('model_kwargs', 'epochs', 'lr')}}))
    resume = ['--resume', '--output-dir', str(tmp_path)]
    for given in ([], ['--model-kwargs', 'mask_scale=mean1']):
        args = options.parse_args(options.build_parser('About.\n\nMore.'), [*resume, *given])
        assert (args.model_kwargs, args.epochs, args.lr) == ({'mask_scale': 'mean1'}, 3, started.lr)
    with pytest.raises(RunError, match='has --epochs 3, not 4'):
        options.parse_args(parser, [*resume, '--epochs', '4'])
    for damage in ('{"arguments": 3}', '[]', '{', ''):
        (tmp_path / 'run.json').write_text(damage)
        with pytest.raises(RunError, match='run.json is damaged or not from this program'):
            options.parse_args(parser, resume)


def test_help_says_what_a_recipe_sets(parser):
    text = ' '.join(parser.format_help().split())
    training, images, rest = (text.index(title) for title in (
        'training (the recipe sets these', 'images (the recipe sets these', 'several runs, each'))
    assert training < text.index('--epochs EPOCHS') < images < text.index('--img-size IMG_SIZE') < rest


@pytest.mark.parametrize('flags, message', [
    (['--start-size', '160', '--img-size', '128'], '--start-size 160 is more than --img-size 128'),
    (['--distill-weight', '0.9'], '--distill-weight is of no use without --teacher'),
    (['--distill-features', '0'], '--distill-features is of no use without --teacher'),
    (['--folds', '5', '--patience', '3'], 'leave out --patience')])
def test_flags_that_would_do_nothing_are_refused(parser, flags, message):
    with pytest.raises(RunError, match=message):
        options.parse_args(parser, flags)
    assert options.parse_args(parser, ['--img-size', '64'])  # smaller than the recipe's start: all epochs have it
    assert options.parse_args(parser, ['--recipe', 'weights'])  # which has a share of teachers, if there are some
