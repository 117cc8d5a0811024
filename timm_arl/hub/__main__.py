"""Publishing: a model repo from a training output, with a card, pushed to a Hub or a folder and verified.

    python -m timm_arl.hub stage OUT STAGED --evaluation R    # a model repo, ready to publish, from a finished run
    python -m timm_arl.hub stage NAME.TAG STAGED              # the same for weights that come with this package
    python -m timm_arl.hub card STAGED                        # write its README.md again
    python -m timm_arl.hub card NAME.TAG --output DIR         # that of registered weights
    python -m timm_arl.hub push STAGED --to user/model        # list what would be sent; --yes sends it
    TIMM_ARL_HUB=me python -m timm_arl.hub push STAGED STAGED ... --yes    # each to me/NAME.TAG
    python -m timm_arl.hub verify user/model --against STAGED # download it into an empty cache and compare

A folder (./FOLDER) can stand for a repo; verify also takes user/model@REVISION. Log in with `hf auth login` or
HF_TOKEN. HF_ENDPOINT names another Hub, TIMM_ARL_HUB the user or organisation to push to without --to. The staged
README.md is sent as it is, but with the name of the repo or folder in its call of timm.create_model.
"""
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from safetensors import SafetensorError

from ..arguments import program_parser
from ..download import WeightsError
from .publish import push, staged_files, usual_repo, verify
from .results import UNKNOWN_LICENSE, HubError
from .staging import card, card_of_registered, stage


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = program_parser(__doc__, prog='python -m timm_arl.hub')
    commands = parser.add_subparsers(dest='command', required=True)
    sub = commands.add_parser(
        'stage', allow_abbrev=False, help='build a model repo from a finished run, or from shipped weights')
    sub.add_argument('run', metavar='OUT|NAME.TAG', help='output folder, or weights that come with this package')
    sub.add_argument('target', metavar='STAGED', type=Path)
    sub.add_argument('--evaluation', metavar='R', type=Path, help='output folder of evaluate_isic.py on that run')
    sub.add_argument('--alpha-zero', metavar='R0', type=Path,
                     help='output folder of evaluate_isic.py --alpha-zero --compare R/predictions_test.csv')
    sub.add_argument('--tag', help='tag of the weights (default: isic2017 for the images of the challenge, demo for '
                                   'synthetic ones, else the name of the data)')
    sub.add_argument('--license', help='of the weights, as the Hub abbreviates it (default: apache-2.0 for the images '
                                       'of ISIC 2017 and of the demo, else unknown)')
    sub.add_argument('--overwrite', action='store_true', help='replace a README.md in STAGED that was edited')
    sub.add_argument('--note', default='', help='what the card says about the images ("copies at 256 px", for example)')
    sub = commands.add_parser(
        'card', allow_abbrev=False, help='write the README.md of a staged folder, or of registered weights')
    sub.add_argument('what', metavar='STAGED|NAME.TAG')
    sub.add_argument('--output', metavar='DIR', type=Path, help='for NAME.TAG: folder for its README.md')
    sub.add_argument('--overwrite', action='store_true', help='replace other files of these names in DIR')
    sub = commands.add_parser('push', allow_abbrev=False, help='send staged folders to the Hub or another folder')
    sub.add_argument('folders', metavar='STAGED', type=Path, nargs='+')
    sub.add_argument('--to', metavar='REPO|./DIR', help='(default: NAME.TAG of each, under TIMM_ARL_HUB)')
    sub.add_argument('--yes', action='store_true', help='send; without it, list what would be sent')
    sub.add_argument('--private', action='store_true', help='make a new repo private')
    sub.add_argument('--tag', help='tag what is sent (v1: the tag that this package loads)')
    sub = commands.add_parser(
        'verify', allow_abbrev=False, help='fetch published weights into an empty cache and compare')
    sub.add_argument('source', metavar='REPO|./DIR')
    sub.add_argument('--against', metavar='STAGED', type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == 'stage':
            stage(args.run, args.target, args.evaluation, args.tag, args.note, args.alpha_zero, args.overwrite,
                  args.license)
            print(f'Staged: {args.target} ({", ".join(sorted(path.name for path in args.target.iterdir()))})')
            config = json.loads((args.target / 'config.json').read_text(encoding='utf-8'))
            if config['pretrained_cfg'].get('license') == UNKNOWN_LICENSE:
                print('The card gives no licence (license: unknown): say by --license under which one you publish.')
        elif args.command == 'card':
            if Path(args.what).is_dir() and args.output:
                raise HubError(f'{args.what} is a staged folder and its card goes there: leave out --output.')
            elif Path(args.what).is_dir():
                print(f'Written: {card(Path(args.what))}')
            elif args.output:
                print(f'Written: {card_of_registered(args.what, args.output, args.overwrite)}')
            else:
                raise HubError(f'No folder {args.what}; for the card of registered weights pass --output DIR.')
        elif args.command == 'push':
            if args.to is not None and len(args.folders) > 1:
                raise HubError('--to names one place: push one folder at a time, or leave it out.')
            for folder in args.folders:
                staged_files(folder)
            places = [usual_repo(folder) if args.to is None else args.to for folder in args.folders]
            twice = next((to for to in places if places.count(to) > 1), None)
            if twice:
                raise HubError(f'Two of the folders would go to {twice}: push one of them, or give each its --to.')
            for folder, to in zip(args.folders, places):
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
        parser.exit(130, '\nInterrupted: run the same command again to continue.\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
