"""The table of `timm-sape2 list` that says which implementation of SaPE2 attention runs on this machine, and why."""

import torch

from .._table import text_table
from ..ops.sape2 import IMPLEMENTATIONS, choose


def show_implementations() -> None:
    """Print what runs on the CPU and, if there is one, on the GPU, in two dtypes."""
    rows: list[tuple[str, ...]] = [('SaPE2 attention', 'runs', 'because')]
    for device in ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append((f'{device}, {str(dtype).removeprefix("torch.")}', *explain_choice(device, dtype)))
    print(text_table(rows))


def explain_choice(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the implementation that runs for tensors of a kind, and why not those that are better."""
    query = torch.zeros(1, 1, 5, 64, device=device, dtype=dtype)
    name, reasons = choose(query, (2, 2))
    better = IMPLEMENTATIONS[: IMPLEMENTATIONS.index(name)]
    return name, '; '.join(f'not {other}: {reasons[other]}' for other in better) or 'nothing prevents it'
