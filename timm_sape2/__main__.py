"""The command `timm-sape2`, which is also `python -m timm_sape2`."""

import os
import signal
import sys
from collections.abc import Sequence

import timm
import torch

from . import __version__
from ._arguments import unrecognized
from .commands import COMMANDS
from .commands.parser import Parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line.

    Args:
        argv: Arguments after the program's name, by default those of this process.

    Returns:
        The exit code, None for 0; 141 if whoever reads the output stopped. After an error of the user it exits with
        code 2 by itself, after Ctrl-C with 130.
    """
    parser = build_parser()
    arguments, flags = parser.parse_known_args(argv)
    if flags and not arguments.takes_flags:
        parser.error(unrecognized(flags, arguments.options))
    arguments.flags = flags
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `| head` does when it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not written at exit either
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, 'timm-sape2: interrupted\n')
    except arguments.user_errors as error:
        parser.error(str(error))


def build_parser() -> Parser:
    """Build the parser of the whole command line.

    A command is a function in `timm_sape2.commands` that adds a parser. The parser sets the default `command`, a
    function of the parsed arguments that returns an exit code or None. A ValueError or an OSError in there is taken for
    an error of the user; a command for which that is wrong sets the default `user_errors` too. One that sets
    `takes_flags` finds what its parser does not know in `flags`.
    """
    parser = Parser(
        prog='timm-sape2',
        description="SaPE2 and other position encodings for timm's vision transformers.",
        epilog="""\
examples:
  timm-sape2 list                           the models
  timm-sape2 train                          train one, on digits without data
  timm-sape2 run train.py --model NAME ...  a script of timm, with these models
  timm-sape2 COMMAND --help                 all about one command""",
    )
    versions = f'timm-sape2 {__version__} (timm {timm.__version__}, torch {torch.__version__})'
    parser.add_argument('--version', action='version', version=versions)
    parser.set_defaults(user_errors=(ValueError, OSError), takes_flags=False)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


if __name__ == '__main__':
    sys.exit(main())
