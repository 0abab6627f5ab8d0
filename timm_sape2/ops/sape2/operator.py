"""The Triton kernels as a PyTorch operator with gradients, for which torch.compile needs not break the graph."""

from typing import Any

import torch
from torch import Tensor

from .inputs import distinct_inputs, empty_like_output

LONGEST_IN_REGISTERS = 64
SHORTEST_FOR_PRODUCTS = 4
UNIT_OF_STRIDES = 8  # numbers: the 16 bytes that a GPU loads at once are 8 of half precision


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    logit_query: Tensor,
    logit_key: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    target: str,
    scale: float,
) -> Tensor:
    """Attention with the bias of SaPE2; the arguments are those of `sape2_attention`, with at least one table.

    Returns:
        Attention output, (B, h, P + N, d), laid out as (B, P + N, h, d). It cannot be differentiated twice.
    """
    tensors, gates = distinct_inputs(query, key, value, gate_key, logit_query, logit_key)
    return _attention(*tensors, row_table, column_table, *grid, num_prefix_tokens, gates, target, scale)[0]


@torch.library.custom_op('timm_sape2::sape2_attention', mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    logit_query: Tensor | None,
    logit_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    height: int,
    width: int,
    num_prefix_tokens: int,
    gates: str,
    target: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return attention, and what its backward pass needs: see `triton_kernel.forward`.

    Args:
        query: Queries of signatures, (B, h, P + N, d), float32, bfloat16 or float16.
        key: Keys of signatures, likewise.
        value: Values, likewise.
        gate_key: What gates are read from if from something else than keys, likewise.
        logit_query: Queries of logits if they are others, likewise.
        logit_key: Keys of logits if they are others, likewise.
        row_table: Position embeddings along rows, (n, d).
        column_table: Position embeddings along columns, (n, d).
        height: Rows H of patches.
        width: Columns W of patches.
        num_prefix_tokens: Tokens P before the patches.
        gates: 'none' for gates of 1, 'key' or 'other'.
        target: 'k' or 'q'.
        scale: Factor of the dot products.
    """
    from . import triton_kernel

    tensors = _with_strides_in_units(query, key, value, gate_key, logit_query, logit_key, row_table, column_table)
    problem = triton_kernel.Problem._make([*tensors, height, width, num_prefix_tokens, gates, target, scale])
    with torch.cuda.device_of(query):
        return triton_kernel.forward(problem)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_table, column_table, height, width = others[3:7]
    lines = 0 if row_table is None else width, 0 if column_table is None else height
    exact = has_exact_distances(lines, query.dtype)
    pitch = sum(length_of_points(size, exact) for size in lines)
    batch, heads, tokens, _ = query.shape
    logsumexp, points, norms = (
        query.new_empty(batch, heads, *shape, dtype=torch.float32)
        for shape in ((tokens,), (tokens, pitch), (2, tokens))
    )
    return empty_like_output(value), logsumexp, points, norms


@torch.library.custom_op('timm_sape2::sape2_attention_backward', mutates_args=())
def _attention_backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    points: Tensor,
    norms: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    logit_query: Tensor | None,
    logit_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    height: int,
    width: int,
    num_prefix_tokens: int,
    gates: str,
    target: str,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of the tensors that went into attention, without those that are None."""
    from . import triton_kernel

    tensors = _with_strides_in_units(query, key, value, gate_key, logit_query, logit_key, row_table, column_table)
    problem = triton_kernel.Problem._make([*tensors, height, width, num_prefix_tokens, gates, target, scale])
    (grad_output,) = _with_strides_in_units(grad_output)
    with torch.cuda.device_of(query):
        grads = triton_kernel.backward(problem, grad_output, output, logsumexp, points, norms)
    return [grad for grad in grads if grad is not None]


@_attention_backward.register_fake
def _(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, points: Tensor, norms: Tensor, *inputs: Any
) -> list[Tensor]:
    tensors, tables = inputs[:6], inputs[6:8]
    return [
        *(empty_like_output(x) for x in tensors if x is not None),
        *(x.new_empty(x.shape) for x in tables if x is not None),
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs[:8])


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(_attention_backward(grad_output, *tensors, *ctx.options))
    return (*(None if x is None else next(found) for x in tensors[4:]), *(None for _ in ctx.options))


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _with_strides_in_units(*tensors: Any) -> list[Any]:
    """Copy what has other strides than 1 along channels and multiples of UNIT_OF_STRIDES elsewhere."""
    return [x if x is None or _has_strides_in_units(x) else x.contiguous() for x in tensors]


def _has_strides_in_units(x: Tensor) -> bool:
    *outer, last = (stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    return last == 1 and all(stride % UNIT_OF_STRIDES == 0 for stride in outer)


def padded(size: int) -> int:
    """Return the next power of 2, from 16 on, and 0 for 0."""
    return max(16, 1 << (size - 1).bit_length()) if size > 0 else 0


def has_exact_distances(lines: tuple[int, int], dtype: torch.dtype) -> bool:
    """Tell whether distances come from differences.

    They do for float32, and for lines so short that distances may be smaller than what products lose.
    """
    used = [size for size in lines if size > 0]
    return dtype == torch.float32 or min(used) < SHORTEST_FOR_PRODUCTS


def length_of_points(size: int, exact: bool) -> int:
    """Return how many numbers a point is in memory, along lines of `size`.

    Where distances come from products the squared norm follows in two numbers, unless this took too many registers.
    """
    with_norm = 0 if exact or size == 0 else padded(size + 2)
    return with_norm if 0 < with_norm <= LONGEST_IN_REGISTERS else padded(size)
