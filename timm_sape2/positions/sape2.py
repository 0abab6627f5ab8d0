"""2D Semantic-Aware Position Encoding (SaPE2)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2 import (
    eager_attention,
    is_being_exported,
    sape2_attention,
    sape2_bias,
    sape2_signatures,
    why_not_eager,
    why_not_triton,
)
from .base import Host, PositionEncoding

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
        target: What reads the positions: 'k' queries (embedding on keys), 'q' keys (on queries), 'qk' the sum of both.
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

    options_after_training = ('distance_scale', 'recompute')

    target: Final[str]
    scale: Final[float]
    semantic: Final[bool]
    gates_from_value: Final[bool]
    reference_grid: Tensor | None

    def __init__(
        self,
        host: Host,
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
        if self.reference_grid is not None:
            self.reference_grid.copy_(torch.tensor(self.native_grid))

    def gates_from(self, key: Tensor, value: Tensor) -> Tensor | None:
        """Return what queries are compared with for gates, (B, h, N, d), None for gates of 1."""
        if not self.semantic:
            return None
        return value if self.gates_from_value else self.gate_key(key)

    def attention_bias(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
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
    ) -> Tensor | None:
        if self.why_not_triton(query, grid) is None:
            patch_query, patch_key, patch_value = (x[:, :, num_prefix_tokens:] for x in (query, key, value))
            rows, columns = sape2_signatures(
                patch_query,
                patch_key,
                self.gates_from(patch_key, patch_value),
                self.row_table,
                self.column_table,
                grid,
                self.scale,
                self.target,
                self.reference_grid,
            )
            row, column = (x[0] if x else None for x in (rows, columns))
            return sape2_attention(query, key, value, row, column, grid, num_prefix_tokens, implementation='triton')
        if self.why_not_eager(query, key, value) is not None:
            if is_being_exported() or not (self.recompute and torch.is_grad_enabled()):
                return None
            return checkpoint(self.attend, query, key, value, grid, num_prefix_tokens)
        row_table, column_table = self.row_table, self.column_table
        if self.reference_grid is not None:  # signatures, and so distances, are linear in the tables
            row_scale, column_scale = (self.reference_grid.flip(0) / torch.tensor((grid[1], grid[0]))).sqrt()
            row_table = None if row_table is None else row_table * row_scale
            column_table = None if column_table is None else column_table * column_scale
        return eager_attention(
            query,
            key,
            value,
            row_table,
            column_table,
            grid,
            num_prefix_tokens,
            self.semantic,
            self.target,
            self.recompute,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
    ) -> Tensor:
        """Attention with a stored bias, (B, h, P + N, d)."""
        patch_query, patch_key, patch_value = (x[:, :, num_prefix_tokens:] for x in (query, key, value))
        bias = self.attention_bias(patch_query, patch_key, patch_value, grid)
        bias = F.pad(bias, [num_prefix_tokens, 0, num_prefix_tokens, 0])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    def why_not_triton(self, query: Tensor, grid: tuple[int, int]) -> str | None:
        """Tell why the Triton kernel cannot compute attention with this encoding, None if it can.

        Args:
            query: Queries, (B, h, P + N, d).
            grid: Rows and columns of patches.

        Returns:
            The reason or None.
        """
        if self.target == 'qk':
            return "target='qk' has two signatures an axis"
        return why_not_triton(query, grid)

    def why_not_eager(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        """Tell why `eager_attention` cannot compute attention with this encoding, None if it can."""
        if self.target == 'qk':
            return "target='qk' has two signatures an axis"
        if self.gates_from_value or not isinstance(self.gate_key, nn.Identity):
            return 'gates do not come from the dot products of attention'
        return why_not_eager(query, key, value)

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
