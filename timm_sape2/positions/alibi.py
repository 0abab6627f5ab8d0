"""Attention with linear biases in two dimensions."""

import math

import torch
from torch import Tensor
from torch.jit import Final

from .base import HostShape, PositionEncoding
from .grid import patch_offsets


class LinearBias(PositionEncoding):
    """Linear biases of ALiBi (arXiv 2108.12409) for images: `B[i, j] = -m_h |(r_i, c_i) - (r_j, c_j)|`.

    Distances are Euclidean, in patches, as in 2D-ALiBi of CROMA (arXiv 2311.00566, section 3). The slopes m_h of
    h = 1 ... n heads are `2 ** (-8 h / n)` if n is a power of 2. If not, they are those of the power of 2 below, and
    then every second one of the next power, as in ALiBi's code.

    Prefix tokens have bias 0. There are no parameters and nothing in the state dict. Distances are computed for the
    grid at hand, so any grid will do as it is; the penalty goes on growing with the distance.

    Args:
        host: The model that this encoding is built into.
        device: Not used, there are no tensors to hold.
        dtype: Not used.
    """

    place = 'block'
    translation = 'relative'

    slopes: Final[list[float]]

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.slopes = alibi_slopes(host.num_heads)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return linear_bias(grid, self.slopes, device)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        assert shared is not None
        return shared.to(query.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of the heads, as ALiBi's code has them for any number of heads."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    between = [2 ** (-4 * h / below) for h in range(1, 2 * below + 1, 2)]
    return slopes + between[: num_heads - below]


@torch.fx.wrap
def linear_bias(grid: tuple[int, int], slopes: list[float], device: torch.device) -> Tensor:
    """Less slope times distance for all heads and pairs of patches, (1, h, N, N) in float32."""
    distance = patch_offsets(grid, device).float().square().sum(0).sqrt()
    return -torch.tensor(slopes, device=device).view(1, -1, 1, 1) * distance
