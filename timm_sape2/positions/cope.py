"""Contextual position encoding (CoPE)."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2.reference import semantic_gates, signatures
from .base import HostShape, PositionEncoding
from .options import check_whole_number


class ContextualPosition(PositionEncoding):
    """Contextual position encoding (CoPE, arXiv 2405.18719), a bias from positions that count what matters.

    The patches are one sequence in raster order, without causal mask:

    - gates `g[i, t] = sigmoid(d ** -0.5 * q_i . k_t)`,
    - positions `p[i, j] = sum over t >= j of g[i, t]`, at most `num_positions - 1`,
    - bias `B[i, j] = q_i . E(p[i, j])`, E the linear interpolation of the table between whole positions.

    It is computed from `z = q E^T`, interpolated, in float32 whatever the autocast state. Without the mask of a
    language model, a sum that starts at j runs to the last patch, as in the rows and columns of SaPE2.

    Prefix tokens have bias 0 and are not counted. There are `num_positions * head_dim` parameters a block, shared by
    its heads and independent of the grid, so any grid will do as it is. The number of columns is not used: the
    same patches on a grid of another shape give the same bias.

    Args:
        host: The model that this encoding is built into.
        num_positions: Entries of the table. The authors' code takes one more than the sequence is long, so that nothing
            is clamped; 64 comes to that for an 8x8 grid, without tying the table to the image size. On a larger grid
            patches with many relevant ones after them share the last position.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `num_positions` is below 2 or not a whole number.
    """

    place = 'block'
    kind = 'learned'
    translation = 'content-based'

    scale: Final[float]

    def __init__(
        self,
        host: HostShape,
        *,
        num_positions: int = 64,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole_number('num_positions', num_positions, 2)
        super().__init__()
        self.scale = host.head_dim**-0.5
        self.position_table = nn.Parameter(torch.empty(num_positions, host.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a truncated normal (std 0.02)."""
        trunc_normal_(self.position_table, std=0.02)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        return cope_bias(query, key, self.position_table, self.scale)


@torch.fx.wrap
def cope_bias(query: Tensor, key: Tensor, table: Tensor, scale: float) -> Tensor:
    """Attention bias of CoPE over one sequence.

    Args:
        query: Queries after normalisation, (B, h, N, d).
        key: Keys after normalisation, (B, h, N, d).
        table: Position embeddings, (n, d).
        scale: Factor of the gates' dot product, usually d ** -0.5.

    Returns:
        Bias in the dtype of `query`, (B, h, N, N).
    """
    return signatures(query, semantic_gates(query, key, scale), table).to(query.dtype)
