"""Coordinates of the patches of a grid, as several encodings need them."""

import torch
from torch import Tensor


@torch.fx.wrap
def patch_coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of all patches of a grid in raster order, (2, N)."""
    height, width = grid
    rows = torch.arange(height, device=device).unsqueeze(1).expand(-1, width).flatten()
    columns = torch.arange(width, device=device).unsqueeze(0).expand(height, -1).flatten()
    return torch.stack([rows, columns])


@torch.fx.wrap
def one_hot_coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Column and row of all patches as ones among zeros, (N, W + H) in float32.

    As channels of keys they let a query that has a number for every column and every row, `[u, v]`, add
    `u[c_j] + v[r_j]` to its logits. As channels of values they let attention count what it gives to every column and
    every row.
    """
    height, width = grid
    rows, columns = patch_coordinates(grid, device).unsqueeze(-1).unbind(0)
    is_column = columns == torch.arange(width, device=device)
    is_row = rows == torch.arange(height, device=device)
    return torch.cat([is_column, is_row], dim=1).float()


@torch.fx.wrap
def patch_offsets(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Rows and columns from the query patch i to the key patch j, (2, N, N), positive downwards and to the right."""
    coordinates = patch_coordinates(grid, device)
    return coordinates.unsqueeze(1) - coordinates.unsqueeze(2)
