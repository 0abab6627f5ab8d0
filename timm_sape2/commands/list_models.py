"""The command `timm-sape2 list`."""

import argparse
from typing import Any

import timm

from .._table import text_table
from ..models.encoding_table import encodings
from ..models.flops import count_flops, count_parameters
from ..trained.config import MODULE
from .list_implementations import show_implementations
from .parser import Commands


def add_list(commands: Commands) -> None:
    """Add `list`."""
    parser = commands.add_parser(
        'list',
        help='show the models, or the position encodings',
        description="""\
Show the models that this package registers with timm, or the encodings.

Below all models stands how SaPE2 attention is computed on this machine, and why
not in a faster way: by the Triton kernel (triton), by compiled C on a CPU
(cpu), or as defined, with a stored bias (reference).

The table of encodings has what they state. Translation: content that moves
keeps its features ('relative'; 'relative inside' if the border of the image
makes a difference), or they depend on the place ('absolute') or on what lies
around ('content-based'), without class token. Parameters and MFLOPs are those
added to vit_small at 224x224, patch 16; FLOPs are those of matrix products,
attention included, and convolutions. Parameters fit another grid as they are,
or are resampled.""",
        epilog="""\
examples:
  timm-sape2 list
  timm-sape2 list '*patch4_32'       those for images of 32x32
  timm-sape2 list 'vit_small_pos_*'  one transformer with each of the encodings
  timm-sape2 list --pretrained       those whose weights come with the package
  timm-sape2 list --encodings        what the encodings are like

A name goes wherever timm takes a model: timm.create_model(NAME), --model NAME.""",
    )
    parser.add_argument('pattern', nargs='?', default='', help='names to show, with the wildcards * ? [] as in timm')
    parser.add_argument(
        '--gmacs',
        action='store_true',
        help='count 10^9 multiply-accumulates an image too: matrix products and convolutions',
    )
    parser.add_argument(
        '--pretrained', action='store_true', help='show those alone that have weights, by the names that load them'
    )
    parser.add_argument('--encodings', action='store_true', help='show the position encodings in place of the models')
    parser.set_defaults(command=show)


def show(arguments: argparse.Namespace) -> None:
    """Print the table that the arguments ask for."""
    if not arguments.encodings:
        show_models(arguments)
        if not arguments.pattern and not arguments.pretrained:
            print()
            show_implementations()
    elif arguments.pattern or arguments.gmacs or arguments.pretrained:
        raise ValueError('--encodings goes alone, without names of models, --gmacs and --pretrained')
    else:
        print(encodings())


def show_models(arguments: argparse.Namespace) -> None:
    """Print a table of the models that match a pattern."""
    names = timm.list_models(arguments.pattern, module=MODULE, pretrained=arguments.pretrained)
    if not names:
        which, flag = ('model with weights', ' --pretrained') if arguments.pretrained else ('model', '')
        raise ValueError(f"no {which} matches {arguments.pattern!r}; 'timm-sape2 list{flag}' shows them all")
    rows: list[tuple[str, ...]] = [('model', 'position', 'input', 'patch', 'parameters')]
    if arguments.gmacs:
        rows[0] += ('GMACs',)
    for name in names:
        model = timm.create_model(name, device='meta').eval()
        rows.append((name, *describe_model(model)) + ((f'{count_flops(model) / 2e9:.3g}',) if arguments.gmacs else ()))
    print(text_table(rows))


def describe_model(model: Any) -> tuple[str, ...]:
    """Return position encoding, input size, patch size and number of parameters of a model."""
    return (
        model.position_name,
        'x'.join(map(str, model.pretrained_cfg['input_size'])),
        'x'.join(map(str, model.patch_embed.patch_size)),
        f'{count_parameters(model) / 1e6:.2f} M',
    )
