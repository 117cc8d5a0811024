"""Command-line values that are checked, and the error that a program ends with."""
import argparse
import json
import math

from timm.utils import ParseKwargs


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def program_parser(doc: str, usage: str, **kwargs) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a program, with abbreviations refused.

    Args:
        doc: The docstring; its first paragraph stands above the flags, the rest below.
        usage: What follows the name of the program.
        **kwargs: Of ArgumentParser.
    """
    description, epilog = doc.split('\n\n', 1)
    return argparse.ArgumentParser(
        usage=f'%(prog)s {usage} [options] (--help lists them)', description=description, epilog=epilog,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def number(kind, low, high=math.inf):
    """A type for argparse: a finite int or float from low to high, both included."""
    def parse(text):
        value = kind(text)
        if value in (math.inf, -math.inf) or value != value:
            raise argparse.ArgumentTypeError(f'{text} is not a finite number')
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'must be at least {low}, not {text}' if high == math.inf else
                f'must be between {low} and {high}, not {text}')
        return value
    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


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
