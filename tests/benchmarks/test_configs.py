"""The launch configurations start as many processes as they say, each with a rank of its own."""
import multiprocessing

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

SCRIPT = '''import os, pathlib, sys
e = os.environ
path = pathlib.Path(sys.argv[1], e.get('RANK', '0'))
path.write_text(e.get('WORLD_SIZE', '1') + ' ' + e['ACCELERATE_MIXED_PRECISION'])
'''


def launch(*args):
    """What accelerate launch does, in a process that has imported it."""
    launch_command(launch_command_parser().parse_args(list(map(str, args))))


@pytest.mark.slow
@pytest.mark.parametrize('name, nodes, processes', [('one_gpu', 1, 1), ('eight_gpus', 1, 8), ('two_nodes', 2, 16)])
def test_launch(repo, tmp_path, name, nodes, processes):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'ranks').mkdir()
    started = [
        multiprocessing.get_context('fork').Process(target=launch, args=(
            '--config_file', repo / 'benchmarks' / 'configs' / f'{name}.yaml',
            *(['--machine_rank', node, '--main_process_ip', '127.0.0.1', '--main_process_port', 29655] if nodes > 1 else
              ['--main_process_port', 29656] * (processes > 1)),
            tmp_path / 'script.py', tmp_path / 'ranks'))
        for node in range(nodes)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        process.kill()  # if it has not ended, pytest would wait for it for ever
    assert [process.exitcode for process in started] == [0] * nodes
    assert {p.name: p.read_text() for p in (tmp_path / 'ranks').iterdir()} == {
        str(rank): f'{processes} bf16' for rank in range(processes)}
