"""docs/benchmarks/gpu_estimate.py: counted by hand, and the page shows what it prints."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('gpu_estimate', ROOT / 'docs' / 'benchmarks' / 'gpu_estimate.py')
estimate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(estimate)


def test_time_of_a_kernel_by_hand():
    """5 tokens are 64 by 32 pairs, 64 times 32 of them, each 10 clocks of tensor cores and 40 of instructions."""
    kernel = estimate.Kernel(instructions=40, special=2, tensor=10, own=64, other=32)
    assert kernel.microseconds(5, heads=1) == pytest.approx(1e6 * 64 * 50 / (132 * 4 * 1.755e9))


def test_the_busier_unit_counts():
    kernel = estimate.Kernel(instructions=10, special=2, tensor=0, own=64, other=32)
    assert kernel.microseconds(5, heads=1) == pytest.approx(1e6 * 64 * 16 / (132 * 4 * 1.755e9))


def test_the_page_has_its_table():
    assert estimate.table() in (ROOT / 'docs' / 'gpu.md').read_text()
