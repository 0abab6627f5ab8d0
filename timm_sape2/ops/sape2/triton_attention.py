"""The Triton kernels of attention with a bias of distances between points, which triton_signatures.py makes.

Distances come from differences, exact everywhere, for float32 inputs and for very short lines. Otherwise they
come from products on tensor cores, in TF32: squared distances that are negative become 0 without a mask. What is lost
are distances below about 2e-3 of the norms.

In the backward pass one program owns a tile of tokens as queries *and* as keys. Distances are symmetric, so each is
computed once for both. Where that takes more registers than there are, `share_out` gives the work to more launches. As
factors, points are followed by a 1 where there is room, so that one product gives both sums of the gradient of a
point, `(sum_j R_ij) u_i - sum_j R_ij u_j` with `R = grad_logits / distances`.
"""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_tiles import INTERPRETED, LOG2_E, MOST_REGISTERS, UNIT, architecture, dot, load_rows, store_rows


@triton.jit
def _others(start, tokens, BLOCK: tl.constexpr):
    """Return tokens from `start`, where there are no more the last, and -inf for these, else 0."""
    other = start + tl.arange(0, BLOCK)
    return tl.minimum(other, tokens - 1), tl.where(other < tokens, 0.0, float('-inf'))


@triton.jit
def _own_points(points, norms, own, SIZE: tl.constexpr, BLOCK: tl.constexpr, PITCH: tl.constexpr):
    """Points times -2, with what adds the norms of others to products with these, and norms."""
    tile = load_rows(points, own, None, PITCH, BLOCK, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    tile = tl.where(column < SIZE, tile * -2.0, tl.where((column < SIZE + 2) & (SIZE + 2 <= BLOCK), 1.0, 0.0))
    return tile, tl.load(norms + own)


@triton.jit
def _squares(
    own_points,
    own_norms,
    points,
    norms,
    own,
    other,
    tokens,
    prefix,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PITCH: tl.constexpr,
    DISTANCES: tl.constexpr,
):
    """Squared distances, not above 0 where there is none: [own, other]."""
    if DISTANCES == 'differences':
        squares = tl.zeros([own.shape[0], other.shape[0]], tl.float32)
        for column in range(SIZE):
            left = tl.load(points + own * PITCH + column, mask=own < tokens, other=0.0)
            right = tl.load(points + other * PITCH + column)
            difference = left[:, None] - right[None, :]
            squares += difference * difference
        squares = tl.where((own >= prefix)[:, None] & (other >= prefix)[None, :], squares, 0.0)
    else:
        other_points = load_rows(points, other, None, PITCH, BLOCK, BLOCK)
        squares = tl.dot(own_points, tl.trans(other_points), input_precision=DISTANCES) + own_norms[:, None]
        if SIZE + 2 > BLOCK:
            squares += tl.load(norms + other)[None, :]
    return squares


@triton.jit
def _root(squares, DISTANCES: tl.constexpr):
    """Distances, 0 where squares are negative; NaN stays."""
    if DISTANCES == 'differences':
        distances = tl.sqrt_rn(squares)  # exact, or a large bias would not be that of the backward pass
    else:
        distances = tl.sqrt(tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return distances


@triton.jit
def _root_and_inverse(squares, DISTANCES: tl.constexpr):
    """Distances and their inverses, both 0 where squares are not above 0; NaN stays."""
    if DISTANCES == 'differences':
        distances = tl.sqrt_rn(squares)
        inverse = 1.0 / tl.where(distances == 0.0, float('inf'), distances)
    else:
        inverse = tl.rsqrt(tl.where(squares <= 0.0, float('inf'), squares))
        distances = squares * inverse
    return distances, inverse


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    points,
    norms,
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
    DISTANCES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """Compute outputs and logarithms (to base 2) of the softmax denominators for a tile of queries."""
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query += (image * query_strides[0] + head * query_strides[1]) * UNIT
    key += (image * key_strides[0] + head * key_strides[1]) * UNIT
    value += (image * value_strides[0] + head * value_strides[1]) * UNIT
    output += (image * tokens * heads + head) * DIM
    row_points, row_norms = points + pair * tokens * (BLOCK_WIDTH + BLOCK_HEIGHT), norms + pair * 2 * tokens
    column_points, column_norms = row_points + BLOCK_WIDTH, row_norms + tokens

    own = tl.program_id(0) % tiles * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    is_own = own < tokens
    query_tile = load_rows(query, own, is_own, query_strides[2] * UNIT, DIM, BLOCK_DIM)
    inside = tl.minimum(own, tokens - 1)
    if BLOCK_WIDTH > 0:
        own_rows, own_row_norms = _own_points(
            row_points, row_norms, inside, WIDTH, BLOCK_WIDTH, BLOCK_WIDTH + BLOCK_HEIGHT
        )
    if BLOCK_HEIGHT > 0:
        own_columns, own_column_norms = _own_points(
            column_points, column_norms, inside, HEIGHT, BLOCK_HEIGHT, BLOCK_WIDTH + BLOCK_HEIGHT
        )
    highest = tl.full([BLOCK_OWN], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_OWN], tl.float32)
    mixed = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_OTHER):
        other, outside = _others(start, tokens, BLOCK_OTHER)
        key_tile = load_rows(key, other, None, key_strides[2] * UNIT, DIM, BLOCK_DIM)
        bias = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        if BLOCK_WIDTH > 0:
            squares = _squares(
                own_rows,
                own_row_norms,
                row_points,
                row_norms,
                own,
                other,
                tokens,
                prefix,
                WIDTH,
                BLOCK_WIDTH,
                BLOCK_WIDTH + BLOCK_HEIGHT,
                DISTANCES,
            )
            bias = _root(squares, DISTANCES)
        if BLOCK_HEIGHT > 0:
            squares = _squares(
                own_columns,
                own_column_norms,
                column_points,
                column_norms,
                own,
                other,
                tokens,
                prefix,
                HEIGHT,
                BLOCK_HEIGHT,
                BLOCK_WIDTH + BLOCK_HEIGHT,
                DISTANCES,
            )
            bias += _root(squares, DISTANCES)
        bias = tl.where((own >= prefix)[:, None], bias, 0.0)  # NaN of a patch stays away from prefix tokens
        logits = dot(query_tile, tl.trans(key_tile)) * scale + bias + outside[None, :]
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        value_tile = load_rows(value, other, None, value_strides[2] * UNIT, DIM, BLOCK_DIM)
        mixed = dot(weights.to(value_tile.dtype), value_tile, mixed * shrink[:, None])
        highest = new_highest
    store_rows(output, own, is_own, heads * DIM, mixed / total[:, None], DIM, BLOCK_DIM)
    tl.store(logsumexp + pair * tokens + own, highest + tl.log2(total), mask=is_own)


@triton.jit
def _round_points(
    points,
    factors,
    own,
    is_own,
    pitch,
    factor_pitch,
    SIZE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Write points as factors, with a 1 behind them where there is room."""
    if FACTOR > 0:
        column = tl.arange(0, FACTOR)[None, :]
        tile = tl.where(
            column < SIZE, load_rows(points, own, is_own, pitch, FACTOR, FACTOR), tl.where(column == SIZE, 1.0, 0.0)
        )
        store_rows(factors, own, is_own, factor_pitch, tile, FACTOR, FACTOR)


@triton.jit
def delta_kernel(
    output,
    grad_output,
    points,
    delta,
    factors,
    grad_output_strides,
    heads,
    tokens,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    FACTOR_WIDTH: tl.constexpr,
    FACTOR_HEIGHT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Compute `delta = sum(output * grad_output)` of a few tokens, and round their points."""
    pair, own = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    image, head, is_own = pair // heads, pair % heads, own < tokens
    output += (image * tokens * heads + head) * DIM
    grad_output += (image * grad_output_strides[0] + head * grad_output_strides[1]) * UNIT
    tile = load_rows(output, own, is_own, heads * DIM, DIM, BLOCK_DIM).to(tl.float32)
    tile *= load_rows(grad_output, own, is_own, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM).to(tl.float32)
    tl.store(delta + pair * tokens + own, tl.sum(tile, 1), mask=is_own)
    if HAS_FACTORS:
        pitch, factor_pitch = BLOCK_WIDTH + BLOCK_HEIGHT, FACTOR_WIDTH + FACTOR_HEIGHT
        points += pair * tokens * pitch
        factors += pair * tokens * factor_pitch
        _round_points(points, factors, own, is_own, pitch, factor_pitch, WIDTH, FACTOR_WIDTH)
        points += BLOCK_WIDTH
        factors += FACTOR_WIDTH
        _round_points(points, factors, own, is_own, pitch, factor_pitch, HEIGHT, FACTOR_HEIGHT)


@triton.jit
def _store_pull(
    gradient,
    factors,
    own,
    is_own,
    total,
    mixed,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PITCH: tl.constexpr,
):
    """Store `total * u_i - mixed`, where the total may be the last sum that is mixed."""
    if SIZE < BLOCK:
        total = tl.sum(tl.where((tl.arange(0, BLOCK) == SIZE)[None, :], mixed, 0.0), 1)
    own_factors = load_rows(factors, own, is_own, PITCH, BLOCK, BLOCK).to(tl.float32)
    store_rows(gradient, own, is_own, PITCH, total[:, None] * own_factors - mixed, BLOCK, BLOCK)


@triton.jit
def _pull(
    grad_logits,
    inverse,
    total,
    mixed,
    factors,
    other,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PITCH: tl.constexpr,
):
    """Add a tile's part to both sums of `(sum_j R_ij) u_i - sum_j R_ij u_j`, `R = grad_logits * inverse`."""
    ratio, other_factors = grad_logits * inverse, load_rows(factors, other, None, PITCH, BLOCK, BLOCK)
    if SIZE == BLOCK:
        total += tl.sum(ratio, 1)
    return total, dot(ratio.to(other_factors.dtype), other_factors, mixed)


@triton.jit
def backward_kernel(
    query,
    key,
    value,
    points,
    norms,
    factors,
    logsumexp,
    delta,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    grad_points,
    query_strides,
    key_strides,
    value_strides,
    grad_output_strides,
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
    FACTOR_WIDTH: tl.constexpr,
    FACTOR_HEIGHT: tl.constexpr,
    DISTANCES: tl.constexpr,
    AS_QUERIES: tl.constexpr,
    AS_KEYS: tl.constexpr,
    OF_INPUTS: tl.constexpr,
    OF_POINTS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """Compute the gradients of a tile of tokens, and of their points, as queries, as keys, or as both."""
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query += (image * query_strides[0] + head * query_strides[1]) * UNIT
    key += (image * key_strides[0] + head * key_strides[1]) * UNIT
    value += (image * value_strides[0] + head * value_strides[1]) * UNIT
    grad_output += (image * grad_output_strides[0] + head * grad_output_strides[1]) * UNIT
    offset, row = (image * tokens * heads + head) * DIM, heads * DIM
    row_points, row_norms = points + pair * tokens * (BLOCK_WIDTH + BLOCK_HEIGHT), norms + pair * 2 * tokens
    column_points, column_norms = row_points + BLOCK_WIDTH, row_norms + tokens
    row_factors = factors + pair * tokens * (FACTOR_WIDTH + FACTOR_HEIGHT)
    column_factors = row_factors + FACTOR_WIDTH
    grad_points += pair * tokens * (FACTOR_WIDTH + FACTOR_HEIGHT)
    logsumexp += pair * tokens
    delta += pair * tokens

    own = tl.program_id(0) % tiles * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    is_own = own < tokens
    inside = tl.minimum(own, tokens - 1)
    if BLOCK_WIDTH > 0:
        own_rows, own_row_norms = _own_points(
            row_points, row_norms, inside, WIDTH, BLOCK_WIDTH, BLOCK_WIDTH + BLOCK_HEIGHT
        )
    if BLOCK_HEIGHT > 0:
        own_columns, own_column_norms = _own_points(
            column_points, column_norms, inside, HEIGHT, BLOCK_HEIGHT, BLOCK_WIDTH + BLOCK_HEIGHT
        )
    row_total = tl.zeros([BLOCK_OWN], tl.float32)
    column_total = tl.zeros([BLOCK_OWN], tl.float32)
    if BLOCK_WIDTH > 0:
        row_mixed = tl.zeros([BLOCK_OWN, FACTOR_WIDTH], tl.float32)
    if BLOCK_HEIGHT > 0:
        column_mixed = tl.zeros([BLOCK_OWN, FACTOR_HEIGHT], tl.float32)
    if AS_QUERIES:
        own_query = load_rows(query, own, is_own, query_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_grad_output = load_rows(grad_output, own, is_own, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_logsumexp = tl.load(logsumexp + own, mask=is_own, other=float('inf'))
        own_delta = tl.load(delta + own, mask=is_own, other=0.0)
        grad_query_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    if AS_KEYS:
        own_key = load_rows(key, own, is_own, key_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_value = load_rows(value, own, is_own, value_strides[2] * UNIT, DIM, BLOCK_DIM)
        grad_key_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
        grad_value_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_OTHER):
        other, outside = _others(start, tokens, BLOCK_OTHER)
        bias = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32) + outside[None, :]
        if BLOCK_WIDTH > 0:
            squares = _squares(
                own_rows,
                own_row_norms,
                row_points,
                row_norms,
                own,
                other,
                tokens,
                prefix,
                WIDTH,
                BLOCK_WIDTH,
                BLOCK_WIDTH + BLOCK_HEIGHT,
                DISTANCES,
            )
            distances, row_inverse = _root_and_inverse(squares, DISTANCES)
            bias += distances
        if BLOCK_HEIGHT > 0:
            squares = _squares(
                own_columns,
                own_column_norms,
                column_points,
                column_norms,
                own,
                other,
                tokens,
                prefix,
                HEIGHT,
                BLOCK_HEIGHT,
                BLOCK_WIDTH + BLOCK_HEIGHT,
                DISTANCES,
            )
            distances, column_inverse = _root_and_inverse(squares, DISTANCES)
            bias += distances
        grad_logits = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        if AS_QUERIES:
            other_key = load_rows(key, other, None, key_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_value = load_rows(value, other, None, value_strides[2] * UNIT, DIM, BLOCK_DIM)
            weights = tl.exp2(dot(own_query, tl.trans(other_key)) * scale + bias - own_logsumexp[:, None])
            grad_logits = weights * (dot(own_grad_output, tl.trans(other_value)) - own_delta[:, None])
            if OF_INPUTS:
                grad_query_tile = dot(grad_logits.to(other_key.dtype), other_key, grad_query_tile)
        if AS_KEYS:
            other_query = load_rows(query, other, None, query_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_grad_output = load_rows(grad_output, other, None, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_logsumexp = tl.load(logsumexp + other)
            other_delta = tl.load(delta + other)
            weights = tl.exp2(dot(own_key, tl.trans(other_query)) * scale + bias - other_logsumexp[None, :])
            if OF_INPUTS:
                grad_value_tile = dot(weights.to(other_query.dtype), other_grad_output, grad_value_tile)
            grad_other = weights * (dot(own_value, tl.trans(other_grad_output)) - other_delta[None, :])
            if OF_INPUTS:
                grad_key_tile = dot(grad_other.to(other_query.dtype), other_query, grad_key_tile)
            grad_logits += grad_other
        if BLOCK_WIDTH > 0 and OF_POINTS:
            row_total, row_mixed = _pull(
                grad_logits,
                row_inverse,
                row_total,
                row_mixed,
                row_factors,
                other,
                WIDTH,
                FACTOR_WIDTH,
                FACTOR_WIDTH + FACTOR_HEIGHT,
            )
        if BLOCK_HEIGHT > 0 and OF_POINTS:
            column_total, column_mixed = _pull(
                grad_logits,
                column_inverse,
                column_total,
                column_mixed,
                column_factors,
                other,
                HEIGHT,
                FACTOR_HEIGHT,
                FACTOR_WIDTH + FACTOR_HEIGHT,
            )
    slope = scale / LOG2_E
    if AS_QUERIES and OF_INPUTS:
        store_rows(grad_query + offset, own, is_own, row, grad_query_tile * slope, DIM, BLOCK_DIM)
    if AS_KEYS and OF_INPUTS:
        store_rows(grad_key + offset, own, is_own, row, grad_key_tile * slope, DIM, BLOCK_DIM)
        store_rows(grad_value + offset, own, is_own, row, grad_value_tile, DIM, BLOCK_DIM)
    if BLOCK_WIDTH > 0 and OF_POINTS:
        _store_pull(
            grad_points,
            row_factors,
            own,
            is_own,
            row_total,
            row_mixed,
            WIDTH,
            FACTOR_WIDTH,
            FACTOR_WIDTH + FACTOR_HEIGHT,
        )
    if BLOCK_HEIGHT > 0 and OF_POINTS:
        _store_pull(
            grad_points + FACTOR_WIDTH,
            column_factors,
            own,
            is_own,
            column_total,
            column_mixed,
            HEIGHT,
            FACTOR_HEIGHT,
            FACTOR_WIDTH + FACTOR_HEIGHT,
        )


class Role(NamedTuple):
    """What a launch of the backward kernel does for the tokens that a program owns."""

    AS_QUERIES: bool  # walk over keys
    AS_KEYS: bool  # walk over queries
    OF_INPUTS: bool = True  # gradients of queries, keys and values
    OF_POINTS: bool = True


def _config(own: int, other: int, warps: int, all_registers: bool = False) -> triton.Config:
    """Return tiles and warps, and whether a thread may take all registers where ptxas would spill to take fewer."""
    most = MOST_REGISTERS if all_registers else None
    return triton.Config({'BLOCK_OWN': own, 'BLOCK_OTHER': other}, num_warps=warps, num_stages=2, maxnreg=most)


def forward_configs(dim: int, block_points: int, by_differences: bool) -> list[triton.Config]:
    """List configurations that are worth a try and take no more registers than there are."""
    if by_differences:
        return [_config(32, 32 if dim <= 64 else 16, 8, all_registers=True)]
    if dim <= 64 and block_points <= 32:
        small = _config(64, 32, 4, all_registers=dim < 32)
        return [small, _config(128, 64, 8) if _is_hopper() else _config(128, 32, 8)]
    return [_config(64, 32, 4) if dim <= 64 or _is_hopper() else _config(32, 32, 4, all_registers=True)]


def backward_configs(dim: int, block_points: int, by_differences: bool) -> list[triton.Config]:
    """List configurations as `forward_configs` does."""
    if by_differences:
        return [_config(16, 16, 8, all_registers=True)]
    if dim > 64 and len(share_out(dim, block_points, by_differences)) > 2 and not _is_hopper():
        return [_config(32, 16, 2, all_registers=True)]
    return [_config(64, 16, 4, all_registers=dim > 64 or block_points > 32)]


def share_out(dim: int, block_points: int, by_differences: bool) -> list[Role]:
    """Share the work of the backward kernel out to as few launches as there are registers for."""
    one, two = [Role(True, True)], [Role(True, False), Role(False, True)]
    of_inputs = [role._replace(OF_POINTS=False) for role in two]
    three = [Role(True, True, OF_INPUTS=False), *of_inputs]
    if by_differences:
        return two
    if block_points > 32 and dim > 64:
        return [*(role._replace(OF_INPUTS=False) for role in two), *of_inputs]
    if block_points > (32 if dim <= 64 else 16):
        return three
    if _is_hopper():
        return one if dim <= 64 else two
    needs_three = 32 < dim < 64 or (dim > 64 and architecture() != 80)  # a few bytes would spill
    return three if needs_three else two


def _is_hopper() -> bool:
    """Tell whether operands of products come from shared memory, which leaves more registers."""
    return architecture() in (90, 100)


@functools.cache
def tuned(kernel: Any, list_configs: Any, dim: int, block_points: int, by_differences: bool) -> Any:
    """A kernel that takes the fastest configuration that there is for these sizes, found at the first launch."""
    configs = list_configs(dim, block_points, by_differences)
    configs = configs[:1] if INTERPRETED.value else configs
    return triton.autotune(configs, key=['DIM', 'WIDTH', 'HEIGHT'], cache_results=True)(kernel)
