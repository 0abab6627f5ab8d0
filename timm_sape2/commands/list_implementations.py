"""The table of `timm-sape2 list` that says which implementation of SaPE2 attention runs on this machine, and why."""

import torch

from ..positions import Host
from ..positions.sape2 import SaPE2
from .table import print_table

HOST = Host(embed_dim=64, num_heads=1, grid=(2, 2), num_prefix_tokens=1)


def show_implementations() -> None:
    """Print what runs on the CPU and, if there is one, on the GPU, in two dtypes."""
    rows: list[tuple[str, ...]] = [('SaPE2 attention', 'runs', 'because')]
    for device in ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append((f'{device}, {str(dtype).removeprefix("torch.")}', *choose_implementation(device, dtype)))
    print_table(rows)


def choose_implementation(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the implementation that runs for tensors of a kind, and why not those that are faster."""
    encoding = SaPE2(HOST)
    query = torch.zeros(1, 1, 5, 64, device=device, dtype=dtype)
    reasons: list[str] = []
    for name, reason in (
        ('triton', encoding.why_not_triton(query, HOST.grid)),
        ('eager', encoding.why_not_eager(query, query, query)),
    ):
        if reason is None:
            return name, '; '.join(reasons) or 'nothing prevents it'
        reasons.append(f'not {name}: {reason}')
    return 'reference', '; '.join(reasons)
