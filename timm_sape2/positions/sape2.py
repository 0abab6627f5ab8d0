"""2D Semantic-Aware Position Encoding (SaPE2)."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2 import choose, sape2_attention, sape2_bias
from .base import HostShape, PositionEncoding

torch.fx.wrap('sape2_bias')


class SaPE2(PositionEncoding):
    """2D Semantic-Aware Position Encoding (arXiv 2505.09466): an attention bias from content-dependent positions.

    Along each row and each column, every patch counts the patches that matter to it, reads a small table of embeddings
    at these fractional positions, and the distance between two patches' readings is added to their attention logit:
    `B[i, j] = |u_i - u_j| + |v_i - v_j|`. See `timm_sape2/ops/sape2/README.md` for the steps.

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
        distance_scale: 'none' (the paper), or 'grid' to multiply distances by sqrt(W_reference / W) and
            sqrt(H_reference / H), with the reference grid kept in the state dict.
        recompute: Where the Triton kernel does not run, compute logits and bias again in the backward pass: nothing
            with N x N numbers is stored for it, at the price of time.

    Raises:
        ValueError: An option is not one of those listed, or `num_positions` is below 2.
    """

    place = 'block'
    kind = 'learned'
    translation = 'content-based'
    options_after_training = ('distance_scale', 'recompute')

    target: Final[str]
    scale: Final[float]
    semantic: Final[bool]
    gates_from_value: Final[bool]
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
        distance_scale: str = 'none',
        recompute: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_choice('target', target, ('k', 'q', 'qk'))
        _check_choice('gating', gating, ('semantic', 'none'))
        _check_choice('gate_source', gate_source, ('key', 'separate', 'value'))
        _check_choice('axes', axes, ('xy', 'x', 'y'))
        _check_choice('distance_scale', distance_scale, ('none', 'grid'))
        if isinstance(num_positions, bool) or not isinstance(num_positions, int) or num_positions < 2:
            raise ValueError(f'num_positions must be a whole number of at least 2, got {num_positions!r}.')
        if not isinstance(recompute, bool):
            raise ValueError(f'recompute must be true or false, got {recompute!r}.')
        if gating == 'none' and gate_source != 'key':
            raise ValueError(f"gate_source={gate_source!r} has no effect with gating='none'; leave one of them out.")
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.target = target
        self.scale = host.head_dim**-0.5
        self.semantic = gating == 'semantic'
        self.gates_from_value = gate_source == 'value'
        self.native_grid = host.grid
        self.recompute = recompute

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
        """Draw the tables from a truncated normal (std 0.02); tables of 0 would never train."""
        for table in (self.row_table, self.column_table):
            if table is not None:
                trunc_normal_(table, std=0.02)
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
    ) -> Tensor:
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

    def fused_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        rotated: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        gate_key = self.gates_from(key, value)
        logit_query, logit_key = (query, key) if rotated is None else rotated
        implementation, _ = choose(
            query, key, value, gate_key, grid, self.target, rotated=rotated is not None, recompute=self.recompute
        )
        if implementation == 'reference':
            return None
        return sape2_attention(
            query,
            key,
            value,
            gate_key,
            self.row_table,
            self.column_table,
            grid,
            num_prefix_tokens,
            target=self.target,
            scale=self.scale,
            reference_grid=self.reference_grid,
            logit_query=logit_query,
            logit_key=logit_key,
            recompute=self.recompute,
            implementation=implementation,
        )

    def adapt_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        source_grid: tuple[int, int] | None,
    ) -> None:
        """Give a checkpoint that was trained with `distance_scale='none'` its own grid as the reference."""
        has_tables = any(f'{prefix}{name}' in state_dict for name in ('row_table', 'column_table'))
        if self.reference_grid is not None and has_tables and source_grid is not None:
            state_dict.setdefault(f'{prefix}reference_grid', torch.tensor(source_grid))


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{option} must be one of {", ".join(map(repr, choices))}, got {value!r}.')
