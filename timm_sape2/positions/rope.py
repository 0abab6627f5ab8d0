"""Rotary position encoding in two dimensions, with fixed axial or learned mixed frequencies."""

import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed
from torch import Tensor, nn
from torch.jit import Final

from .._compat import init_random_2d_freqs
from ..ops.sape2.reference import at_least_float32
from .base import HostShape, PositionEncoding


class AxialRotaryPosition(PositionEncoding):
    """Rotary encoding of rows and columns with fixed frequencies (RoPE-Axial, arXiv 2403.13298, equations 10 and 11).

    Queries and keys of a patch in row r and column c are rotated in the planes of neighbouring channels (2k, 2k + 1).
    With D = d / 4 frequencies `w_k = temperature ** (-k / D)`, the angle is `c w_k` in the first half of the channels
    and `r w_k` in the second, so that a dot product depends on contents and on (r_i - r_j, c_i - c_j) alone.
    The same as `vit_small_patch16_rope_224` of timm, which takes its weights from the authors.

    Prefix tokens are not rotated, so that their dot products with a patch depend on its place. There are no parameters
    and nothing in the state dict. Angles are computed for
    the grid at hand, so any grid will do as it is; a larger grid has distances that were never seen in training.

    Args:
        host: The model that this encoding is built into.
        temperature: Base of the frequencies; the longest period is about 2 pi times this many patches.
        device: Not used, there are no tensors to hold.
        dtype: Not used.

    Raises:
        ValueError: The head dimension is not divisible by 4, or `temperature` is not a positive number.
    """

    place = 'block'
    translation = 'relative'

    head_dim: Final[int]
    temperature: Final[float]

    def __init__(
        self,
        host: HostShape,
        *,
        temperature: float = 100.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check('rope', host, temperature)
        super().__init__()
        self.head_dim = host.head_dim
        self.temperature = float(temperature)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return axial_angles(grid, self.head_dim, self.temperature, device)

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert shared is not None
        sin, cos = shared[0], shared[1]
        return apply_rot_embed(query, sin, cos), apply_rot_embed(key, sin, cos)


class MixedRotaryPosition(PositionEncoding):
    """Rotary encoding with learned frequencies in both directions (RoPE-Mixed, arXiv 2403.13298, equations 12 and 13).

    As with `AxialRotaryPosition`, but every plane k of every head has learned frequencies of its own, and the
    angle of a patch in row r and column c is `c u_k + r v_k`: diagonal directions take part too. The same as
    `vit_small_patch16_rope_mixed_224` of timm. Frequencies start as the axial ones with `temperature`, turned by
    a random angle in each head.

    Prefix tokens are not rotated, as there. There are h * d = C parameters a block, `freqs` (2, h, d / 2) for u and v,
    independent of the grid. Angles are computed for the grid at hand, so any grid will do as it is.

    Args:
        host: The model that this encoding is built into.
        temperature: Base of the initial frequencies.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: The head dimension is not divisible by 4, or `temperature` is not a positive number.
    """

    place = 'block'
    kind = 'learned'
    translation = 'relative'

    def __init__(
        self,
        host: HostShape,
        *,
        temperature: float = 10.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check('rope_mixed', host, temperature)
        super().__init__()
        self.temperature = float(temperature)
        self.freqs = nn.Parameter(torch.empty(2, host.num_heads, host.head_dim // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the frequencies to the axial ones, turned by a random angle in each head."""
        _, heads, planes = self.freqs.shape
        initial = init_random_2d_freqs(2 * planes, 1, heads, self.temperature, device=self.freqs.device)
        with torch.no_grad():
            self.freqs.copy_(initial[:, 0])

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return patch_coordinates(grid, device)

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert shared is not None
        return rotate_mixed(query, key, shared, self.freqs)


def _check(name: str, host: HostShape, temperature: float) -> None:
    if host.head_dim % 4:
        raise ValueError(
            f'position={name!r} needs a head dimension (embed_dim / num_heads) divisible by 4, got {host.head_dim}.'
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < float('inf'):
        raise ValueError(f'temperature must be a positive number, got {temperature!r}.')


@torch.fx.wrap
def axial_angles(grid: tuple[int, int], head_dim: int, temperature: float, device: torch.device) -> Tensor:
    """Sines and cosines of `AxialRotaryPosition`'s angles for all patches of a grid, (2, N, d) in float32."""
    sin, cos = build_rotary_pos_embed(
        [grid[0], grid[1]], dim=head_dim, temperature=temperature, in_pixels=False, grid_indexing='xy', device=device
    )
    return torch.stack([sin, cos])


@torch.fx.wrap
def patch_coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of all patches of a grid in raster order, (2, N)."""
    height, width = grid
    rows = torch.arange(height, device=device).unsqueeze(1).expand(-1, width).flatten()
    columns = torch.arange(width, device=device).unsqueeze(0).expand(height, -1).flatten()
    return torch.stack([rows, columns])


@torch.fx.wrap
def rotate_mixed(query: Tensor, key: Tensor, coordinates: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, h, N, d) of patches at `coordinates` (2, N), with frequencies (2, h, d / 2)."""
    rows, columns = coordinates.unsqueeze(-1).unbind(0)  # (N, 1)
    column_freqs, row_freqs = at_least_float32(freqs).unsqueeze(2).unbind(0)  # (h, 1, d / 2)
    angles = columns * column_freqs + rows * row_freqs  # (h, N, d / 2)
    angles = torch.stack([angles, angles], dim=-1).flatten(-2)
    sin, cos = angles.sin(), angles.cos()
    return apply_rot_embed(query, sin, cos), apply_rot_embed(key, sin, cos)
