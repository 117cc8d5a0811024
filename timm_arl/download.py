"""Files of the Hub that arrive whole, or one error that says what to do."""
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Union

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .hub_errors import LOCAL_FILE, diagnose_hub_error, plain_http

__all__ = ['WeightsError', 'fetch_weights', 'is_whole', 'say', 'sha256_of']

ATTEMPTS = 4
PATIENCE = 30  # seconds after which nothing is tried again
OTHERWISE = f'set HF_ENDPOINT to a mirror, or {LOCAL_FILE}'


class WeightsError(RuntimeError):
    """Weights that cannot be had or do not fit; the message names them, the cause and the remedy.

    Attributes:
        repo, file, revision: Where they were looked for on the Hub, or None.
        cause: What went wrong.
        remedy: What to do.
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
    ) -> None:
        super().__init__(message or f'{file} of {repo} (revision {revision}) cannot be had from '
                                    f'{huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.')
        self.repo, self.file, self.revision = repo, file, revision
        self.cause, self.remedy = cause or message, remedy


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
                raise WeightsError(**where, cause=cause, remedy=remedy) from error
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
