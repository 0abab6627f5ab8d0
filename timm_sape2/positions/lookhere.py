"""Directed attention heads with linear biases (LookHere)."""

import torch
from torch import Tensor
from torch.jit import Final

from .base import HostShape, PositionEncoding
from .grid import patch_offsets
from .options import check_choice, check_positive

DIRECTIONS = {'halves': 4, 'quarters': 4, 'eighths': 8}  # that heads look in, by view


class DirectedBias(PositionEncoding):
    """LookHere (arXiv 2405.13985, section 3): heads that see one direction, with a penalty that grows with distance.

    Two thirds of the heads see patches in one direction only, themselves included, and give all others weight 0; the
    rest see everything. What head h of block b sees has the bias

        B[i, j] = -slope * f_b * m_h * |(r_i, c_i) - (r_j, c_j)|,

    with the Euclidean distance in patches, f_b falling linearly from 1.5 in the first block to 0.5 in the last,
    m_h = 1/2 for the first head in every direction, 1/4 for the second, and so on, and m_h from 1/4 to 1/256 for the
    heads that see everything. With 6 and 12 heads these are the assignments of the authors' code.

    Prefix tokens are seen by all heads, see all patches, and have bias 0. There are no parameters and nothing in the
    state dict. Everything is computed for the grid at hand, so any grid will do as it is; at a larger one the authors
    lower or raise `slope`, which changes no weights.

    Args:
        host: The model that this encoding is built into.
        view: 'halves' (180 degrees, up, down, left or right), 'quarters' (90 degrees about these directions) or
            'eighths' (45 degrees).
        slope: Factor of all penalties.
        device: Not used, there are no tensors to hold.
        dtype: Not used.

    Raises:
        ValueError: `view` is not one of those listed, or `slope` is not a positive number.
    """

    place = 'block'
    translation = 'relative'

    view: Final[str]
    slopes: Final[list[float]]
    directed: Final[int]
    factor: Final[float]

    def __init__(
        self,
        host: HostShape,
        *,
        view: str = 'quarters',
        slope: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice('view', view, tuple(DIRECTIONS))
        check_positive('slope', slope)
        super().__init__()
        undirected = host.num_heads // 3
        self.view = view
        self.directed = host.num_heads - undirected
        slopes = [2.0 ** -(1 + h // DIRECTIONS[view]) for h in range(self.directed)]
        slopes += [4.0 ** -(1 + h * 4 // max(undirected, 4)) for h in range(undirected)]
        self.slopes = [slope * head_slope for head_slope in slopes]
        self.factor = 1.5 - (host.block or 0) / max(host.depth - 1, 1)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return directed_penalty(grid, self.view, self.directed, self.slopes, device)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        assert shared is not None
        return (-self.factor * shared).to(query.dtype)


@torch.fx.wrap
def directed_penalty(
    grid: tuple[int, int], view: str, directed: int, slopes: list[float], device: torch.device
) -> Tensor:
    """Penalties before the factor of the block, 10000 where a head does not look, (1, h, N, N) in float32.

    Args:
        grid: Rows and columns of patches (H, W), N = H * W.
        view: A name in `DIRECTIONS`.
        directed: Heads that see one direction, the first ones.
        slopes: Slope of every head.
        device: Where to compute.
    """
    rows, columns = patch_offsets(grid, device).unbind(0)
    distance = (rows.square() + columns.square()).float().sqrt()
    up, down, left, right = rows <= 0, rows >= 0, columns <= 0, columns >= 0
    views = [up, down, left, right]
    if view != 'halves':
        steep, flat = columns.abs() <= rows.abs(), rows.abs() <= columns.abs()
        views = [up & steep, down & steep, left & flat, right & flat]
    if view == 'eighths':
        upper, lower, on_left, on_right = views[0], views[1], views[2], views[3]
        views = [upper & left, lower & left, on_left & up, on_right & up]
        views += [upper & right, lower & right, on_left & down, on_right & down]
    out_of_view = 1e4  # leaves a weight of exactly 0, in half precision too
    penalties: list[Tensor] = []
    for head, slope in enumerate(slopes):
        penalty = slope * distance
        if head < directed:
            penalty = penalty.masked_fill(~views[head % len(views)], out_of_view)
        penalties.append(penalty)
    return torch.stack(penalties).unsqueeze(0)
