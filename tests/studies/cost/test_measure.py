"""Time is measured in turns, memory to the byte."""

import os
import time

import pytest
import torch

from timm_sape2.studies.cost import measure
from timm_sape2.studies.cost.measure import peak_memory, ratio_quartiles, seconds_in_turns

CPU = torch.device('cpu')


def test_turns():
    """Two warm-up calls each, one that says how often to call, then A B C A B C."""
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'ABC'}
    seconds = seconds_in_turns(steps, rounds=2, device=CPU, description='steps')
    assert calls[:7] == list('AABBCCA')
    turns = ''.join(calls[7:])
    repeats = len(turns) // 6
    assert repeats > 1, 'fast steps are called several times in a turn'
    assert turns == 2 * ('A' * repeats + 'B' * repeats + 'C' * repeats)
    assert {name: len(values) for name, values in seconds.items()} == {'A': 2, 'B': 2, 'C': 2}


def test_seconds_are_those_of_one_call(monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    assert seconds_in_turns({'A': int, 'B': int}, rounds=1, device=CPU, description='steps') == {'A': [1.0], 'B': [4.0]}
    clock = iter([10.0, 18.0])
    assert measure.seconds_of(int, 4, CPU) == 2.0


def test_ratios_are_taken_round_by_round():
    """A machine that becomes ten times slower changes no ratio; 1, 2, 3, 4, 5 have quartiles 2, 3, 4."""
    assert ratio_quartiles([2, 20, 2], [1, 10, 1]) == (2, 2, 2)
    assert ratio_quartiles([1, 20, 3, 40, 5], [1, 10, 1, 10, 1]) == (2, 3, 4)
    assert ratio_quartiles([3], [2]) == (1.5, 1.5, 1.5)


def test_peak_memory_by_hand():
    """The peak is 4 MB and 2 MB; after it 2 MB and 2.4 MB; what was there before does not count."""
    kept = torch.empty(100_000)

    def step():
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(600_000)
        return kept, second, third

    assert [peak_memory(step, CPU) for _ in range(3)] == [6_000_000] * 3
    assert peak_memory(lambda: None, CPU) == 0


def test_peak_memory_counts_what_backward_needs():
    """Without gradients two of the results are there at a time; with gradients all three are kept."""
    x = torch.zeros(1_000_000, requires_grad=True)
    with torch.no_grad():
        assert peak_memory(lambda: x.exp().exp().exp(), CPU) == 8_000_000
    assert peak_memory(lambda: x.exp().exp().exp(), CPU) == 12_000_000


def test_the_profiler_is_silent_and_stderr_comes_back(capfd):
    peak_memory(lambda: torch.ones(3), CPU)
    assert capfd.readouterr().err == ''
    with pytest.raises(RuntimeError), measure.silent_stderr():
        raise RuntimeError
    os.write(2, b'back')
    assert capfd.readouterr().err == 'back'
