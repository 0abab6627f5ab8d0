"""Attention with the bias of SaPE2, and the choice of who computes it."""

import importlib.util
import os

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import checkpoint
from torch import Tensor

from ..._compat import is_being_exported
from .cpu import cpu_attention, why_not_cpu
from .operator import UNIT_OF_STRIDES, triton_attention
from .reference import sape2_bias, scale_tables

IMPLEMENTATIONS = ('triton', 'cpu', 'recompute', 'reference')
"""Ways to compute SaPE2 attention, the best first."""

HEAD_DIMS = (16, 128)
MOST_CHANNELS_OF_FLOAT32 = 64
MOST_LINES = 64
WIDEST_ON_LONG_LINES = 96
MOST_LINES_OF_WIDE_HEADS = 32
"""Of heads of more than WIDEST_ON_LONG_LINES channels."""

_HAS_TRITON = importlib.util.find_spec('triton') is not None


def choose(
    query: Tensor,
    grid: tuple[int, int],
    target: str = 'k',
    recompute: bool = False,
) -> tuple[str, dict[str, str]]:
    """Choose an implementation of SaPE2 attention.

    Args:
        query: Queries, (B, h, P + N, d), for their device, dtype and head dimension.
        grid: Rows and columns of patches (H, W).
        target: 'k', 'q' or 'qk'.
        recompute: The reference may not store anything with N x N numbers for the backward pass.

    Returns:
        One of `IMPLEMENTATIONS`, and for each other one the reason against it, such as 'not a CUDA tensor'.
    """
    reasons = why_not(query, grid, target, recompute)
    name = next(name for name in IMPLEMENTATIONS if reasons[name] is None)
    return name, {other: reasons[other] or f'{name} is better' for other in IMPLEMENTATIONS if other != name}


def why_not(
    query: Tensor,
    grid: tuple[int, int],
    target: str = 'k',
    recompute: bool = False,
) -> dict[str, str | None]:
    """Tell for each of `IMPLEMENTATIONS` why it cannot run, None if it can; the arguments are those of `choose`."""
    for_both = why_not_fused()
    return {
        'triton': for_both or why_not_triton(query, grid, target),
        'cpu': for_both or why_not_cpu(query),
        'recompute': why_not_recompute(recompute),
        'reference': None,
    }


def why_not_fused() -> str | None:
    """Tell why only the reference may compute attention, None if others may too."""
    if is_being_exported():
        return 'the model is being exported'
    if not use_fused_attn():
        return "timm's fused attention is switched off (timm.layers.set_fused_attn, TIMM_FUSED_ATTN)"
    return None


def why_not_triton(query: Tensor, grid: tuple[int, int], target: str) -> str | None:
    """Tell why the Triton kernel cannot compute attention with these queries, grid and target, None if it can."""
    height, width = grid
    least, most = HEAD_DIMS
    if not _HAS_TRITON:
        return 'triton is not installed'
    if not query.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return 'not a CUDA tensor'
    if torch.version.hip is not None:
        return 'on AMD GPUs it spills registers at many sizes, and it has not been tried there'
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return 'the GPU is older than compute capability 8.0'
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'{query.dtype} is none of float32, bfloat16 and float16'
    if not least <= query.shape[-1] <= most:
        return f'head dimension {query.shape[-1]} is outside {least} to {most}'
    if query.shape[-1] % UNIT_OF_STRIDES:
        return f'head dimension {query.shape[-1]} is not divisible by {UNIT_OF_STRIDES}'
    if query.dtype == torch.float32 and query.shape[-1] > MOST_CHANNELS_OF_FLOAT32:
        return f'{query.shape[-1]} channels of float32 take more registers than a GPU has'
    if max(height, width) > MOST_LINES:
        return f'the grid {height}x{width} has more than {MOST_LINES} rows or columns'
    if query.shape[-1] > WIDEST_ON_LONG_LINES and max(height, width) > MOST_LINES_OF_WIDE_HEADS:
        return (
            f'the grid {height}x{width} has more than {MOST_LINES_OF_WIDE_HEADS} rows or columns, '
            f'which with {query.shape[-1]} channels take more registers than a GPU has'
        )
    if target == 'qk':
        return "target='qk' has two signatures an axis"
    return None


def why_not_recompute(wanted: bool) -> str | None:
    """Tell why the reference should not run again in the backward pass, None if it should."""
    if not wanted:
        return 'not asked for'
    if is_being_exported():
        return 'the model is being exported'
    if not torch.is_grad_enabled():
        return 'no gradients are computed'
    return None


def sape2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    *,
    target: str = 'k',
    scale: float | None = None,
    reference_grid: Tensor | None = None,
    logit_query: Tensor | None = None,
    logit_key: Tensor | None = None,
    recompute: bool = False,
    implementation: str = 'auto',
) -> Tensor:
    """Attention with the bias of SaPE2, `softmax(scale * q k^T + B) v`, with B = 0 for prefix tokens.

    Args:
        query: Queries after normalisation, (B, h, P + N, d).
        key: Keys after normalisation, (B, h, P + N, d).
        value: Values, (B, h, P + N, d).
        gate_key: What queries are compared with for gates, (B, h, P + N, d): `key` itself, mapped keys or values; None
            for gates of 1.
        row_table: Position embeddings along rows, (n, d), or None to leave this axis out.
        column_table: Position embeddings along columns, (n, d), or None to leave this axis out.
        grid: Rows and columns of patches (H, W), N = H * W.
        num_prefix_tokens: Tokens P before the patches.
        target: 'k' (signatures of queries), 'q' (of keys) or 'qk' (the sum of both biases).
        scale: Factor of the dot products, of logits and of gates, by default d ** -0.5.
        reference_grid: (H, W) as a tensor of two, to scale distances to the grid as `scale_tables` says.
        logit_query: Queries of the logits, (B, h, P + N, d), if not `query`: rotated ones.
        logit_key: Keys of the logits, (B, h, P + N, d), if not `key`.
        recompute: Where only the reference can run, compute logits and bias again in the backward pass instead of
            storing them; the others never store them.
        implementation: One of `IMPLEMENTATIONS`, or 'auto' for what `choose` says.

    Returns:
        Attention output, (B, h, P + N, d), in the dtype of the values, or that of autocast.

    Raises:
        ValueError: Ranks, shapes, dtypes or devices do not fit together, the grid does not have as many patches as
            there are, or the implementation asked for cannot run.
    """
    logit_query, logit_key = query if logit_query is None else logit_query, key if logit_key is None else logit_key
    _check_inputs(
        {
            'query': query,
            'key': key,
            'value': value,
            'gate_key': gate_key,
            'logit_query': logit_query,
            'logit_key': logit_key,
        },
        {'row_table': row_table, 'column_table': column_table},
        grid,
        num_prefix_tokens,
        target,
    )
    if implementation == 'auto':
        implementation, _ = choose(query, grid, target, recompute)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f'implementation must be one of auto, {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.')
    elif implementation in ('triton', 'cpu'):
        reason = why_not(query, grid, target)[implementation]
        if reason is not None:
            raise ValueError(f'implementation={implementation!r} cannot run: {reason}.')

    if row_table is None and column_table is None:
        return F.scaled_dot_product_attention(logit_query, logit_key, value, scale=scale)
    row_table, column_table = scale_tables(row_table, column_table, grid, reference_grid)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = (query, key, value, gate_key, row_table, column_table, logit_query, logit_key)
    if implementation == 'triton':
        return triton_attention(*inputs, grid, num_prefix_tokens, target, scale)
    if implementation == 'cpu':
        return cpu_attention(*inputs, grid, num_prefix_tokens, target, scale)
    if implementation == 'recompute':
        return checkpoint(_reference_attention, *inputs, grid, num_prefix_tokens, target, scale)
    return _reference_attention(*inputs, grid, num_prefix_tokens, target, scale)


def _reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    row_table: Tensor | None,
    column_table: Tensor | None,
    logit_query: Tensor,
    logit_key: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    target: str,
    scale: float,
) -> Tensor:
    """Attention with a stored bias."""
    query, key = query[:, :, num_prefix_tokens:], key[:, :, num_prefix_tokens:]
    gate_key = None if gate_key is None else gate_key[:, :, num_prefix_tokens:]
    bias = sape2_bias(query, key, gate_key, row_table, column_table, grid, scale, target)
    bias = F.pad(bias, [num_prefix_tokens, 0, num_prefix_tokens, 0])
    return F.scaled_dot_product_attention(logit_query, logit_key, value, attn_mask=bias, scale=scale)


def _check_inputs(
    tensors: dict[str, Tensor | None],
    tables: dict[str, Tensor | None],
    grid: tuple[int, int],
    num_prefix_tokens: int,
    target: str,
) -> None:
    """Raise a ValueError if arguments of `sape2_attention` do not fit together."""
    query, *_ = tensors.values()
    assert query is not None
    if query.dim() != 4:
        raise ValueError(f'query must be (B, h, P + N, d), got {query.dim()} dimensions.')
    height, width = grid
    for name, x in tensors.items():
        if x is not None and x.shape != query.shape:
            raise ValueError(f'{name} has shape {tuple(x.shape)}, query has {tuple(query.shape)}.')
        if x is not None and x.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise ValueError(f'{name} is {x.dtype}, query is {query.dtype}.')
    if num_prefix_tokens < 0 or num_prefix_tokens + height * width != query.shape[2]:
        raise ValueError(
            f'There are {query.shape[2]} tokens, but a grid of {height}x{width} patches and {num_prefix_tokens} prefix '
            f'tokens make {num_prefix_tokens + height * width}.'
        )
    for name, table in tables.items():
        if table is not None and (table.dim() != 2 or table.shape[0] < 2 or table.shape[1] != query.shape[3]):
            raise ValueError(f'{name} must be (n, {query.shape[3]}) with n of at least 2, got {tuple(table.shape)}.')
    if target not in ('k', 'q', 'qk'):
        raise ValueError(f"target must be one of 'k', 'q', 'qk', got {target!r}.")
    devices = {str(x.device) for x in (*tensors.values(), *tables.values()) if x is not None}
    if len(devices) > 1:
        raise ValueError(f'All tensors must be on one device, got {", ".join(sorted(devices))}.')
