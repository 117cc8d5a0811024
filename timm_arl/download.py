"""Files of the Hub that arrive whole, or one error that says what to do."""
import hashlib
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple, Union, cast

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

LOCAL_FILE = ("pass a file of your own: pretrained_cfg_overlay=dict(file='model.safetensors') in Python, "
              "--init-checkpoint to finetune_isic.py")
ATTEMPTS = 4
PATIENCE = 30  # seconds after which nothing is tried again
OTHERWISE = f'set HF_ENDPOINT to a mirror, or {LOCAL_FILE}'


class WeightsError(RuntimeError):
    """Weights that cannot be had or do not fit; the message names them, the cause and the remedy.

    Attributes:
        repo, file, revision: Where they were looked for on the Hub, or None.
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
        super().__init__(message or f'{file} of {repo} (revision {revision}) cannot be had from '
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
    """A file of a Hub repo in the local cache, from there if it is whole, else downloaded.

    What is in the cache is used without asking the Hub. Either way the content must have the digest that the Hub gave
    for it (sha256, or git's of a small file) and `sha256` where that is known; a damaged copy is fetched anew, once.
    A cache without links (some file systems, Windows) does not hold the Hub's digests: there, only downloads are
    compared with them.

    Args:
        repo: Repo id.
        file: File in it; never a pickle.
        revision: Branch, tag or commit, by default main.
        sha256: Digest that the file must have.
        cache_dir: Instead of huggingface_hub's own.

    Returns:
        Path in the cache.

    Raises:
        WeightsError: It cannot be had; with repo, file, revision, cause and remedy.
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
            raise WeightsError(**where, cause='its copy in the cache is damaged, and HF_HUB_OFFLINE is set',
                               remedy=f'unset that, or {LOCAL_FILE}')
        force = True
        say(f'{file} of {repo} in the cache is damaged: downloading it again.')
    except (LocalEntryNotFoundError, OSError):
        pass
    except HFValidationError as error:
        cause, remedy, _ = diagnose_hub_error(error, repo)
        raise WeightsError(**where, cause=cause, remedy=remedy) from error
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # asked for by itself, since hf_hub_download retries a failing request for half a minute without a word
            etag = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repo, file, revision=revision)).etag
            if force and not path.is_symlink():
                path.unlink(missing_ok=True)  # huggingface_hub would keep it
            with plain_http():
                path = Path(huggingface_hub.hf_hub_download(**request, force_download=force))
        except Exception as error:  # of an HTTP library that depends on huggingface_hub's version; others go on
            cause, remedy, again = diagnose_hub_error(error, repo, OTHERWISE)
            if not cause:
                raise
            if not again or attempt == ATTEMPTS or time.monotonic() - start > PATIENCE:
                raise WeightsError(**where, cause=cause, remedy=remedy, missing=cause == NO_FILE) from error
            say(f'{file} of {repo}: {cause}; trying again ({attempt} of {ATTEMPTS - 1}).')
            time.sleep(2 ** (attempt - 1) / 2)
            continue
        if is_whole(path, sha256, etag):
            return path
        if force:
            _blob(path).unlink(missing_ok=True)  # or others that use the cache would load it
            break
        force = True
        say(f'{file} of {repo} came damaged: downloading it again.')
    raise WeightsError(**where, cause='what was downloaded has another digest than it should have', remedy=(
        f'the file or the way to it was tampered with or is faulty: try another network or mirror (HF_ENDPOINT), or '
        f'{LOCAL_FILE}'))


def is_whole(path: Path, sha256: Optional[str], etag: Optional[str] = None) -> bool:
    """Whether a file has the digest it should have, and the one that the Hub gave, which is the name of its blob."""
    if sha256 is not None and sha256_of(path) != sha256:
        return False
    given = etag or _blob(path).name
    if not set(given) <= set('0123456789abcdef'):  # nor has a file a name of this kind where links are not possible
        return True
    if len(given) == 40:  # git's, of a file not in LFS; on mirrors, of its content
        content = path.read_bytes()
        return given in (git_hash(content), hashlib.sha1(content, usedforsecurity=False).hexdigest())
    return len(given) != 64 or given == sha256 or given == sha256_of(path)


def sha256_of(path: Path) -> str:
    """Digest of a file."""
    with path.open('rb') as file:
        return sha_fileobj(file).hex()


def _blob(path: Path) -> Path:
    """What a file in the cache links to, by one step: that may be a link too, to a store named by other digests."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def say(line: str) -> None:
    print(f'timm_arl: {line}', file=sys.stderr, flush=True)


NO_FILE = 'there is no such file in the repo'
LOG_IN = 'log in (hf auth login, or HF_TOKEN)'

_lock = threading.Lock()
_inside, _before = 0, False


@contextmanager
def plain_http() -> Iterator[None]:
    """Let huggingface_hub use HTTP: hf_xet tries for two minutes without a word where its servers are blocked."""
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
    """Whether an error is of the HTTP library that huggingface_hub happens to use, or of a socket."""
    library = type(error).__module__.partition('.')[0]
    return library in ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3') or isinstance(
        error, (ConnectionError, TimeoutError))


def diagnose_hub_error(error: BaseException, repo: str, otherwise: str = '') -> Tuple[str, str, bool]:
    """Cause, remedy, and whether to try again; an empty cause for an error that has nothing to do with the Hub.

    Args:
        error: What huggingface_hub raised.
        repo: Repo id.
        otherwise: What can be done without this Hub.
    """
    text = ' '.join(str(error).split())
    page = f'{huggingface_hub.constants.ENDPOINT}/{repo}'
    network = f'check the network{otherwise and ", "}{otherwise}'
    if type(error) in (RuntimeError, ValueError) and isinstance(error.__cause__, Exception):  # "Error while uploading"
        return diagnose_hub_error(error.__cause__, repo, otherwise)
    if isinstance(error, HFValidationError):
        return text.rstrip('.'), 'a repo is user/name', False
    if not huggingface_hub.constants.ENDPOINT.startswith(('http://', 'https://')):
        return ('HF_ENDPOINT is ' + ('no address' if huggingface_hub.constants.ENDPOINT else 'empty'),
                'let it begin with https:// or http://, or unset it', False)
    if isinstance(error, ValueError) and 'Invalid metadata' in text:
        return f'it refuses the card ({text})', 'mend the first lines of README.md', False
    if isinstance(error, ValueError) and 'LFS batch' in text:
        return f'it does not take the files ({text})', f'look at {page} and at the storage of the account', False
    if isinstance(error, OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return ('it is not in the cache and HF_HUB_OFFLINE is set',
                f'unset that and load it once with a network{otherwise and ", or "}{otherwise}', False)
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return 'the repo is gated and this account has no access', f'ask for it at {page}, then {LOG_IN}', False
    if isinstance(error, RepositoryNotFoundError):
        return 'there is no such repo, or it is private', f'look at {page}; for a private one {LOG_IN}', False
    if isinstance(error, RevisionNotFoundError):
        return 'there is no such revision', f'choose one of {page}/commits/main', False
    if isinstance(error, LocalEntryNotFoundError):
        return f'it is not in the cache and the Hub cannot be reached ({text})', network, True
    if isinstance(error, EntryNotFoundError):
        return (NO_FILE,
                f'look at {page}/tree/main; weights in another format (.bin) are not opened', False)
    if isinstance(error, HfHubHTTPError):
        return _diagnose_status(getattr(error.response, 'status_code', None), text, network)
    if isinstance(error, (FileMetadataError, json.JSONDecodeError)):
        return f'what answers there does not speak as a Hub does ({text})', network, True
    if is_of_network(error):
        return f'the connection failed ({type(error).__name__}: {text})', network, True
    if isinstance(error, OSError) and 'onsistency check' in text:
        return 'what came was shorter or longer than announced', network, True
    for name in ('SSL_CERT_FILE', 'SSL_CERT_DIR', 'REQUESTS_CA_BUNDLE'):
        if isinstance(error, OSError) and os.environ.get(name) and not os.path.exists(os.environ[name]):
            return f'{name} names {os.environ[name]}, which does not exist', 'mend or unset it', False
    if isinstance(error, OSError):
        return f'it could not be stored ({text})', 'make room in, or allow writing to, the cache (HF_HOME)', False
    if isinstance(error, (ImportError, ValueError)) and ('proxy' in text.lower() or 'socks' in text.lower()):
        return f'the proxy cannot be used ({text})', 'mend or unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY', False
    if isinstance(error, UnicodeEncodeError):
        return 'the token holds a character that no token has', LOG_IN, False
    return '', '', False


def _diagnose_status(status: Any, text: str, network: str) -> Tuple[str, str, bool]:
    if status == 401 and huggingface_hub.get_token() is None:
        return 'the Hub refused the request (401)', LOG_IN, False
    if status == 401:
        return ('the Hub refused the request (401)',
                'the token is wrong: log in anew (hf auth login), or unset HF_TOKEN', False)
    if status == 403:
        return f'the Hub refused the request ({text})', 'use an account or a token that may do that', False
    if status == 429:
        return (f'the Hub answered 429 ({text})',
                'wait for some minutes, or log in (hf auth login), which raises the limit', True)
    passes = status is None or status >= 500
    return f'the Hub answered {status if passes and status else text}', network, passes
