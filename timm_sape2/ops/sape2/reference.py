"""SaPE2 in plain PyTorch: the steps of its definition, one function each.

Shapes: B images, h heads, N = H * W patches in raster order, head dimension d, n positions. A *line* is a row or a
column of the grid, L its length. Positions and distances are computed in float32 (float64 stays float64), whatever the
autocast state. The maths with its sources is in README.md beside this file.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def semantic_gates(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Step 1: how much patch t of a line matters to patch x, `g[x, t] = sigmoid(scale * q_x . k_t)`.

    Args:
        query: Queries of the patches of each line, (..., L, d).
        key: What gates are read from, (..., L, d).
        scale: Factor of the dot product, usually d ** -0.5.

    Returns:
        Gates in (0, 1), (..., L, L).
    """
    return torch.sigmoid(at_least_float32(scale * (query @ key.transpose(-2, -1))))


def unit_gates(query: Tensor) -> Tensor:
    """Gates of 1 in place of `semantic_gates`: positions become plain distances to the end of the line.

    Args:
        query: Queries of the patches of each line, (..., L, d).

    Returns:
        Ones, (..., L, L).
    """
    ones = at_least_float32(torch.ones_like(query[..., 0]))
    return ones.unsqueeze(-1) * ones.unsqueeze(-2)


def soft_positions(gates: Tensor, num_positions: int) -> Tensor:
    """Step 2: position of t for x, the sum of its gates from t to the end of the line, at most n - 1.

    Args:
        gates: Gates, (..., L, L).
        num_positions: Rows n of the embedding table.

    Returns:
        Positions in [0, n - 1], (..., L, L).
    """
    return gates.flip(-1).cumsum(-1).flip(-1).clamp(max=num_positions - 1)


def interpolate(scores: Tensor, positions: Tensor) -> Tensor:
    """Steps 3 and 4: read `scores` at fractional positions, linearly between the two whole neighbours.

    The dot product with an interpolated embedding equals the interpolated dot products, so only the scores
    `z = q E^T` are needed. The lower neighbour is at most n - 2, which gives whole positions a gradient too.

    Args:
        scores: Dot products with every embedding, (..., L, n).
        positions: Positions in [0, n - 1], (..., L, L).

    Returns:
        Scores at the positions, (..., L, L).
    """
    index = positions.detach().long().clamp(0, scores.shape[-1] - 2)  # NaN has no index, but must come out as NaN
    lower, upper = scores.gather(-1, index), scores[..., 1:].gather(-1, index)
    return lower + (positions - index) * (upper - lower)  # torch.lerp does not export to ONNX with onnxscript 0.6


def signatures(content: Tensor, gates: Tensor, table: Tensor) -> Tensor:
    """Steps 2 to 4: what each patch reads along its line, `u_x[t] = content_x . E(p[x, t])`.

    Args:
        content: Queries (target 'k') or keys (target 'q') of each line, (..., L, d).
        gates: Gates, (..., L, L).
        table: Position embeddings E, (n, d).

    Returns:
        Signatures, (..., L, L).
    """
    scores = at_least_float32(content @ table.t().to(content.dtype))
    return interpolate(scores, soft_positions(gates, table.shape[0]))


def pairwise_distances(points: Tensor) -> Tensor:
    """Step 5: Euclidean distances of all pairs, exactly 0 for equal points, with gradient 0 there.

    Args:
        points: Signatures of all patches, (..., N, L).

    Returns:
        Distances, (..., N, N).
    """
    if not torch.jit.is_scripting() and _is_in_onnx_export():
        return pairwise_distances_from_products(points)
    # the default mode of cdist is not exact near zero and branches on the number of points
    return torch.cdist(points, points, p=2.0, compute_mode='donot_use_mm_for_euclid_dist')


@torch.jit.unused
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def pairwise_distances_from_products(points: Tensor) -> Tensor:
    """Pairwise distances from dot products, for exporters without `cdist`.

    Cancellation leaves nothing of a distance below about 1e-3 of the norms (in float32), such a distance becomes 0.

    Args:
        points: Signatures of all patches, (..., N, L).

    Returns:
        Distances, (..., N, N).
    """
    squared_norms = (points * points).sum(-1)
    sum_of_norms = squared_norms.unsqueeze(-1) + squared_norms.unsqueeze(-2)
    squares = sum_of_norms - 2 * (points @ points.transpose(-2, -1))
    index = torch.arange(points.shape[-2], device=points.device)
    is_positive = (squares > 16 * torch.finfo(points.dtype).eps * sum_of_norms) & (index.unsqueeze(-1) != index)
    return torch.where(is_positive, squares, torch.ones_like(squares)).sqrt() * is_positive.to(points.dtype)


def axis_signatures(
    query: Tensor,
    key: Tensor,
    gate_key: Tensor | None,
    table: Tensor,
    scale: float,
    target: str,
    along_columns: bool,
) -> list[Tensor]:
    """Steps 1 to 4 along the rows or the columns of the grid.

    Args:
        query: Queries, (B, h, H, W, d).
        key: Keys, (B, h, H, W, d).
        gate_key: What gates are read from, (B, h, H, W, d), or None for gates of 1.
        table: Position embeddings of this axis, (n, d).
        scale: Factor of the gates' dot product.
        target: 'k' (signatures of queries), 'q' (of keys) or 'qk' (of both).
        along_columns: Lines are columns instead of rows.

    Returns:
        Signatures of all patches, (B, h, N, L) each: one, or two for target 'qk'.
    """
    if along_columns:
        query, key = query.transpose(2, 3), key.transpose(2, 3)
        gate_key = None if gate_key is None else gate_key.transpose(2, 3)
    gates = unit_gates(query) if gate_key is None else semantic_gates(query, gate_key, scale)
    found = []
    for content in [query, key] if target == 'qk' else [query if target == 'k' else key]:
        signature = signatures(content, gates, table)
        if along_columns:
            signature = signature.transpose(2, 3)
        found.append(signature.flatten(2, 3))
    return found


def scale_tables(
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    reference_grid: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Scale distances to a grid, since a norm over L entries grows with sqrt(L); they are linear in the tables.

    Args:
        row_table: Position embeddings along rows, (n, d), or None.
        column_table: Position embeddings along columns, (n, d), or None.
        grid: Rows and columns of patches (H, W).
        reference_grid: (H, W) as a tensor of two, or None to change nothing.

    Returns:
        Row table times sqrt(W_reference / W), column table times sqrt(H_reference / H).
    """
    if reference_grid is not None:
        if row_table is not None:
            row_table = row_table * (reference_grid[1] / grid[1]).sqrt().to(row_table.dtype)
        if column_table is not None:
            column_table = column_table * (reference_grid[0] / grid[0]).sqrt().to(column_table.dtype)
    return row_table, column_table


def sape2_signatures(
    query: Tensor,
    key: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    scale: float,
    target: str = 'k',
    reference_grid: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Steps 1 to 4 along both axes: what the distances of the bias are taken between.

    Args:
        query: Queries after normalisation, (B, h, N, d).
        key: Keys after normalisation, (B, h, N, d).
        gate_key: What gates are read from, (B, h, N, d): keys, mapped keys or values; None for gates of 1.
        row_table: Position embeddings along rows, (n, d), or None to leave this axis out.
        column_table: Position embeddings along columns, (n, d), or None to leave this axis out.
        grid: Rows and columns of patches (H, W), N = H * W.
        scale: Factor of the gates' dot product, usually d ** -0.5.
        target: 'k' (signatures of queries), 'q' (of keys) or 'qk' (of both).
        reference_grid: See `scale_tables`.

    Returns:
        Row signatures (B, h, N, W) and column signatures (B, h, N, H), in float32 (float64 stays float64): none
        without a table, two of each for target 'qk', else one.
    """
    row_table, column_table = scale_tables(row_table, column_table, grid, reference_grid)
    batch, heads, _, dim = query.shape
    height, width = grid
    query_grid = query.reshape(batch, heads, height, width, dim)
    key_grid = key.reshape(batch, heads, height, width, dim)
    gate_grid = None if gate_key is None else gate_key.reshape(batch, heads, height, width, dim)

    rows: list[Tensor] = []
    if row_table is not None:
        rows = axis_signatures(query_grid, key_grid, gate_grid, row_table, scale, target, along_columns=False)
    columns: list[Tensor] = []
    if column_table is not None:
        columns = axis_signatures(query_grid, key_grid, gate_grid, column_table, scale, target, along_columns=True)
    return rows, columns


def sape2_bias(
    query: Tensor,
    key: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    scale: float,
    target: str = 'k',
    reference_grid: Tensor | None = None,
) -> Tensor:
    """Attention bias of SaPE2, `B[i, j] = |u_i - u_j| + |v_i - v_j|` with row signatures u and column signatures v.

    With target 'qk' it is the sum of the biases of both targets. The arguments are those of `sape2_signatures`.

    Returns:
        Bias in the dtype of `query`, (B, h, N, N): symmetric, never negative, exactly 0 for i = j.
    """
    rows, columns = sape2_signatures(query, key, gate_key, row_table, column_table, grid, scale, target, reference_grid)
    signatures_of_both = rows + columns
    total = pairwise_distances(signatures_of_both[0])
    for signature in signatures_of_both[1:]:
        total = total + pairwise_distances(signature)
    return total.to(query.dtype)
