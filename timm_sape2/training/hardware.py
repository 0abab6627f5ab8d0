"""Where a run computes and in which precision: device, processes, mixed precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import NativeScaler
from timm.utils.distributed import init_distributed_device_so


def set_up_device(device: str | None) -> tuple[torch.device, dict[str, int | bool]]:
    """Join the processes of a distributed run.

    Returns:
        The device of this process; and its 'rank', 'local_rank', the 'world_size', and whether it is 'distributed'.

    Raises:
        ValueError: If there is no such device.
    """
    name = device_name(device)
    if name.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    found = init_distributed_device_so(name)
    processes = {key: found[key] for key in ('local_rank', 'world_size', 'distributed')}
    return torch.device(found['device']), {'rank': found['global_rank'], **processes}


def device_name(name: str | None) -> str:
    """Return the name of a device that exists, by default the GPU if there is one, or raise a ValueError."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    kind, _, index = name.partition(':')
    if kind not in ('cpu', 'cuda') or (index and not index.isdigit()):
        raise ValueError(f'--device must be cpu, cuda or cuda:N, not {name}')
    if kind == 'cuda' and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f'no --device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs')
    return name


def mixed_precision(device: torch.device, amp: bool, amp_dtype: str) -> tuple[Callable, NativeScaler | None]:
    """Return the autocast context of `--amp`, without effect if it is off, and the loss scaler that float16 needs.

    Raises:
        ValueError: If the device cannot do it.
    """
    scaled = amp and amp_dtype == 'float16'
    if scaled and device.type == 'cpu':
        raise ValueError('--amp-dtype float16 needs a GPU: use bfloat16 on the CPU')
    autocast = partial(torch.autocast, device.type, dtype=getattr(torch, amp_dtype), enabled=amp)
    return autocast, NativeScaler(device=device.type) if scaled else None


def format_of_images(model_dtype: str | None, channels_last: bool) -> dict[str, Any]:
    """Return type and memory format of weights and images, as `Tensor.to` takes them."""
    return dict(
        dtype=getattr(torch, model_dtype) if model_dtype else None,
        memory_format=torch.channels_last if channels_last else torch.preserve_format,
    )


def check_precision(amp: bool, model_dtype: str | None, model_ema: bool) -> None:
    """Raise a ValueError if the types of weights and of the rest do not go together."""
    if model_dtype in (None, 'float32'):
        return
    if amp:
        raise ValueError(f'--amp keeps the weights in float32: leave out --amp, or --model-dtype {model_dtype}')
    if model_ema:
        raise ValueError(
            f'--model-ema stands still in --model-dtype {model_dtype}, whose digits are too few for its small steps: '
            'use --amp'
        )
