"""Command-line values that are checked, and the error that a program ends with."""
import argparse
import math


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def number(kind, low, high=math.inf):
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return kind(text)
    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


def check_not_empty(args):
    """Refuse options given as '', as an unset variable of a shell gives them."""
    for name, value in vars(args).items():
        if value == '':
            raise RunError(f'--{name.replace("_", "-")} is empty: give it a value, or leave it out.')
