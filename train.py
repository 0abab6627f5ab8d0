#!/usr/bin/env python3
"""Train an image classifier on timm's parts. `python train.py --help` says how; without data it trains an example."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

import timm_sape2  # noqa: F401  registers the models
from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.interrupt import SignalCatcher
from timm_sape2.training.loop import fit, set_up
from timm_sape2.training.next_steps import next_steps
from timm_sape2.training.processes import set_up_logging

DEFAULT_RECIPE = Path(__file__).parent / 'hub_configs' / 'vit_compact_sape2_patch4_32.digits' / 'train.yaml'


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
        print(next_steps(run.args, run.task.trainable_module, run.folder))
    return 0


if __name__ == '__main__':
    sys.exit(main())
