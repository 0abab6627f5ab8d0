"""Measuring the time and the memory of things that are compared with each other."""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Step: TypeAlias = Callable[[], object]

WARM_UP = 2
TURN = 0.1  # seconds that a turn of the first step takes at least


def seconds_in_turns(
    steps: Mapping[str, Step],
    rounds: int,
    device: torch.device,
    description: str,
) -> dict[str, list[float]]:
    """Time steps in turns, A B C A B C ..., so that a machine that slows down slows all of them.

    Each step is first run twice, which compiles it and fills caches. A turn is so many calls in a row as the first
    step makes in a tenth of a second, at least one, and the same number for every step.

    Args:
        steps: What to time, by name.
        rounds: Number of turns of every step.
        device: Where the steps compute; on a GPU a turn ends when the GPU is done.
        description: What the progress bars say.

    Returns:
        Seconds of one call, by name; a number for every round.
    """
    bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=None)
    for step in bar(steps.values(), desc=f'{description}, warm-up'):
        for _ in range(WARM_UP):
            step()
    calls = math.ceil(TURN / max(seconds_of(next(iter(steps.values())), 1, device), TURN / 1000))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in bar(range(rounds), desc=description, unit='round'):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, calls, device))
    return seconds


def seconds_of(step: Step, calls: int, device: torch.device) -> float:
    """Return the seconds that one of several calls in a row takes."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def ratio_quartiles(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile of the ratios of two sequences, taken round by round."""
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    first, median, third = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method='inclusive')
    return first, median, third


def peak_memory(step: Step, device: torch.device) -> int:
    """Return the bytes that PyTorch allocates at the peak of a step, beyond what was allocated before it.

    On a GPU this is what `torch.cuda.max_memory_allocated` says, on a CPU the same from torch's profiler, which records
    every allocation and release. What libraries such as oneDNN allocate by themselves is not in it.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        with (
            silent_stderr(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
        ):
            step()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())['traceEvents']
    changes = sorted((event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]')
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what libraries write to the standard error, as torch's profiler does about itself."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
