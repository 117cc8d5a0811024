"""python -m timm_arl SCRIPT runs it as python SCRIPT does, with the models registered."""
import subprocess
import sys

SCRIPT = """
import sys
import beside
import timm

if __name__ == '__main__':
    model = timm.create_model(sys.argv[1], num_classes=2)
    print(__file__, sys.argv, beside.VALUE, sum(name.endswith('.alpha') for name, _ in model.named_parameters()))
    sys.exit(int(sys.argv[3]))
"""


def run(*args, cwd):
    return subprocess.run([sys.executable, '-m', 'timm_arl', *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_a_script_that_never_heard_of_timm_arl(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'train.py').write_text(SCRIPT)
    (tmp_path / 'scripts' / 'beside.py').write_text('VALUE = 7')
    done = run('scripts/train.py', 'arl_cnn50', '--help', 3, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "scripts/train.py ['scripts/train.py', 'arl_cnn50', '--help', '3'] 7 16\n"


def test_no_script(tmp_path):
    done = run('train.py', cwd=tmp_path)
    assert done.returncode == 2 and 'there is no file train.py' in done.stderr and 'Traceback' not in done.stderr
    assert run('--help', cwd=tmp_path).returncode == 0
