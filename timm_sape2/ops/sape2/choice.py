"""SaPE2 attention from signatures: checks of the input, and which implementation runs, with the reason."""

import importlib.util
import os

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, use_fused_attn
from torch import Tensor

from .operator import triton_attention
from .reference import pairwise_distances

IMPLEMENTATIONS = ('auto', 'triton', 'reference')
HEAD_DIMS = (16, 128)
MOST_LINES = 128
_HAS_TRITON = importlib.util.find_spec('triton') is not None


def is_being_exported() -> bool:
    """Tell whether a model is traced or exported, as opposed to compiled."""
    # up to torch 2.11 the compiler says that it is exporting, but the flag beneath is right
    return torch.jit.is_tracing() or (is_exporting() and torch.compiler._is_exporting_flag)


def why_not_triton(
    query: Tensor,
    grid: tuple[int, int],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> str | None:
    """Tell why the Triton kernel cannot compute SaPE2 attention, None if it can.

    Args:
        query: Queries, (B, h, P + N, d), for their device, dtype and head dimension.
        grid: Rows and columns of patches (H, W).
        attn_mask: Attention mask, if any.
        is_causal: Later tokens are masked.
        dropout_p: Probability of attention dropout.

    Returns:
        The reason, such as 'not a CUDA tensor', or None.
    """
    height, width = grid
    least, most = HEAD_DIMS
    if is_being_exported():
        return 'the model is being exported'
    if not use_fused_attn():
        return "timm's fused attention is switched off (timm.layers.set_fused_attn, TIMM_FUSED_ATTN)"
    if not _HAS_TRITON:
        return 'triton is not installed'
    if not query.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return 'not a CUDA tensor'
    if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return 'the GPU is older than compute capability 8.0'
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'{query.dtype} is none of float32, bfloat16 and float16'
    if not least <= query.shape[-1] <= most:
        return f'head dimension {query.shape[-1]} is outside {least} to {most}'
    if max(height, width) > MOST_LINES:
        return f'the grid {height}x{width} has more than {MOST_LINES} rows or columns'
    if attn_mask is not None or is_causal:
        return 'the kernel has no attention masks'
    if dropout_p > 0:
        return 'the kernel has no attention dropout'
    return None


def sape2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor | None,
    column_signature: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    implementation: str = 'auto',
) -> Tensor:
    """Attention with the SaPE2 bias, `softmax(scale * q k^T + B) v`, `B[i, j] = |u_i - u_j| + |v_i - v_j|`.

    The bias of prefix tokens is 0. Signatures come from `sape2_signatures`.

    Args:
        query: Queries, (B, h, P + N, d).
        key: Keys, (B, h, P + N, d).
        value: Values, (B, h, P + N, d).
        row_signature: Row signatures u of the patches, (B, h, N, W), or None to leave them out.
        column_signature: Column signatures v of the patches, (B, h, N, H), or None to leave them out.
        grid: Rows and columns of patches (H, W), N = H * W.
        num_prefix_tokens: Tokens P before the patches.
        scale: Factor of the dot products, by default d ** -0.5.
        attn_mask: Boolean (True attends) or additive, broadcastable to (B, h, P + N, P + N).
        is_causal: Mask later tokens; takes precedence over `attn_mask`.
        dropout_p: Probability of attention dropout.
        implementation: 'triton' (memory linear in the tokens), 'reference' (PyTorch, stores the bias), or 'auto' for
            the first of them that can run; `why_not_triton` has the reason.

    Returns:
        Attention output, (B, h, P + N, d), in the dtype of the values, or that of autocast.

    Raises:
        ValueError: Ranks, shapes, dtypes or devices do not fit together, the grid does not have as many patches as
            there are, or the implementation asked for cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'implementation must be one of {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.')
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    _check_inputs(query, key, value, row_signature, column_signature, grid, num_prefix_tokens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    if implementation != 'reference':
        reason = why_not_triton(query, grid, attn_mask, is_causal, dropout_p)
        if reason is None:
            batch, heads, tokens, _ = query.shape
            nothing = query.new_empty(batch, heads, tokens - num_prefix_tokens, 0, dtype=torch.float32)
            row_signature, column_signature = (
                nothing if x is None else x.float() for x in (row_signature, column_signature)
            )
            return triton_attention(query, key, value, row_signature, column_signature, num_prefix_tokens, scale)[0]
        if implementation == 'triton':
            raise ValueError(f"implementation='triton' cannot run: {reason}.")

    bias: Tensor | None = None
    for signature in (row_signature, column_signature):
        if signature is not None:
            distances = pairwise_distances(signature).to(query.dtype)
            bias = distances if bias is None else bias + distances
    if bias is not None and num_prefix_tokens > 0:
        bias = F.pad(bias, [num_prefix_tokens, 0, num_prefix_tokens, 0])
    if is_causal:
        later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
        attn_mask = torch.zeros_like(later, dtype=query.dtype).masked_fill_(later, float('-inf'))
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float('-inf'))
    if attn_mask is not None:
        bias = attn_mask if bias is None else bias + attn_mask
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor | None,
    column_signature: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> None:
    """Raise a ValueError if tensors do not fit together."""
    if query.dim() != 4:
        raise ValueError(f'query must be (B, h, P + N, d), got {query.dim()} dimensions.')
    batch, heads, tokens, _ = query.shape
    height, width = grid
    for name, x in (('key', key), ('value', value)):
        if x.shape != query.shape:
            raise ValueError(f'{name} has shape {tuple(x.shape)}, query has {tuple(query.shape)}.')
        if x.dtype != query.dtype:
            raise ValueError(f'{name} is {x.dtype}, query is {query.dtype}.')
    if num_prefix_tokens < 0 or num_prefix_tokens + height * width != tokens:
        raise ValueError(
            f'There are {tokens} tokens, but a grid of {height}x{width} patches and {num_prefix_tokens} prefix tokens '
            f'make {num_prefix_tokens + height * width}.'
        )
    for name, signature, length in (('row', row_signature, width), ('column', column_signature, height)):
        if signature is not None and signature.shape != (batch, heads, height * width, length):
            raise ValueError(
                f'{name}_signature must have shape {(batch, heads, height * width, length)}, '
                f'got {tuple(signature.shape)}.'
            )
    devices = {str(x.device) for x in (query, key, value, row_signature, column_signature) if x is not None}
    if len(devices) > 1:
        raise ValueError(f'All tensors must be on one device, got {", ".join(sorted(devices))}.')
