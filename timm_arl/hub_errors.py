"""What goes wrong between this machine and a Hub: its cause, its remedy, and whether to try again."""
import json
import os
import threading
from contextlib import contextmanager
from typing import Any, Iterator, Tuple, cast

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

__all__ = ['LOCAL_FILE', 'diagnose_hub_error', 'is_of_network', 'plain_http']

LOCAL_FILE = ("pass a file of your own: pretrained_cfg_overlay=dict(file='model.safetensors') in Python, "
              "--init-checkpoint to finetune_isic.py")
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
        return ('there is no such file in the repo',
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
