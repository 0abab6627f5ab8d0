"""Attention with SaPE2 from queries, keys, values and tables, in each of its implementations."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.sape2 import (
    eager_attention,
    sape2_attention,
    sape2_bias,
    sape2_signatures,
    why_not_eager,
    why_not_triton,
)

PREFIX = 1
"""Tokens before the patches: a class token."""


NAMES = ('plain', 'reference', 'compiled reference', 'cpu', 'cpu, recompute', 'triton')
BASELINE, REFERENCE, COMPILED = NAMES[:3]


class Inputs(NamedTuple):
    """Queries, keys and values, (B, h, 1 + N, d) each, and the tables of SaPE2, (n, d) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    row_table: Tensor
    column_table: Tensor


Grid: TypeAlias = tuple[int, int]
Attention: TypeAlias = Callable[[Inputs, Grid], Tensor]


def plain_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """Attention without a bias."""
    return F.scaled_dot_product_attention(*inputs[:3])


def reference_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """Plain PyTorch with a stored bias."""
    query, key, value, row_table, column_table = inputs
    patch_query, patch_key = query[:, :, PREFIX:], key[:, :, PREFIX:]
    scale = query.shape[-1] ** -0.5
    bias = sape2_bias(patch_query, patch_key, patch_key, row_table, column_table, grid, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, [PREFIX, 0, PREFIX, 0]))


def cpu_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """The implementation for CPUs."""
    return eager_attention(*inputs, grid, PREFIX)


def cpu_attention_with_recompute(inputs: Inputs, grid: Grid) -> Tensor:
    """The implementation for CPUs that stores nothing with N x N numbers."""
    return eager_attention(*inputs, grid, PREFIX, recompute=True)


def triton_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """The implementation for GPUs."""
    query, key, value, row_table, column_table = inputs
    patch_query, patch_key = query[:, :, PREFIX:], key[:, :, PREFIX:]
    scale = query.shape[-1] ** -0.5
    (rows,), (columns,) = sape2_signatures(patch_query, patch_key, patch_key, row_table, column_table, grid, scale)
    return sape2_attention(query, key, value, rows, columns, grid, PREFIX, implementation='triton')


def attentions() -> dict[str, Attention]:
    """Return all implementations by name; what is to be compiled is so at the first call."""
    compiled = torch.compile(reference_attention, fullgraph=True, dynamic=False)
    functions = (
        plain_attention,
        reference_attention,
        compiled,
        cpu_attention,
        cpu_attention_with_recompute,
        triton_attention,
    )
    return dict(zip(NAMES, functions, strict=True))


def why_not(name: str, inputs: Inputs, grid: Grid) -> str | None:
    """Tell why an implementation cannot run at speed, None if it can or only trying will tell."""
    if name.startswith('cpu'):
        return why_not_eager(*inputs[:3])
    if name == 'triton':  # its interpreter runs on a CPU
        return why_not_triton(inputs.query, grid) if inputs.query.is_cuda else 'not a CUDA tensor'
    return None


def draw_inputs(
    batch_size: int,
    heads: int,
    head_dim: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int = 10,
    table_std: float = 0.1,
) -> Inputs:
    """Draw inputs from a normal distribution, laid out as in a model: views of one projection."""
    height, width = grid
    qkv = torch.randn(batch_size, PREFIX + height * width, 3, heads, head_dim, dtype=dtype, device=device)
    tables = table_std * torch.randn(2, num_positions, head_dim, device=device)
    return Inputs(*qkv.permute(2, 0, 3, 1, 4), *tables)
