"""Publishing: a model repo from a training output, with a card, pushed to a Hub or a folder and verified.

    python -m timm_arl.hub stage OUT STAGED --evaluation R    # a model repo, ready to publish, from a finished run
    python -m timm_arl.hub card STAGED                        # write its README.md anew
    python -m timm_arl.hub push STAGED --to user/model        # lists what would go; --yes sends it
    python -m timm_arl.hub push STAGED STAGED ... --yes       # each to a repo of its name under {HUB}
    python -m timm_arl.hub verify user/model --against STAGED # downloads it into an empty cache and compares

--to and verify take a folder (./FOLDER) too, and verify a revision (user/model@REVISION). HF_ENDPOINT names another
Hub, HF_TOKEN or `hf auth login` the account, TIMM_ARL_HUB another name than timm-arl.
"""
import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, cast

import huggingface_hub
import safetensors.torch
import timm
import torch

from .cards import read_results, registered_config, render_card
from .isic import LABELS
from .isic.results import replacing, write_json
from .isic.sources import CHALLENGE_IDS, ids_digest
from .pretrained import WeightsError, create_for_task, diagnose_hub_error

__all__ = ['HubError', 'card', 'push', 'stage', 'verify']

HUB = os.environ.get('TIMM_ARL_HUB', 'timm-arl')  # whose repos these are
PICTURES = ('roc_test.png', 'roc_validation.png', 'reliability_test.png', 'reliability_validation.png', 'alphas.png')


class HubError(RuntimeError):
    """Something that cannot be staged, pushed or verified; the message says why and what to do."""


def stage(
        run: Path,
        target: Path,
        evaluation: Optional[Path] = None,
        tag: Optional[str] = None,
        note: str = '',
) -> Path:
    """Build a model repo from a finished run: config.json, model.safetensors, results.json, pictures, README.md.

    config.json is what timm reads, and beside that the versions, the thresholds and, after an evaluation, temperatures.

    Args:
        run: Output folder of finetune_isic.py.
        target: Folder to make; one that was staged before is replaced.
        evaluation: Output folder of evaluate_isic.py on that run, whose richer scores and pictures are taken.
        tag: Of the weights, by default isic2017, or demo for synthetic images.
        note: What the card should say of the images, their size for example.

    Returns:
        target.

    Raises:
        HubError: A run that is not finished, an evaluation of something else, or a target that is something else.
        WeightsError: Weights that do not fit their config.
    """
    record, metrics, config = (_read(run / name, 'a finished run of finetune_isic.py') for name in (
        'run.json', 'metrics.json', 'config.json'))
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / 'results.json').is_file())):
        raise HubError(f'{target} exists and was not staged by this command: choose another folder.')
    if evaluation is not None:
        richer = _read(evaluation / 'metrics.json', 'an output folder of evaluate_isic.py')
        for split in metrics.keys() & richer.keys():
            ours, theirs = (each[split]['mean_auc'] for each in (metrics, richer))
            if ours is None or theirs is None or abs(ours - theirs) > 5e-3:
                raise HubError(f'{evaluation} has a mean AUC of {theirs} on {split}, the run {ours}: it is not an '
                               f'evaluation of {run} with the images and crops of its training.')
        metrics = {**metrics, **richer}
    model = create_for_task(f'local-dir:{run}', pretrained=True)
    with open(run / 'summary.csv', newline='', encoding='utf-8') as file:
        summary = list(csv.DictReader(file))
    kept = (max(summary, key=lambda row: float(row['validation_mean_auc']))
            if record['arguments']['keep'] == 'best' else summary[-1])
    record['command'] = _without_folders(record['command'])
    record['arguments'] = {key: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
                           for key, value in record['arguments'].items()}
    tag = tag or ('demo' if record['arguments']['data'] == 'demo' else 'isic2017')
    versions = {'timm_arl': record['versions']['timm_arl'], 'timm': timm.__version__}
    config['pretrained_cfg'].update(tag=tag, license=config['pretrained_cfg'].get('license', 'apache-2.0'))
    config.update({f'{name}_version': version for name, version in versions.items()}, **_operating_points(metrics))
    results = {
        'name': f'{config["architecture"]}.{tag}', 'metrics': metrics, 'run': record, 'epochs': len(summary),
        'data': {'name': record['arguments']['data'], 'note': note,
                 'official_splits': _official_splits(record['arguments'], run, evaluation)},
        'kept_epoch': int(kept['epoch']), 'img_size': config['pretrained_cfg']['input_size'][-1],
        'alphas': {key: float(value) for key, value in kept.items() if key.endswith('.alpha')}, 'looks': _looks(run),
    }

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as folder:
        new = Path(folder, 'new')
        new.mkdir()
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, new / 'model.safetensors',
            metadata={'format': 'pt', 'name': results['name'], **versions})
        write_json(new / 'config.json', config)
        write_json(new / 'results.json', results)
        for name in PICTURES:
            if evaluation is not None and (evaluation / name).is_file():
                shutil.copyfile(evaluation / name, new / name)
        card(new)
        if target.exists():
            target.rename(Path(folder, 'old'))
        new.rename(target)
    return target


def card(folder: Path) -> Path:
    """Write the README.md of a staged folder, from its config.json and results.json.

    Raises:
        HubError: Not a staged folder.
    """
    config = _read(folder / 'config.json', 'a staged folder')
    results = read_results(folder)
    if results is None:
        raise HubError(f'{folder} has no results.json: stage it first.')
    name = results['name']
    text = render_card(
        name, config, results, _sha256(folder / 'model.safetensors'), f'hf-hub:{HUB}/{name}',
        [picture for picture in PICTURES if (folder / picture).is_file()])
    with replacing(folder / 'README.md') as temporary:
        temporary.write_text(text, encoding='utf-8')
    return folder / 'README.md'


def push(folder: Path, to: str, yes: bool = False, private: bool = False) -> List[str]:
    """Send a staged folder to a Hub repo or another folder; a second time sends what is missing, and no empty commit.

    What the card gives to timm.create_model becomes the name of the repo.

    Args:
        folder: Staged.
        to: Repo id, or a folder that starts with . / or ~.
        yes: Send; else only find out what would be sent.
        private: Make the repo private, where it is made.

    Returns:
        Names of the files that differ from what is there.

    Raises:
        HubError: Not a staged folder, or the Hub refuses.
    """
    if read_results(folder) is None:
        raise HubError(f'{folder} has no results.json: stage it first.')
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith('.'))
    if _is_folder(to):
        there = Path(to).expanduser()
        changed = [name for name in files
                   if not (there / name).is_file() or _sha256(there / name) != _sha256(folder / name)]
        if yes:
            there.mkdir(parents=True, exist_ok=True)
            for name in changed:
                with replacing(there / name) as temporary:
                    shutil.copyfile(folder / name, temporary)
        return changed
    if yes:
        _name_repo(folder, to)
    api = huggingface_hub.HfApi()
    try:
        exists = api.repo_exists(to)
        remote = {f.rfilename: f for f in api.model_info(to, files_metadata=True).siblings or []} if exists else {}
        changed = [name for name in files if not _is_there(folder / name, remote.get(name))]
        if yes and changed:
            api.create_repo(to, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=to, folder_path=folder, allow_patterns=changed,
                commit_message=f'{(read_results(folder) or {})["name"]}, by timm_arl')
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
    if read_results(against) is None:
        raise HubError(f'{against} has no results.json: stage it first.')
    files = sorted(path.name for path in against.iterdir() if path.is_file() and not path.name.startswith('.'))
    with tempfile.TemporaryDirectory(prefix='timm_arl-verify-') as cache:
        if _is_folder(source):
            found = Path(source).expanduser()
        else:
            try:
                repo, _, revision = source.partition('@')
                found = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, cache_dir=cache))
            except Exception as error:  # as above
                cause, remedy, _ = diagnose_hub_error(error, source)
                if not cause:
                    raise
                raise HubError(f'{source} at {huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.') from error
        digests = {name: _sha256(against / name) for name in files}
        wrong = [name for name in files if not (found / name).is_file() or _sha256(found / name) != digests[name]]
        if wrong:
            raise HubError(f'{source} differs from {against} in {", ".join(wrong)}: push again.')
        theirs, ours = (cast(Any, create_for_task(f'local-dir:{each}', pretrained=True)).eval()
                        for each in (found, against))
        side = ours.pretrained_cfg['input_size'][-1]
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if not torch.equal(theirs(images), ours(images)):
                raise HubError(f'{source} and {against} hold the same files, but give other outputs on one image.')
    return digests


def _is_folder(name: str) -> bool:
    return name.startswith(('.', '/', '~'))


def _name_repo(folder: Path, repo: str) -> None:
    """Write the repo's name where the card tells how to load it; the rest of the card may have been edited."""
    path = folder / 'README.md'
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    named = re.sub(r"'hf-hub:[^']*'", f"'hf-hub:{repo}'", text)
    if named != text:
        with replacing(path) as temporary:
            temporary.write_text(named, encoding='utf-8')


def _is_there(path: Path, remote: Any) -> bool:
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == _sha256(path)
    content = path.read_bytes()
    return remote.blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()


def _operating_points(metrics: Dict[str, Any]) -> Dict[str, Any]:
    """Thresholds by name and label, and temperatures by label where an evaluation fitted them on validation."""
    tasks = {label: metrics['validation'][label] for label in LABELS}
    names = [point['name'] for point in tasks[LABELS[0]].get('operating_points', ())]
    thresholds = {'official': {label: task['threshold'] for label, task in tasks.items()}}
    for k, name in enumerate(names):
        thresholds[name] = {label: task['operating_points'][k]['threshold'] for label, task in tasks.items()}
    temperatures = {label: task['calibration']['temperature'] for label, task in tasks.items() if 'calibration' in task}
    return {'thresholds': thresholds, **({'temperatures': temperatures} if temperatures else {})}


def _official_splits(arguments: Dict[str, Any], run: Path, evaluation: Optional[Path]) -> List[str]:
    """Which splits are the challenge's own, by the ids of their images; train as the others where it recorded none."""
    digests = {}
    for name in ('validation', 'test'):
        for folder in filter(None, (evaluation, run)):
            if (folder / f'predictions_{name}.csv').is_file():
                with open(folder / f'predictions_{name}.csv', newline='', encoding='utf-8') as file:
                    digests[name] = ids_digest(row['image_id'] for row in csv.DictReader(file))
                break
    official = [name for name, digest in digests.items() if digest == CHALLENGE_IDS[name]]
    train = arguments.get('train_ids', CHALLENGE_IDS['train'] if len(official) == 2 else '')
    return ['train', *official] if train == CHALLENGE_IDS['train'] else official


def _looks(run: Path) -> List[Dict[str, str]]:
    if not (run / 'looks.csv').is_file():
        return []
    with open(run / 'looks.csv', newline='', encoding='utf-8') as file:
        return [{**row, 'checkpoint': Path(row['checkpoint']).name, 'command': _without_folders(row['command'])}
                for row in csv.DictReader(file)]


def _without_folders(command: str) -> str:
    """A command line whose absolute paths are names: whose disk it was is nobody's business."""
    return shlex.join(Path(word).name if os.path.isabs(word) else word for word in shlex.split(command))


def _read(path: Path, what: str) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise HubError(f'{path.parent} is not {what}: {path.name} is missing or unreadable.') from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def main(argv: Optional[Sequence[str]] = None) -> int:
    usage, epilog = (__doc__ or '\n\n').replace('{HUB}', HUB).split('\n\n', 1)
    parser = argparse.ArgumentParser(
        prog='python -m timm_arl.hub', description=usage, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    sub = commands.add_parser('stage', help='build a model repo from a finished run of finetune_isic.py')
    sub.add_argument('run', metavar='OUT', type=Path)
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
    sub = commands.add_parser('verify', help='fetch published weights into an empty cache and compare')
    sub.add_argument('source', metavar='REPO|./DIR')
    sub.add_argument('--against', metavar='STAGED', type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == 'stage':
            stage(args.run, args.target, args.evaluation, args.tag, args.note)
            print(f'Staged: {args.target} ({", ".join(sorted(path.name for path in args.target.iterdir()))})')
        elif args.command == 'card':
            print(f'Written: {_card_of(args)}')
        elif args.command == 'push':
            if args.to and len(args.folders) > 1:
                raise HubError('--to names one place: push one folder at a time, or leave it out.')
            for folder in args.folders:
                to = args.to or f'{HUB}/{(read_results(folder) or {}).get("name", folder.name)}'
                changed = push(folder, to, args.yes, args.private)
                print(f'{folder} to {to}: ' + (', '.join(changed) or 'everything is there already')
                      + ('' if args.yes or not changed else ' would be sent; pass --yes to send'))
        else:
            for name, digest in verify(args.source, args.against).items():
                print(f'{digest}  {name}')
            print(f'{args.source} is {args.against}: the same files, the same outputs.')
    except (HubError, WeightsError, OSError) as error:
        parser.exit(2, f'{parser.prog} {args.command}: error: {error}\n')
    return 0


def _card_of(args: argparse.Namespace) -> Path:
    if Path(args.what).is_dir():
        return card(Path(args.what))
    if '.' not in args.what or not timm.is_model_pretrained(args.what) or not args.output:
        raise HubError(f'{args.what} is no staged folder, and a card of registered weights needs NAME.TAG, as '
                       f"timm.list_pretrained('arl_*') gives them, and --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    text = render_card(args.what, registered_config(args.what), None, None, args.what)
    with replacing(args.output / 'README.md') as temporary:
        temporary.write_text(text, encoding='utf-8')
    return args.output / 'README.md'


if __name__ == '__main__':
    sys.exit(main())
