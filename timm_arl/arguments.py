"""Parsers and checked values of the command lines of all programs."""
import argparse
import math
from typing import Any, Callable, Optional

__all__ = ['not_empty', 'number', 'program_parser']


def program_parser(doc: Optional[str], usage: str = '', **kwargs: Any) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a program, with abbreviations refused.

    Args:
        doc: The docstring; its first paragraph stands above the flags, the rest below.
        usage: What follows the name of the program; '' for all flags.
        **kwargs: Of ArgumentParser.
    """
    description, epilog = (doc or '\n\n').split('\n\n', 1)  # none under python -OO
    return argparse.ArgumentParser(
        usage=f'%(prog)s {usage} [options] (--help lists them)' if usage else None, description=description,
        epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def number(kind: Callable[[str], Any], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A type for argparse: a finite int or float from low to high, both included."""
    def parse(text: str) -> Any:
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


def not_empty(text: str) -> str:
    """A type for argparse: a word, and not '', as a variable that the shell does not know gives it."""
    if not text:
        raise argparse.ArgumentTypeError('must not be empty')
    return text
