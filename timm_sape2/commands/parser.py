"""The parser that all commands share."""

import argparse
from typing import Any, NoReturn, TypeAlias


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its help and reports an error in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Parse what is known; `options` of the result are those of the command that was called."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if not hasattr(parsed, 'options'):
            parsed.options = list(self._option_string_actions)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and exit with code 2."""
        self.exit(2, f'timm-sape2: error: {message}\n')


Commands: TypeAlias = 'argparse._SubParsersAction[Parser]'
