"""Fixed sinusoidal position embeddings in two dimensions."""

import torch
from timm.layers import freq_bands
from torch import Tensor

from .base import HostShape, PositionEncoding


class SinCosPosition(PositionEncoding):
    """Sinusoidal absolute embeddings `x_i + e_i`, as in MAE (arXiv 2111.06377; the sinusoids of arXiv 1706.03762).

    With D = C / 4 frequencies `w_k = 10000 ** (-k / D)`, a patch in row r and column c gets the C numbers
    `[sin(c w), cos(c w), sin(r w), cos(r w)]`: half of the channels for columns, which MAE puts first, half for rows.

    Prefix tokens get none, which is MAE's embedding of 0 for the class token. There are no parameters and nothing in
    the state dict. Embeddings are computed for the grid at hand, so any grid will do as it is; patches of a larger grid
    get positions that were never seen in training.

    Args:
        host: The model that this encoding is built into.
        device: Not used, there are no tensors to hold.
        dtype: Not used.

    Raises:
        ValueError: `embed_dim` is not divisible by 4.
    """

    translation = 'absolute'

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if host.embed_dim % 4:
            raise ValueError(
                f"position='sincos' needs an embed_dim divisible by 4, a sine and a cosine for rows and for columns, "
                f'got {host.embed_dim}.'
            )
        super().__init__()

    def add_to_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens + sincos_embedding(grid, tokens.shape[2], tokens.device).to(tokens.dtype)


@torch.fx.wrap
def sincos_embedding(grid: tuple[int, int], embed_dim: int, device: torch.device) -> Tensor:
    """Embeddings of all patches in raster order, (N, embed_dim) in float32.

    Args:
        grid: Rows and columns (H, W), N = H * W.
        embed_dim: Channels, divisible by 4.
        device: Where to compute.
    """
    height, width = grid
    bands = freq_bands(embed_dim // 4, step=1, device=device)
    rows = torch.arange(height, device=device).unsqueeze(1) * bands
    columns = torch.arange(width, device=device).unsqueeze(1) * bands
    row_half = torch.cat([rows.sin(), rows.cos()], dim=1).unsqueeze(1).expand(-1, width, -1)
    column_half = torch.cat([columns.sin(), columns.cos()], dim=1).unsqueeze(0).expand(height, -1, -1)
    return torch.cat([column_half, row_half], dim=2).flatten(0, 1)
