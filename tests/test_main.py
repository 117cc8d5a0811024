"""python -m timm_arl SCRIPT runs it as python SCRIPT does, with the models registered."""
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import beside
import timm

if __name__ == '__main__':
    model = timm.create_model(sys.argv[1], num_classes=2)
    print(__file__, sys.argv, beside.VALUE, sum(name.endswith('.alpha') for name, _ in model.named_parameters()))
    sys.exit(int(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_script_that_never_heard_of_timm_arl(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'train.py').write_text(SCRIPT)
    (tmp_path / 'scripts' / 'beside.py').write_text('VALUE = 7')
    done = subprocess.run([sys.executable, '-m', 'timm_arl', 'scripts/train.py', 'arl_cnn50', '--help', '3'],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "scripts/train.py ['scripts/train.py', 'arl_cnn50', '--help', '3'] 7 16\n"


def test_no_script(call, tmp_path):
    done = call('timm_arl.__main__', 'train.py', cwd=tmp_path)
    assert done.returncode == 2 and 'there is no file train.py' in done.stderr
    assert call('timm_arl.__main__', '--help').returncode == 0
