"""SaPE2 attention in Triton: gates, positions, signatures, distances and attention, forward and backward.

Memory is linear in the tokens: of the N x N logits and distances only one tile at a time exists. Forward there are two
launches: the signatures of all patches, then attention with the bias that they make. Backward there are three: sums
that the softmax's gradient needs, attention, and signatures.

Signatures are kept as *points*: times log2(e), so that exponentials are powers of 2, moved near to the origin, which
changes no distance, and padded. Where there is room behind it, a point is followed by a 1, so that one product gives
both sums of the gradient of a signature, `(sum_j R_ij) u_i - sum_j R_ij u_j` with `R = grad_logits / distances`.

Distances come from differences, exact everywhere, for float32 inputs and for very short lines. Otherwise they
come from products on tensor cores: points are cut off to the 11 bits of TF32, so that products are exact, and their
squared norms are kept a little too short, so that the squared distance of a patch to itself, and all that rounding
could have made, is negative and becomes 0 without a mask. What is lost are distances below about 2e-3 of the norms.

In the backward pass one program owns a tile of tokens as queries *and* as keys. Distances are symmetric, so each is
computed once for both. Where that takes more registers than there are, `_roles` shares it out to more launches.

Importing this module imports triton. operator.py makes an operator of it.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .operator import UNIT_OF_STRIDES, has_exact_distances, length_of_points, padded

LOG2_E = tl.constexpr(1.4426950408889634)
KEPT = tl.constexpr(1 - 2.0**-19)  # of a squared norm
NO_POINT = tl.constexpr(-1e30)  # squared norm of what has no distance to anything
UNIT = tl.constexpr(UNIT_OF_STRIDES)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LONGEST_FOR_TRIANGLES = tl.constexpr(32)  # lines whose sums are products with triangles of ones
LINES = 8  # of the grid, whose signatures one program computes


@triton.jit
def _load(pointer, rows, is_row, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a matrix of SIZE columns, 0 outside of it: [rows, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if is_row is None and SIZE == BLOCK:
        tile = tl.load(pointers)
    else:
        mask = (columns < SIZE)[None, :]
        if is_row is not None:
            mask = mask & is_row[:, None]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(pointer, rows, is_row, stride, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] as rows of a matrix of SIZE columns, except what is outside of it."""
    columns = tl.arange(0, BLOCK)
    mask = is_row[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _add(pointer, rows, is_row, stride, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Add [rows, BLOCK] to rows of a matrix of SIZE columns."""
    there = _load(pointer, rows, is_row, stride, SIZE, BLOCK)
    _store(pointer, rows, is_row, stride, there.to(tl.float32) + tile, SIZE, BLOCK)


@triton.jit
def _dot(left, right, sums=None):
    """Matrix product accumulated in float32."""
    if INTERPRETED:  # it takes bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision='ieee')


@triton.jit
def _cut_off(x):
    """Set the last 13 bits of float32 to 0, which TF32 does not have."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _lines_along(axis, width, height):
    """Length and number of lines along an axis (0: rows), and steps between patches of a line and between lines."""
    length, lines = tl.where(axis == 0, width, height), tl.where(axis == 0, height, width)
    return length, lines, tl.where(axis == 0, 1, width), tl.where(axis == 0, width, 1)


@triton.jit
def _read_line(query, gate_key, content, table, t, length, count, scale, GATES: tl.constexpr):
    """Steps 1 to 4 along a line: gates, their sums, positions, fractions, scores below and slopes, [x, t] each."""
    if GATES == 'none':
        gates = tl.zeros([t.shape[0], t.shape[0]], tl.float32) + 1.0
    else:
        gates = 1.0 / (1.0 + tl.exp2(_dot(query, tl.trans(gate_key)) * (scale * -LOG2_E)))
    gates = tl.where((t < length)[None, :], gates, 0.0)
    if t.shape[0] > LONGEST_FOR_TRIANGLES:
        sums = tl.cumsum(gates, 1, reverse=True)
    else:
        # sums by products on tensor cores: two halves have the bits of float32 numbers below 1
        is_later = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(tl.float16)
        half = gates.to(tl.float16)
        rest = (gates - half.to(tl.float32)).to(tl.float16)
        sums = _dot(half, is_later, _dot(rest, is_later))
    positions = tl.minimum(sums, count - 1.0, propagate_nan=tl.PropagateNan.ALL)
    index = tl.minimum(tl.maximum(positions.to(tl.int32), 0), count - 2)
    scores = _dot(content, tl.trans(table))
    below = tl.gather(scores, index, 1)
    slopes = tl.gather(scores, index + 1, 1) - below
    return gates, sums, positions, positions - index.to(tl.float32), below, slopes


@triton.jit
def _signature_kernel(
    query,
    key,
    gate_key,
    row_table,
    column_table,
    points,
    norms,
    query_strides,
    key_strides,
    gate_key_strides,
    heads,
    prefix,
    height,
    width,
    row_count,
    column_count,
    scale,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_LINE: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    GATES: tl.constexpr,
    TARGET: tl.constexpr,
    PARTS: tl.constexpr,
    CUT_OFF: tl.constexpr,
    LINES: tl.constexpr,
):
    """Compute the points of a few lines along an axis, and their squared norms."""
    pair, axis, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * LINES
    if BLOCK_WIDTH == 0:
        axis += 1
    image, head, tokens, row = pair // heads, pair % heads, prefix + height * width, BLOCK_WIDTH + BLOCK_HEIGHT
    query += (image * query_strides[0] + head * query_strides[1]) * UNIT
    key += (image * key_strides[0] + head * key_strides[1]) * UNIT
    gate_key += (image * gate_key_strides[0] + head * gate_key_strides[1]) * UNIT
    points += pair * tokens * row + axis * BLOCK_WIDTH
    norms += (pair * 2 + axis) * tokens
    length, lines, step, line_step = _lines_along(axis, width, height)
    table, count = row_table, row_count
    if axis == 1:
        table, count = column_table, column_count

    t, n = tl.arange(0, BLOCK_LINE), tl.arange(0, BLOCK_COUNT)
    is_inside = t < length
    block = tl.where(axis == 0, BLOCK_WIDTH, BLOCK_HEIGHT)
    table_tile = _load(table, n, n < count, DIM, DIM, BLOCK_DIM).to(query.dtype.element_ty)
    if first == 0:
        for start in range(0, prefix, BLOCK_LINE):
            token = start + t
            tl.store(norms + token, tl.full([BLOCK_LINE], NO_POINT, tl.float32), mask=token < prefix)
            for part in tl.static_range(PARTS):
                column = (part * BLOCK_LINE + t)[None, :]
                tile = tl.where((column == length) & (t >= 0)[:, None], NO_POINT, 0.0)
                mask = (token < prefix)[:, None] & (column < block)
                tl.store(points + token[:, None] * row + column, tile, mask=mask)
    center = tl.zeros([BLOCK_LINE], tl.float32)
    for turn in range(first - 1, tl.minimum(first + LINES, lines)):  # first the center, which is the mean of line 0
        patch = prefix + tl.where(turn < first, 0, turn) * line_step + t * step
        query_tile = _load(query, patch, is_inside, query_strides[2] * UNIT, DIM, BLOCK_DIM)
        key_tile = _load(key, patch, is_inside, key_strides[2] * UNIT, DIM, BLOCK_DIM)
        gate_key_tile = key_tile
        if GATES == 'other':
            gate_key_tile = _load(gate_key, patch, is_inside, gate_key_strides[2] * UNIT, DIM, BLOCK_DIM)
        _, _, _, fractions, below, slopes = _read_line(
            query_tile,
            gate_key_tile,
            query_tile if TARGET == 'k' else key_tile,
            table_tile,
            t,
            length,
            count,
            scale,
            GATES,
        )
        signatures = (below + fractions * slopes) * LOG2_E - center[None, :]
        signatures = tl.where(is_inside[:, None] & is_inside[None, :], signatures, 0.0)
        if turn < first:
            center = tl.sum(signatures, 0) / length
        else:
            behind, last = tl.full([BLOCK_LINE], 1.0, tl.float32), tl.zeros([BLOCK_LINE], tl.float32)
            if CUT_OFF:
                signatures = _cut_off(signatures)
                norm = tl.sum(signatures * signatures, 1) * KEPT
                tl.store(norms + patch, norm, mask=is_inside)
                behind = _cut_off(norm)
                last = _cut_off(norm - behind)
            for part in tl.static_range(PARTS):
                column = (part * BLOCK_LINE + t)[None, :]
                tile = tl.where(
                    column == length, behind[:, None], tl.where(column == length + 1, last[:, None], signatures)
                )
                tl.store(points + patch[:, None] * row + column, tile, mask=is_inside[:, None] & (column < block))
                signatures = tl.zeros([BLOCK_LINE, BLOCK_LINE], tl.float32)


@triton.jit
def _signature_backward_kernel(
    query,
    key,
    gate_key,
    row_table,
    column_table,
    grad_points,
    grad_query,
    grad_key,
    grad_gate_key,
    grad_row_table,
    grad_column_table,
    role_stride,
    query_strides,
    key_strides,
    gate_key_strides,
    heads,
    prefix,
    height,
    width,
    row_count,
    column_count,
    scale,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    FACTOR_WIDTH: tl.constexpr,
    FACTOR_HEIGHT: tl.constexpr,
    BLOCK_LINE: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    GATES: tl.constexpr,
    TARGET: tl.constexpr,
    ROLES: tl.constexpr,
    WORK: tl.constexpr,
):
    """Add what comes through the signatures of a head to the gradients of its queries and keys, and the tables'."""
    pair = tl.program_id(0).to(tl.int64)
    image, head, tokens, row = pair // heads, pair % heads, prefix + height * width, heads * DIM
    query += (image * query_strides[0] + head * query_strides[1]) * UNIT
    key += (image * key_strides[0] + head * key_strides[1]) * UNIT
    gate_key += (image * gate_key_strides[0] + head * gate_key_strides[1]) * UNIT
    offset = (image * tokens * heads + head) * DIM
    grad_query += offset
    grad_key += offset
    grad_gate_key += offset
    grad_points += pair * tokens * (FACTOR_WIDTH + FACTOR_HEIGHT)
    grad_row_table += pair * row_count * DIM
    grad_column_table += pair * column_count * DIM

    t, n = tl.arange(0, BLOCK_LINE), tl.arange(0, BLOCK_COUNT)
    for axis in range(0 if FACTOR_WIDTH > 0 else 1, 2 if FACTOR_HEIGHT > 0 else 1):
        length, lines, step, line_step = _lines_along(axis, width, height)
        table, grad_table, count = row_table, grad_row_table, row_count
        if axis == 1:
            table, grad_table, count = column_table, grad_column_table, column_count
        is_inside = t < length
        table_tile = _load(table, n, n < count, DIM, DIM, BLOCK_DIM).to(query.dtype.element_ty)
        grad_table_tile = tl.zeros([BLOCK_COUNT, BLOCK_DIM], tl.float32)
        for line in range(lines):
            patch = prefix + line * line_step + t * step
            query_tile = _load(query, patch, is_inside, query_strides[2] * UNIT, DIM, BLOCK_DIM)
            key_tile = _load(key, patch, is_inside, key_strides[2] * UNIT, DIM, BLOCK_DIM)
            gate_key_tile = key_tile
            if GATES == 'other':
                gate_key_tile = _load(gate_key, patch, is_inside, gate_key_strides[2] * UNIT, DIM, BLOCK_DIM)
            content_tile = query_tile if TARGET == 'k' else key_tile
            gates, sums, positions, _, _, slopes = _read_line(
                query_tile, gate_key_tile, content_tile, table_tile, t, length, count, scale, GATES
            )
            grad = tl.zeros([BLOCK_LINE, BLOCK_LINE], tl.float32)
            for role in tl.static_range(ROLES):
                spots = role * role_stride + patch[:, None] * (FACTOR_WIDTH + FACTOR_HEIGHT) + axis * FACTOR_WIDTH + t
                grad += tl.load(grad_points + spots, mask=is_inside[:, None] & is_inside[None, :], other=0.0)
            if GATES != 'none':
                grad_sums = tl.where(sums > count - 1.0, 0.0, grad * slopes)
                if BLOCK_LINE > LONGEST_FOR_TRIANGLES:
                    grad_gates = tl.cumsum(grad_sums, 1)
                else:
                    is_earlier = tl.where(t[:, None] <= t[None, :], 1.0, 0.0).to(WORK)
                    grad_gates = _dot(grad_sums.to(WORK), is_earlier)
                grad_logits = grad_gates * gates * (1.0 - gates) * scale
                grad_logits = grad_logits.to(query.dtype.element_ty)
            grad_scores = tl.zeros([BLOCK_LINE, BLOCK_COUNT], tl.float32)
            for position in range(count):
                share = tl.maximum(1.0 - tl.abs(positions - position), 0.0)
                is_position = tl.where((n == position)[None, :] & (t >= 0)[:, None], 1.0, 0.0).to(WORK)
                grad_scores = _dot((grad * share).to(WORK), is_position, grad_scores)
            grad_scores = grad_scores.to(query.dtype.element_ty)
            grad_table_tile = _dot(tl.trans(grad_scores), content_tile, grad_table_tile)
            grad_content = _dot(grad_scores, table_tile)
            if TARGET == 'q':
                if GATES != 'key':
                    _add(grad_key, patch, is_inside, row, grad_content, DIM, BLOCK_DIM)
            elif GATES == 'none':
                _add(grad_query, patch, is_inside, row, grad_content, DIM, BLOCK_DIM)
            if GATES != 'none':
                if TARGET == 'k':
                    grad_query_tile = _dot(grad_logits, gate_key_tile, grad_content)
                else:
                    grad_query_tile = _dot(grad_logits, gate_key_tile)
                _add(grad_query, patch, is_inside, row, grad_query_tile, DIM, BLOCK_DIM)
                if GATES == 'other':
                    _add(grad_gate_key, patch, is_inside, row, _dot(tl.trans(grad_logits), query_tile), DIM, BLOCK_DIM)
                elif TARGET == 'q':
                    grad_key_tile = _dot(tl.trans(grad_logits), query_tile, grad_content)
                    _add(grad_key, patch, is_inside, row, grad_key_tile, DIM, BLOCK_DIM)
                else:
                    _add(grad_key, patch, is_inside, row, _dot(tl.trans(grad_logits), query_tile), DIM, BLOCK_DIM)
        _store(grad_table, n, n < count, DIM, grad_table_tile, DIM, BLOCK_DIM)
        tl.debug_barrier()  # the other axis adds to what this one has written


@triton.jit
def _others(start, tokens, BLOCK: tl.constexpr):
    """Return tokens from `start`, where there are no more the last, and -inf for these, else 0."""
    other = start + tl.arange(0, BLOCK)
    return tl.minimum(other, tokens - 1), tl.where(other < tokens, 0.0, float('-inf'))


@triton.jit
def _own_points(points, norms, own, SIZE: tl.constexpr, BLOCK: tl.constexpr, PITCH: tl.constexpr):
    """Points times -2, with what adds the norms of others to products with these, and norms."""
    tile = _load(points, own, None, PITCH, BLOCK, BLOCK)
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
        other_points = _load(points, other, None, PITCH, BLOCK, BLOCK)
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
def _forward_kernel(
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
    query_tile = _load(query, own, is_own, query_strides[2] * UNIT, DIM, BLOCK_DIM)
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
        key_tile = _load(key, other, None, key_strides[2] * UNIT, DIM, BLOCK_DIM)
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
        logits = _dot(query_tile, tl.trans(key_tile)) * scale + bias + outside[None, :]
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        value_tile = _load(value, other, None, value_strides[2] * UNIT, DIM, BLOCK_DIM)
        mixed = _dot(weights.to(value_tile.dtype), value_tile, mixed * shrink[:, None])
        highest = new_highest
    _store(output, own, is_own, heads * DIM, mixed / total[:, None], DIM, BLOCK_DIM)
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
            column < SIZE, _load(points, own, is_own, pitch, FACTOR, FACTOR), tl.where(column == SIZE, 1.0, 0.0)
        )
        _store(factors, own, is_own, factor_pitch, tile, FACTOR, FACTOR)


@triton.jit
def _delta_kernel(
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
    tile = _load(output, own, is_own, heads * DIM, DIM, BLOCK_DIM).to(tl.float32)
    tile *= _load(grad_output, own, is_own, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM).to(tl.float32)
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
    own_factors = _load(factors, own, is_own, PITCH, BLOCK, BLOCK).to(tl.float32)
    _store(gradient, own, is_own, PITCH, total[:, None] * own_factors - mixed, BLOCK, BLOCK)


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
    ratio, other_factors = grad_logits * inverse, _load(factors, other, None, PITCH, BLOCK, BLOCK)
    if SIZE == BLOCK:
        total += tl.sum(ratio, 1)
    return total, _dot(ratio.to(other_factors.dtype), other_factors, mixed)


@triton.jit
def _backward_kernel(
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
        own_query = _load(query, own, is_own, query_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_grad_output = _load(grad_output, own, is_own, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_logsumexp = tl.load(logsumexp + own, mask=is_own, other=float('inf'))
        own_delta = tl.load(delta + own, mask=is_own, other=0.0)
        grad_query_tile = tl.zeros([BLOCK_OWN, BLOCK_DIM], tl.float32)
    if AS_KEYS:
        own_key = _load(key, own, is_own, key_strides[2] * UNIT, DIM, BLOCK_DIM)
        own_value = _load(value, own, is_own, value_strides[2] * UNIT, DIM, BLOCK_DIM)
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
            other_key = _load(key, other, None, key_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_value = _load(value, other, None, value_strides[2] * UNIT, DIM, BLOCK_DIM)
            weights = tl.exp2(_dot(own_query, tl.trans(other_key)) * scale + bias - own_logsumexp[:, None])
            grad_logits = weights * (_dot(own_grad_output, tl.trans(other_value)) - own_delta[:, None])
            if OF_INPUTS:
                grad_query_tile = _dot(grad_logits.to(other_key.dtype), other_key, grad_query_tile)
        if AS_KEYS:
            other_query = _load(query, other, None, query_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_grad_output = _load(grad_output, other, None, grad_output_strides[2] * UNIT, DIM, BLOCK_DIM)
            other_logsumexp = tl.load(logsumexp + other)
            other_delta = tl.load(delta + other)
            weights = tl.exp2(_dot(own_key, tl.trans(other_query)) * scale + bias - other_logsumexp[None, :])
            if OF_INPUTS:
                grad_value_tile = _dot(weights.to(other_query.dtype), other_grad_output, grad_value_tile)
            grad_other = weights * (_dot(own_value, tl.trans(other_grad_output)) - other_delta[None, :])
            if OF_INPUTS:
                grad_key_tile = _dot(grad_other.to(other_query.dtype), other_query, grad_key_tile)
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
        _store(grad_query + offset, own, is_own, row, grad_query_tile * slope, DIM, BLOCK_DIM)
    if AS_KEYS and OF_INPUTS:
        _store(grad_key + offset, own, is_own, row, grad_key_tile * slope, DIM, BLOCK_DIM)
        _store(grad_value + offset, own, is_own, row, grad_value_tile, DIM, BLOCK_DIM)
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
    most = 255 if all_registers else None
    return triton.Config({'BLOCK_OWN': own, 'BLOCK_OTHER': other}, num_warps=warps, num_stages=2, maxnreg=most)


def _forward_configs(dim: int, block_points: int, by_differences: bool) -> list[triton.Config]:
    """List configurations that are worth a try and take no more registers than there are."""
    if by_differences:
        return [_config(32, 32 if dim <= 64 else 16, 8, all_registers=True)]
    if dim <= 64 and block_points <= 32:
        return [_config(64, 32, 4), _config(128, 64, 8) if _is_hopper() else _config(128, 32, 8)]
    return [_config(64, 32, 4) if dim <= 64 or _is_hopper() else _config(32, 32, 4)]


def _backward_configs(dim: int, block_points: int, by_differences: bool) -> list[triton.Config]:
    """List configurations as `_forward_configs` does."""
    if by_differences:
        return [_config(16, 16, 8, all_registers=dim <= 64)]
    if dim > 64 and len(_roles(dim, block_points, by_differences)) == 3 and not _is_hopper():
        return [_config(32, 16, 2, all_registers=True)]
    return [_config(64, 16, 4, all_registers=dim > 64 or block_points > 32)]


def _signature_warps(block_line: int, block_dim: int, exact: bool) -> int:
    """Return how many warps have registers for a line, exactly (float32) or in half precision."""
    warps = {16: 4, 32: 8, 64: 16}[block_line] if exact else {16: 1, 32: 2, 64: 8}[block_line]
    return (2 if exact else 4) * warps if block_dim > 64 and block_line <= 32 else warps


def _roles(dim: int, block_points: int, by_differences: bool) -> list[Role]:
    """Share the work of the backward kernel out to as few launches as there are registers for."""
    one, two = [Role(True, True)], [Role(True, False), Role(False, True)]
    three = [Role(True, True, OF_INPUTS=False), *(role._replace(OF_POINTS=False) for role in two)]
    if by_differences:
        return two
    if block_points > (32 if dim <= 64 else 16):
        return three
    if _is_hopper():
        return one if dim <= 64 else two
    needs_three = 32 < dim < 64 or (dim > 64 and _architecture() != 80)  # a few bytes would spill
    return three if needs_three else two


def _architecture() -> Any:
    """Return the GPU's: 80 for compute capability 8.0, None in the interpreter."""
    return None if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch


def _is_hopper() -> bool:
    """Tell whether operands of products come from shared memory, which leaves more registers."""
    return _architecture() in (90, 100)


@functools.cache
def _tuned(kernel: Any, list_configs: Any, dim: int, block_points: int, by_differences: bool) -> Any:
    """A kernel that takes the fastest configuration that there is for these sizes, found at the first launch."""
    configs = list_configs(dim, block_points, by_differences)
    configs = configs[:1] if INTERPRETED.value else configs
    return triton.autotune(configs, key=['DIM', 'WIDTH', 'HEIGHT'], cache_results=True)(kernel)


class Problem(NamedTuple):
    """Attention to compute: the arguments of `triton_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate_key: Tensor | None
    logit_query: Tensor | None
    logit_key: Tensor | None
    row_table: Tensor | None
    column_table: Tensor | None
    height: int
    width: int
    prefix: int
    gates: str
    target: str
    scale: float

    @property
    def logit_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of attention."""
        query = self.query if self.logit_query is None else self.logit_query
        return query, self.key if self.logit_key is None else self.logit_key, self.value

    @property
    def signature_inputs(self) -> tuple[Tensor, ...]:
        """Queries, keys, keys of gates and both tables; what is not there is one of the others."""
        row_table, column_table = self.row_table, self.column_table
        table = row_table if row_table is not None else column_table
        assert table is not None
        tables = (table if one is None else one for one in (row_table, column_table))
        return self.query, self.key, self.key if self.gate_key is None else self.gate_key, *tables

    @property
    def lines(self) -> tuple[int, int]:
        """Lengths of rows and columns, 0 where there is no table."""
        return 0 if self.row_table is None else self.width, 0 if self.column_table is None else self.height

    @property
    def counts(self) -> tuple[int, int]:
        """Entries of both tables that can be read: no position is above the length of a line."""
        *_, row_table, column_table = self.signature_inputs
        return min(len(row_table), self.width + 1), min(len(column_table), self.height + 1)

    @property
    def blocks(self) -> dict[str, int]:
        """Compile-time sizes of memory: of channels, of points, and of what points are as factors."""
        width, height = self.lines
        return {
            'DIM': self.query.shape[-1],
            'BLOCK_DIM': padded(self.query.shape[-1]),
            'BLOCK_WIDTH': length_of_points(width, self.by_differences),
            'BLOCK_HEIGHT': length_of_points(height, self.by_differences),
            'FACTOR_WIDTH': padded(width),
            'FACTOR_HEIGHT': padded(height),
        }

    @property
    def by_differences(self) -> bool:
        """Tell whether distances come from differences, as `has_exact_distances` says."""
        return has_exact_distances(self.lines, self.query.dtype)

    @property
    def sizes(self) -> tuple[int, int, bool]:
        """What configurations depend on: channels, blocks of points, and how distances are computed."""
        blocks = self.blocks
        points = max(blocks['BLOCK_WIDTH'], blocks['BLOCK_HEIGHT'])
        return blocks['DIM'], points, self.by_differences

    @property
    def signature_constants(self) -> dict[str, Any]:
        """Compile-time arguments of both kernels of signatures."""
        line = max(self.blocks['FACTOR_WIDTH'], self.blocks['FACTOR_HEIGHT'])
        exact = self.query.dtype == torch.float32
        return {
            'DIM': self.query.shape[-1],
            'BLOCK_DIM': padded(self.query.shape[-1]),
            'BLOCK_LINE': line,
            'BLOCK_COUNT': padded(max(self.counts)),
            'GATES': self.gates,
            'TARGET': self.target,
            'num_warps': _signature_warps(line, padded(self.query.shape[-1]), exact),
        }

    @property
    def attention_constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels of attention."""
        width, height = self.lines
        distances = 'differences' if self.by_differences else 'tf32'
        return self.blocks | {'WIDTH': width, 'HEIGHT': height, 'DISTANCES': distances}


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Return strides in units, so that the compiler knows where rows start."""
    return [tuple(stride // UNIT_OF_STRIDES for stride in x.stride()[:3]) for x in tensors]


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute signatures and attention.

    Args:
        problem: Its tensors have stride 1 along their last dimension, and multiples of UNIT_OF_STRIDES along others.

    Returns:
        Output (B, h, P + N, d), laid out as (B, P + N, h, d), and for the backward pass logarithms (to base 2) of the
        softmax denominators, (B, h, P + N), points of all patches (B, h, N, .), and their squared norms (B, h, 2, N).
    """
    query, key, value = problem.logit_inputs
    batch, heads, tokens, dim = query.shape
    height, width, prefix = problem.height, problem.width, problem.prefix
    blocks = problem.blocks
    points = query.new_empty(batch, heads, tokens, blocks['BLOCK_WIDTH'] + blocks['BLOCK_HEIGHT'], dtype=torch.float32)
    make_norms = query.new_zeros if problem.by_differences or 0 in problem.lines else query.new_empty  # all are written
    norms = make_norms(batch, heads, 2, tokens, dtype=torch.float32)
    axes, lines = sum(size > 0 for size in problem.lines), max(height, width)
    constants = problem.signature_constants
    _signature_kernel[(batch * heads, axes, triton.cdiv(lines, LINES))](
        *problem.signature_inputs,
        points,
        norms,
        *_strides(*problem.signature_inputs[:3]),
        heads,
        prefix,
        height,
        width,
        *problem.counts,
        problem.scale,
        BLOCK_WIDTH=blocks['BLOCK_WIDTH'],
        BLOCK_HEIGHT=blocks['BLOCK_HEIGHT'],
        PARTS=triton.cdiv(max(blocks['BLOCK_WIDTH'], blocks['BLOCK_HEIGHT']), constants['BLOCK_LINE']),
        CUT_OFF=not problem.by_differences,
        LINES=LINES,
        **constants,
    )
    output = query.new_empty(batch, tokens, heads, dim)
    logsumexp = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    tuned = _tuned(_forward_kernel, _forward_configs, *problem.sizes)
    tuned[lambda constants: (batch * heads * triton.cdiv(tokens, constants['BLOCK_OWN']),)](
        query,
        key,
        value,
        points,
        norms,
        output,
        logsumexp,
        *_strides(query, key, value),
        heads,
        tokens,
        prefix,
        problem.scale * math.log2(math.e),
        **{name: size for name, size in problem.attention_constants.items() if 'FACTOR' not in name},
    )
    return output.transpose(1, 2), logsumexp, points, norms


def backward(
    problem: Problem, grad_output: Tensor, output: Tensor, logsumexp: Tensor, points: Tensor, norms: Tensor
) -> list[Tensor | None]:
    """Compute the gradients of all tensors of the problem, None for those that are None.

    Args:
        problem: What `forward` was given.
        grad_output: Gradient of the output, (B, h, P + N, d), with strides as above.
        output: What `forward` returned, and so are the others.
        logsumexp: See `output`.
        points: See `output`.
        norms: See `output`.

    Returns:
        Gradients of the tensors of `Problem`, in their order. Those of queries, keys and values are laid out like the
        output.
    """
    query, key, value = problem.logit_inputs
    batch, heads, tokens, dim = query.shape
    blocks = problem.blocks
    factor_pitch = blocks['FACTOR_WIDTH'] + blocks['FACTOR_HEIGHT']
    delta = torch.empty_like(logsumexp)
    roles = _roles(*problem.sizes)
    grad_points = points.new_empty(sum(role.OF_POINTS for role in roles), batch, heads, tokens, factor_pitch)
    has_factors = not problem.by_differences
    factors = torch.empty_like(grad_points[0], dtype=torch.bfloat16) if has_factors else points
    _delta_kernel[(batch * heads, triton.cdiv(tokens, 32))](
        output,
        grad_output,
        points,
        delta,
        factors,
        *_strides(grad_output),
        heads,
        tokens,
        HAS_FACTORS=has_factors,
        BLOCK_OWN=32,
        **{name: size for name, size in problem.attention_constants.items() if name != 'DISTANCES'},
    )
    grad_logit_query, grad_logit_key, grad_value = (query.new_empty(batch, tokens, heads, dim) for _ in range(3))
    tuned = _tuned(_backward_kernel, _backward_configs, *problem.sizes)
    for index, role in enumerate(sorted(roles, key=lambda role: not role.OF_POINTS)):
        tuned[lambda constants: (batch * heads * triton.cdiv(tokens, constants['BLOCK_OWN']),)](
            query,
            key,
            value,
            points,
            norms,
            factors,
            logsumexp,
            delta,
            grad_output,
            grad_logit_query,
            grad_logit_key,
            grad_value,
            grad_points[min(index, len(grad_points) - 1)],
            *_strides(query, key, value, grad_output),
            heads,
            tokens,
            problem.prefix,
            problem.scale * math.log2(math.e),
            **role._asdict(),
            **problem.attention_constants,
        )
    grad_query, grad_key, grad_gate_key = (
        own if other is None else torch.zeros_like(own)
        for own, other in (
            (grad_logit_query, problem.logit_query),
            (grad_logit_key, problem.logit_key),
            (grad_value, grad_value if problem.gate_key is not None else None),
        )
    )
    grad_tables = [
        torch.empty(batch * heads, count, dim, device=query.device, dtype=torch.float32) for count in problem.counts
    ]
    _signature_backward_kernel[(batch * heads,)](
        *problem.signature_inputs,
        grad_points,
        grad_query,
        grad_key,
        grad_gate_key,
        *grad_tables,
        grad_points.stride(0),
        *_strides(*problem.signature_inputs[:3]),
        heads,
        problem.prefix,
        problem.height,
        problem.width,
        *problem.counts,
        problem.scale,
        FACTOR_WIDTH=blocks['FACTOR_WIDTH'],
        FACTOR_HEIGHT=blocks['FACTOR_HEIGHT'],
        ROLES=len(grad_points),
        WORK=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
        **problem.signature_constants,
    )
    found = [grad_query, grad_key, grad_value, grad_gate_key, grad_logit_query, grad_logit_key]
    return [
        *(None if x is None else grad.transpose(1, 2) for x, grad in zip(problem[:6], found, strict=True)),
        *(None if x is None else _sum(grad, x) for x, grad in zip(problem[6:8], grad_tables, strict=True)),
    ]


def _sum(grad_tables: Tensor, table: Tensor) -> Tensor:
    """Sum the gradients of a table over heads, with 0 for the entries that are never read."""
    total = grad_tables.sum(0)
    return F.pad(total, (0, 0, 0, len(table) - len(total))).to(table.dtype)
