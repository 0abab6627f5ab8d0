"""What the fused implementations take and give, on any device."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What an operator takes besides tables, (B, h, T, d) each; None for what there is not."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate_key: Tensor | None  # if gates are read from something else than keys
    logit_query: Tensor | None  # if logits come from others than signatures
    logit_key: Tensor | None


def distinct_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    logit_query: Tensor,
    logit_key: Tensor,
) -> tuple[Inputs, str]:
    """Leave out what is another tensor again, and cast the rest to the dtype of autocast, except float64.

    Returns:
        The inputs, and where gates come from: 'none' for gates of 1, 'key' or 'other'.
    """
    gates = 'none' if gate_key is None else 'key' if gate_key is key else 'other'
    rotated = logit_query is not query or logit_key is not key
    pair = (logit_query, logit_key) if rotated else (None, None)
    inputs = Inputs(query, key, value, gate_key if gates == 'other' else None, *pair)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        inputs = Inputs(*(None if x is None else x.to(dtype) for x in inputs))  # type: ignore[arg-type]
    return inputs, gates


def empty_like_output(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor (B, h, T, d), laid out as (B, T, h, d), by default in the dtype of `x`."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
