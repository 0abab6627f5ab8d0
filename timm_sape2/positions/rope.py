"""Rotary position encoding in two dimensions, with fixed axial or learned mixed frequencies."""

import math

import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed
from torch import Tensor, nn
from torch.jit import Final

from .._compat import init_random_2d_freqs
from ..ops.sape2.reference import at_least_float32
from .base import HostShape, PositionEncoding
from .grid import patch_coordinates
from .options import check_choice, check_head_dim, check_number, check_positive


class AxialRotaryPosition(PositionEncoding):
    """Rotary encoding of rows and columns with fixed frequencies (RoPE-Axial, arXiv 2403.13298, equations 10 and 11).

    Queries and keys of a patch in row r and column c are rotated in the planes of neighbouring channels (2k, 2k + 1).
    With D = d / 4 frequencies `w_k = temperature ** (-k / D)`, the angle is `c w_k` in the first half of the channels
    and `r w_k` in the second, so that a dot product depends on contents and on (r_i - r_j, c_i - c_j) alone.
    The same as `vit_small_patch16_rope_224` of timm, which takes its weights from the authors.

    With other `coordinates` than patches, as in DINOv3 (arXiv 2508.10104, section 3.2), rows and columns are replaced
    by places between -1 and 1, the centres of patches, `y = 2 (r + 1/2) / H - 1`, and the frequencies are
    `w_k = 2 pi temperature ** (-k / D)`: the angles are those of `RotaryEmbeddingDinoV3` in timm. Such places may be
    changed at random in training, all alike: both moved, each stretched and both stretched.

    Prefix tokens are not rotated, so that their dot products with a patch depend on its place. There are no parameters
    and nothing in the state dict. Angles are computed for the grid at hand, so any grid will do as it is. A larger grid
    has distances in patches that were never seen in training; normalised coordinates shrink the distances instead.

    Args:
        host: The model that this encoding is built into.
        temperature: Base of the frequencies; in patches the longest period is about 2 pi times this many.
        coordinates: 'patches', or normalised by the size of the grid along each axis ('separate', as in DINOv3) or by
            its longer ('max') or shorter side ('min').
        shift: In training, move normalised coordinates along each axis by up to this much.
        jitter: In training, stretch each axis by a factor between 1 / `jitter` and `jitter` (2 in DINOv3).
        rescale: In training, stretch both axes by one factor between 1 / `rescale` and `rescale` (2 in DINOv3).
        device: Not used, there are no tensors to hold.
        dtype: Not used.

    Raises:
        ValueError: The head dimension is not divisible by 4, `temperature` is not a positive number, `coordinates` is
            not one of those listed, or an option of training is out of range or given with coordinates in patches.
    """

    place = 'block'
    translation = 'relative'
    options_after_training = ('shift', 'jitter', 'rescale')

    head_dim: Final[int]
    temperature: Final[float]
    coordinates: Final[str]
    shift: Final[float]
    jitter: Final[float]
    rescale: Final[float]

    def __init__(
        self,
        host: HostShape,
        *,
        temperature: float = 100.0,
        coordinates: str = 'patches',
        shift: float = 0.0,
        jitter: float = 1.0,
        rescale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_head_dim('rope', host.head_dim)
        check_positive('temperature', temperature)
        check_choice('coordinates', coordinates, ('patches', 'separate', 'max', 'min'))
        for option, value, least in (('shift', shift, 0), ('jitter', jitter, 1), ('rescale', rescale, 1)):
            check_number(option, value, least)
            if value > least and coordinates == 'patches':
                raise ValueError(f"{option}={value!r} needs normalised coordinates, such as coordinates='separate'.")
        super().__init__()
        self.head_dim = host.head_dim
        self.temperature = float(temperature)
        self.coordinates = coordinates
        self.shift, self.jitter, self.rescale = float(shift), float(jitter), float(rescale)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.coordinates != 'patches':
            places = normalized_coordinates(grid, self.coordinates, device)
            if self.training:
                places = augment_coordinates(places, self.shift, self.jitter, self.rescale)
            return normalized_angles(places, self.head_dim, self.temperature)
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
        check_head_dim('rope_mixed', host.head_dim)
        check_positive('temperature', temperature)
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


@torch.fx.wrap
def axial_angles(grid: tuple[int, int], head_dim: int, temperature: float, device: torch.device) -> Tensor:
    """Sines and cosines of `AxialRotaryPosition`'s angles for all patches of a grid, (2, N, d) in float32."""
    sin, cos = build_rotary_pos_embed(
        [grid[0], grid[1]], dim=head_dim, temperature=temperature, in_pixels=False, grid_indexing='xy', device=device
    )
    return torch.stack([sin, cos])


@torch.fx.wrap
def normalized_coordinates(grid: tuple[int, int], by: str, device: torch.device) -> Tensor:
    """Place of all patches by row and by column, (2, N) in float32, from -1 to 1 if `by` is 'separate'."""
    height, width = grid
    if by == 'max':
        height = width = max(height, width)
    elif by == 'min':
        height = width = min(height, width)
    rows, columns = (patch_coordinates(grid, device).float() + 0.5).unbind(0)
    return torch.stack([2 * (rows / height) - 1, 2 * (columns / width) - 1])


@torch.fx.wrap
def augment_coordinates(places: Tensor, shift: float, jitter: float, rescale: float) -> Tensor:
    """Move and stretch places (2, N) at random, in the order of DINOv3; see `AxialRotaryPosition`."""
    if shift > 0:
        places = places + torch.empty(2, 1, device=places.device).uniform_(-shift, shift)
    if jitter > 1:
        places = places * torch.empty(2, 1, device=places.device).uniform_(-math.log(jitter), math.log(jitter)).exp()
    if rescale > 1:
        places = places * torch.empty(1, device=places.device).uniform_(-math.log(rescale), math.log(rescale)).exp()
    return places


@torch.fx.wrap
def normalized_angles(places: Tensor, head_dim: int, temperature: float) -> Tensor:
    """Sines and cosines of the angles at places (2, N), the columns in the first half, (2, N, d) in float32."""
    exponents = torch.arange(head_dim // 4, device=places.device).float() / (head_dim // 4)
    rows, columns = (2 * math.pi * places.unsqueeze(-1) / temperature**exponents).unbind(0)
    angles = torch.cat([columns, rows], dim=-1).repeat_interleave(2, dim=-1)
    return torch.stack([angles.sin(), angles.cos()])


@torch.fx.wrap
def rotate_mixed(query: Tensor, key: Tensor, coordinates: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, h, N, d) of patches at `coordinates` (2, N), with frequencies (2, h, d / 2)."""
    rows, columns = coordinates.unsqueeze(-1).unbind(0)  # (N, 1)
    column_freqs, row_freqs = at_least_float32(freqs).unsqueeze(2).unbind(0)  # (h, 1, d / 2)
    angles = columns * column_freqs + rows * row_freqs  # (h, N, d / 2)
    angles = torch.stack([angles, angles], dim=-1).flatten(-2)
    sin, cos = angles.sin(), angles.cos()
    return apply_rot_embed(query, sin, cos), apply_rot_embed(key, sin, cos)
