"""The Triton kernels as a PyTorch operator with gradients, for which torch.compile needs not break the graph."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op('timm_sape2::sape2_attention', mutates_args=())
def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T + B) v` with B from signatures, never stored; see `sape2_attention` for a checked call.

    Args:
        query: Queries, (B, h, P + N, d), float32, bfloat16 or float16.
        key: Keys, likewise.
        value: Values, likewise.
        row_signature: Row signatures, (B, h, N, W), float32, W = 0 for no rows.
        column_signature: Column signatures, (B, h, N, H), float32, H = 0 for no columns.
        num_prefix_tokens: Tokens P before the patches.
        scale: Factor of the dot products.

    Returns:
        Output (B, h, P + N, d), and the logarithms of the softmax denominators (B, h, P + N) for the backward pass.
    """
    from . import triton_kernel

    query, key, value = (_with_unit_stride(x) for x in (query, key, value))
    with torch.cuda.device_of(query):
        return triton_kernel.forward(query, key, value, row_signature, column_signature, num_prefix_tokens, scale)


@triton_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_like_output(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op('timm_sape2::sape2_attention_backward', mutates_args=())
def triton_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `triton_attention` with respect to its five tensors."""
    from . import triton_kernel

    query, key, value = (_with_unit_stride(x) for x in (query, key, value))
    with torch.cuda.device_of(query):
        return triton_kernel.backward(
            grad_output,
            query,
            key,
            value,
            row_signature,
            column_signature,
            output,
            logsumexp,
            num_prefix_tokens,
            scale,
        )


@triton_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_signature: Tensor,
    column_signature: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        _empty_like_output(query),
        _empty_like_output(query),
        _empty_like_output(query),
        torch.empty_like(row_signature, memory_format=contiguous),
        torch.empty_like(column_signature, memory_format=contiguous),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_prefix_tokens, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = triton_attention_backward(grad_output, *ctx.saved_tensors, ctx.num_prefix_tokens, ctx.scale)
    return *grads, None, None


triton_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like_output(query: Tensor) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
