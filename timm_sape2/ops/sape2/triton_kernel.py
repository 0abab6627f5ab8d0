"""SaPE2 attention in Triton, forward and backward, with the bias computed in the tile.

Memory is linear in the tokens: of the N x N logits and distances only one tile at a time exists. One program owns a
tile of queries (output, gradient of queries) or of keys (gradients of keys and values) and loops over the other side.

Distances come from differences, exact everywhere, for float32 inputs. For half-precision inputs they come from products
on tensor cores, which lose distances below about 1e-3 of the norms, as rounding a bias to bfloat16 does; signatures are
centred first, which changes no distance and leaves less to cancel. Gradients of signatures, with
`R = grad_logits / distances` the sum of `R_ij (u_i - u_j)` over j, always come from products: the rounding of these
hurts no more than the rounding of u.

Importing this module imports triton. operator.py makes an operator of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(16 * 2.0**-23)  # squared distances from products below this part of the norms are 0
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_rows(pointer, rows, count, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a matrix of `count` rows and SIZE columns, 0 outside of it: [rows, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    mask = ((rows >= 0) & (rows < count))[:, None] & (columns[None, :] < SIZE)
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, rows, count, stride, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] as rows of a matrix of `count` rows and SIZE columns, except what is outside of it."""
    columns = tl.arange(0, BLOCK)
    mask = ((rows >= 0) & (rows < count))[:, None] & (columns[None, :] < SIZE)
    address = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """Matrix product accumulated in float32."""
    if INTERPRETED:  # it takes bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _distances(points, own, other, count, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Distances between patches, 0 between a patch and itself and where one is a prefix token: [own, other]."""
    is_own, is_other = (own >= 0) & (own < count), (other >= 0) & (other < count)
    squares = tl.zeros([own.shape[0], other.shape[0]], tl.float32)
    if PRECISION == 'ieee':
        for column in range(SIZE):
            left = tl.load(points + own.to(tl.int64) * SIZE + column, mask=is_own, other=0.0)
            right = tl.load(points + other.to(tl.int64) * SIZE + column, mask=is_other, other=0.0)
            difference = left[:, None] - right[None, :]
            squares += difference * difference
    elif SIZE > 0:
        left = _load_rows(points, own, count, SIZE, SIZE, BLOCK)
        right = _load_rows(points, other, count, SIZE, SIZE, BLOCK)
        norms = tl.sum(left * left, 1)[:, None] + tl.sum(right * right, 1)[None, :]
        squares = norms - 2.0 * _dot(left, tl.trans(right), PRECISION)
        squares = tl.where(squares <= norms * ROUNDING, 0.0, squares)  # false for NaN, which must spread
    is_pair = is_own[:, None] & is_other[None, :] & (own[:, None] != other[None, :])
    return tl.sqrt(tl.where(is_pair, squares, 0.0))


@triton.jit
def _pull(
    total,
    mixed,
    grad_logits,
    distances,
    points,
    other,
    count,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile's part to both sums of `(sum_j R_ij) u_i - sum_j R_ij u_j`, `R = grad_logits / distances`."""
    if SIZE > 0:
        is_zero = distances == 0.0
        ratio = tl.where(is_zero, 0.0, grad_logits / tl.where(is_zero, 1.0, distances))
        total += tl.sum(ratio, 1)
        mixed += _dot(ratio, _load_rows(points, other, count, SIZE, SIZE, BLOCK), PRECISION)
    return total, mixed


@triton.jit
def _store_signature_gradient(
    gradient,
    total,
    mixed,
    points,
    own,
    count,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store the difference of both sums of `_pull`, or add it to what is there."""
    if SIZE > 0:
        tile = total[:, None] * _load_rows(points, own, count, SIZE, SIZE, BLOCK) - mixed
        if ADD:
            tile += _load_rows(gradient, own, count, SIZE, SIZE, BLOCK)
        _store_rows(gradient, own, count, SIZE, tile, SIZE, BLOCK)


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    row_points,
    column_points,
    output,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    heads,
    tokens,
    prefix,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute outputs and logarithms of the softmax denominators for a tile of queries."""
    tiles, patches = tl.cdiv(tokens, BLOCK_OWN), tokens - prefix
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    output += (image * tokens * heads + head) * DIM
    row_points += pair * patches * WIDTH
    column_points += pair * patches * HEIGHT

    own = tl.program_id(0) % tiles * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    query_tile = _load_rows(query, own, tokens, query_strides[2], DIM, BLOCK_DIM)
    highest = tl.full([BLOCK_OWN], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_OWN], tl.float32)
    mixed = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        key_tile = _load_rows(key, other, tokens, key_strides[2], DIM, BLOCK_DIM)
        logits = _dot(query_tile, tl.trans(key_tile), PRECISION) * scale
        logits += _distances(row_points, own - prefix, other - prefix, patches, WIDTH, BLOCK_WIDTH, PRECISION)
        logits += _distances(column_points, own - prefix, other - prefix, patches, HEIGHT, BLOCK_HEIGHT, PRECISION)
        logits = tl.where((other < tokens)[None, :], logits, float('-inf'))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        shift = tl.where(new_highest == float('-inf'), 0.0, new_highest)
        weights = tl.exp2((logits - shift[:, None]) * LOG2_E)
        shrink = tl.exp2((highest - shift) * LOG2_E)
        value_tile = _load_rows(value, other, tokens, value_strides[2], DIM, BLOCK_DIM)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + _dot(weights.to(value_tile.dtype), value_tile, PRECISION)
        highest = new_highest
    _store_rows(output, own, tokens, heads * DIM, mixed / total[:, None], DIM, BLOCK_DIM)
    tl.store(logsumexp + pair * tokens + own, highest + tl.log2(total) / LOG2_E, mask=own < tokens)


@triton.jit
def _backward_kernel(
    query,
    key,
    value,
    row_points,
    column_points,
    output,
    logsumexp,
    grad_output,
    delta,
    grad_own,
    grad_value,
    grad_row_points,
    grad_column_points,
    query_strides,
    key_strides,
    value_strides,
    heads,
    tokens,
    prefix,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
    OWNS_QUERIES: tl.constexpr,
):
    """Compute the gradients of a tile of queries (run first), or of keys and values, and of their signatures.

    The run for queries stores `delta = sum(output * grad_output)` and the signatures' gradients, the run for keys
    reads the one and adds to the others.
    """
    tiles, patches = tl.cdiv(tokens, BLOCK_OWN), tokens - prefix
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query += image * query_strides[0] + head * query_strides[1]
    key += image * key_strides[0] + head * key_strides[1]
    value += image * value_strides[0] + head * value_strides[1]
    output += (image * tokens * heads + head) * DIM
    grad_output += (image * tokens * heads + head) * DIM
    grad_own += (image * tokens * heads + head) * DIM
    grad_value += (image * tokens * heads + head) * DIM
    logsumexp += pair * tokens
    delta += pair * tokens
    row_points += pair * patches * WIDTH
    column_points += pair * patches * HEIGHT
    grad_row_points += pair * patches * WIDTH
    grad_column_points += pair * patches * HEIGHT

    own = tl.program_id(0) % tiles * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    if OWNS_QUERIES:
        own_tile = _load_rows(query, own, tokens, query_strides[2], DIM, BLOCK_DIM)
        own_mixed = _load_rows(grad_output, own, tokens, heads * DIM, DIM, BLOCK_DIM)
        output_tile = _load_rows(output, own, tokens, heads * DIM, DIM, BLOCK_DIM)
        own_delta = tl.sum(output_tile.to(tl.float32) * own_mixed.to(tl.float32), 1)
        tl.store(delta + own, own_delta, mask=own < tokens)
        own_logsumexp = tl.load(logsumexp + own, mask=own < tokens, other=float('inf'))
    else:
        own_tile = _load_rows(key, own, tokens, key_strides[2], DIM, BLOCK_DIM)
        own_mixed = _load_rows(value, own, tokens, value_strides[2], DIM, BLOCK_DIM)

    grad_own_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    grad_value_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    row_total = tl.zeros([BLOCK_OWN], tl.float32)
    row_mixed = tl.zeros([BLOCK_OWN, BLOCK_WIDTH], tl.float32)
    column_total = tl.zeros([BLOCK_OWN], tl.float32)
    column_mixed = tl.zeros([BLOCK_OWN, BLOCK_HEIGHT], tl.float32)
    for start in range(0, tokens, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        rows = _distances(row_points, own - prefix, other - prefix, patches, WIDTH, BLOCK_WIDTH, PRECISION)
        columns = _distances(column_points, own - prefix, other - prefix, patches, HEIGHT, BLOCK_HEIGHT, PRECISION)
        if OWNS_QUERIES:
            other_tile = _load_rows(key, other, tokens, key_strides[2], DIM, BLOCK_DIM)
            other_mixed = _load_rows(value, other, tokens, value_strides[2], DIM, BLOCK_DIM)
            shift, expected = own_logsumexp[:, None], own_delta[:, None]
        else:
            other_tile = _load_rows(query, other, tokens, query_strides[2], DIM, BLOCK_DIM)
            other_mixed = _load_rows(grad_output, other, tokens, heads * DIM, DIM, BLOCK_DIM)
            shift = tl.load(logsumexp + other, mask=other < tokens, other=float('inf'))[None, :]
            expected = tl.load(delta + other, mask=other < tokens, other=0.0)[None, :]
        logits = _dot(own_tile, tl.trans(other_tile), PRECISION) * scale + rows + columns
        weights = tl.exp2((logits - shift) * LOG2_E)
        weights = tl.where((own < tokens)[:, None] & (other < tokens)[None, :], weights, 0.0)
        if not OWNS_QUERIES:
            grad_value_tile += _dot(weights.to(other_mixed.dtype), other_mixed, PRECISION)
        grad_logits = weights * (_dot(own_mixed, tl.trans(other_mixed), PRECISION) - expected)
        grad_own_tile += _dot(grad_logits.to(other_tile.dtype), other_tile, PRECISION)
        row_total, row_mixed = _pull(
            row_total, row_mixed, grad_logits, rows, row_points, other - prefix, patches, WIDTH, BLOCK_WIDTH, PRECISION
        )
        column_total, column_mixed = _pull(
            column_total,
            column_mixed,
            grad_logits,
            columns,
            column_points,
            other - prefix,
            patches,
            HEIGHT,
            BLOCK_HEIGHT,
            PRECISION,
        )
    _store_rows(grad_own, own, tokens, heads * DIM, grad_own_tile * scale, DIM, BLOCK_DIM)
    if not OWNS_QUERIES:
        _store_rows(grad_value, own, tokens, heads * DIM, grad_value_tile, DIM, BLOCK_DIM)
    _store_signature_gradient(
        grad_row_points,
        row_total,
        row_mixed,
        row_points,
        own - prefix,
        patches,
        WIDTH,
        BLOCK_WIDTH,
        ADD=not OWNS_QUERIES,
    )
    _store_signature_gradient(
        grad_column_points,
        column_total,
        column_mixed,
        column_points,
        own - prefix,
        patches,
        HEIGHT,
        BLOCK_HEIGHT,
        ADD=not OWNS_QUERIES,
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        query: Queries, (B, h, P + N, d), with stride 1 along d.
        key: Keys, likewise.
        value: Values, likewise.
        row_signature: Row signatures, (B, h, N, W), float32, W = 0 for no rows.
        column_signature: Column signatures, (B, h, N, H), float32, H = 0 for no columns.
        prefix: Tokens P without a bias.
        scale: Factor of the dot products.

    Returns:
        Output (B, h, P + N, d), laid out as (B, P + N, h, d), and the logarithms of the softmax denominators,
        (B, h, P + N), float32.
    """
    batch, heads, tokens, dim = query.shape
    output = query.new_empty(batch, tokens, heads, dim)
    logsumexp = torch.empty(batch, heads, tokens, device=query.device, dtype=torch.float32)
    settings, grid = _settings(query, row_signature, column_signature)
    _forward_kernel[grid](
        query,
        key,
        value,
        _points(row_signature, query.dtype),
        _points(column_signature, query.dtype),
        output,
        logsumexp,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        heads,
        tokens,
        prefix,
        scale,
        **settings,
    )
    return output.transpose(1, 2), logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        grad_output: Gradient of the output, (B, h, P + N, d).
        query: As in `forward`, and so are the next four.
        key: See `query`.
        value: See `query`.
        row_signature: See `query`.
        column_signature: See `query`.
        output: First result of `forward`.
        logsumexp: Second result of `forward`.
        prefix: As in `forward`.
        scale: As in `forward`.

    Returns:
        Gradients of queries, keys and values, laid out like the output, and of row and column signatures.
    """
    batch, heads, tokens, dim = query.shape
    grad_query, grad_key, grad_value = (query.new_empty(batch, tokens, heads, dim) for _ in range(3))
    row_points, column_points = _points(row_signature, query.dtype), _points(column_signature, query.dtype)
    grad_row, grad_column = torch.empty_like(row_points), torch.empty_like(column_points)
    delta = torch.empty_like(logsumexp)
    grad_output = grad_output.transpose(1, 2).contiguous()
    settings, grid = _settings(query, row_signature, column_signature)
    for grad_own, owns_queries in ((grad_query, True), (grad_key, False)):
        _backward_kernel[grid](
            query,
            key,
            value,
            row_points,
            column_points,
            output,
            logsumexp,
            grad_output,
            delta,
            grad_own,
            grad_value,
            grad_row,
            grad_column,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            heads,
            tokens,
            prefix,
            scale,
            **settings,
            OWNS_QUERIES=owns_queries,
        )
    return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2), grad_row, grad_column


def _points(signature: Tensor, dtype: torch.dtype) -> Tensor:
    """Signatures as the kernels read them: contiguous, and centred where distances come from products."""
    if dtype == torch.float32 or signature.shape[-1] == 0:
        return signature.contiguous()
    return signature.contiguous() - signature.mean(-2, keepdim=True)


def _settings(query: Tensor, row_signature: Tensor, column_signature: Tensor) -> tuple[dict[str, Any], tuple[int]]:
    """Compile-time arguments of the kernels, and their launch grid."""
    batch, heads, tokens, dim = query.shape
    width, height = row_signature.shape[-1], column_signature.shape[-1]
    block_dim, block_width, block_height = (max(16, triton.next_power_of_2(size)) for size in (dim, width, height))
    by_differences = query.dtype == torch.float32 or torch.version.hip is not None
    small = not by_differences and block_dim <= 64 and block_width + block_height <= 64
    block = 64 if small else 32
    settings = {
        'DIM': dim,
        'WIDTH': width,
        'HEIGHT': height,
        'BLOCK_DIM': block_dim,
        'BLOCK_WIDTH': block_width,
        'BLOCK_HEIGHT': block_height,
        'BLOCK_OWN': block,
        'BLOCK_OTHER': 32,
        'PRECISION': 'ieee' if by_differences else 'tf32x3',
        'num_warps': 4,
        'num_stages': 2,
    }
    return settings, (batch * heads * triton.cdiv(tokens, block),)
