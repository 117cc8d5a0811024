"""The launch configurations start as many processes as they say, each with a rank of its own."""
import subprocess
import sys

import pytest

SCRIPT = '''import os, pathlib, sys
e = os.environ
path = pathlib.Path(sys.argv[1], e.get('RANK', '0'))
path.write_text(e.get('WORLD_SIZE', '1') + ' ' + e['ACCELERATE_MIXED_PRECISION'])
'''


@pytest.mark.slow
@pytest.mark.parametrize('name, nodes, processes', [('one_gpu', 1, 1), ('eight_gpus', 1, 8), ('two_nodes', 2, 16)])
def test_launch(repo, tmp_path, name, nodes, processes):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'ranks').mkdir()
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file',
               str(repo / 'benchmarks' / 'configs' / f'{name}.yaml')]
    started = [
        subprocess.Popen([
            *command, *(['--machine_rank', str(node), '--main_process_ip', '127.0.0.1', '--main_process_port', '29655']
                        if nodes > 1 else ['--main_process_port', '29656'] * (processes > 1)),
            str(tmp_path / 'script.py'), str(tmp_path / 'ranks')],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(nodes)]
    for process in started:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert {p.name: p.read_text() for p in (tmp_path / 'ranks').iterdir()} == {
        str(rank): f'{processes} bf16' for rank in range(processes)}
