"""The Triton kernels of SaPE2's signatures: gates, positions and interpolated scores along rows and columns.

Signatures are kept as *points*: times log2(e), so that exponentials are powers of 2, moved near to the origin, which
changes no distance, and padded. Where there is room behind it, a point is followed by its squared norm in two parts,
which triton_attention.py makes distances of. For float32 inputs and very short lines points are exact. Otherwise they
are cut off to the 11 bits of TF32, so that products of them are exact, and their squared norms are kept a little too
short, so that the squared distance of a patch to itself, and all that rounding could have made, is negative.
"""

import triton
import triton.language as tl

from .triton_tiles import LOG2_E, MOST_REGISTERS, UNIT, add_to_rows, dot, load_rows, store_rows

KEPT = tl.constexpr(1 - 2.0**-19)  # of a squared norm
NO_POINT = tl.constexpr(-1e30)  # squared norm of what has no distance to anything
LONGEST_FOR_TRIANGLES = tl.constexpr(32)  # lines whose sums are products with triangles of ones
LINES = 8  # of the grid, whose signatures one program computes


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
    """Steps 1 to 4 along a line: gates, their sums, positions, fractions, scores below and slopes, [rows, t] each.

    Rows are the patches of the line whose queries and contents these are, columns are all of its patches.
    """
    if GATES == 'none':
        gates = tl.zeros([query.shape[0], t.shape[0]], tl.float32) + 1.0
    else:
        gates = 1.0 / (1.0 + tl.exp2(dot(query, tl.trans(gate_key)) * (scale * -LOG2_E)))
    gates = tl.where((t < length)[None, :], gates, 0.0)
    if t.shape[0] > LONGEST_FOR_TRIANGLES:
        sums = tl.cumsum(gates, 1, reverse=True)
    else:
        # sums by products on tensor cores: two halves have the bits of float32 numbers below 1
        is_later = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(tl.float16)
        half = gates.to(tl.float16)
        rest = (gates - half.to(tl.float32)).to(tl.float16)
        sums = dot(half, is_later, dot(rest, is_later))
    positions = tl.minimum(sums, count - 1.0, propagate_nan=tl.PropagateNan.ALL)
    index = tl.minimum(tl.maximum(positions.to(tl.int32), 0), count - 2)
    scores = dot(content, tl.trans(table))
    below = tl.gather(scores, index, 1)
    slopes = tl.gather(scores, index + 1, 1) - below
    return gates, sums, positions, positions - index.to(tl.float32), below, slopes


@triton.jit
def signature_kernel(
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
    BLOCK_ROWS: tl.constexpr,
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
    table_tile = load_rows(table, n, n < count, DIM, DIM, BLOCK_DIM).to(query.dtype.element_ty)
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
        line_patch = prefix + tl.where(turn < first, 0, turn) * line_step
        key_tile = load_rows(gate_key, line_patch + t * step, is_inside, gate_key_strides[2] * UNIT, DIM, BLOCK_DIM)
        total = tl.zeros([BLOCK_LINE], tl.float32)
        for start in range(0, BLOCK_LINE, BLOCK_ROWS):
            spot = start + tl.arange(0, BLOCK_ROWS)
            is_row, patch = spot < length, line_patch + spot * step
            query_tile = load_rows(query, patch, is_row, query_strides[2] * UNIT, DIM, BLOCK_DIM)
            content_tile = query_tile
            if TARGET == 'q':
                content_tile = load_rows(key, patch, is_row, key_strides[2] * UNIT, DIM, BLOCK_DIM)
            _, _, _, fractions, below, slopes = _read_line(
                query_tile, key_tile, content_tile, table_tile, t, length, count, scale, GATES
            )
            signatures = (below + fractions * slopes) * LOG2_E - center[None, :]
            signatures = tl.where(is_row[:, None] & is_inside[None, :], signatures, 0.0)
            if turn < first:
                total += tl.sum(signatures, 0)
            else:
                behind, last = tl.full([BLOCK_ROWS], 1.0, tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
                if CUT_OFF:
                    signatures = _cut_off(signatures)
                    norm = tl.sum(signatures * signatures, 1) * KEPT
                    tl.store(norms + patch, norm, mask=is_row)
                    behind = _cut_off(norm)
                    last = _cut_off(norm - behind)
                for part in tl.static_range(PARTS):
                    column = (part * BLOCK_LINE + t)[None, :]
                    tile = tl.where(
                        column == length, behind[:, None], tl.where(column == length + 1, last[:, None], signatures)
                    )
                    tl.store(points + patch[:, None] * row + column, tile, mask=is_row[:, None] & (column < block))
                    signatures = tl.zeros([BLOCK_ROWS, BLOCK_LINE], tl.float32)
        if turn < first:
            center = total / length


@triton.jit
def signature_backward_kernel(
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
    BLOCK_ROWS: tl.constexpr,
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
    grad_content = grad_query if TARGET == 'k' else grad_key
    if GATES == 'key':
        grad_gate_key = grad_key
    factor_pitch = FACTOR_WIDTH + FACTOR_HEIGHT
    grad_points += pair * tokens * factor_pitch
    grad_row_table += pair * (row_count + column_count) * DIM
    grad_column_table += pair * (row_count + column_count) * DIM

    t, n = tl.arange(0, BLOCK_LINE), tl.arange(0, BLOCK_COUNT)
    for axis in range(0 if FACTOR_WIDTH > 0 else 1, 2 if FACTOR_HEIGHT > 0 else 1):
        length, lines, step, line_step = _lines_along(axis, width, height)
        table, grad_table, count = row_table, grad_row_table, row_count
        if axis == 1:
            table, grad_table, count = column_table, grad_column_table, column_count
        is_inside = t < length
        table_tile = load_rows(table, n, n < count, DIM, DIM, BLOCK_DIM).to(query.dtype.element_ty)
        grad_table_tile = tl.zeros([BLOCK_COUNT, BLOCK_DIM], tl.float32)
        for line in range(lines):
            patch = prefix + line * line_step + t * step
            gate_key_tile = load_rows(gate_key, patch, is_inside, gate_key_strides[2] * UNIT, DIM, BLOCK_DIM)
            for start in range(0, BLOCK_LINE, BLOCK_ROWS):
                spot = start + tl.arange(0, BLOCK_ROWS)
                is_row, row_patch = spot < length, prefix + line * line_step + spot * step
                query_tile = load_rows(query, row_patch, is_row, query_strides[2] * UNIT, DIM, BLOCK_DIM)
                content_tile = query_tile
                if TARGET == 'q':
                    content_tile = load_rows(key, row_patch, is_row, key_strides[2] * UNIT, DIM, BLOCK_DIM)
                gates, sums, positions, _, _, slopes = _read_line(
                    query_tile,
                    gate_key_tile,
                    content_tile,
                    table_tile,
                    t,
                    length,
                    count,
                    scale,
                    GATES,
                )
                grad = tl.zeros([BLOCK_ROWS, BLOCK_LINE], tl.float32)
                for role in tl.static_range(ROLES):
                    spots = role * role_stride + row_patch[:, None] * factor_pitch + axis * FACTOR_WIDTH + t
                    grad += tl.load(grad_points + spots, mask=is_row[:, None] & is_inside[None, :], other=0.0)
                if GATES != 'none':
                    grad_sums = tl.where(sums > count - 1.0, 0.0, grad * slopes)
                    if BLOCK_LINE > LONGEST_FOR_TRIANGLES:
                        grad_gates = tl.cumsum(grad_sums, 1)
                    else:
                        is_earlier = tl.where(t[:, None] <= t[None, :], 1.0, 0.0).to(WORK)
                        grad_gates = dot(grad_sums.to(WORK), is_earlier)
                    grad_logits = (grad_gates * gates * (1.0 - gates) * scale).to(query.dtype.element_ty)
                    grad_gate_key_tile = dot(tl.trans(grad_logits), query_tile)
                    add_to_rows(grad_gate_key, patch, is_inside, row, grad_gate_key_tile, DIM, BLOCK_DIM)
                grad_scores = tl.zeros([BLOCK_ROWS, BLOCK_COUNT], tl.float32)
                for position in range(count):
                    share = tl.maximum(1.0 - tl.abs(positions - position), 0.0)
                    is_position = tl.where((n == position)[None, :] & (t >= 0)[:, None], 1.0, 0.0).to(WORK)
                    grad_scores = dot((grad * share).to(WORK), is_position, grad_scores)
                grad_scores = grad_scores.to(query.dtype.element_ty)
                grad_table_tile = dot(tl.trans(grad_scores), content_tile, grad_table_tile)
                grad_content_tile = dot(grad_scores, table_tile)
                if GATES != 'none' and TARGET == 'k':
                    grad_content_tile = dot(grad_logits, gate_key_tile, grad_content_tile)
                elif GATES != 'none':
                    grad_query_tile = dot(grad_logits, gate_key_tile)
                    add_to_rows(grad_query, row_patch, is_row, row, grad_query_tile, DIM, BLOCK_DIM)
                    tl.debug_barrier()  # gates' keys may be the content
                add_to_rows(grad_content, row_patch, is_row, row, grad_content_tile, DIM, BLOCK_DIM)
                if TARGET == 'q':
                    tl.debug_barrier()  # the next rows' gates may add to the same keys
        store_rows(grad_table, n, n < count, DIM, grad_table_tile, DIM, BLOCK_DIM)
        tl.debug_barrier()  # the other axis adds to what this one has written


def tile(line: int, dim: int, is_exact: bool, is_backward: bool) -> dict[str, int]:
    """Return how many rows of a line a program computes at once, and the warps that have registers for them.

    Args:
        line: Length of lines, padded.
        dim: Channels of a head, padded.
        is_exact: Products are float32, not half precision.
        is_backward: For `signature_backward_kernel`.
    """
    if is_exact:
        rows, warps = 16, 4 if line <= 32 and dim <= 64 else 8
    elif is_backward:
        rows, warps = min(line, 32), line // 8 * (2 if dim > 64 else 1)
    else:
        rows, warps = min(line, 32), line // 16 * (4 if dim > 64 else 1)
    return {'BLOCK_ROWS': rows, 'num_warps': min(warps, 8), 'maxnreg': MOST_REGISTERS}
