"""The biases that a model gives to images, and a picture of them."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ..._figure import check_matplotlib
from ...trained.opening import TrainedModel, as_trained, evaluation_mode
from ...trained.prediction import AnImage, image_mode, read_image
from .biases import UNSEEN_BELOW, attention_biases, blocks_with_bias, trained_blocks
from .drawing import BiasMap, Patch, draw_bias_maps
from .head_grid import HeadMaps, draw_head_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)


class SeenImage(NamedTuple):
    """An image as a model sees it, and its biases in some blocks."""

    name: str
    image: np.ndarray
    """The image after the preprocessing of the model, (height, width, 3), from 0 to 1."""

    bias: np.ndarray
    """From every query patch to every key patch, (blocks, heads, H, W, H, W)."""


def bias_maps(
    model: Any,
    images: AnImage | Iterable[AnImage],
    blocks: Iterable[int] | int | None = None,
    heads: Iterable[int | str] | int | str = 'mean',
    patches: Iterable[Patch] = (),
) -> 'Figure':
    """Draw what the position encoding of a model adds to attention on images. This is what `timm-sape2 visualize` does.

    Example:
        >>> timm_sape2.bias_maps(model, 'deer.png')  # the last block whose bias reaches the output, mean of the heads
        >>> timm_sape2.bias_maps(model, ['deer.png', 'horse.png'], blocks=[0, 4], patches=[(2, 5)])
        >>> timm_sape2.bias_maps(model, 'deer.png', heads='all').savefig('heads.png')

    Args:
        model: A model of timm whose position encoding has an attention bias, which is left in the mode that it is in;
            or a checkpoint, the folder of a run (its last checkpoint), a folder with config.json, or 'OWNER/NAME' on
            the Hub.
        images: Files or images of PIL, one or several.
        blocks: Blocks of the transformer, by default the last one whose bias reaches the output.
        heads: Numbers of attention heads, their 'mean', or 'all' of them side by side.
        patches: Query patches (row, column) to enlarge.

    Returns:
        A figure of matplotlib, which a notebook shows and `savefig` writes. White is a bias of 0.

    Raises:
        OSError: If the checkpoint cannot be read.
        ValueError: If matplotlib is missing, the model is none of timm, has no bias or does not open, an image cannot
            be read, or there is no such block, head or patch.
    """
    check_matplotlib()
    trained = as_trained(model)
    wanted = [heads] if isinstance(heads, (int, str)) else list(heads)
    chosen = chosen_blocks([blocks] if isinstance(blocks, int) else blocks, trained.model)
    names = chosen_heads(wanted, trained.model)
    enlarged = chosen_patches(patches, trained.model)
    lines = [
        HeadMaps(f'{seen.name}\nblock {block}', seen.image, of_heads(bias, names))
        for seen in see_images(trained, images, chosen)
        for block, bias in zip(chosen, seen.bias, strict=True)
    ]
    if 'all' in wanted:
        return draw_head_grid(lines, enlarged)
    maps = [BiasMap(f'{title}, {head}', shown, bias) for title, shown, heads in lines for head, bias in heads]
    return draw_bias_maps(maps, enlarged)


def see_images(trained: TrainedModel, images: AnImage | Iterable[AnImage], blocks: Sequence[int]) -> list[SeenImage]:
    """Return images as a model sees them, and the biases of some blocks on them.

    Args:
        trained: The model.
        images: Files or images of PIL, one or several. Those that come from a file are called by its name.
        blocks: Blocks that have a bias.

    Raises:
        ValueError: If an image cannot be read.
    """
    model, data, mode = trained.model, trained.data_config, image_mode(trained)
    transform, weight = create_transform(**data), next(model.parameters())
    images = [images] if isinstance(images, AnImage) else list(images)
    opened = [read_image(image, mode) for image in images]
    seen = []
    with evaluation_mode(model):
        for number, image in enumerate(tqdm(images, unit='image', disable=len(images) < 2 or None)):
            pixels = transform(opened[number])
            found = attention_biases(model, pixels.unsqueeze(0).to(weight.device, weight.dtype), blocks)
            bias = np.stack([found[block][0].cpu().numpy() for block in blocks])
            seen.append(SeenImage(name_of(image, number), as_picture(pixels, data['mean'], data['std']), bias))
    return seen


def name_of(image: AnImage, number: int) -> str:
    """Return the end of the path of an image, or its number if it comes from no file."""
    path = getattr(image, 'filename', '') if isinstance(image, Image.Image) else image
    return str(Path(*Path(path).parts[-2:]))[-36:] if path else f'image {number}'


def as_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return a normalised image (C, height, width) as a picture in colour, (height, width, 3), from 0 to 1."""
    picture = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def chosen_blocks(blocks: Iterable[int] | None, model: Any, all_of_them: bool = False) -> list[int]:
    """Return the blocks to draw, by default the last or all, and warn of those whose bias was never trained."""
    there, trained = blocks_with_bias(model), trained_blocks(model)
    if blocks is None:
        return trained if all_of_them else trained[-1:]
    blocks = list(blocks)
    for block in blocks:
        if block not in there:
            raise ValueError(f'no bias in block {block}: there is one in the blocks {there[0]} to {there[-1]}')
        if block not in trained:
            _logger.warning(f'The bias of block {block} was not trained: only the class token is read after it')
    return blocks


def chosen_heads(heads: Iterable[int | str], model: Any) -> list[str]:
    """Return the heads to draw, numbers as text or 'mean'."""
    count = model.blocks[0].attn.num_heads
    chosen: list[str] = []
    for head in map(str, heads):
        if head not in ('all', 'mean') and not (head.isdecimal() and int(head) < count):
            raise ValueError(f"no head {head}: heads go from 0 to {count - 1}, or 'all', or their 'mean'")
        chosen += map(str, range(count)) if head == 'all' else [head]
    return chosen


def chosen_patches(patches: Iterable[Sequence[int]], model: Any) -> list[Patch]:
    """Return the query patches to enlarge."""
    rows, columns = model.patch_embed.grid_size
    chosen = [(row, column) for row, column in patches]
    for row, column in chosen:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f'no patch {row} {column}: rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}')
    return chosen


def of_heads(bias: np.ndarray, heads: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Return title and bias, (H, W, H, W), of some heads out of (h, H, W, H, W), NaN for what is not seen at all."""
    seen = np.ma.masked_less(bias, UNSEEN_BELOW)
    return [
        (f'mean of {len(bias)} heads', seen.mean(0).filled(np.nan))
        if head == 'mean'
        else (f'head {head}', seen[int(head)].filled(np.nan))
        for head in heads
    ]
