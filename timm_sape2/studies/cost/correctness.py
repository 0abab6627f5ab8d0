"""Checks that a model or an operator gives right numbers, before anything about it is measured."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...ops.sape2 import sape2_attention, sape2_bias
from ..bias_maps.biases import record_attention_inputs
from .variants import use_reference

PREFIX = 1
"""Tokens before the patches in `Inputs`: a class token."""


class Inputs(NamedTuple):
    """Queries, keys and values, (B, h, 1 + N, d) each, and the tables of SaPE2, (n, d) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    row_table: Tensor
    column_table: Tensor


Grid: TypeAlias = tuple[int, int]
Attention: TypeAlias = Callable[[Inputs, Grid], Tensor]


def sape2_by(implementation: str) -> Attention:
    """Return attention with SaPE2 by one of the implementations."""

    def attention(inputs: Inputs, grid: Grid) -> Tensor:
        query, key, value, row_table, column_table = inputs
        return sape2_attention(
            query, key, value, key, row_table, column_table, grid, PREFIX, implementation=implementation
        )

    return attention


def check_logits(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raise a RuntimeError unless the logits are finite, the same when computed again, and one for each class."""
    logits = model(images)
    if logits.shape != (len(images), num_classes):
        raise RuntimeError(f'{name}: logits of shape {tuple(logits.shape)} instead of {(len(images), num_classes)}')
    if not logits.isfinite().all():
        raise RuntimeError(f'{name}: logits are not finite')
    if not torch.equal(logits, model(images)):
        raise RuntimeError(f'{name}: logits differ when they are computed again')


def check_against_reference(name: str, measured: Callable, model: nn.Module, images: Tensor, tolerance: float) -> None:
    """Raise a RuntimeError if the logits differ from those with stored biases, neither compiled nor in half precision.

    Args:
        name: Name of the encoding, for the message.
        measured: The model as it is measured.
        model: The same, not compiled.
        images: A batch, of which the reference gets the first image.
        tolerance: Largest error, relative to the largest logit.
    """
    reference = copy.deepcopy(model)
    use_reference(reference)
    logits = measured(images)[:1]
    with torch.autocast(images.device.type, enabled=False):
        expected = reference(images[:1])
    error = ((logits.float() - expected).abs().max() / expected.abs().max()).item()
    if not error <= tolerance:
        raise RuntimeError(f'{name}: logits differ from those of the reference by {error:.1e}')


def check_fused(name: str, model: Any, images: Tensor, tolerance: float) -> None:
    """Raise a RuntimeError if attention without a stored bias differs in any block from that with one, in float32.

    Logits hardly show the attention of models that are not trained, so every block is compared.

    Args:
        name: Name of the encoding, for the message.
        model: The model.
        images: A batch, of which the last image is compared.
        tolerance: Largest error, as a norm relative to that of the output of the block's attention.
    """
    recorded: dict[nn.Module, tuple[Tensor, Grid, Tensor]] = {}

    def record(attention: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        recorded[attention] = arguments[0][-1:], arguments[1], output[-1:]

    fused = [block.attn for block in model.blocks if block.attn.position.fused_encoding]
    handles = [attention.register_forward_hook(record) for attention in fused]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    for block, (attention, (tokens, grid, output)) in enumerate(recorded.items()):
        reference: Any = copy.deepcopy(attention)
        use_reference(reference)
        with torch.autocast(images.device.type, enabled=False):
            expected = reference(tokens.float(), grid)
        error = ((output.float() - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            raise RuntimeError(f'{name}, block {block}: attention differs from the reference by {error:.1e}')


def check_attention(name: str, attention: Attention, inputs: Inputs, grid: Grid, tolerance: float) -> None:
    """Raise a RuntimeError if attention or its gradients are not those of the reference in float64.

    The last head of the last image is compared; the gradient of the output is 0 for all others. Errors are norms,
    relative to the norm of what is compared: where a position is a whole number, rounding may change a gradient much.

    Args:
        name: Name of the implementation, for the message.
        attention: Attention with SaPE2.
        inputs: Its inputs.
        grid: Rows and columns of patches.
        tolerance: Largest error.
    """
    grad_output = torch.zeros_like(inputs.query)
    grad_output[-1, -1] = torch.randn_like(inputs.query[-1, -1])
    found = output_and_gradients(attention, inputs, grid, grad_output)
    expected = output_and_gradients(
        sape2_by('reference'),
        Inputs(*(x[-1:, -1:].double() for x in inputs[:3]), *(x.double() for x in inputs[3:])),
        grid,
        grad_output[-1:, -1:].double(),
    )
    for what, right in expected.items():
        value = found[what] if 'table' in what else found[what][-1:, -1:]
        error, norm = (value.double() - right).norm().item(), right.norm().item()
        if not error <= tolerance * norm:
            raise RuntimeError(
                f'{name}: the {what} of attention differs from the reference by {error:.1e} of {norm:.1e}'
            )


def output_and_gradients(
    attention: Attention,
    inputs: Inputs,
    grid: Grid,
    grad_output: Tensor,
) -> dict[str, Tensor]:
    """Return the output of attention and the gradients of its inputs, by name."""
    inputs = Inputs(*(x.detach().requires_grad_() for x in inputs))
    output = attention(inputs, grid)
    grads = torch.autograd.grad(output, inputs, grad_output, materialize_grads=True)
    names = [f'gradient of {name.replace("_", " ")}' for name in Inputs._fields]
    return {'output': output.detach(), **dict(zip(names, grads, strict=True))}


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
