"""Sending a staged folder to a Hub or a folder, and verifying what is there."""
import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union, cast

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..download import diagnose_hub_error, plain_http, sha256_of
from ..factory import create_for_task
from ..files import replacing
from ..pretrained import HUB, OWN_WEIGHTS, check_file
from .cards import read_results
from .results import HubError
from .staging import NEEDED, PICTURES

__all__ = ['check_target', 'push', 'staged_files', 'usual_repo', 'verify']

LOADING = re.compile(r'''timm\.create_model\((['"])(?:hf-hub|local-dir):.*?\1''')


def push(folder: Path, to: str, yes: bool = False, private: bool = False, tag: Optional[str] = None) -> List[str]:
    """Send a staged folder to a Hub repo or another folder; a second push sends what is missing, and no empty commit.

    Push removes stale pictures: those of an earlier evaluation that are not staged. The staged folder stays as it is;
    in the card that is sent, the name for timm.create_model is that of the repo or folder.

    Args:
        folder: Staged.
        to: Repo id, or a folder that starts with . / or ~.
        yes: Send; otherwise only find out what would be sent.
        private: Make a new repo a private one.
        tag: Tag for what is sent, on a Hub.

    Returns:
        What differs from what is there: names of files, 'removal of NAME' for stale pictures, and 'the tag TAG'.

    Raises:
        HubError: Not a staged folder, an invalid name of a repo or tag, or the Hub refuses.
    """
    if _is_folder(to):
        if private or tag:
            raise HubError(f'{to} is a folder: leave out --private and --tag, which are for a Hub.')
        there = Path(to).expanduser()
        staged = staged_files(folder, f'local-dir:{there.resolve().name}')
        files = {path.name for path in there.iterdir()} if there.is_dir() else set()
        if (there.exists() and not there.is_dir()) or (files and 'name' not in (read_results(there) or {})):
            raise HubError(f'{to} exists and this command did not write it: choose another folder.')
        changed = [name for name, content in staged.items()
                   if not (there / name).is_file() or sha256_of(there / name) != _sha256(content)]
        stale = [name for name in PICTURES if name in files and name not in staged]
        if yes:
            there.mkdir(parents=True, exist_ok=True)
            for name in sorted(changed, key=lambda name: name != 'results.json'):  # marks it as ours
                with replacing(there / name) as temporary:
                    temporary.write_bytes(_bytes(staged[name]))
            for name in stale:
                (there / name).unlink()
        return changed + [f'removal of {name}' for name in stale]
    check_target(to)
    if tag is not None and not re.fullmatch(r'(?!main$)[A-Za-z0-9][A-Za-z0-9._-]*', tag):
        why = 'is the name of the default branch: choose another' if tag == 'main' else (
            'cannot be the name of a tag: use letters, digits, . and -')
        raise HubError(f'--tag {tag!r} {why} (v1, for example).')
    staged = staged_files(folder, f'hf-hub:{to}')
    api = huggingface_hub.HfApi()
    try:
        differing = _differing(api, staged, to)
        changed, stale = (list(staged), []) if differing is None else differing
        refs = None if differing is None or not tag else api.list_repo_refs(to)
        if refs and tag in [branch.name for branch in refs.branches]:
            raise HubError(f'{to} has a branch {tag}: choose another --tag.')
        tagged = refs is not None and tag in [ref.name for ref in refs.tags]
        if tagged and any(_differing(api, staged, to, tag) or ()):
            raise HubError(f'{to} already has a tag {tag} with other content: choose another --tag.')
        if yes and (changed or stale):
            api.create_repo(to, private=private or None, exist_ok=True)  # None: as the account's settings have it
            with plain_http():
                api.create_commit(
                    to, [*(huggingface_hub.CommitOperationAdd(name, staged[name]) for name in changed),
                         *(huggingface_hub.CommitOperationDelete(name) for name in stale)],
                    commit_message=f'{(read_results(folder) or {})["name"]}, by timm_arl')
        if yes and tag and not tagged:
            api.create_tag(to, tag=tag)
    except HubError:
        raise
    except Exception as error:  # HTTP errors differ with huggingface_hub's version; unrelated ones are raised
        cause, remedy, _ = diagnose_hub_error(error, to)
        if not cause:
            raise
        raise HubError(f'{to} at {huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}. Run the same command '
                       f'again to continue.') from None
    return changed + [f'removal of {name}' for name in stale] + [f'the tag {tag}'] * bool(tag and not tagged)


def verify(source: str, against: Path) -> Dict[str, str]:
    """Fetch a published model into an empty cache and compare files and outputs with a staged folder.

    Args:
        source: Repo id, with @revision if wanted, or a folder that starts with . / or ~.
        against: Staged folder.

    Returns:
        The sha256 of each file.

    Raises:
        HubError: A file is missing or differs, or the outputs differ.
    """
    staged = staged_files(against)
    with tempfile.TemporaryDirectory(prefix='timm_arl-verify-') as cache:
        repo, _, revision = source.partition('@')
        if _is_folder(source):
            found = Path(source).expanduser()
            if not found.is_dir():
                raise HubError(f'No folder {source}: push {against} to it first, or name a repo (user/name).')
        else:
            check_target(repo)
            try:
                huggingface_hub.model_info(repo, revision=revision or None, timeout=10)  # the next call has no timeout
                with plain_http():
                    found = Path(huggingface_hub.snapshot_download(
                        repo, revision=revision or None, cache_dir=cache, allow_patterns=[*staged, *PICTURES]))
            except Exception as error:  # as in push
                cause, remedy, _ = diagnose_hub_error(error, repo)
                if not cause:
                    raise
                raise HubError(f'{source} at {huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.') from None
        wrong = [name for name in staged if not (found / name).is_file() or (
            _named(found, 'it') != _named(against, 'it') if name == 'README.md' else
            sha256_of(found / name) != sha256_of(against / name))]
        wrong += [name for name in PICTURES if name not in staged and (found / name).is_file()]
        if wrong:
            raise HubError(f'{source} differs from {against} in {", ".join(wrong)}: push again, then verify again.')
        theirs, ours = (cast(Any, create_for_task(f'local-dir:{each}', pretrained=True)).eval()
                        for each in (found, against))
        side = ours.pretrained_cfg['input_size'][-1]
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if not torch.equal(theirs(images), ours(images)):
                raise HubError(f'{source} and {against} hold the same files, but give different outputs for the same '
                               f'images.')
        return {name: sha256_of(found / name) for name in staged}


def staged_files(folder: Path, load_name: str = 'it') -> Dict[str, Union[str, bytes]]:
    """The files to publish, by name: paths; for the card its content, with this name for timm.create_model."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing or 'name' not in (read_results(folder) or {}):
        raise HubError(f'{folder} has no {", ".join(missing) or "results.json that can be read"}: stage it first.')
    check_file(folder / 'model.safetensors')
    return {path.name: _named(folder, load_name) if path.name == 'README.md' else str(path)
            for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith('.')}


def _named(folder: Path, load_name: str) -> bytes:
    """The card of a folder, edited or not, with this name in its call of timm.create_model."""
    try:
        text = (folder / 'README.md').read_text(encoding='utf-8')
    except UnicodeDecodeError:
        raise HubError(
            f'{folder / "README.md"} is not UTF-8: save it as UTF-8, or write it again: card {folder}.') from None
    return LOADING.sub(lambda _: f'timm.create_model({load_name!r}', text, count=1).encode()


def _bytes(content: Union[str, bytes]) -> bytes:
    return content if isinstance(content, bytes) else Path(content).read_bytes()


def _sha256(content: Union[str, bytes]) -> str:
    return sha256_of(Path(content)) if isinstance(content, str) else hashlib.sha256(content).hexdigest()


def check_target(name: str) -> None:
    """Refuse what is neither a folder nor the name of a repo, and a repo where the Hub must not be asked.

    Raises:
        HubError: In one sentence.
    """
    if _is_folder(name):
        return
    try:
        validate_repo_id(name)
        good = '/' in name
    except HFValidationError:
        good = False
    if not good:
        raise HubError(f'{name!r} is neither a repo (user/name) nor a folder (./name).')
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise HubError('HF_HUB_OFFLINE is set: unset it, or name a folder (./name).')


def _is_folder(name: str) -> bool:
    return name.startswith(('.', '/', '~'))


def _differing(
        api: huggingface_hub.HfApi,
        staged: Dict[str, Union[str, bytes]],
        repo: str,
        revision: Optional[str] = None,
) -> Optional[Tuple[List[str], List[str]]]:
    """Staged files that a repo lacks or has otherwise, and its stale pictures; None if there is no such repo."""
    try:
        about = api.model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except GatedRepoError:  # a RepositoryNotFoundError too
        raise
    except RepositoryNotFoundError:
        return None
    there = {file.rfilename: file for file in about.siblings or ()}
    return ([name for name, content in staged.items() if not _is_there(content, there.get(name))],
            [name for name in PICTURES if name in there and name not in staged])


def _is_there(content: Union[str, bytes], remote: Any) -> bool:
    """Whether a Hub has a file of this content."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == _sha256(content)
    content = _bytes(content)
    return remote.blob_id == git_hash(content)


def usual_repo(folder: Path) -> str:
    name = (read_results(folder) or {}).get('name', folder.name)
    if HUB == 'timm-arl' and OWN_WEIGHTS.get(name) != sha256_of(folder / 'model.safetensors'):
        raise HubError(f'{folder}: say where to push it: --to user/{name}, or TIMM_ARL_HUB=user (timm-arl is reserved '
                       f'for weights of this project).')
    return f'{HUB}/{name}'
