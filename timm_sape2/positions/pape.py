"""Parabolic position encoding (PaPE)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from ..ops.sape2.reference import at_least_float32
from .base import HostShape, PositionEncoding
from .grid import patch_coordinates
from .options import check_flag, check_positive, check_whole_number


class ParabolicPosition(PositionEncoding):
    """Parabolas of relative positions (PaPE, arXiv 2602.01418), whose shape the attending token decides.

    The tokens x that attention reads give every head m curvatures and slopes, and m learned directions w turn the
    places y = (row, column) of patches into numbers p = w . y:

        B[i, j] = sum over m of -a_i (p_j - p_i) ** 2 + b_i (p_j - p_i),    a_i = softplus(A x_i),  b_i = S x_i.

    Curvatures are never negative, so that far patches lose (distance decay), slopes say where to look first
    (directionality), and both follow the content. Squares expand into 2 m + 1 channels of queries and keys, so nothing
    of size N x N is stored. With `rotation_invariant` (PaPE-RI) the directions are the axes, with one curvature for
    both and no slopes, `B[i, j] = -a_i |y_j - y_i| ** 2`.

    This is a reading of the published equation, not of the authors' code: how many parabolas there are, how they begin,
    and that places are in patches are choices made here.

    Prefix tokens have bias 0. There are 2 * m * h * (C + 2) parameters a block, h * (C + 1) with `rotation_invariant`,
    for h heads and C channels of the model. They are independent of the grid, so any grid will do as it is; the penalty
    goes on growing with the square of the distance.

    Args:
        host: The model that this encoding is built into.
        num_parabolas: Parabolas of every head, m.
        rotation_invariant: Distances alone, without directions.
        initial_std: Standard deviation of the initial directions. Curvatures begin near log 2, so the penalty at a
            distance of r patches begins at about `log(2) * m * (initial_std * r) ** 2`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `num_parabolas` is below 1 or not a whole number, `rotation_invariant` is neither true nor false,
            `initial_std` is not a positive number, or there are directions to choose with `rotation_invariant`.
    """

    place = 'block'
    kind = 'learned'
    options_after_training = ('initial_std',)
    translation = 'relative'

    num_heads: Final[int]
    directions: Tensor | None

    def __init__(
        self,
        host: HostShape,
        *,
        num_parabolas: int = 2,
        rotation_invariant: bool = False,
        initial_std: float = 0.2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole_number('num_parabolas', num_parabolas, 1)
        check_flag('rotation_invariant', rotation_invariant)
        check_positive('initial_std', initial_std)
        if rotation_invariant and num_parabolas != 2:
            raise ValueError('rotation_invariant=True has one parabola for each axis; leave num_parabolas out.')
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_heads = host.num_heads
        self.initial_std = initial_std
        coefficients = 1 if rotation_invariant else 2 * num_parabolas
        self.coefficients = nn.Linear(host.embed_dim, host.num_heads * coefficients, **dd)
        shape = (host.num_heads, num_parabolas, 2)
        self.directions = None if rotation_invariant else nn.Parameter(torch.empty(shape, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions from a truncated normal of `initial_std`, the map of tokens from one of 0.02, biases 0."""
        if self.directions is not None:
            trunc_normal_(self.directions, std=self.initial_std)
        trunc_normal_(self.coefficients.weight, std=0.02)
        nn.init.zeros_(self.coefficients.bias)

    def look(self, tokens: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        return self.coefficients(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, 2 m or 1)

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        assert shared is not None
        return parabola_channels(shared, self.directions, grid)


@torch.fx.wrap
def parabola_channels(coefficients: Tensor, directions: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Channels of queries and of keys whose dot products are the parabolas.

    `-a (p_j - p_i)^2 + b (p_j - p_i) = [-a, 2 a p_i + b, -a p_i^2 - b p_i] . [p_j^2, p_j, 1]`, the last summed over all
    parabolas. Places are counted from the middle of the grid, which changes no difference and leaves more digits to low
    precision. Attention in bfloat16 rounds them: a bias may be off by about a hundredth of the largest `a_i p_j^2`.

    Args:
        coefficients: What curvatures come from, then slopes, (B, h, N, 2 m), or curvatures alone, (B, h, N, 1).
        directions: Row and column part of every direction, (h, m, 2), or None for the two axes without slopes.
        grid: Rows and columns of patches (H, W), N = H * W.

    Returns:
        Channels in float32 (float64 stays float64), (B, h, N, 2 m + 1) and (h or 1, N, 2 m + 1).
    """
    numbers = at_least_float32(coefficients)
    rows, columns = patch_coordinates(grid, numbers.device).unbind(0)
    places = torch.stack([rows - grid[0] // 2, columns - grid[1] // 2], dim=1).to(numbers.dtype)  # (N, 2)
    if directions is None:
        p = places.unsqueeze(0)
        curvature = F.softplus(numbers).expand(-1, -1, -1, 2)
        slope = torch.zeros_like(curvature)
    else:
        p = (places.unsqueeze(1) * directions.to(numbers.dtype).unsqueeze(1)).sum(3)  # (h, N, m)
        bends, slope = numbers.chunk(2, dim=3)
        curvature = F.softplus(bends)
    own = ((curvature * p + slope) * p).sum(3, keepdim=True)
    of_keys = torch.cat([p.square(), p, torch.ones_like(p[..., :1])], dim=2)
    return torch.cat([-curvature, 2 * curvature * p + slope, -own], dim=3), of_keys
