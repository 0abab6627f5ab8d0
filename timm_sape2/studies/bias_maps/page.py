"""A page for a browser: point at a patch of an image, and see where its attention bias goes."""

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from ...models.vit import PositionVisionTransformer
from ...positions.base import BIAS_HOOKS
from ...positions.sape2 import SaPE2
from .biases import UNSEEN_BELOW, blocks_with_bias, trained_blocks
from .of_images import SeenImage

MOST_BYTES = 100e6  # of a page, which a browser still opens in seconds
# The code of a bias that leaves no attention. Others are steps from the lowest of a block and head to the highest.
UNSEEN = 255

EFFECT = {
    'more': 'dark means more attention, white that nothing is added.',
    'less': 'dark means less attention, white that nothing is taken away.',
    'both': 'red means more attention, blue less, white that nothing changes.',
}


def check_page_size(images: int, blocks: int, heads: int, grid: tuple[int, int]) -> None:
    """Raise a ValueError if a page would be too large for a browser."""
    size = images * blocks * heads * (grid[0] * grid[1]) ** 2 * 4 / 3
    if size > MOST_BYTES:
        raise ValueError(
            f'the page would have {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}: choose fewer images or blocks'
        )


def bias_page(
    model: PositionVisionTransformer,
    images: Sequence[SeenImage],
    blocks: Sequence[int],
    head: int | None = None,
    patch: tuple[int, int] | None = None,
    is_trained: bool = True,
) -> str:
    """Return a page of HTML that needs no other file and no network.

    Args:
        model: The model that the biases are of.
        images: What to show, on grids of one size.
        blocks: Indices of the blocks that the biases are of; the page opens with the last.
        head: Head that the page opens with, None for the mean of them all.
        patch: Query patch (row, column) that the page opens with, None for the one in the middle.
        is_trained: The model has weights; if not, the page says that it means nothing.
    """
    heads, rows, columns = images[0].bias.shape[1:4]
    maps: list[dict[str, Any]] = []
    shown = []
    for image in images:
        coded = encoded_bias(image.bias)
        if coded not in maps:  # one that knows places alone is the same for all images
            maps.append(coded)
        shown.append({'name': image.name, 'picture': data_url(image.image), 'maps': maps.index(coded)})
    sign = sign_of_bias(maps)
    has_unseen = any((image.bias < UNSEEN_BELOW).any() for image in images)
    data = {
        'model': model_name(model),
        'position': model.position_name,
        'trained': is_trained,
        'effect': f'{EFFECT[sign]}{" Gray gets none at all." if has_unseen else ""}',
        'words': words(model, blocks, len(maps) < len(images), has_unseen),
        'sign': sign,
        'grid': [rows, columns],
        'size': images[0].image.shape[:2],
        'blocks': list(blocks),
        'heads': heads,
        'images': shown,
        'maps': maps,
        'start': {
            'block': len(blocks) - 1,
            'head': -1 if head is None else head,
            'patch': patch or (rows // 2, columns // 2),
        },
    }
    template = resources.files(__package__).joinpath('page.html').read_text(encoding='utf-8')
    return template.replace('{{data}}', json.dumps(data).replace('<', r'\u003c'))


def encoded_bias(bias: np.ndarray) -> dict[str, Any]:
    """Return biases (blocks, heads, ...) as a byte each, with the lowest and highest of every block and head."""
    seen = np.ma.masked_less(bias.reshape(*bias.shape[:2], -1).astype(np.float64), UNSEEN_BELOW)
    lowest, highest = (extreme.filled(0.0) for extreme in (seen.min(-1), seen.max(-1)))
    step = np.where(highest > lowest, highest - lowest, 1.0) / (UNSEEN - 1)
    codes = np.rint((seen - lowest[..., None]) / step[..., None]).filled(UNSEEN).astype(np.uint8)
    return {
        'codes': base64.b64encode(codes.tobytes()).decode(),
        'ranges': np.stack([lowest, highest], -1).tolist(),
    }


def sign_of_bias(maps: Sequence[dict[str, Any]]) -> str:
    """Tell whether encoded biases only add to attention ('more'), only take from it ('less'), or do both."""
    ranges = np.array([encoded['ranges'] for encoded in maps])
    if ranges.min() >= 0:
        return 'more'
    return 'less' if ranges.max() <= 0 else 'both'


def words(model: PositionVisionTransformer, blocks: Sequence[int], is_same: bool, has_unseen: bool) -> list[str]:
    """Return sentences that say what the numbers on a page are.

    Args:
        model: The model that they are of.
        blocks: Indices of the blocks on the page.
        is_same: Several images have the same biases.
        has_unseen: Some patches are not looked at.
    """
    attention: Any = model.blocks[blocks[0]].attn
    position = model.position_name.split('+')
    with_bias = attention.position.overriding(*BIAS_HOOKS)
    biases = {name: attention.position[name] for name in position if name in with_bias}
    first, *others = biases.values()
    if isinstance(first, SaPE2) and not others:
        sentences = [distance_in_words(first)]
    else:
        sentences = [f'Shown is the position bias of {" and ".join(biases)}{", summed" if others else ""}.']
    sentences.append(
        'A bias is added to the attention logits: +0.7 doubles the attention before softmax makes its sum 1, '
        '\N{MINUS SIGN}0.7 halves it, and what is the same for all patches changes nothing.'
    )
    if has_unseen:
        sentences.append('Means are over the heads and blocks that look at a patch.')
    if is_same:
        sentences.append('It is the same in these images: it depends on places alone.')
    elif any(encoding.translation == 'content-based' for encoding in biases.values()):
        sentences.append('It is computed from what the image shows, so every image has its own.')
    elsewhere = [name for name in position if name not in biases]
    if elsewhere:
        sentences.append(f'What {" and ".join(elsewhere)} does to tokens, queries or keys is not in it.')
    for block in sorted(set(blocks_with_bias(model)) - set(trained_blocks(model))):
        reason = 'only the class token is read after it, so its bias has no effect.'
        sentences.append(f'Block {block} {"is last: " if block in blocks else "is left out: "}{reason}')
    sentences.append(
        'Rows, columns, blocks and heads count from 0. Numbers are exact to 0.2 % of the range in their block and head.'
    )
    return sentences


def distance_in_words(encoding: SaPE2) -> str:
    """Return what the bias of SaPE2 is."""
    lines = [name for name in ('row', 'column') if getattr(encoding, f'{name}_table') is not None]
    return (
        f'The bias of SaPE2 is a {"squared " if encoding.squared else ""}distance: how differently two patches count '
        f'what matters to them along their {" and their ".join(lines)}. It is 0 from a patch to itself and small to '
        'patches that are like it; since it is added, the patches that are unlike it are dark and get more attention.'
    )


def model_name(model: PositionVisionTransformer) -> str:
    """Return the name of a model, with the tag of its weights if they have one."""
    cfg: Any = model.pretrained_cfg
    tag = cfg.get('tag')
    return f'{cfg["architecture"]}.{tag}' if tag and tag != 'untrained' else cfg['architecture']


def data_url(image: np.ndarray) -> str:
    """Return an image (height, width, 3), from 0 to 1, as a PNG inside of a URL."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.rint(image * 255))).save(file, 'PNG', optimize=True)
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
