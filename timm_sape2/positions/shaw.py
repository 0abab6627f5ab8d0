"""Relative position embeddings on keys and values."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from .base import HostShape, PositionEncoding
from .grid import one_hot_coordinates
from .options import check_flag, check_positive, check_whole_number


class RelativeEmbedding(PositionEncoding):
    """Relative embeddings of Shaw et al. (arXiv 1803.02155, equations 3 and 4), for rows and columns.

    With clipped distances `r = clip(r_j - r_i, -clip, clip)` and c likewise, a table of embeddings for rows and one for
    columns on the keys (K) and on the values (V), the output of a patch i is

        z_i = sum_j a_ij (v_j + V_row[r] + V_column[c]),    a_ij = softmax_j s q_i . (k_j + K_row[r] + K_column[c]).

    The sum over both axes is the cross method of iRPE (arXiv 2107.14222). It needs H + W more channels of queries and
    keys, as every query reads its tables for every row and column of the grid, and as many of the values, which say how
    much weight every row and column got; nothing of size N x N is computed but attention itself.

    Prefix tokens have no embeddings, neither as keys nor as values, and their outputs none. There are
    4 * (2 * clip + 1) * d parameters a block (half of them without `values`), shared by its heads and independent of
    the grid, so any grid will do as it is.

    Args:
        host: The model that this encoding is built into.
        clip: Largest distance that is told apart, in patches.
        values: Embeddings on the values too.
        initial_std: Standard deviation of the initial tables.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `clip` is below 1 or not a whole number, `values` is neither true nor false, or `initial_std` is not
            a positive number.
    """

    place = 'block'
    kind = 'learned'
    options_after_training = ('initial_std',)
    translation = 'relative inside'

    scale: Final[float]
    clip: Final[int]
    value_row_table: Tensor | None
    value_column_table: Tensor | None

    def __init__(
        self,
        host: HostShape,
        *,
        clip: int = 2,
        values: bool = True,
        initial_std: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole_number('clip', clip, 1)
        check_flag('values', values)
        check_positive('initial_std', initial_std)
        super().__init__()
        self.scale = host.head_dim**-0.5
        self.clip = clip
        self.initial_std = initial_std

        def table() -> nn.Parameter:
            return nn.Parameter(torch.empty(2 * clip + 1, host.head_dim, device=device, dtype=dtype))

        self.key_row_table, self.key_column_table = table(), table()
        self.value_row_table, self.value_column_table = (table(), table()) if values else (None, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all tables from a truncated normal of `initial_std`."""
        for table in self.parameters():
            trunc_normal_(table, std=self.initial_std)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return one_hot_coordinates(grid, device)

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        assert shared is not None
        return self.scale * read_tables(query, self.key_row_table, self.key_column_table, self.clip, grid), shared

    def value_channels(self, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        return shared if self.value_row_table is not None else None

    def add_to_output(
        self, output: Tensor, attended: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor:
        row_table, column_table = self.value_row_table, self.value_column_table
        assert row_table is not None and column_table is not None
        return output + mix_tables(attended, row_table, column_table, self.clip, grid)


@torch.fx.wrap
def read_tables(query: Tensor, row_table: Tensor, column_table: Tensor, clip: int, grid: tuple[int, int]) -> Tensor:
    """Dot products of queries (B, h, N, d) with the embeddings of all columns and all rows, (B, h, N, W + H)."""
    query = query.reshape(query.shape[0], query.shape[1], grid[0], grid[1], query.shape[3])
    column_embeddings = clipped_embeddings(column_table, clip, grid[1]).to(query.dtype)
    row_embeddings = clipped_embeddings(row_table, clip, grid[0]).to(query.dtype)
    of_columns = torch.einsum('bhrcd,ctd->bhrct', query, column_embeddings)
    of_rows = torch.einsum('bhrcd,rtd->bhrct', query, row_embeddings)
    return torch.cat([of_columns, of_rows], dim=4).flatten(2, 3)


@torch.fx.wrap
def mix_tables(attended: Tensor, row_table: Tensor, column_table: Tensor, clip: int, grid: tuple[int, int]) -> Tensor:
    """Embeddings weighted by what every column and every row got, (B, h, N, W + H) to (B, h, N, d)."""
    attended = attended.reshape(attended.shape[0], attended.shape[1], grid[0], grid[1], attended.shape[3])
    column_embeddings = clipped_embeddings(column_table, clip, grid[1]).to(attended.dtype)
    row_embeddings = clipped_embeddings(row_table, clip, grid[0]).to(attended.dtype)
    from_columns = torch.einsum('bhrct,ctd->bhrcd', attended[..., : grid[1]], column_embeddings)
    from_rows = torch.einsum('bhrct,rtd->bhrcd', attended[..., grid[1] :], row_embeddings)
    return (from_columns + from_rows).flatten(2, 3)


def clipped_embeddings(table: Tensor, clip: int, length: int) -> Tensor:
    """Embedding of place t as seen from place s of a line, (L, L, d) by s and t."""
    places = torch.arange(length, device=table.device)
    return table[(places - places.unsqueeze(1)).clamp(-clip, clip) + clip]
