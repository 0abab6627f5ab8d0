"""Processes of a run: what they exchange, how a signal stops them at a clean place, and their random numbers.

Everything random in an epoch follows from (seed, epoch, rank), so that an epoch can be repeated exactly.
"""

import random
import signal
from types import FrameType
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed, reduce_tensor


def mean_loss_and_stop(loss: torch.Tensor, stop: bool, num_processes: int) -> tuple[float, bool]:
    """Return the mean of the losses of all processes, and whether any of them is to stop, in one exchange."""
    if num_processes == 1:
        return loss.item(), stop
    values = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=loss.device)])
    mean_loss, any_stop = reduce_tensor(values, num_processes).tolist()
    return mean_loss, any_stop > 0


def any_process(flag: bool, num_processes: int, device: torch.device) -> bool:
    """Return whether the flag is set in any of the processes."""
    if num_processes == 1:
        return flag
    return reduce_tensor(torch.tensor(float(flag), device=device), num_processes).item() > 0


def all_random_states(num_processes: int) -> list[dict[str, Any]]:
    """Return the states of the random generators of all processes, by rank."""
    if num_processes == 1:
        return [get_random_state()]
    states: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(states, get_random_state())
    return states


class SignalCatcher:
    """While active, remembers SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C does end the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def caught(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal ended; that of SIGTERM if it came to another process."""
        return 128 + (self.number or signal.SIGTERM)

    def __enter__(self) -> 'SignalCatcher':
        self._previous = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, numpy and torch for one epoch of one process."""
    random_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))


def get_random_state() -> dict[str, Any]:
    """Return the state of all generators of this process, in types that torch loads with `weights_only=True`."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = dict(python=random.getstate(), torch=torch.get_rng_state())
    state['numpy'] = (name, np.asarray(keys).tolist(), *rest)
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue all generators of this process from a state of `get_random_state`."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'])
