"""Relative position bias."""

import logging

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from .base import HostShape, PositionEncoding
from .grid import patch_offsets

_logger = logging.getLogger(__name__)


class RelativePositionBias(PositionEncoding):
    """Relative position bias of Swin (arXiv 2103.14030, equation 4): `B[i, j] = table[r_i - r_j, c_i - c_j]`.

    Prefix tokens have three numbers a head as in BEiT (arXiv 2106.08254), for a prefix token that attends to a patch,
    a patch that attends to a prefix token, and prefix tokens among themselves. There are ((2H - 1)(2W - 1) + 3) * h
    parameters a block, without prefix tokens 3 * h less, the same numbers as in timm's `RelPosBias`.

    At another grid the table is resampled bicubically to (2H' - 1)(2W' - 1), so that it spans the new grid as it did
    the old one; the three numbers stay as they are. `set_input_size` and loading a checkpoint do so once, a model with
    `dynamic_img_size=True` in every forward.

    Args:
        host: The model that this encoding is built into.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    place = 'block'
    kind = 'learned'
    translation = 'relative'
    other_grids = 'resampled'

    bias_has_prefix_tokens = True
    num_prefix_tokens: Final[int]
    prefix_bias: Tensor | None

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        (height, width), heads = host.grid, host.num_heads
        self.num_prefix_tokens = host.num_prefix_tokens
        self.bias_table = nn.Parameter(torch.empty(heads, 2 * height - 1, 2 * width - 1, device=device, dtype=dtype))
        has_prefix = host.num_prefix_tokens > 0
        self.prefix_bias = nn.Parameter(torch.empty(3, heads, device=device, dtype=dtype)) if has_prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all numbers from a truncated normal (std 0.02)."""
        trunc_normal_(self.bias_table, std=0.02)
        if self.prefix_bias is not None:
            trunc_normal_(self.prefix_bias, std=0.02)

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return relative_index(grid, device)

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        assert shared is not None
        return relative_bias(self.bias_table, self.prefix_bias, shared, grid, self.num_prefix_tokens).to(query.dtype)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the table to a new native grid."""
        if self.bias_table.shape[1:] == (2 * grid[0] - 1, 2 * grid[1] - 1):
            return
        with torch.no_grad():
            table = resample_table(self.bias_table, grid)
        self.bias_table = nn.Parameter(table, requires_grad=self.bias_table.requires_grad)

    def adapt_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        source_grid: tuple[int, int] | None,
    ) -> None:
        """Resample the table of a checkpoint, whose shape tells its grid."""
        key = f'{prefix}bias_table'
        table = state_dict.get(key)
        if table is None or table.ndim != 3 or table.shape[1:] == self.bias_table.shape[1:]:
            return
        grid = (self.bias_table.shape[1] + 1) // 2, (self.bias_table.shape[2] + 1) // 2
        _logger.info(f'Resampling {key} from {tuple(table.shape[1:])} to {tuple(self.bias_table.shape[1:])}.')
        state_dict[key] = resample_table(table, grid)


def resample_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a table (h, 2H - 1, 2W - 1) bicubically for another grid, distance 0 stays in the middle."""
    size = [2 * grid[0] - 1, 2 * grid[1] - 1]
    return F.interpolate(table.unsqueeze(0).float(), size=size, mode='bicubic').squeeze(0).to(table.dtype)


@torch.fx.wrap
def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Entry of the flattened table (2H - 1)(2W - 1) for each pair of patches, (N, N)."""
    height, width = grid
    rows, columns = patch_offsets(grid, device).unbind(0)
    return (height - 1 - rows) * (2 * width - 1) + (width - 1 - columns)


@torch.fx.wrap
def relative_bias(
    table: Tensor, prefix_bias: Tensor | None, index: Tensor, grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Look up the bias of all pairs of tokens.

    Args:
        table: Bias by head and distance in rows and columns, (h, 2H - 1, 2W - 1).
        prefix_bias: Bias of prefix to patch, patch to prefix and prefix to prefix by head, (3, h), or None.
        index: `relative_index` of the grid, (N, N).
        grid: Rows and columns of patches, resampled to if the table is for another.
        num_prefix_tokens: P, 0 without `prefix_bias`.

    Returns:
        Bias, (1, h, P + N, P + N).
    """
    height, width = grid
    # no branch on the size while exporting, it would tie the graph to the size of the example
    if is_exporting() or table.shape[1] != 2 * height - 1 or table.shape[2] != 2 * width - 1:
        table = resample_table(table, grid)
    bias = table.flatten(1)[:, index]
    if prefix_bias is not None:
        prefix, patches, heads = num_prefix_tokens, bias.shape[1], bias.shape[0]
        to_patch, to_prefix, among = prefix_bias.unsqueeze(-1).unsqueeze(-1).unbind(0)
        top = torch.cat([among.expand(heads, prefix, prefix), to_patch.expand(heads, prefix, patches)], dim=2)
        bottom = torch.cat([to_prefix.expand(heads, patches, prefix), bias], dim=2)
        bias = torch.cat([top, bottom], dim=1)
    return bias.unsqueeze(0)
