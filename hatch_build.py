"""Compiles timm_arl/kernels/native.c while a wheel is built, once for each kind of processor.

Any C compiler with GCC's or Clang's options serves; ``CC`` names another than ``cc``, and ``CFLAGS`` add to the
options, but for those that make arithmetic inexact, such as ``-ffast-math``. Without a compiler the wheel is built all
the same, for every platform, and the gate uses PyTorch's operations (``timm_arl.kernels.backend`` says which).
"""
import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Dict, List

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

FLAGS = [
    '-std=gnu11', '-O3', '-fPIC', '-shared', '-fvisibility=hidden',
    '-fno-math-errno', '-fno-trapping-math']  # branches become vectors
LAST = ['-ffp-contract=off']  # whatever CFLAGS say; see FMA in native.c
INEXACT = re.compile('-Ofast|-f(fast-math|unsafe-math-optimizations|associative-math|finite-math-only|reciprocal-math)')
# the kinds of torch.backends.cpu.get_cpu_capability()
X86 = {
    'any': [],
    'avx2': ['-mavx2', '-mfma'],
    'avx512': ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
}


class NativeKernels(BuildHookInterface):
    """See above."""

    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        folder = Path(self.root, 'timm_arl', 'kernels')
        if sys.platform == 'win32':
            return  # PyTorch's OpenMP there is another
        built = compile_all(folder)
        for path in built:
            build_data['artifacts'].append(f'/{path.relative_to(self.root)}')
        if built:
            build_data['pure_python'] = False
            build_data['tag'] = f'py3-none-{platform_tag(built)}'


def compile_all(folder: Path) -> List[Path]:
    """The libraries, for all kinds of this machine's architecture; none of them if one cannot be compiled."""
    source = folder / 'native.c'
    version = f'-DSOURCE={zlib.crc32(source.read_bytes())}u'  # native.py asks for it
    kinds = X86 if platform.machine().lower() in ('x86_64', 'amd64') else {'any': []}
    # two dots: what walks through packages would take native-any.so for a module
    paths = [folder / f'native.{kind}.so' for kind in kinds]
    for path, options in zip(paths, kinds.values()):
        temporary = path.with_suffix(f'.{os.getpid()}.part')  # two installations may build here at once
        command = [os.environ.get('CC') or 'cc']
        try:
            given = shlex.split(os.environ.get('CFLAGS') or '')
            flags = [*FLAGS, *options, *(flag for flag in given if not INEXACT.fullmatch(flag)), *LAST]
            command = [*shlex.split(command[0]), *flags, version, str(source), '-o', str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True)
            problem = done.returncode and (done.stderr.strip() or f'exit status {done.returncode}')
            if not problem:
                temporary.replace(path)
        except (OSError, ValueError) as error:  # a quote that is not closed, for one
            problem = str(error)
        if problem:
            for old in (temporary, *paths):
                with contextlib.suppress(OSError):  # not there, or in a folder that cannot be written
                    old.unlink()
            print(f'timm-arl: no C kernels, since `{shlex.join(command)}` failed: {problem}', file=sys.stderr)
            return []
    return paths


def platform_tag(libraries: List[Path]) -> str:
    """The platform that the libraries run on: on Linux, by the newest symbols of glibc that they ask for."""
    if platform.libc_ver()[0] != 'glibc':
        return next(sys_tags()).platform
    asked = [found for path in libraries for found in re.findall(rb'GLIBC_(\d+)\.(\d+)', path.read_bytes())]
    major, minor = max([(2, 17), *(tuple(map(int, found)) for found in asked)])  # PyTorch itself asks for 2.17 or more
    return f'manylinux_{major}_{minor}_{platform.machine()}'
