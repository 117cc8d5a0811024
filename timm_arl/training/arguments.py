"""Command-line values that are checked, and the error that a program ends with."""
import argparse
import json

from timm.utils import ParseKwargs

from ..arguments import number, program_parser

__all__ = ['ModelKwargs', 'RunError', 'check_not_empty', 'number', 'program_parser']


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class ModelKwargs(ParseKwargs):
    """timm's ``--model-kwargs KEY=VALUE ...``, refused by argparse where it cannot be read or saved as JSON."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
            kwargs = json.loads(json.dumps(getattr(namespace, self.dest), allow_nan=False))  # as a resumed run reads it
        except (ValueError, TypeError, SyntaxError):
            raise argparse.ArgumentError(
                self, f'{" ".join(values)} is not KEY=VALUE, with a number, word or list as value') from None
        setattr(namespace, self.dest, kwargs)


def check_not_empty(args):
    """Refuse options given as '', as an unset variable of a shell gives them."""
    for name, value in vars(args).items():
        if value == '' or isinstance(value, list) and '' in value:
            raise RunError(f'--{name.replace("_", "-")} is empty: give it a value, or leave it out.')
