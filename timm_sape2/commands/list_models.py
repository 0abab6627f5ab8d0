"""The command `timm-sape2 list`."""

import argparse
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from .parser import Commands


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
