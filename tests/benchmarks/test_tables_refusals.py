"""What reproduce_tables.py refuses, before any work."""
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('args, says', [
    (['table3', '--output-dir', 'o'], '--data'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--row', 'resnet34'], 'resnet14'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--model', 'resnet34'], 'resnet14'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--seeds', '1', '1'], 'twice'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--weights', 'resnet50'], 'NAME=FILE'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--weights', 'resnet50=missing'], 'no file missing'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--weights', 'arl_cnn50=f'], 'no row starts from weights'),
    (['table3', '--data', 'nowhere', '--output-dir', 'o'], 'nowhere'),
    (['table7', '--output-dir', 'o', '--check'], 'make the table first'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--check'], 'make the table first'),
    (['figures', '--data', 'demo', '--output-dir', 'o', '--model', 'arl_cnn14'], '--model A B'),
    (['maps', '--data', 'demo', '--output-dir', 'o'], 'make one first'),
    (['maps', '--data', 'demo', '--output-dir', 'o', '--drop-duplicates', 'no.csv'], 'for the tables of test scores'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--drop-duplicates', 'no.csv'], 'no.csv cannot be read'),
    (['table3', '--data', 'demo', '--output-dir', 'o', '--drop-duplicates', 'twins.csv'], 'No run of table3 is finish'),
])
def test_bad_input_is_one_sentence(call, few, tmp_path, args, says):
    args = [few if arg == 'demo' else arg for arg in args]  # which takes longer
    if 'twins.csv' in args:
        (tmp_path / 'twins.csv').write_text('image_id_a,image_id_b\n')
    done = call('reproduce_tables', *args, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr
    assert '--check' not in args or not any(tmp_path.iterdir())
