"""Everything random in an epoch follows from (seed, epoch, rank), so that an epoch can be repeated exactly."""

import random
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed


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
