"""2D Semantic-Aware Position Encoding (SaPE2)."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2 import choose, sape2_attention, sape2_bias
from ..ops.sape2.reference import sape2_signatures
from .base import HostShape, PositionEncoding
from .options import check_choice, check_flag, check_positive, check_whole_number

torch.fx.wrap('sape2_bias')


class SaPE2(PositionEncoding):
    """2D Semantic-Aware Position Encoding (arXiv 2505.09466): an attention bias from content-dependent positions.

    Along each row and each column, every patch counts the patches that matter to it, reads a small table of embeddings
    at these fractional positions, and the distance between two patches' readings is added to their attention logit:
    `B[i, j] = |u_i - u_j| + |v_i - v_j|`, or with squares (`distance='squared'`), which is another method, but no more
    than H + W + 2 channels of queries and keys for attention. See `timm_sape2/ops/sape2/README.md` for the steps.

    Prefix tokens have bias 0. There are `2 * num_positions * head_dim` parameters a block, shared by its heads and
    independent of the grid, so any grid will do as it is.

    Args:
        host: The model that this encoding is built into.
        target: 'k' adds embeddings to keys, so that queries are multiplied with them; 'q' the reverse; 'qk' is the
            sum of both biases.
        gating: 'semantic', or 'none' for gates of 1, which makes positions plain distances.
        gate_source: What queries are compared with for gates: 'key', 'separate' (keys through a learned map, shared by
            heads and axes) or 'value'.
        axes: 'xy' rows and columns, 'x' rows only, 'y' columns only.
        num_positions: Entries of each table; positions are clamped to the last.
        distance: 'euclidean' (the paper), or 'squared' for `|u_i - u_j| ** 2 + |v_i - v_j| ** 2`.
        distance_scale: 'none' (the paper), or 'grid' to multiply distances by sqrt(W_reference / W) and
            sqrt(H_reference / H), with the reference grid kept in the state dict.
        recompute: Where only the reference runs, compute logits and bias again in the backward pass: nothing with N x N
            numbers is stored for it, at the price of time. Other implementations never store such.
        initial_std: Standard deviation of the initial tables.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: An option is not one of those listed, `num_positions` is below 2, `initial_std` not positive, or an
            option has no effect beside another.
    """

    place = 'block'
    kind = 'learned'
    translation = 'content-based'
    options_after_training = ('distance_scale', 'recompute', 'initial_std')

    target: Final[str]
    scale: Final[float]
    semantic: Final[bool]
    gates_from_value: Final[bool]
    squared: Final[bool]
    reference_grid: Tensor | None

    def __init__(
        self,
        host: HostShape,
        *,
        target: str = 'k',
        gating: str = 'semantic',
        gate_source: str = 'key',
        axes: str = 'xy',
        num_positions: int = 10,
        distance: str = 'euclidean',
        distance_scale: str = 'none',
        recompute: bool = False,
        initial_std: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice('target', target, ('k', 'q', 'qk'))
        check_choice('gating', gating, ('semantic', 'none'))
        check_choice('gate_source', gate_source, ('key', 'separate', 'value'))
        check_choice('axes', axes, ('xy', 'x', 'y'))
        check_choice('distance', distance, ('euclidean', 'squared'))
        check_choice('distance_scale', distance_scale, ('none', 'grid'))
        check_whole_number('num_positions', num_positions, 2)
        check_positive('initial_std', initial_std)
        check_flag('recompute', recompute)
        if gating == 'none' and gate_source != 'key':
            raise ValueError(f"gate_source={gate_source!r} has no effect with gating='none'; leave one of them out.")
        if distance == 'squared' and recompute:
            raise ValueError("recompute has no effect with distance='squared', which stores nothing; leave it out.")
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.target = target
        self.scale = host.head_dim**-0.5
        self.semantic = gating == 'semantic'
        self.squared = distance == 'squared'
        self.gates_from_value = gate_source == 'value'
        self.native_grid = host.grid
        self.recompute = recompute
        self.initial_std = initial_std

        def table(used: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_positions, host.head_dim, **dd)) if used else None

        self.row_table = table('x' in axes)
        self.column_table = table('y' in axes)
        separate = gate_source == 'separate'
        self.gate_key = nn.Linear(host.head_dim, host.head_dim, bias=False, **dd) if separate else nn.Identity()
        scaled = distance_scale == 'grid'
        self.register_buffer('reference_grid', torch.empty(2, dtype=torch.long, device=device) if scaled else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables from a truncated normal of `initial_std`; tables of 0 would never train."""
        for table in (self.row_table, self.column_table):
            if table is not None:
                trunc_normal_(table, std=self.initial_std)
        if isinstance(self.gate_key, nn.Linear):
            trunc_normal_(self.gate_key.weight, std=0.02)
        if self.reference_grid is not None:
            self.reference_grid.copy_(torch.tensor(self.native_grid))

    def gates_from(self, key: Tensor, value: Tensor) -> Tensor | None:
        """Return what queries are compared with for gates, (B, h, N, d), None for gates of 1."""
        if not self.semantic:
            return None
        return value if self.gates_from_value else self.gate_key(key)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        if self.squared:
            return None
        return sape2_bias(
            query,
            key,
            self.gates_from(key, value),
            self.row_table,
            self.column_table,
            grid,
            self.scale,
            self.target,
            self.reference_grid,
        )

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if not self.squared:
            return None
        return squared_distance_channels(
            query,
            key,
            self.gates_from(key, value),
            self.row_table,
            self.column_table,
            grid,
            self.scale,
            self.target,
            self.reference_grid,
        )

    def fused_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        rotated: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        if self.squared:
            return None
        implementation, _ = choose(query, grid, self.target, self.recompute)
        if implementation == 'reference':
            return None
        logit_query, logit_key = (query, key) if rotated is None else rotated
        return sape2_attention(
            query,
            key,
            value,
            self.gates_from(key, value),
            self.row_table,
            self.column_table,
            grid,
            num_prefix_tokens,
            target=self.target,
            scale=self.scale,
            reference_grid=self.reference_grid,
            logit_query=logit_query,
            logit_key=logit_key,
            implementation=implementation,
        )

    def adapt_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        source_grid: tuple[int, int] | None,
    ) -> None:
        """Without scaled distances drop the reference grid; with them it is by default the checkpoint's own grid."""
        if self.reference_grid is None:
            state_dict.pop(f'{prefix}reference_grid', None)
            return
        has_tables = any(f'{prefix}{name}' in state_dict for name in ('row_table', 'column_table'))
        if has_tables and source_grid is not None:
            state_dict.setdefault(f'{prefix}reference_grid', torch.tensor(source_grid))


@torch.fx.wrap
def squared_distance_channels(
    query: Tensor,
    key: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    scale: float,
    target: str,
    reference_grid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Channels of queries and of keys whose dot products are the squared distances of all signatures.

    `|s_i - s_j| ** 2 = [-2 s_i, |s_i| ** 2, 1] . [s_j, 1, |s_j| ** 2]`, s being row and column signatures together.
    They are centred first, which changes no distance and leaves more digits to low precision. The arguments are those
    of `sape2_signatures`.

    Returns:
        Two tensors (B, h, N, H + W + 2), with twice as many signatures for target 'qk'.
    """
    rows, columns = sape2_signatures(query, key, gate_key, row_table, column_table, grid, scale, target, reference_grid)
    signature = torch.cat(rows + columns, dim=-1)
    signature = signature - signature.mean(-2, keepdim=True)
    square = signature.square().sum(-1, keepdim=True)
    one = torch.ones_like(square)
    return torch.cat([-2 * signature, square, one], dim=-1), torch.cat([signature, one, square], dim=-1)
