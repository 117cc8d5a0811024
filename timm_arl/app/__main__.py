"""A page to try a network on a picture: probabilities, maps of where they come from, and what attention changes.

    python -m timm_arl.app                        # the weights that come with the package
    python -m timm_arl.app --model OUT            # the output folder of a training run

Open the printed address in a browser on this machine. Ctrl-C stops. Pictures stay in memory and are forgotten, and
nothing is sent to other machines.

Not a medical device: for research only.
"""
import argparse
import errno
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from typing import Optional, Sequence

from PIL import Image

from ..arguments import number, program_parser
from ..download import WeightsError
from ..kernels import problem
from ..predict import sentence_of
from ..predictor import DEFAULT_MODEL
from .analysis import MAX_PIXELS, Analyst

__all__ = ['main']

FIRST_PORT, PORTS = 7860, 40  # tried where none is asked for; 7860 is Gradio's


class StartError(Exception):
    """Why the page cannot start, in one sentence."""


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__, prog='python -m timm_arl.app')
    parser.add_argument('--model', metavar='NAME|DIR', default=DEFAULT_MODEL,
                        help='weights by name, or output folder of a training run (default: %(default)s)')
    parser.add_argument('--port', type=number(int, 0, 65535), metavar='P',
                        help=f'0 for any free one (default: the first free one from {FIRST_PORT})')
    parser.add_argument('--host', metavar='H', default='127.0.0.1',
                        help='address to listen on; others than the default let other machines in')
    return parser


def listen(host: str, port: Optional[int]) -> socket.socket:
    """A socket on a free port, taken before anything slow.

    Raises:
        StartError: A port that is taken or not allowed, or an address that is not of this machine.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for each in ports:
        try:
            family = socket.getaddrinfo(host, each, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, each), family=family, backlog=256)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StartError(f'--host {host} --port {each} cannot be used: {error.strerror or error}.') from error
    taken = f'Port {port} of {host} is' if port is not None else f'The ports {ports[0]} to {ports[-1]} of {host} are'
    raise StartError(f'{taken} taken by another program: choose another with --port.')


def serve(model: str, sock: socket.socket, folder: str) -> None:
    """Serve the page of a network until a signal comes.

    Args:
        model: As Predictor takes it.
        sock: Where to listen.
        folder: An empty one, which Gradio insists on; nothing is put there.

    Raises:
        StartError: Kernels that this machine cannot run.
        WeightsError: A network that cannot be loaded.
        ImportError: ONNX Runtime is missing.
    """
    if problem():
        raise StartError(problem())
    analyst = Analyst(model)
    os.environ.update({  # before Gradio is imported
        'GRADIO_TEMP_DIR': folder, 'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_RUN_HISTORY': 'False',
        'GRADIO_SSR_MODE': 'False', 'GRADIO_MCP_SERVER': 'False'})
    import uvicorn

    from .page import build
    from .server import create_app

    app = create_app(build(analyst))
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print('note: other machines can open this page and send pictures to it.', file=sys.stderr, flush=True)
    print(f'Open http://{f"[{host}]" if ":" in host else host}:{port} in a browser. Ctrl-C stops.', flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=2)).run(sockets=[sock])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with listen(args.host, args.port) as sock, tempfile.TemporaryDirectory(prefix='timm-arl-') as folder:
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice that, and so does read_dicom
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # after uvicorn's own; the folder is then removed
            serve(args.model, sock, folder)
    except (StartError, WeightsError, ImportError) as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    except OSError as error:  # no room for temporary files, for one
        print(f'{parser.prog}: error: The page cannot start: {sentence_of(error)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nStopped.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
