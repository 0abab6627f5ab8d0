"""What the attention of a block computes its position bias from."""

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..models.vit import PositionAttention, PositionVisionTransformer


class AttentionInputs(NamedTuple):
    """Queries and keys after normalisation, and values, (B, h, P + N, d) each, and the grid of the N patches."""

    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int]


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
        batch, length, _ = tokens.shape
        qkv = attention.qkv(tokens).reshape(batch, length, 3, attention.num_heads, attention.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        recorded[block] = AttentionInputs(attention.q_norm(query), attention.k_norm(key), value, grid)

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
