"""What the flags of all commands are made of: ranges that are checked, pairs, errors that are raised."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from timm.utils import ParseKwargs

from ._files import check_writable
from ._names import did_you_mean


def _number(kind: Callable[[str], float], holds: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f'must be {wanted}, not {text!r}')
        return value

    return convert


FLAG = argparse.BooleanOptionalAction

positive_int = _number(int, lambda value: value > 0, 'a whole number above 0')
whole_number = _number(int, lambda value: value >= 0, 'a whole number, 0 or more')
positive_float = _number(float, lambda value: value > 0, 'a number above 0')
non_negative_float = _number(float, lambda value: value >= 0, 'a number, 0 or more')

fraction = _number(float, lambda value: 0 <= value <= 1, 'a number from 0 to 1')


def loader_processes(text: str) -> int:
    """Read a number of processes that load images, at most as many as there are cores: more are no faster."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(int(whole_number(text)), cores)


def check_file(flag: str, path: Path, suffix: str = '') -> None:
    """Raise an error if the file of a flag cannot be written, or does not end in a suffix, capitals or not."""
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f'{flag} must end in {suffix}, not {path}')
    if path.is_dir():
        raise ValueError(f'{flag} must be a file, but {path} is a folder')
    check_writable(path.parent)


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, with an error for what is no pair."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in filter(None, values):
            if '=' not in value:
                parser.error(f'argument {option_string}: must be KEY=VALUE, not {value!r}')
        super().__call__(parser, namespace, values, option_string)


def unrecognized(words: Sequence[str], options: Iterable[str]) -> str:
    """Return the message for arguments that a parser with some options does not know."""
    known = [option.lstrip('-') for option in options if option.startswith('--')]
    mistyped = [word[2:].partition('=')[0] for word in words if word.startswith('--')]
    hints = ''.join(did_you_mean(word, known, prefix='--') for word in mistyped)
    return f'unrecognized arguments: {" ".join(words)}{hints}'


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises its errors, for the caller to report like any other bad input."""

    def parse_args(self, args=None, namespace=None):
        """Parse all arguments, or name those that are not known, and what may be meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unrecognized(unknown, self._option_string_actions))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
