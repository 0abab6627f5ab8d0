"""What a model costs, on paper: the same for a model on any device and with any version of PyTorch."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: Any) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: Any, size: tuple[int, int, int] | None = None) -> int:
    """Return the FLOPs of matrix products and convolutions for one image, 2 for a multiply-accumulate.

    Attention counts as its two matrix products, fused or not. The model runs on the device `meta`, where nothing is
    computed and no kernel hides its products: SaPE2 counts as its reference computes it, without its distances.

    Args:
        model: The model, on any device.
        size: Channels, height and width of the image, by default those of a model of this package.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    on_meta = {name: torch.empty_like(tensor, device='meta') for name, tensor in tensors}
    images = torch.empty(1, *(size or input_size(model)), device='meta', dtype=next(model.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _AttentionAsProducts():
        functional_call(model, on_meta, images)
    return counter.get_total_flops()


class _AttentionAsProducts(TorchFunctionMode):
    """Fused attention becomes its matrix products, since torch's counter knows some of its kernels in some versions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return (query @ key.transpose(-2, -1)) @ value
        return func(*args, **(kwargs or {}))


def input_size(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a model of this package."""
    return model.in_chans, *model.patch_embed.img_size
