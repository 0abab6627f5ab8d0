"""Functional interpolation for relative positions (FIRE), in two dimensions."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.sape2.reference import at_least_float32
from .base import HostShape, PositionEncoding
from .options import check_whole_number
from .relbias import relative_index


class FunctionalBias(PositionEncoding):
    """A learned function of interpolated distances (FIRE, arXiv 2310.04418), for rows and columns.

    The paper's bias of sequences is `f(psi(i - j) / psi(max(L, i)))` with `psi(x) = log(|c| x + 1)`, where c is learned
    and f is a small network with an output for every head. The numerator tells near distances apart better than far
    ones, the denominator keeps the argument in [0, 1] however long the sequence, since i is the largest distance in it.
    Here f takes one such number for rows and one for columns, with the sign of the distance as images have no order,
    and the largest distances are H - 1 and W - 1, as timm's `RelPosMlp` does with constants in place of c:

        B[i, j] = f(s(r_j - r_i, H - 1), s(c_j - c_i, W - 1)),    s(x, l) = sign(x) psi(|x|) / psi(l).

    The threshold L of the paper, below which short contexts are not stretched, is left out: on one grid it would be a
    constant. f has one hidden layer with ReLU and runs once for every distance, not for every pair.

    Prefix tokens have bias 0. There are `hidden * (h + 3) + h + 1` parameters a block for h heads. Distances are
    interpolated to any grid, so that the bias spans it as it did the grid of training, with the parameters as they are.

    Args:
        host: The model that this encoding is built into.
        hidden: Width of the hidden layer of f.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `hidden` is below 1 or not a whole number.
    """

    place = 'block'
    kind = 'learned'
    translation = 'relative'

    def __init__(
        self,
        host: HostShape,
        *,
        hidden: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole_number('hidden', hidden, 1)
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.steepness = nn.Parameter(torch.empty(1, **dd))
        self.hidden = nn.Linear(2, hidden, **dd)
        self.output = nn.Linear(hidden, host.num_heads, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with c of 0.1, as the authors do, and the layers of f as PyTorch draws them."""
        nn.init.constant_(self.steepness, 0.1)
        self.hidden.reset_parameters()
        self.output.reset_parameters()

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return relative_index(grid, device)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        assert shared is not None
        table = self.output(self.hidden(interpolated_distances(self.steepness, grid)).relu())  # ((2H-1)(2W-1), h)
        return table.t()[:, shared].unsqueeze(0).to(query.dtype)


@torch.fx.wrap
def interpolated_distances(steepness: Tensor, grid: tuple[int, int]) -> Tensor:
    """Numbers from -1 to 1 for all distances of rows and columns, ((2H - 1)(2W - 1), 2) in the order of a table.

    Args:
        steepness: The learned c, (1).
        grid: Rows and columns of patches (H, W).
    """
    rows, columns = line_distances(steepness, grid[0]), line_distances(steepness, grid[1])
    pairs = [rows.unsqueeze(1).expand(-1, columns.shape[0]), columns.unsqueeze(0).expand(rows.shape[0], -1)]
    return torch.stack(pairs, dim=2).flatten(0, 1).to(steepness.dtype)


def line_distances(steepness: Tensor, length: int) -> Tensor:
    """Numbers for the distances from length - 1 to 1 - length, the order of `relative_index`, (2 * length - 1)."""
    c = at_least_float32(steepness).abs()
    distance = length - 1 - torch.arange(2 * length - 1, device=c.device)
    return distance.sign() * (c * distance.abs() + 1).log() / ((c * max(length - 1, 1) + 1).log() + 1e-6)
