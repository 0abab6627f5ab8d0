"""Conditional position encoding."""

import torch
from torch import Tensor, nn

from .base import HostShape, PositionEncoding


class ConditionalPosition(PositionEncoding):
    """Conditional position encoding (arXiv 2102.10882): a depthwise 3x3 convolution after the first block.

    `x <- x + conv(x)` on the patch tokens laid out on the grid, one filter and one bias a channel. Zeros beyond the
    border are what tells a patch where it is: away from it, and from what attention carries inwards, the convolution
    treats all places alike.

    Prefix tokens pass it by unchanged. There are 10 * C parameters in the model, 9 weights and a bias a channel
    (initialised as PyTorch does, weight decay on the weights), independent of the grid, so any grid will do as it is.

    Args:
        host: The model that this encoding is built into.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    kind = 'learned'
    translation = 'relative inside'

    def __init__(
        self, host: HostShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels = host.embed_dim
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, device=device, dtype=dtype)

    def mix_tokens(self, tokens: Tensor, grid: tuple[int, int], block_index: int) -> Tensor | None:
        if block_index != 0:
            return None
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid[0], grid[1])
        return tokens + self.conv(image).flatten(2).transpose(1, 2)
