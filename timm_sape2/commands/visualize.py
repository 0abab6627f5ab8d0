"""The command `timm-sape2 visualize`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .._arguments import check_file, whole_number
from .._figure import check_matplotlib
from .._files import atomic_write
from ..studies.bias_maps.drawing import DPI
from ..studies.bias_maps.of_images import bias_maps, chosen_blocks, chosen_heads, chosen_patches, see_images
from ..studies.bias_maps.page import bias_page, check_page_size
from ..trained.opening import TrainedModel
from ..training.console import set_up_logging
from .model_arguments import add_model_arguments, create_named_model, open_named_model
from .parser import Commands

_logger = logging.getLogger(__name__)


def add_visualize(commands: Commands) -> None:
    """Add `visualize`."""
    parser = commands.add_parser(
        'visualize',
        help="draw a model's attention biases on images",
        description="""\
Draw what a position encoding adds to attention, from every patch of an image
to every other one: a small map for each query patch, at the place of the
patch, and enlarged ones of the query patches that --patch names. White is a
bias of 0. Any encoding with an attention bias will do; the bias of several
that are joined is their sum. Rows, columns, blocks and heads count from 0.

--head all draws a compact grid, a panel for each head: the small maps, or with
--patch the map of that query patch alone.

--html writes a page for a browser instead: point at a patch and see where its
bias goes, in all blocks (or those that --block names) and heads.""",
        epilog="""\
examples:
  timm-sape2 visualize deer.png --checkpoint output/train/mine
  timm-sape2 visualize deer.png horse.png --checkpoint output/train/mine \\
      --block 0 4 --head mean --patch 2 5 --patch 6 1 --output maps.png
  timm-sape2 visualize photo.jpg --model vit_small_sape2 --img-size 160 224 \\
      --checkpoint model.safetensors --head all
  timm-sape2 visualize deer.png horse.png --checkpoint output/train/mine --html

A checkpoint of training, a name that has weights (`timm-sape2 list
--pretrained`) or a folder with config.json says which model it is of and how
its images are prepared. The folder of a run means its last checkpoint. With
other weights, --model does. Without weights the model is untrained, and the
maps mean nothing.""",
    )
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='files of images')
    add(
        '--checkpoint',
        metavar='PATH',
        help='file, folder of a run or with config.json, name that has weights, or OWNER/NAME on the Hub',
    )
    add_model_arguments(parser)
    add(
        '--block',
        nargs='+',
        type=whole_number,
        metavar='N',
        help='blocks of the transformer (default: the last one whose bias reaches the output)',
    )
    add('--head', nargs='+', default=['mean'], metavar='N', help="heads, 'all' or their 'mean' (default: mean)")
    add(
        '--patch',
        nargs=2,
        type=whole_number,
        action='append',
        default=[],
        metavar=('ROW', 'COLUMN'),
        help='query patch to enlarge; may be given several times',
    )
    add('--html', action='store_true', help='write a page for a browser; it opens with the first head and patch')
    add('--output', type=Path, metavar='FILE', help='picture or page (default: bias_maps.png, or bias_maps.html)')
    parser.set_defaults(command=visualize)


def visualize(arguments: argparse.Namespace) -> None:
    """Draw the attention biases of a model on images."""
    set_up_logging()
    suffix = '.html' if arguments.html else '.png'
    output: Path = arguments.output or Path(f'bias_maps{suffix}')
    check_file('--output', output, suffix)
    if not arguments.html:
        check_matplotlib()
    trained = named_model(arguments)
    images = list(dict.fromkeys(arguments.images))
    if arguments.html:
        page = html_page(arguments, trained, images)
    else:
        figure = bias_maps(trained, images, arguments.block, arguments.head, arguments.patch)
    with atomic_write(output) as temporary:
        if arguments.html:
            temporary.write_text(page, encoding='utf-8')
        else:
            figure.savefig(temporary, dpi=DPI)
    _logger.info(f'The page is {output}: open it in a browser' if arguments.html else f'The maps are in {output}')


def html_page(arguments: argparse.Namespace, trained: TrainedModel, images: Sequence[str]) -> str:
    """Return the page that the arguments ask for."""
    model = trained.model
    blocks = chosen_blocks(arguments.block, model, all_of_them=True)
    head = chosen_heads(arguments.head, model)[0]
    patches = chosen_patches(arguments.patch, model)
    check_page_size(len(images), len(blocks), model.blocks[0].attn.num_heads, model.patch_embed.grid_size)
    opens_with = (None if head == 'mean' else int(head), patches[0] if patches else None)
    return bias_page(model, see_images(trained, images, blocks), blocks, *opens_with, arguments.checkpoint is not None)


def named_model(arguments: argparse.Namespace) -> TrainedModel:
    """Open the model that the arguments name, or create it where they name no weights.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If no model is named, or it does not load.
    """
    source = arguments.checkpoint
    if source is None and arguments.model is None:
        raise ValueError('which model? Give --checkpoint PATH, or --model NAME for an untrained one')
    if source is None:
        _logger.warning('The model is untrained, so the maps mean nothing; --checkpoint gives it weights')
        return create_named_model(arguments)
    return open_named_model(arguments, source)
