"""A small loopback Hub that the real huggingface_hub client and timm talk to, with faults on demand."""
import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Union

LFS = ('.safetensors', '.bin', '.parquet')


class Hub:
    """Repos by id (those of datasets as datasets/user/name): {path: content}, and what they were at earlier commits.

    `private` and `gated` name those that want a token of `tokens`.
    """

    def __init__(self, repos: Dict[str, Dict[str, Union[bytes, Path]]], tokens=('hf_test',), private=(), gated=()):
        self.repos = {repo: {path: content if isinstance(content, bytes) else content.read_bytes()
                             for path, content in files.items()} for repo, files in repos.items()}
        self.commits: Dict[str, List[str]] = {repo: ['first'] for repo in repos}  # titles
        self.revisions: Dict[str, Dict[str, Dict[str, bytes]]] = {repo: {} for repo in repos}  # by commit and by tag
        self.blobs: Dict[str, bytes] = {}  # of LFS, sent and not yet committed
        self.tokens, self.private, self.gated = set(tokens), set(private), set(gated)
        self.requests: List[str] = []
        self.faults: List[Dict[str, Any]] = []
        self.lock = threading.Lock()
        self.server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def fault(self, match: str, kind: str, times: int = 1, **options) -> None:
        """Spoil the next requests whose "METHOD /path" matches.

        Args:
            match: Regular expression.
            kind: 'status' (code), 'reset' and 'close' (after so many bytes), 'short' (announced and sent), 'corrupt'
                (the byte at), 'stall' (seconds).
            times: How many; -1 for all.
            **options: Of the kind, in brackets above.
        """
        self.faults.append(dict(options, match=re.compile(match), kind=kind, times=times))

    def revision(self, repo: str) -> str:
        """The commit that main is at, kept for later."""
        files = self.repos[repo]
        commit = hashlib.sha1(json.dumps(sorted((path, git_sha1(c)) for path, c in files.items())).encode()).hexdigest()
        self.revisions[repo][commit] = dict(files)
        return commit

    def tag(self, repo: str, name: str) -> None:
        self.revision(repo)
        self.revisions[repo][name] = dict(self.repos[repo])

    def env(self, home: Path, **extra: str) -> Dict[str, str]:
        """What a client process needs to find this Hub instead of the real one."""
        return {'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'NO_PROXY': '127.0.0.1,localhost',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
                'HF_HUB_ETAG_TIMEOUT': '1', 'HF_HUB_DOWNLOAD_TIMEOUT': '1', **extra}

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


@cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # clients that are killed are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, line = self.hub, f'{self.command} {self.path}'
        with hub.lock:
            hub.requests.append(' '.join(filter(None, [line, self.headers.get('Range')])))
            fault = next((f for f in hub.faults if f['times'] and f['match'].search(line)), {'kind': None})
            if fault['kind']:
                fault['times'] -= 1
        if fault['kind'] == 'status':
            self.rfile.read(int(self.headers.get('Content-Length') or 0))  # or it would be taken for another request
            return self.answer(fault['code'], b'{"error": "a fault"}')
        if fault['kind'] == 'stall':
            time.sleep(fault['seconds'])
        if fault['kind'] == 'reset' and 'after' not in fault:
            return self.reset()
        return self.answer(*self.found(), fault)

    do_HEAD = do_POST = do_PUT = do_GET

    def found(self):
        self.sent = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path.startswith('/_lfs/'):
            self.hub.blobs[sha256(self.sent)] = self.sent
            return 200, b'', {}
        if self.path.startswith('/_cdn/'):
            digest = self.path.split('/')[2]
            stored = [*self.hub.repos.values(), *(f for each in self.hub.revisions.values() for f in each.values())]
            content = next(c for files in stored for c in files.values() if sha256(c) == digest)
            return 200, content, {'ETag': f'"{digest}"'}
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.hub.tokens:
            return 401, b'{"error": "bad"}', {'X-Error-Message': 'Invalid credentials in Authorization header'}
        if self.command in ('POST', 'PUT'):
            return self.written(token)
        path = self.path.partition('?')[0]
        match = re.fullmatch(r'/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        api = re.fullmatch(
            r'/api/(?:models|(datasets))/([^/]+/[^/]+)(?:/(refs)|/(?:revision|(tree))/([^/]+)(?:/(.*))?)?', path)
        if not match and not api:
            return 404, b'{}', {}
        repo = match[1] if match else '/'.join(filter(None, [api[1], api[2]]))
        if repo not in self.hub.repos or (repo in self.hub.private and not token):
            return 401 if not token else 404, b'{}', {'X-Error-Code': 'RepoNotFound'}
        commit = self.hub.revision(repo)
        revision = (match[2] if match else api[5]) or 'main'
        files = self.hub.revisions[repo].get(commit if revision == 'main' else revision)
        if files is None:
            return 404, b'{}', {'X-Error-Code': 'RevisionNotFound'}
        commit = next(key for key, value in self.hub.revisions[repo].items() if value == files and len(key) == 40)
        if api:
            return self.listed(repo, files, commit, api)
        if repo in self.hub.gated and not token:
            return 401, b'{}', {'X-Error-Code': 'GatedRepo'}
        content = files.get(match[3])
        if content is None:
            return 404, b'{}', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit}
        if path.endswith(LFS):
            digest = sha256(content)
            return 302, b'', {
                'X-Repo-Commit': commit, 'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(content)),
                'X-Xet-Hash': digest[::-1], 'X-Xet-Refresh-Route': f'{self.hub.url}/xet-token',  # behind a firewall
                'Location': f'{self.hub.url}/_cdn/{digest}/{repo}'.replace('127.0.0.1', 'localhost')}  # another host's
        return 200, content, {'X-Repo-Commit': commit, 'ETag': f'"{git_sha1(content)}"'}

    def listed(self, repo, files, commit, api):
        if api[3]:
            tags = [{'name': name, 'ref': f'refs/tags/{name}', 'targetCommit': next(
                commit for commit, content in self.hub.revisions[repo].items() if len(commit) == 40 and content == at)}
                for name, at in self.hub.revisions[repo].items() if len(name) != 40]
            main = {'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': commit}
            return 200, json.dumps({'branches': [main], 'tags': tags, 'converts': []}).encode(), {}
        if not api[4]:
            siblings = [self.sibling(name, content) for name, content in files.items()]
            return 200, json.dumps({'id': repo.removeprefix('datasets/'), 'sha': commit, 'siblings': siblings,
                                    'private': repo in self.hub.private, 'tags': [], 'downloads': 0}).encode(), {}
        folder = f'{api[6]}/' if api[6] else ''
        inside = {name: content for name, content in files.items() if name.startswith(folder)}
        if folder and not inside:
            return 404, b'{}', {'X-Error-Code': 'EntryNotFound'}
        deep = 'recursive=true' in self.path.lower()
        folders = {folder + name.removeprefix(folder).partition('/')[0] for name in inside
                   if '/' in name.removeprefix(folder)}
        entries = [{'type': 'directory', 'path': path, 'oid': '0' * 40, 'size': 0} for path in sorted(folders)]
        for name, content in inside.items():
            if deep or '/' not in name.removeprefix(folder):
                entries.append({'type': 'file', 'path': name, 'size': len(content), 'oid': git_sha1(content)})
                if name.endswith(LFS):
                    entries[-1]['lfs'] = {'oid': sha256(content), 'size': len(content), 'pointerSize': 134}
        return 200, json.dumps(entries).encode(), {}

    def sibling(self, name, content):
        about = {'rfilename': name, 'size': len(content), 'blobId': git_sha1(content)}
        if name.endswith(LFS):
            about['lfs'] = {'sha256': sha256(content), 'size': len(content), 'pointerSize': 134}
        return about

    def written(self, token):
        """What a push does, in the order in which it does it."""
        hub, path = self.hub, self.path.partition('?')[0]
        if path == '/api/validate-yaml':
            return 200, b'{"errors": [], "warnings": []}', {}
        if not token:
            return 401, b'{"error": "no token"}', {}
        if path == '/api/repos/create':
            about = json.loads(self.sent)
            repo = f"{about.get('organization') or 'user'}/{about['name']}"
            reply = json.dumps({'url': f'{hub.url}/{repo}'}).encode()
            if repo in hub.repos:
                return 409, reply, {}
            hub.repos[repo], hub.commits[repo], hub.revisions[repo] = {}, ['first'], {}
            if about.get('private') or about.get('visibility') == 'private':
                hub.private.add(repo)
            return 200, reply, {}
        if path.endswith('.git/info/lfs/objects/batch'):
            objects = [{**o, **({} if o['oid'] in hub.blobs else {'actions': {'upload': {
                'href': f'{hub.url}/_lfs/{o["oid"]}'}}})} for o in json.loads(self.sent)['objects']]
            return 200, json.dumps({'transfer': 'basic', 'objects': objects}).encode(), {}
        repo, action = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/main', path).groups()
        if action == 'tag':
            hub.tag(repo, json.loads(self.sent)['tag'])
            return 200, b'{}', {}
        if action == 'preupload':
            files = [{'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(LFS) else 'regular',
                      'shouldIgnore': False, 'oid': None} for f in json.loads(self.sent)['files']]
            return 200, json.dumps({'files': files}).encode(), {}
        for line in map(json.loads, self.sent.splitlines()):
            if line['key'] == 'header':
                hub.commits[repo].append(line['value']['summary'])
            elif line['key'] == 'deletedFile':
                del hub.repos[repo][line['value']['path']]
            elif line['key'] == 'lfsFile':
                hub.repos[repo][line['value']['path']] = hub.blobs[line['value']['oid']]
            else:
                hub.repos[repo][line['value']['path']] = base64.b64decode(line['value']['content'])
        commit = hub.revision(repo)
        return 200, json.dumps({'commitOid': commit, 'commitUrl': f'{hub.url}/{repo}/commit/{commit}'}).encode(), {}

    def answer(self, status, content, headers=None, fault=None):
        fault = fault or {'kind': None}
        headers = {'Accept-Ranges': 'bytes', **(headers or {})}
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
            status, content = 206, content[first:last + 1]
        if fault['kind'] == 'corrupt' and content:
            at = fault.get('at', len(content) // 2)
            content = content[:at] + bytes([content[at] ^ 0xff]) + content[at + 1:]
        if fault['kind'] == 'short':
            content = content[:fault['after']]
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault['kind'] in ('reset', 'close'):
            self.wfile.write(content[:fault['after']])
            self.wfile.flush()
            self.close_connection = True
            if fault['kind'] == 'reset':
                time.sleep(0.2)  # a reset throws away what was sent and not yet read
                self.reset()
            return
        self.wfile.write(content)

    def reset(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()
