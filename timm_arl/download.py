"""Files of the Hub that arrive intact, or one error that says what to do."""
import hashlib
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Type, Union, cast

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj

__all__ = [
    'LOCAL_FILE', 'WeightsError', 'diagnose_hub_error', 'fetch_weights', 'is_of_network', 'is_whole', 'plain_http',
    'say', 'sha256_of',
]

LOCAL_FILE = ("use a local file: pretrained_cfg_overlay=dict(file='model.safetensors') in Python, "
              "--init-checkpoint in finetune_isic.py")
ATTEMPTS = 4
PATIENCE = 30  # seconds after which nothing is tried again
OTHERWISE = f'set HF_ENDPOINT to a mirror, or {LOCAL_FILE}'


class WeightsError(RuntimeError):
    """Weights that could not be loaded; the message names them, the cause and the remedy.

    Attributes:
        repo, file, revision: Where they are on the Hub, or None.
        cause: What went wrong.
        remedy: What to do.
        missing: Whether the repo is there, but has no such file.
    """

    def __init__(
            self,
            message: str = '',
            *,
            repo: Optional[str] = None,
            file: Optional[str] = None,
            revision: Optional[str] = None,
            cause: str = '',
            remedy: str = '',
            missing: bool = False,
    ) -> None:
        super().__init__(message or f'{file} of {repo} (revision {revision}) could not be loaded from '
                                    f'{huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.')
        self.repo, self.file, self.revision = repo, file, revision
        self.cause, self.remedy, self.missing = cause or message, remedy, missing


def fetch_weights(
        repo: str,
        file: str = 'model.safetensors',
        revision: Optional[str] = None,
        sha256: Optional[str] = None,
        cache_dir: Union[str, Path, None] = None,
) -> Path:
    """Path of a Hub file in the local cache; it is downloaded if it is not there or damaged.

    A cached file is used without asking the Hub. Cached and downloaded files are compared with the checksum that the
    Hub gave (sha256, or git's for a small file) and with `sha256` where that is known; a damaged one is downloaded
    again, once. A cache without symbolic links (some file systems, Windows) does not keep the Hub's checksums: there,
    only downloads are compared with them.

    Args:
        repo: Repo id.
        file: File in it: .safetensors or .json, never a pickle.
        revision: Branch, tag or commit; main by default.
        sha256: Checksum that the file must have.
        cache_dir: Cache to use instead of huggingface_hub's own.

    Raises:
        WeightsError: The file could not be loaded; with repo, file, revision, cause and remedy.
    """
    where: Dict[str, Any] = dict(repo=repo, file=file, revision=revision or 'main')
    if not file.endswith(('.safetensors', '.json')) or {'..', ''} & set(file.split('/')):
        raise WeightsError(
            **where, cause='it is no .safetensors file of a repo', remedy='only those are opened, never a pickle')
    request: Dict[str, Any] = dict(repo_id=repo, filename=file, revision=revision, cache_dir=cache_dir)
    force = False
    try:
        path = Path(huggingface_hub.hf_hub_download(**request, local_files_only=True))
        if is_whole(path, sha256):
            return path
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise WeightsError(**where, cause='the cached copy is damaged, and HF_HUB_OFFLINE is set',
                               remedy=f'unset HF_HUB_OFFLINE, or {LOCAL_FILE}')
        force = True
        say(f'{file} of {repo} in the cache is damaged: downloading it again.')
    except PermissionError as error:
        raise WeightsError(
            **where, cause=f'reading the cached copy is not permitted ({error.filename})',
            remedy='change the permissions, or set HF_HOME to another folder') from None
    except (LocalEntryNotFoundError, OSError):
        pass
    except HFValidationError as error:
        cause, remedy, _ = diagnose_hub_error(error, repo)
        raise WeightsError(**where, cause=cause, remedy=remedy) from None
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # asked for by itself: hf_hub_download silently retries a failing request for half a minute
            etag = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repo, file, revision=revision)).etag
            if force and not path.is_symlink():
                path.unlink(missing_ok=True)  # huggingface_hub would keep it
            with plain_http():
                path = Path(huggingface_hub.hf_hub_download(**request, force_download=force))
            whole = is_whole(path, sha256, etag)
        except Exception as error:  # HTTP errors differ with huggingface_hub's version; unrelated ones are raised
            cause, remedy, again = diagnose_hub_error(error, repo, OTHERWISE)
            if not cause:
                raise
            if not again or attempt == ATTEMPTS or time.monotonic() - start > PATIENCE:
                raise WeightsError(**where, cause=cause, remedy=remedy, missing=cause == NO_FILE) from None
            say(f'{file} of {repo}: {cause}; trying again ({attempt} of {ATTEMPTS - 1}).')
            time.sleep(2 ** (attempt - 1) / 2)
            continue
        if whole:
            return path
        if force:
            _blob(path).unlink(missing_ok=True)
            break
        _blob(path).unlink(missing_ok=True)  # or other programs that use the cache would load it
        force = True
        say(f'{file} of {repo} arrived damaged: downloading it again.')
    raise WeightsError(**where, cause='the downloaded file has the wrong checksum', remedy=(
        f'the file or the connection is faulty or was tampered with: try another network or mirror (HF_ENDPOINT), or '
        f'{LOCAL_FILE}'))


def is_whole(path: Path, sha256: Optional[str], etag: Optional[str] = None) -> bool:
    """Whether a file has the checksum it must have, and the one that the Hub gave (the name of its blob)."""
    if sha256 is not None and sha256_of(path) != sha256:
        return False
    given = etag or _blob(path).name
    if not set(given) <= set('0123456789abcdef'):  # a cache without links names files as the repo does
        return True
    if len(given) == 40:  # git's, for a file outside LFS; some mirrors give the sha1 of the content
        content = path.read_bytes()
        return given in (git_hash(content), hashlib.sha1(content, usedforsecurity=False).hexdigest())
    return len(given) != 64 or given == sha256 or given == sha256_of(path)


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with path.open('rb') as file:
        return sha_fileobj(file).hex()


def _blob(path: Path) -> Path:
    """What a cached file links to, one step only: the blob may itself link to a store with other names (Xet's)."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def say(line: str) -> None:
    print(f'timm_arl: {line}', file=sys.stderr, flush=True)


_lock = threading.Lock()
_inside, _before = 0, False


@contextmanager
def plain_http() -> Iterator[None]:
    """Have huggingface_hub use HTTP: hf_xet silently retries for two minutes where its servers are blocked."""
    global _inside, _before
    constants = cast(Any, huggingface_hub.constants)
    with _lock:
        if not _inside:
            _before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                constants.HF_HUB_DISABLE_XET = _before


def is_of_network(error: BaseException) -> bool:
    """Whether an error comes from a socket, or from the HTTP library that huggingface_hub uses."""
    library = type(error).__module__.partition('.')[0]
    return library in ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3') or isinstance(
        error, (ConnectionError, TimeoutError))


Test = Callable[[Any, str], bool]  # of an error and its text


def _is(kind: Union[Type[BaseException], Tuple[Type[BaseException], ...]], *words: str) -> Test:
    """An error of a kind, whose text has one of these words."""
    return lambda error, text: isinstance(error, kind) and (not words or any(word in text.lower() for word in words))


def _answered(*codes: Optional[int]) -> Test:
    """An answer of the Hub with one of these HTTP status codes."""
    return lambda error, text: isinstance(error, HfHubHTTPError) and _status(error) in codes


def _status(error: Any) -> Optional[int]:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def _lost_certificates() -> str:
    """Name of a setting for certificates that names no file, or ''."""
    names = ('SSL_CERT_FILE', 'SSL_CERT_DIR', 'REQUESTS_CA_BUNDLE')
    return next((name for name in names if os.environ.get(name) and not os.path.exists(os.environ[name])), '')


NO_FILE = 'there is no such file in the repo'
LOG_IN = 'log in (hf auth login, or HF_TOKEN)'
NETWORK = 'check the network{or_else}'
ADDRESS = 'let it start with https:// or http://, or unset it'
# What an error means: test, cause, remedy, whether trying again may help. The first row that applies counts.
HUB_ERRORS: Tuple[Tuple[Test, str, str, bool], ...] = (
    (_is(HFValidationError), '{text}', 'a repo id is user/name', False),
    (lambda error, text: not huggingface_hub.constants.ENDPOINT, 'HF_ENDPOINT is empty', ADDRESS, False),
    (lambda error, text: not huggingface_hub.constants.ENDPOINT.startswith(('http://', 'https://')),
     'HF_ENDPOINT is not an address', ADDRESS, False),
    (_is(ValueError, 'invalid metadata'),
     'the Hub refused the card ({text})', 'fix the first lines of README.md', False),
    (_is(ValueError, 'lfs batch'), 'the Hub did not accept the files ({text})',
     'look at {page} and at the storage of the account', False),
    (lambda error, text: isinstance(error, OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE,
     'it is not in the cache and HF_HUB_OFFLINE is set', 'unset HF_HUB_OFFLINE to download it{or_else}', False),
    (_is(GatedRepoError),  # before RepositoryNotFoundError, which it is too
     'the repo is gated and this account has no access', f'ask for access at {{page}}, then {LOG_IN}', False),
    (_is(RepositoryNotFoundError), 'there is no such repo, or it is private',
     f'check its name ({{page}}); for a private repo {LOG_IN}', False),
    (_is(RevisionNotFoundError), 'there is no such revision', 'choose one of {page}/commits/main', False),
    (_is(LocalEntryNotFoundError),  # before EntryNotFoundError, which it is too
     'it is not in the cache and the Hub cannot be reached ({text})', NETWORK, True),
    (_is(EntryNotFoundError), NO_FILE,
     'look at {page}/tree/main; weights in another format (.bin) are not opened', False),
    (lambda error, text: _answered(401)(error, text) and huggingface_hub.get_token() is None,
     'the Hub refused the request (401)', LOG_IN, False),
    (_answered(401), 'the Hub refused the request (401)',
     'the token is wrong: log in again (hf auth login), or unset HF_TOKEN', False),
    (_answered(403), 'the Hub refused the request ({text})', 'use an account or a token with that permission', False),
    (_answered(429), 'the Hub answered 429 ({text})',
     'wait some minutes, or log in (hf auth login) for a higher limit', True),
    (_answered(None), 'the Hub answered {text}', NETWORK, True),
    (_answered(*range(500, 600)), 'the Hub answered {status}', NETWORK, True),
    (_is(HfHubHTTPError), 'the Hub answered {text}', NETWORK, False),
    (_is((FileMetadataError, json.JSONDecodeError)),
     'the server does not answer as a Hub does ({text})', NETWORK, True),
    (_is((ImportError, ValueError), 'proxy', 'socks'), 'the proxy cannot be used ({text})',
     'fix or unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY', False),
    (lambda error, text: is_of_network(error), 'the connection failed ({kind}: {text})', NETWORK, True),
    (_is(OSError, 'consistency check'), 'the download was shorter or longer than announced', NETWORK, True),
    (lambda error, text: isinstance(error, OSError) and bool(_lost_certificates()),
     '{setting} names {value}, which does not exist', 'fix or unset it', False),
    (_is(PermissionError), 'permission denied ({text})', 'allow reading and writing the cache (HF_HOME)', False),
    (_is(OSError), 'it could not be stored ({text})', 'free space for the cache, or move it (HF_HOME)', False),
    (_is(UnicodeEncodeError), 'the token holds a character that no token has', LOG_IN, False),
)


def diagnose_hub_error(error: BaseException, repo: str, otherwise: str = '') -> Tuple[str, str, bool]:
    """Cause, remedy, and whether trying again may help; an empty cause for an error unrelated to the Hub.

    Args:
        error: What huggingface_hub raised.
        repo: Repo id.
        otherwise: What can be done without this Hub.
    """
    if type(error) in (RuntimeError, ValueError) and isinstance(error.__cause__, Exception):  # "Error while uploading"
        return diagnose_hub_error(error.__cause__, repo, otherwise)
    text, setting = ' '.join(str(error).split()), _lost_certificates()
    about = dict(
        text=text.rstrip('.'), kind=type(error).__name__, status=_status(error),
        page=f'{huggingface_hub.constants.ENDPOINT}/{repo}', or_else=otherwise and f', or {otherwise}',
        setting=setting, value=os.environ.get(setting))
    for applies, cause, remedy, again in HUB_ERRORS:
        if applies(error, text):
            return cause.format(**about), remedy.format(**about), again
    return '', '', False
