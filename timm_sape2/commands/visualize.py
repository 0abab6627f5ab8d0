"""The command `timm-sape2 visualize`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ..studies.bias_maps import DPI, BiasMap, attention_biases, blocks_with_bias, draw_bias_maps, trained_blocks
from ..studies.runner import check_matplotlib
from ..trained.opening import TrainedModel
from ..training.arguments import whole_number
from ..training.processes import set_up_logging
from ..training.run_folder import atomic_write, check_writable
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
that are joined is their sum. Rows, columns, blocks and heads count from 0.""",
        epilog="""\
examples:
  timm-sape2 visualize deer.png --checkpoint output/train/mine
  timm-sape2 visualize deer.png horse.png --checkpoint output/train/mine \\
      --block 0 4 --head mean --patch 2 5 --patch 6 1 --output maps.png
  timm-sape2 visualize photo.jpg --model vit_small_sape2 --img-size 160 224 \\
      --checkpoint model.safetensors --head all

A checkpoint of train.py or a folder with config.json says which model it is of
and how its images are prepared. The folder of a run means its last checkpoint.
With other weights, --model does. Without weights the model is untrained, and
the maps mean nothing.""",
    )
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='files of images')
    add('--checkpoint', metavar='PATH', help='file, folder of a run or with config.json, or OWNER/NAME on the Hub')
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
    add('--output', type=Path, default=Path('bias_maps.png'), metavar='PNG', help='picture (default: %(default)s)')
    parser.set_defaults(command=visualize)


def visualize(arguments: argparse.Namespace) -> None:
    """Draw the attention biases of a model on images."""
    set_up_logging()
    check_matplotlib()
    output: Path = arguments.output
    if output.suffix.lower() != '.png':
        raise ValueError(f'--output must end in .png, not {output}')
    try:
        check_writable(output.parent)
        pictures = {path: open_image(path) for path in arguments.images}
        trained = named_model(arguments)
    except OSError as error:
        raise ValueError(str(error)) from error
    model, data = trained.model, trained.data_config
    blocks = chosen_blocks(arguments.block, model)
    heads = chosen_heads(arguments.head, model.blocks[0].attn.num_heads)
    patches = chosen_patches(arguments.patch, model.patch_embed.grid_size)
    transform = create_transform(**data)
    maps = []
    for path, picture in tqdm(pictures.items(), unit='image', disable=len(pictures) < 2):
        image = transform(picture.convert('L' if model.in_chans == 1 else 'RGB'))
        name = str(Path(*Path(path).parts[-2:]))[-36:]
        shown = pixels(image, data['mean'], data['std'])
        biases = attention_biases(model, image.unsqueeze(0), blocks)
        for block in blocks:
            for title, bias in of_heads(biases[block][0], heads):
                maps.append(BiasMap(f'{name}\nblock {block}, {title}', shown, bias.numpy()))
    figure = draw_bias_maps(maps, patches)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        figure.savefig(temporary, dpi=DPI)
    _logger.info(f'The maps are in {output}')


def open_image(path: str) -> Image.Image:
    """Return an image, read to its end.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is not an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no image {path}')
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # what decoders raise for bytes that make no sense depends on the bytes
        raise ValueError(f'{path} is truncated or no image') from error


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


def chosen_blocks(blocks: Sequence[int] | None, model: Any) -> list[int]:
    """Return the blocks to draw, and warn of those whose bias was never trained."""
    there, trained = blocks_with_bias(model), trained_blocks(model)
    for block in blocks or ():
        if block not in there:
            raise ValueError(f'no bias in --block {block}: there is one in the blocks {there[0]} to {there[-1]}')
        if block not in trained:
            _logger.warning(f'The bias of block {block} was not trained: only the class token is read after it')
    return list(blocks or trained[-1:])


def chosen_heads(heads: Sequence[str], num_heads: int) -> list[str]:
    """Return the heads to draw, numbers as text or 'mean'."""
    chosen: list[str] = []
    for head in heads:
        if head not in ('all', 'mean') and not (head.isdecimal() and int(head) < num_heads):
            raise ValueError(f"no --head {head}: heads go from 0 to {num_heads - 1}, or 'all', or their 'mean'")
        chosen += map(str, range(num_heads)) if head == 'all' else [head]
    return chosen


def chosen_patches(patches: Sequence[Sequence[int]], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the query patches to enlarge."""
    for row, column in patches:
        if row >= grid[0] or column >= grid[1]:
            raise ValueError(
                f'no --patch {row} {column}: rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}'
            )
    return [(row, column) for row, column in patches]


def of_heads(bias: Tensor, heads: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Return title and bias, (H, W, H, W), of some heads out of (h, H, W, H, W)."""
    return [
        (f'mean of {len(bias)} heads', bias.mean(0)) if head == 'mean' else (f'head {head}', bias[int(head)])
        for head in heads
    ]


def pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return a normalised image (C, height, width) as a picture in colour, (height, width, 3), from 0 to 1."""
    picture = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
