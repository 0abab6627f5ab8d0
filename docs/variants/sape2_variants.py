"""Variants of SaPE2 that the screening tried and `timm_sape2` does without; docs/studies.md has what became of them.

They are encodings of another package, found by the entry points in the pyproject.toml beside: after `pip install
./docs/variants` their names work wherever those of `timm_sape2` do.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_sape2.positions import ENCODINGS, HostShape, PositionEncoding
from timm_sape2.positions.grid import one_hot_coordinates
from timm_sape2.positions.options import check_flag

SaPE2, AxialContextualPosition = ENCODINGS['sape2'], ENCODINGS['axial_cope']


class SaPE2WithFactor(SaPE2):
    """SaPE2 with the sign and the scale of its bias learned: `B[i, j] = f_h (|u_i - u_j| + |v_i - v_j|)` in head h.

    A distance added to the logits, as in the paper, lets patches attend more to what is unlike them; a negative factor
    turns that round.

    Args:
        initial_factor: Factor of every head at first.
        initial_std: Standard deviation of the initial tables.
    """

    fused_attention = PositionEncoding.fused_attention  # that of SaPE2 has no factor

    def __init__(
        self,
        host: HostShape,
        *,
        initial_factor: float = -1.0,
        initial_std: float = 0.2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(host, initial_std=initial_std, device=device, dtype=dtype)
        self.initial_factor = initial_factor
        self.factor = nn.Parameter(torch.empty(host.num_heads, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, 'factor'):  # not yet when SaPE2's constructor draws its tables
            nn.init.constant_(self.factor, self.initial_factor)

    def attention_bias(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self.factor * super().attention_bias(*args, **kwargs)


class Tied:
    """Mixin: every block reads the tables of the first, which a model builds just before the others."""

    def __init__(self, host: HostShape, **kwargs: Any) -> None:
        super().__init__(host, **kwargs)
        if host.block == 0:
            type(self).first = self
        else:
            self.row_table, self.column_table = self.first.row_table, self.first.column_table


class TiedSaPE2(Tied, SaPE2):
    """SaPE2 with one pair of tables for all blocks."""

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(host, device=device, dtype=dtype)


class TiedAxial(Tied, AxialContextualPosition):
    """`axial_cope` with one pair of tables for all blocks.

    Args:
        gating: 'semantic', or 'none' for gates of 1.
    """

    def __init__(
        self,
        host: HostShape,
        *,
        gating: str = 'semantic',
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(host, gating=gating, device=device, dtype=dtype)


class AxialBias(PositionEncoding):
    """`axial_cope(gating=none)` with a term that no content takes part in, or with that term alone.

    With gates of 1 the position of column c in its row of W is W - c, whoever asks, within a table of n entries. In
    head h query i reads `u_i[c] = q_i . E(p[c]) + f_h(p[c])`, along columns alike, and the bias of a key in row r_j and
    column c_j is `u_i[c_j] + v_i[r_j]`.

    Args:
        content: Whether the term of the query, `q_i . E(p[c])`, is there.
        num_positions: Entries of each table, n.
        initial_std: Standard deviation of the initial tables E; the terms f begin at 0.

    Raises:
        ValueError: `content` is neither true nor false.
    """

    place, kind, translation = 'block', 'learned', 'absolute'

    def __init__(
        self,
        host: HostShape,
        *,
        content: bool = True,
        num_positions: int = 10,
        initial_std: float = 0.2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_flag('content', content)
        super().__init__()
        self.initial_std = initial_std
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        shape = num_positions, host.head_dim
        self.row_table = nn.Parameter(torch.empty(shape, **dd)) if content else None
        self.column_table = nn.Parameter(torch.empty(shape, **dd)) if content else None
        self.row_term = nn.Parameter(torch.empty(host.num_heads, num_positions, **dd))
        self.column_term = nn.Parameter(torch.empty(host.num_heads, num_positions, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.row_table, self.column_table):
            if table is not None:
                trunc_normal_(table, std=self.initial_std)
        nn.init.zeros_(self.row_term)
        nn.init.zeros_(self.column_term)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return one_hot_coordinates(grid, device)

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        of_rows = self.read(query, self.row_table, self.row_term, grid[1])
        of_columns = self.read(query, self.column_table, self.column_term, grid[0])
        return torch.cat([of_rows, of_columns], dim=-1), shared

    def read(self, query: Tensor, table: Tensor | None, term: Tensor, length: int) -> Tensor:
        """What every query reads for each place of a line, (B, h, N, length)."""
        positions = (length - torch.arange(length, device=query.device)).clamp(max=term.shape[1] - 1)
        free = term[:, positions].unsqueeze(1).expand(query.shape[0], -1, query.shape[2], -1)
        return free if table is None else free + query @ table[positions].t()
