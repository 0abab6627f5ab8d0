"""Learned rotations that do not commute (LieRE)."""

import math

import torch
from torch import Tensor, nn

from ..ops.sape2.reference import at_least_float32
from .base import HostShape, PositionEncoding
from .grid import patch_coordinates
from .options import check_head_dim


class LieRotaryPosition(PositionEncoding):
    """Lie rotational encoding (LieRE, arXiv 2406.10322): queries and keys turned by `exp(x A + y B)`.

    A patch in column c and row r is at x = c / (W - 1) and y = r / (H - 1), in [0, 1]. A and B are learned
    skew-symmetric matrices for every head, so that their exponential is a rotation; with planes of neighbouring
    channels it would be rotary encoding with learned frequencies (`rope_mixed`). Here they have blocks of 4 x 4,
    between that and the 8 x 8 and full matrices of the authors. Such a rotation has a closed form: a skew-symmetric
    matrix of 4 x 4 is the sum of two that commute and square to `-a ** 2 I` and `-b ** 2 I`, so that

        exp(S + T) = (cos a I + sin a / a S) (cos b I + sin b / b T).

    A and B do not commute, so a dot product depends on both places, not only on their distance.

    Prefix tokens are not rotated. There are 3 * C parameters a block, `generators` (2, h, d / 4, 6) with three numbers
    for S and three for T, independent of the grid. Coordinates span the grid at hand, so any grid will do as it is:
    at a larger one patches are nearer to one another.

    Args:
        host: The model that this encoding is built into.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: The head dimension is not divisible by 4.
    """

    place = 'block'
    kind = 'learned'
    translation = 'absolute'

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        check_head_dim('liere', host.head_dim)
        super().__init__()
        shape = (2, host.num_heads, host.head_dim // 4, 6)
        self.generators = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the entries of A and B from [0, 2 pi), as the authors do, signs apart."""
        with torch.no_grad():
            entries = torch.empty_like(self.generators).uniform_(0, 2 * math.pi)
            first, second = entries.unflatten(-1, (2, 3)).unbind(-2)
            self.generators.copy_(torch.cat([(first + second) / 2, (first - second) / 2], dim=-1))

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return unit_coordinates(grid, device)

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert shared is not None
        rotations = rotation_blocks(self.generators, shared)
        return turn(query, rotations), turn(key, rotations)


@torch.fx.wrap
def unit_coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Coordinates x and y of all patches from 0 to 1, (2, N) in float32; 0 along an axis of one patch."""
    rows, columns = patch_coordinates(grid, device).float().unbind(0)
    return torch.stack([columns / max(grid[1] - 1, 1), rows / max(grid[0] - 1, 1)])


@torch.fx.wrap
def rotation_blocks(generators: Tensor, coordinates: Tensor) -> Tensor:
    """Exponentials of `x A + y B` for all patches.

    A block with the numbers (s1, s2, s3, t1, t2, t3) is S + T; each is a sum over three matrices that anticommute and
    square to -I: left and right multiplication of quaternions.

    Args:
        generators: Numbers of the blocks of A and B, (2, h, d / 4, 6).
        coordinates: x and y of the patches, (2, N).

    Returns:
        Rotations, (h, N, d / 4, 4, 4).
    """
    numbers = at_least_float32(generators)
    a, b = numbers.unsqueeze(2).unbind(0)  # (h, 1, d / 4, 6)
    x, y = coordinates.to(numbers.dtype).view(2, 1, -1, 1, 1).unbind(0)  # (1, N, 1, 1)
    sums = x * a + y * b  # (h, N, d / 4, 6)
    left, right = sums[..., :3], sums[..., 3:]
    left_angle, right_angle = safe_norm(left), safe_norm(right)
    w, p, q, r = quaternion(left, left_angle)
    s = torch.stack([w, -p, -q, -r, p, w, -r, q, q, r, w, -p, r, -q, p, w], dim=-1).unflatten(-1, (4, 4))
    w, p, q, r = quaternion(right, right_angle)
    t = torch.stack([w, -p, -q, -r, p, w, r, -q, q, -r, w, p, r, q, -p, w], dim=-1).unflatten(-1, (4, 4))
    return s @ t


def safe_norm(x: Tensor) -> Tensor:
    """Norms of the last dimension, kept, above 0 so that they have a gradient."""
    return x.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()  # onnxscript would leave out "+ 1e-12"


def quaternion(x: Tensor, angle: Tensor) -> list[Tensor]:
    """The exponential of an imaginary quaternion x (..., 3) of this norm (..., 1): its four numbers."""
    imaginary = x * (angle.sin() / angle)
    return [angle[..., 0].cos(), imaginary[..., 0], imaginary[..., 1], imaginary[..., 2]]


@torch.fx.wrap
def turn(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn queries or keys (B, h, N, d) by rotations of blocks of 4 channels (h, N, d / 4, 4, 4)."""
    blocks = x.to(rotations.dtype).unflatten(-1, (-1, 4)).unsqueeze(-1)
    return (rotations * blocks.transpose(-1, -2)).sum(-1).flatten(-2).to(x.dtype)
