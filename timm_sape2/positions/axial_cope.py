"""Contextual positions along rows and columns, read directly."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2.attention import why_not_fused
from ..ops.sape2.cpu import DIRECT, cpu_attention, why_not_cpu
from ..ops.sape2.reference import at_least_float32, interpolate, semantic_gates, unit_gates
from .base import HostShape, PositionEncoding
from .grid import one_hot_coordinates
from .options import check_choice, check_positive, check_whole_number


class AxialContextualPosition(PositionEncoding):
    """Contextual positions (CoPE, arXiv 2405.18719) along each row and column: the signatures of SaPE2, read directly.

    Along its own row every patch i counts the patches that matter to it and reads a table at these positions, as in
    steps 1 to 4 of SaPE2 (`timm_sape2/ops/sape2/README.md`): `u_i[c] = q_i . E(p[i, c])` for every column c; and along
    its own column `v_i[r]` for every row r, with a table of its own. SaPE2 takes distances between these signatures,
    which say how alike two patches see their lines, not where they stand in them. Here the numbers themselves are the
    bias of a key in row r_j and column c_j,

        B[i, j] = u_i[c_j] + v_i[r_j].

    That is a dot product of H + W channels, `[u_i, v_i]` on queries and ones among zeros on keys: nothing of size
    N x N is computed but attention itself, there is no root, and any backend of attention will do. On a CPU suffix
    counts have SaPE2's compiled code, which has the numbers at hand and needs no channels.

    Prefix tokens have bias 0 and are not counted. There are `2 * num_positions * head_dim` parameters a block (twice
    less 2 * head_dim with `counts='outwards'`), shared by its heads and independent of the grid, so any grid will do as
    it is.

    Args:
        host: The model that this encoding is built into.
        counts: 'suffix' counts from a patch to the end of the line, as SaPE2 does, whoever asks; 'outwards' from the
            patch that asks, to the right and downwards as positive, to the left and upwards as negative positions,
            so that its own is 0.
        gating: 'semantic' gates `sigmoid(d ** -0.5 * q_i . k_t)`, or 'none' for gates of 1, which makes positions plain
            distances.
        num_positions: Entries of each table, in each direction; positions are clamped to the last.
        initial_std: Standard deviation of the initial tables. With the 0.02 of SaPE2 the bias begins at about a tenth
            of the logits.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: An option is not one of those listed, `num_positions` is below 2, or `initial_std` not positive.
    """

    place = 'block'
    kind = 'learned'
    options_after_training = ('initial_std',)
    translation = 'content-based'

    scale: Final[float]
    outwards: Final[bool]
    semantic: Final[bool]

    def __init__(
        self,
        host: HostShape,
        *,
        counts: str = 'suffix',
        gating: str = 'semantic',
        num_positions: int = 10,
        initial_std: float = 0.2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice('counts', counts, ('suffix', 'outwards'))
        check_choice('gating', gating, ('semantic', 'none'))
        check_whole_number('num_positions', num_positions, 2)
        check_positive('initial_std', initial_std)
        super().__init__()
        self.scale = host.head_dim**-0.5
        self.outwards = counts == 'outwards'
        self.semantic = gating == 'semantic'
        self.initial_std = initial_std
        entries = 2 * num_positions - 1 if self.outwards else num_positions
        self.row_table = nn.Parameter(torch.empty(entries, host.head_dim, device=device, dtype=dtype))
        self.column_table = nn.Parameter(torch.empty(entries, host.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables from a truncated normal of `initial_std`; tables of 0 would be slow to begin."""
        trunc_normal_(self.row_table, std=self.initial_std)
        trunc_normal_(self.column_table, std=self.initial_std)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return one_hot_coordinates(grid, device)

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        assert shared is not None
        gate_key = key if self.semantic else None
        tables = self.row_table, self.column_table
        return axial_readings(query, gate_key, tables[0], tables[1], grid, self.scale, self.outwards), shared

    def fused_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        rotated: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        if self.outwards or why_not_fused() is not None or why_not_cpu(query) is not None:
            return None
        tables = self.row_table, self.column_table
        gate_key = key if self.semantic else None
        pair = (query, key) if rotated is None else rotated
        return cpu_attention(query, key, value, gate_key, *tables, *pair, grid, num_prefix_tokens, DIRECT, self.scale)


@torch.fx.wrap
def axial_readings(
    query: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor,
    column_table: Tensor,
    grid: tuple[int, int],
    scale: float,
    outwards: bool,
) -> Tensor:
    """What every patch reads for each column of its row and each row of its column, `[u_i, v_i]`.

    Args:
        query: Queries after normalisation, (B, h, N, d).
        gate_key: Keys that gates are read from, (B, h, N, d), or None for gates of 1.
        row_table: Embeddings of the positions along rows, (n, d).
        column_table: Embeddings of the positions along columns, (n, d).
        grid: Rows and columns of patches (H, W), N = H * W.
        scale: Factor of the gates' dot product.
        outwards: Count from the patch that asks, with the middle entry for it, instead of to the end of the line.

    Returns:
        Readings in float32 (float64 stays float64), (B, h, N, W + H).
    """
    batch, heads, _, dim = query.shape
    rows = query.reshape(batch, heads, grid[0], grid[1], dim)
    row_gates = None if gate_key is None else gate_key.reshape(batch, heads, grid[0], grid[1], dim)
    column_gates = None if row_gates is None else row_gates.transpose(2, 3)
    of_rows = read_lines(rows, row_gates, row_table, scale, outwards)
    of_columns = read_lines(rows.transpose(2, 3), column_gates, column_table, scale, outwards).transpose(2, 3)
    return torch.cat([of_rows.flatten(2, 3), of_columns.flatten(2, 3)], dim=-1)


def read_lines(query: Tensor, gate_key: Tensor | None, table: Tensor, scale: float, outwards: bool) -> Tensor:
    """Read a table along lines, queries and keys are (B, h, lines, L, d), readings (B, h, lines, L, L)."""
    gates = unit_gates(query) if gate_key is None else semantic_gates(query, gate_key, scale)
    entries = table.shape[0]
    if outwards:
        positions = outward_positions(gates, entries)
    else:  # as SaPE2's `soft_positions`, but without flips, which are copies
        positions = (gates.sum(-1, keepdim=True) - gates.cumsum(-1) + gates).clamp(0, entries - 1)
    return interpolate(at_least_float32(query @ table.t().to(query.dtype)), positions)


def outward_positions(gates: Tensor, entries: int) -> Tensor:
    """Positions counted from each patch x outwards, plus the middle of the table, within it.

    The position of t > x is the sum of the gates g[x, t'] for x < t' <= t, that of t < x less the sum for t <= t' < x.

    Args:
        gates: Gates, (..., L, L).
        entries: Rows of the table, 2 n - 1, of which n - 1 is for x itself.

    Returns:
        Positions in [0, 2 n - 2], (..., L, L).
    """
    through = gates.cumsum(-1)
    before = through - gates
    after = through - through.diagonal(0, -2, -1).unsqueeze(-1)
    ahead = before - before.diagonal(0, -2, -1).unsqueeze(-1)
    middle = (entries - 1) // 2
    index = torch.arange(gates.shape[-1], device=gates.device)
    positions = torch.where(index > index.unsqueeze(-1), after, ahead)
    return (positions + middle).clamp(0, entries - 1)
