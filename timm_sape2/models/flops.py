"""What a model costs, for a model on the device `meta` as for any other."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: Any) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: Any, size: tuple[int, int, int] | None = None) -> int:
    """Return the FLOPs for one image that torch's counter sees: those of matrix products and convolutions.

    Args:
        model: The model.
        size: Channels, height and width of the image, by default those of a model of this package.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *(size or input_size(model)), device=device))
    return counter.get_total_flops()


def input_size(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a model of this package."""
    return model.in_chans, *model.patch_embed.img_size
