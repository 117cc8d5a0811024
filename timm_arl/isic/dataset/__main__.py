"""Prepare and check data sets: ``python -m timm_arl.isic.dataset prepare|check|demo``."""
import argparse
import sys
from typing import Optional, Sequence

from ..task import DataError
from . import demo, duplicates, prepare


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_arl.isic.dataset', description='Make and check data sets.')
    commands = parser.add_subparsers(dest='command', required=True)
    prepare.add_arguments(commands.add_parser('prepare', help='originals to Parquet shards of a size that trains'))
    duplicates.add_arguments(commands.add_parser('check', help='find images that occur twice, across splits too'))
    demo.add_arguments(commands.add_parser('demo', help='draw a contact sheet of the synthetic demo set'))
    args = parser.parse_args(argv)
    try:
        return {'prepare': prepare.prepare, 'check': duplicates.check, 'demo': demo.draw}[args.command](args)
    except (DataError, OSError) as error:
        parser.exit(2, f'{parser.prog} {args.command}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted: run the same command again to continue.\n')


if __name__ == '__main__':
    sys.exit(main())
