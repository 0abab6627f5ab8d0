"""The command `timm-sape2`, which is also `python -m timm_sape2`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import __version__
from .scripts import ScriptError, run_script


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its help and reports an error in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and exit with code 2."""
        self.exit(2, f'timm-sape2: error: {message}\n')


Commands: TypeAlias = 'argparse._SubParsersAction[Parser]'


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line.

    Args:
        argv: Arguments after the program's name, by default those of this process.

    Returns:
        The exit code, None for 0. After an error of the user it exits with code 2 by itself.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except arguments.user_errors as error:
        parser.error(str(error))


def build_parser() -> Parser:
    """Build the parser of the whole command line.

    To add a command, write a function that adds its parser and name it in `COMMANDS`. The parser sets the default
    `command`, a function of the parsed arguments that returns an exit code or None. A ValueError in there is taken for
    an error of the user; a command for which that is wrong sets the default `user_errors` too.
    """
    parser = Parser(
        prog='timm-sape2',
        description="SaPE2 and other position encodings for timm's vision transformers.",
        epilog="""\
examples:
  timm-sape2 list                           the models
  timm-sape2 run train.py --model NAME ...  a script of timm, with these models
  timm-sape2 COMMAND --help                 all about one command""",
    )
    versions = f'timm-sape2 {__version__} (timm {timm.__version__}, torch {torch.__version__})'
    parser.add_argument('--version', action='version', version=versions)
    parser.set_defaults(user_errors=ValueError)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def add_list(commands: Commands) -> None:
    """Add `list`."""
    parser = commands.add_parser(
        'list',
        help='show the models',
        description='Show the models that this package registers with timm.',
        epilog="""\
examples:
  timm-sape2 list
  timm-sape2 list '*patch4_32'       those for images of 32x32
  timm-sape2 list 'vit_small_pos_*'  one transformer with each of the encodings

A name goes wherever timm takes a model: timm.create_model(NAME), --model NAME.""",
    )
    parser.add_argument('pattern', nargs='?', default='', help='names to show, with the wildcards * ? [] as in timm')
    parser.add_argument(
        '--gmacs',
        action='store_true',
        help='count 10^9 multiply-accumulates an image too: matrix products and convolutions',
    )
    parser.set_defaults(command=show_models)


def show_models(arguments: argparse.Namespace) -> None:
    """Print a table of the models that match a pattern."""
    names = timm.list_models(arguments.pattern, module='vision_transformer_sape2')
    if not names:
        raise ValueError(f"no model matches {arguments.pattern!r}; 'timm-sape2 list' shows them all")
    rows: list[tuple[str, ...]] = [('model', 'position', 'input', 'patch', 'parameters')]
    if arguments.gmacs:
        rows[0] += ('GMACs',)
    for name in names:
        model = timm.create_model(name, device='meta').eval()
        rows.append(describe_model(model) + ((f'{count_gmacs(model):.3g}',) if arguments.gmacs else ()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def describe_model(model: Any) -> tuple[str, ...]:
    """Return name, position encoding, input size, patch size and number of parameters of a model."""
    return (
        model.pretrained_cfg['architecture'],
        model.position_name,
        'x'.join(map(str, model.pretrained_cfg['input_size'])),
        'x'.join(map(str, model.patch_embed.patch_size)),
        f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M',
    )


def count_gmacs(model: Any) -> float:
    """Return the billions of multiply-accumulates for one image that torch's counter sees, for a model on `meta`."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return counter.get_total_flops() / 2e9


def add_run(commands: Commands) -> None:
    """Add `run`."""
    parser = commands.add_parser(
        'run',
        help="run a script of timm's, unchanged, with these models",
        description="""\
Run any Python script as `python SCRIPT ...` does, but with the models of this
package registered. It is meant for timm's train.py, validate.py,
inference.py, benchmark.py and onnx_export.py, which are in timm's repository
and not in its package. Everything after SCRIPT goes to the script, --help too,
and the exit code is the script's.""",
        epilog="""\
examples:
  timm-sape2 run train.py --help
  timm-sape2 run train.py --data-dir DATA --model vit_small_sape2_patch4_32 \\
      --num-classes 10
  timm-sape2 run validate.py DATA --model vit_small_sape2_patch4_32 \\
      --checkpoint output/train/NAME/model_best.pth.tar
  torchrun --nproc_per_node=2 -m timm_sape2 run train.py ...

In a checkout of timm, write `--no-python timm-sape2 run` in place of
`-m timm_sape2 run`: with -m, Python takes the timm of the current folder
instead of the installed one.""",
    )
    parser.add_argument('script', metavar='SCRIPT', nargs=argparse.PARSER, help='path of the script, and its arguments')
    parser.set_defaults(command=run, user_errors=ScriptError)


def run(arguments: argparse.Namespace) -> None:
    """Run a script; what it raises is its own affair."""
    path, *rest = arguments.script
    run_script(path, rest)


COMMANDS = (add_list, add_run)


if __name__ == '__main__':
    sys.exit(main())
