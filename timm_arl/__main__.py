"""Any script, timm's own train.py for one, with the models of timm-arl registered.

    python -m timm_arl PATH/train.py --model arl_cnn50 ...
    torchrun --nproc_per_node 2 -m timm_arl PATH/train.py --model arl_cnn50 ...
"""
import argparse
import runpy
import sys
from pathlib import Path
from typing import Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_arl', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', metavar='SCRIPT', help='the Python file to run')
    parser.add_argument('args', metavar='...', nargs=argparse.REMAINDER, help='its arguments')
    parsed = parser.parse_args(argv)
    script = Path(parsed.script)
    if not script.is_file():
        parser.error(f'there is no file {script}: give the path of a script, as of train.py in a checkout of timm.')
    sys.argv = [str(script), *parsed.args]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` has it
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
