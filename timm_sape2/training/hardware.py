"""Where a run computes and in which precision: device, processes, mixed precision."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timm.utils import NativeScaler, init_distributed_device


def check_device(args: argparse.Namespace) -> None:
    """Choose the device of `args` if none is named.

    Raises:
        ValueError: If there is no such device, or it cannot do the mixed precision asked for.
    """
    args.device = device_name(args.device)
    kind = args.device.partition(':')[0]
    if kind == 'cpu' and args.amp and args.amp_dtype == 'float16':
        raise ValueError('--amp-dtype float16 needs a GPU: use bfloat16 on the CPU')


def set_up_device(args: argparse.Namespace) -> torch.device:
    """Join the processes of a distributed run and return the device of this one; `args` gets rank and world size.

    Raises:
        ValueError: If there is no such device, or it cannot do the mixed precision asked for.
    """
    check_device(args)
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return init_distributed_device(args)


def device_name(name: str | None) -> str:
    """Return the name of a device that exists, by default the GPU if there is one, or raise a ValueError."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    kind, _, index = name.partition(':')
    if kind not in ('cpu', 'cuda') or (index and not index.isdigit()):
        raise ValueError(f'--device must be cpu, cuda or cuda:N, not {name}')
    if kind == 'cuda' and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f'no --device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs')
    return name


def mixed_precision(args: argparse.Namespace, device: torch.device) -> tuple[Callable, NativeScaler | None]:
    """Return the autocast context of `--amp`, without effect if it is off, and the loss scaler that float16 needs."""
    autocast = partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)
    scaled = args.amp and args.amp_dtype == 'float16'
    return autocast, NativeScaler(device=device.type) if scaled else None
