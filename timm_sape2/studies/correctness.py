"""Checks that a model gives right numbers, before anything about it is measured."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.sape2.reference import sape2_bias
from .attention_inputs import record_attention_inputs


def check_logits(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raise a RuntimeError unless the logits are finite, the same when computed again, and one for each class."""
    logits = model(images)
    if logits.shape != (len(images), num_classes):
        raise RuntimeError(f'{name}: logits of shape {tuple(logits.shape)} instead of {(len(images), num_classes)}')
    if not logits.isfinite().all():
        raise RuntimeError(f'{name}: logits are not finite')
    if not torch.equal(logits, model(images)):
        raise RuntimeError(f'{name}: logits differ when they are computed again')


def check_bias(name: str, model: Any, images: Tensor, tolerance: float) -> None:
    """Raise a RuntimeError if SaPE2's bias in any block is not that of the reference in float64.

    Args:
        name: Name of the encoding, for the message.
        model: The model, with default options of SaPE2.
        images: A batch.
        tolerance: Largest error, relative to the largest value of the bias.
    """
    for block, inputs in record_attention_inputs(model, images).items():
        encodings = model.blocks[block].attn.position
        if 'sape2' not in encodings:
            continue
        sape2 = encodings['sape2']
        prefix = model.num_prefix_tokens
        query, key, value = (x[:, :, prefix:] for x in (inputs.query, inputs.key, inputs.value))
        bias = sape2.attention_bias(query, key, value, inputs.grid)
        tables = sape2.row_table.double(), sape2.column_table.double()
        expected = sape2_bias(query.double(), key.double(), key.double(), *tables, inputs.grid, sape2.scale)
        error = ((bias.double() - expected).abs().max() / expected.max()).item()
        if not error <= tolerance:
            raise RuntimeError(f'{name}, block {block}: the bias of SaPE2 differs from the reference by {error:.1e}')
