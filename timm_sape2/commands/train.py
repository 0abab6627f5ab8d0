"""The command `timm-sape2 train`, of which train.py is the door in a checkout."""

import sys
import textwrap
from collections.abc import Sequence

import torch

from .._shipped import shipped
from ..training.arguments import flags_of, parse_arguments
from ..training.console import next_steps, set_up_logging
from ..training.loop import fit, set_up
from ..training.processes import SignalCatcher
from .parser import Commands

DEFAULT_RECIPE = shipped() / 'vit_compact_sape2_patch4_32.digits' / 'train.yaml'


def add_train(commands: Commands) -> None:
    """Add `train`, whose flags, --help too, are those of `parse_arguments`."""
    parser = commands.add_parser('train', help='train an image classifier', add_help=False)
    parser.set_defaults(command=lambda arguments: main(arguments.flags), takes_flags=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit code; a signal ends it with SystemExit."""
    set_up_logging()
    try:
        run = set_up(parse_arguments(sys.argv[1:] if argv is None else argv, DEFAULT_RECIPE))
    except (ValueError, OSError) as error:
        print('error:', textwrap.shorten(str(error), 1000), file=sys.stderr)
        return 2
    try:
        with SignalCatcher() as signals:
            fit(run, signals)
    except FloatingPointError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    finally:
        if run.args.distributed:
            torch.distributed.destroy_process_group()
    if run.saver is not None:
        print(next_steps(run.task.evaluated_module(), run.folder, **flags_of(next_steps, run.args)))
    return 0
