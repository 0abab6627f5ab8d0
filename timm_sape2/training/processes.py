"""What the processes of a distributed run tell each other, and us; alone, a process agrees with itself."""

import argparse
import logging
from typing import Any

import torch
from timm.utils import reduce_tensor, setup_default_logging, world_info_from_env

from .randomness import get_random_state


def set_up_logging() -> None:
    """Let the first process tell what it does, and every process warn."""
    if not logging.root.handlers:
        setup_default_logging(logging.WARNING)
    is_first = world_info_from_env()[1] == 0
    for name in ('timm_sape2', 'timm.models'):
        logging.getLogger(name).setLevel(logging.INFO if is_first else logging.WARNING)


def mean_loss_and_stop(loss: torch.Tensor, stop: bool, args: argparse.Namespace) -> tuple[float, bool]:
    """Return the mean of the losses of all processes, and whether any of them is to stop, in one exchange."""
    if not args.distributed:
        return loss.item(), stop
    values = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=loss.device)])
    mean_loss, any_stop = reduce_tensor(values, args.world_size).tolist()
    return mean_loss, any_stop > 0


def any_process(flag: bool, args: argparse.Namespace, device: torch.device) -> bool:
    """Return whether the flag is set in any of the processes."""
    if not args.distributed:
        return flag
    return reduce_tensor(torch.tensor(float(flag), device=device), args.world_size).item() > 0


def all_random_states(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the states of the random generators of all processes, by rank."""
    if not args.distributed:
        return [get_random_state()]
    states: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(states, get_random_state())
    return states
