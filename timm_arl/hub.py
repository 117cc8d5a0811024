"""Publishing: a model repo from a training output, with a card, pushed to a Hub or a folder and verified.

    python -m timm_arl.hub stage OUT STAGED --evaluation R    # a model repo, ready to publish, from a finished run
    python -m timm_arl.hub stage NAME.TAG STAGED              # the same from weights that came with this package
    python -m timm_arl.hub card STAGED                        # write its README.md anew
    python -m timm_arl.hub push STAGED --to user/model        # lists what would go; --yes sends it
    python -m timm_arl.hub push STAGED STAGED ... --yes       # each to a repo of its name under {HUB}
    python -m timm_arl.hub verify user/model --against STAGED # downloads it into an empty cache and compares

--to and verify take a folder (./FOLDER) too, and verify a revision (user/model@REVISION). HF_ENDPOINT names another
Hub, HF_TOKEN or `hf auth login` the account, TIMM_ARL_HUB another name than timm-arl.
"""
import argparse
import hashlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, cast

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError

from .cards import read_results
from .hub_errors import diagnose_hub_error, plain_http
from .isic.results import replacing
from .pretrained import HUB, WeightsError, create_for_task
from .staging import HubError, card, card_of_registered, sha256_of, stage

__all__ = ['HubError', 'card', 'push', 'stage', 'verify']

def push(folder: Path, to: str, yes: bool = False, private: bool = False, tag: Optional[str] = None) -> List[str]:
    """Send a staged folder to a Hub repo or another folder; a second time sends what is missing, and no empty commit.

    What the card gives to timm.create_model becomes the name of the repo.

    Args:
        folder: Staged.
        to: Repo id, or a folder that starts with . / or ~.
        yes: Send; else only find out what would be sent.
        private: Make the repo private, where it is made.
        tag: Give what is sent this tag, on a Hub.

    Returns:
        Names of the files that differ from what is there.

    Raises:
        HubError: Not a staged folder, or the Hub refuses.
    """
    files = _staged_files(folder)
    if _is_folder(to):
        if private or tag:
            raise HubError(f'{to} is a folder: leave out --private and --tag, which are of a Hub.')
        there = Path(to).expanduser()
        changed = [name for name in files
                   if not (there / name).is_file() or sha256_of(there / name) != sha256_of(folder / name)]
        if yes:
            there.mkdir(parents=True, exist_ok=True)
            for name in changed:
                with replacing(there / name) as temporary:
                    shutil.copyfile(folder / name, temporary)
        return changed
    if '/' not in to:
        raise HubError(f'{to} is neither a repo (user/name) nor a folder (./name).')
    _check_online()
    text = _named_card(folder, to)
    api = huggingface_hub.HfApi()
    try:
        differing = _differing(api, folder, text, to)
        changed = files if differing is None else differing
        tagged = None if differing is None or not tag else _differing(api, folder, text, to, tag)
        if tagged:
            raise HubError(f'{to} has a tag {tag} already, of other content: choose another --tag.')
        if yes and changed:
            api.create_repo(to, private=private or None, exist_ok=True)  # None: as the account's settings have it
        if yes:
            with replacing(folder / 'README.md') as temporary:
                temporary.write_text(text, encoding='utf-8')
        if yes and changed:
            with plain_http():
                api.upload_folder(
                    repo_id=to, folder_path=folder, allow_patterns=changed,
                    commit_message=f'{(read_results(folder) or {})["name"]}, by timm_arl')
        if yes and tag and tagged is None:
            api.create_tag(to, tag=tag)
    except HubError:
        raise
    except Exception as error:  # of an HTTP library that depends on huggingface_hub's version; others go on
        cause, remedy, _ = diagnose_hub_error(error, to)
        if not cause:
            raise
        raise HubError(f'{to} at {huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}. The same command goes on '
                       f'where it stopped.') from error
    return changed


def verify(source: str, against: Path) -> Dict[str, str]:
    """Fetch a published model into an empty cache and compare files and outputs with a staged folder.

    Args:
        source: Repo id, of which revision after an @, or a folder that starts with . / or ~.
        against: Staged folder.

    Returns:
        The sha256 of each file.

    Raises:
        HubError: A file is missing or another, or the outputs differ.
    """
    files = _staged_files(against)
    with tempfile.TemporaryDirectory(prefix='timm_arl-verify-') as cache:
        repo, _, revision = source.partition('@')
        if _is_folder(source):
            found = Path(source).expanduser()
        else:
            _check_online()
            try:
                huggingface_hub.model_info(repo, revision=revision or None, timeout=10)  # which the next one has not
                with plain_http():
                    found = Path(huggingface_hub.snapshot_download(
                        repo, revision=revision or None, cache_dir=cache, allow_patterns=files))
            except Exception as error:  # as above
                cause, remedy, _ = diagnose_hub_error(error, repo)
                if not cause:
                    raise
                raise HubError(f'{source} at {huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.') from error
        digests = {name: sha256_of(against / name) for name in files}
        wrong = [name for name in files if not (found / name).is_file() or sha256_of(found / name) != digests[name]]
        if wrong:
            raise HubError(f'{source} differs from {against} in {", ".join(wrong)}: push again, or, where '
                           f'that finds nothing to send, verify again.')
        theirs, ours = (cast(Any, create_for_task(f'local-dir:{each}', pretrained=True)).eval()
                        for each in (found, against))
        side = ours.pretrained_cfg['input_size'][-1]
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if not torch.equal(theirs(images), ours(images)):
                raise HubError(f'{source} and {against} hold the same files, but give other outputs on one image.')
    return digests


def _staged_files(folder: Path) -> List[str]:
    """Names of what is published of a staged folder."""
    missing = [name for name in ('README.md', 'config.json', 'model.safetensors', 'results.json')
               if not (folder / name).is_file()]
    if missing or 'name' not in (read_results(folder) or {}):
        raise HubError(f'{folder} has no {", ".join(missing) or "results.json that can be read"}: stage it first.')
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith('.'))


def _check_online() -> None:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise HubError('HF_HUB_OFFLINE is set, so that no Hub is asked: unset it, or name a folder (./name).')


def _is_folder(name: str) -> bool:
    return name.startswith(('.', '/', '~'))


def _named_card(folder: Path, repo: str) -> str:
    """The card with the repo's name where it tells how to load it; the rest may have been edited."""
    return re.sub(r"'hf-hub:[^']*'", f"'hf-hub:{repo}'", (folder / 'README.md').read_text(encoding='utf-8'))


def _differing(
        api: huggingface_hub.HfApi,
        folder: Path,
        text: str,
        repo: str,
        revision: Optional[str] = None,
) -> Optional[List[str]]:
    """Names of the staged files, with this text as the card, that a repo has not; None where there is no such repo."""
    try:
        about = api.model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except GatedRepoError:  # a RepositoryNotFoundError too
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    there = {file.rfilename: file for file in about.siblings or ()}
    return [name for name in _staged_files(folder)
            if not _is_there(folder / name, there.get(name), text if name == 'README.md' else None)]


def _is_there(path: Path, remote: Any, text: Optional[str]) -> bool:
    """Whether a Hub has this file, or one of this text."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == sha256_of(path)
    content = path.read_bytes() if text is None else text.encode()
    return remote.blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()


def main(argv: Optional[Sequence[str]] = None) -> int:
    usage, epilog = (__doc__ or '\n\n').replace('{HUB}', HUB).split('\n\n', 1)
    parser = argparse.ArgumentParser(
        prog='python -m timm_arl.hub', description=usage, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    sub = commands.add_parser('stage', help='build a model repo from a finished run, or from shipped weights')
    sub.add_argument('run', metavar='OUT|NAME.TAG', help='output folder, or weights that came with this package')
    sub.add_argument('target', metavar='STAGED', type=Path)
    sub.add_argument('--evaluation', metavar='R', type=Path, help='output folder of evaluate_isic.py on that run')
    sub.add_argument('--tag', help='of the weights (default: isic2017, or demo for synthetic images)')
    sub.add_argument('--note', default='', help='what the card says of the images ("copies at 256 px", for example)')
    sub = commands.add_parser('card', help='write the README.md of a staged folder, or of registered weights')
    sub.add_argument('what', metavar='STAGED|NAME.TAG')
    sub.add_argument('--output', metavar='DIR', type=Path, help='for NAME.TAG: folder for its README.md')
    sub = commands.add_parser('push', help='send staged folders to the Hub or another folder')
    sub.add_argument('folders', metavar='STAGED', type=Path, nargs='+')
    sub.add_argument('--to', metavar='REPO|./DIR', help=f'(default: {HUB}/NAME.TAG of each)')
    sub.add_argument('--yes', action='store_true', help='send; without it, list what would be sent')
    sub.add_argument('--private', action='store_true', help='make the repo a private one, where it is new')
    sub.add_argument('--tag', help='give what is sent this tag (v1, for what this package looks for)')
    sub = commands.add_parser('verify', help='fetch published weights into an empty cache and compare')
    sub.add_argument('source', metavar='REPO|./DIR')
    sub.add_argument('--against', metavar='STAGED', type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == 'stage':
            stage(args.run, args.target, args.evaluation, args.tag, args.note)
            print(f'Staged: {args.target} ({", ".join(sorted(path.name for path in args.target.iterdir()))})')
        elif args.command == 'card':
            if Path(args.what).is_dir():
                print(f'Written: {card(Path(args.what))}')
            elif args.output:
                print(f'Written: {card_of_registered(args.what, args.output)}')
            else:
                raise HubError(f'{args.what} is no staged folder, and a card of registered weights needs --output.')
        elif args.command == 'push':
            if args.to and len(args.folders) > 1:
                raise HubError('--to names one place: push one folder at a time, or leave it out.')
            for folder in args.folders:
                to = args.to or f'{HUB}/{(read_results(folder) or {}).get("name", folder.name)}'
                changed = push(folder, to, args.yes, args.private, args.tag)
                print(f'{folder} to {to}: ' + (', '.join(changed) or 'everything is there already')
                      + (' sent' if args.yes else ' would be sent; pass --yes to send') * bool(changed))
        else:
            for name, digest in verify(args.source, args.against).items():
                print(f'{digest}  {name}')
            print(f'{args.source} is {args.against}: the same files, the same outputs.')
    except (HubError, WeightsError, OSError, SafetensorError) as error:
        parser.exit(2, f'{parser.prog} {args.command}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: the same command goes on.\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
