"""The position biases of a model, and what its attention computes them from."""

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...models.vit import PositionAttention, PositionVisionTransformer
from ...positions import ENCODINGS
from ...positions.base import BIAS_HOOKS

UNSEEN_BELOW = -1e3  # a bias that leaves no attention at all, whatever the logit


class AttentionInputs(NamedTuple):
    """Queries and keys after normalisation, and values, (B, h, P + N, d) each, the grid of the N patches, and what the
    position encodings of the attention share."""

    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int]
    shared: dict[str, Tensor]


def record_attention_inputs(
    model: PositionVisionTransformer,
    images: Tensor,
    blocks: Collection[int] | None = None,
) -> dict[int, AttentionInputs]:
    """Run a model and return what goes into the attention of its blocks.

    Args:
        model: The model; it is left as it was.
        images: Images, (B, C, height, width).
        blocks: Indices of blocks, None for all.
    """
    recorded: dict[int, AttentionInputs] = {}

    def record(attention: PositionAttention, arguments: tuple[Any, ...], block: int) -> None:
        tokens, grid = arguments[:2]
        position: Any = attention.position
        recorded[block] = AttentionInputs(*attention.project_in(tokens), grid, position.look(tokens, grid))

    attentions: list[Any] = [block.attn for block in model.blocks]
    handles = [
        attention.register_forward_pre_hook(partial(record, block=block))
        for block, attention in enumerate(attentions)
        if blocks is None or block in blocks
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def blocks_with_bias(model: torch.nn.Module) -> list[int]:
    """Return the indices of the blocks whose attention has a position bias.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(model, PositionVisionTransformer):
        attentions: list[Any] = [block.attn for block in model.blocks]
        blocks = [block for block, attention in enumerate(attentions) if attention.position.has_bias]
        if blocks:
            return blocks
        problem = f'position={model.position_name!r} has no attention bias'
    else:
        problem = 'the model has no exchangeable position encoding'
    names = ', '.join(name for name, encoding in ENCODINGS.items() if encoding.overrides(*BIAS_HOOKS))
    raise ValueError(f'{problem}; encodings with one: {names}')


def trained_blocks(model: PositionVisionTransformer) -> list[int]:
    """Return the blocks with a bias that reaches the output, and so is trained.

    With class-token pooling nothing reads the patches after the last block, so a bias between patches has no effect
    there.
    """
    blocks = blocks_with_bias(model)
    last = len(model.blocks) - 1
    attention: Any = model.blocks[last].attn
    reaches_prefix_tokens = any(encoding.bias_has_prefix_tokens for encoding in attention.position.values())
    if model.global_pool == 'token' and not reaches_prefix_tokens and len(blocks) > 1:
        return [block for block in blocks if block != last]
    return blocks


@torch.inference_mode()
def attention_biases(
    model: PositionVisionTransformer,
    images: Tensor,
    blocks: Collection[int] | None = None,
) -> dict[int, Tensor]:
    """Compute the position bias between all patches, the sum of all encodings.

    Args:
        model: A model with a position bias.
        images: Images, (B, C, height, width).
        blocks: Indices of blocks that have one, None for all of them.

    Returns:
        Bias by block, (B, h, H, W, H, W): from the query patch at (row, column) to the key patch at (row, column).

    Raises:
        ValueError: If the model has no bias, or one that is not finite.
    """
    biases = {}
    wanted = blocks_with_bias(model) if blocks is None else blocks
    for block, inputs in record_attention_inputs(model, images, wanted).items():
        block_module: Any = model.blocks[block]
        bias = block_module.attn.position.bias(*inputs)
        batch, heads, length, _ = inputs.query.shape
        prefix = model.num_prefix_tokens
        patches = bias.expand(batch, heads, length, length)[:, :, prefix:, prefix:]
        if not patches.isfinite().all():
            raise ValueError(f'the bias of block {block} is not finite: are the weights those of this model?')
        biases[block] = patches.unflatten(3, inputs.grid).unflatten(2, inputs.grid).float()
    return biases
