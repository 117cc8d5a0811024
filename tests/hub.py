"""A loopback Hub that serves one repo's files to the real huggingface_hub client."""
import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, Iterator, List, Tuple


@contextlib.contextmanager
def serve_repo(repo_id: str, files: Dict[str, Path]) -> Iterator[Tuple[str, List[str]]]:
    """Serve files under /REPO_ID/resolve/main/. Yields the endpoint's url and the list of request lines seen."""
    requests: List[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *args):
            pass

        def answer(self):
            requests.append(f'{self.command} {self.path}')
            prefix = f'/{repo_id}/resolve/main/'
            path = files.get(self.path[len(prefix):]) if self.path.startswith(prefix) else None
            body = b'' if path is None else path.read_bytes()
            self.send_response(200 if path else 404)
            if path:
                self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header('X-Repo-Commit', '0' * 40)
            else:
                self.send_header('X-Error-Code', 'EntryNotFound')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(body)

        do_GET = do_HEAD = answer

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', requests
    finally:
        server.shutdown()
        server.server_close()
