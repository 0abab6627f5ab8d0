"""SaPE2 attention on a CPU, forward and backward by hand, one operation an axis where the reference takes many.

Gates are sigmoids of dot products that attention computes anyway: those of the patches of one row or column lie on
diagonals of the logits. So there is one product of queries and keys forward, and its gradients take those of the gates
along. A few images at a time pass through all steps, so that their N x N logits stay in the cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import pairwise_distances

NUMBERS_IN_CACHE = 2**18  # logits of the images that are worked on at a time


class Geometry(NamedTuple):
    """What the steps need to know besides tensors."""

    grid: tuple[int, int]
    prefix: int  # tokens before the patches
    axes: str  # 'xy', 'x' or 'y'
    semantic: bool  # gates are sigmoids, else 1
    target: str  # 'k' or 'q'
    recompute: bool  # compute what has N x N numbers again in the backward pass


def why_not_eager(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tell why `eager_attention` cannot take these tensors, None if it can."""
    if query.device.type != 'cpu':
        return 'not a CPU tensor'
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return 'the model is being exported or compiled'
    if torch.is_autocast_enabled('cpu') or query.dtype not in (torch.float32, torch.float64):
        return 'not in float32 or float64'
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return 'queries, keys and values have different dtypes'
    if torch._C._are_functorch_transforms_active():
        return 'no rules for torch.func'
    return None


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    semantic: bool = True,
    target: str = 'k',
    recompute: bool = False,
) -> Tensor:
    """Attention with the bias of SaPE2, `softmax(s * q k^T + B) v` with `s = d ** -0.5`, and gates from keys or of 1.

    Args:
        query: Queries, (B, h, P + N, d).
        key: Keys, (B, h, P + N, d).
        value: Values, (B, h, P + N, d).
        row_table: Position embeddings along rows, (n, d), or None to leave this axis out.
        column_table: Position embeddings along columns, (n, d), or None to leave this axis out.
        grid: Rows and columns of patches (H, W), N = H * W.
        num_prefix_tokens: Tokens P before the patches, with bias 0.
        semantic: Gates are `sigmoid(s * q_x . k_t)`, else 1.
        target: 'k' (signatures of queries) or 'q' (of keys).
        recompute: Compute logits and distances again in the backward pass instead of storing them.

    Returns:
        Attention output, (B, h, P + N, d), laid out as (B, P + N, h, d). It cannot be differentiated twice.
    """
    tables = torch.cat([table for table in (row_table, column_table) if table is not None]).to(query.dtype)
    axes = ('' if row_table is None else 'x') + ('' if column_table is None else 'y')
    geometry = Geometry(grid, num_prefix_tokens, axes, semantic, target, recompute)
    return _EagerAttention.apply(query, key, value, tables, geometry)


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tables: Tensor, geometry: Geometry) -> Tensor:
        batch, heads, tokens, dim = query.shape
        output = query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
        kept: list[tuple[Tensor, ...]] = []
        for images in _slices(query):
            mixed, keep = _forward(query[images], key[images], value[images], tables, geometry)
            output[images] = mixed
            if any(ctx.needs_input_grad):
                kept.append(keep)
        ctx.save_for_backward(tables, *(x for keep in kept for x in keep))
        ctx.geometry = geometry
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tables, *kept = ctx.saved_tensors
        grads = [grad_output.new_empty(grad_output.shape) for _ in range(3)]
        grad_tables = torch.zeros_like(tables)
        slices = _slices(grad_output)
        size = len(kept) // len(slices)
        for i, images in enumerate(slices):
            keep = kept[i * size : (i + 1) * size]
            grad_tables += _backward(grad_output[images], tables, ctx.geometry, keep, [grad[images] for grad in grads])
        return *grads, grad_tables, None


def _slices(query: Tensor) -> list[slice]:
    """Images that are worked on at a time."""
    batch, heads, tokens, _ = query.shape
    size = max(1, NUMBERS_IN_CACHE // (heads * tokens * tokens))
    return [slice(start, start + size) for start in range(0, max(batch, 1), size)]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention output, and what the backward pass needs: queries, keys, values, weights, and six tensors an axis."""
    scale = query.shape[-1] ** -0.5
    scaled = torch.mul(query, scale, out=query.new_empty(query.shape)).flatten(0, 1)
    key, value = key.contiguous().flatten(0, 1), value.contiguous().flatten(0, 1)
    content, factor = (scaled, 1 / scale) if geometry.target == 'k' else (key, 1.0)
    scores = content @ (factor * tables).t()
    logits = scaled @ key.mT
    patches = logits[:, geometry.prefix :, geometry.prefix :]
    keep = []
    for axis, axis_scores in zip(geometry.axes, _split_scores(scores, geometry), strict=True):
        gates = _lines(patches, geometry.grid, axis).clone(memory_format=torch.contiguous_format)
        gates = gates.sigmoid_() if geometry.semantic else gates.fill_(1.0)
        keep.append(_read(gates, axis_scores, axis))
    for axis_keep in keep:
        patches += axis_keep[-1]
    weights = logits.softmax(-1)
    mixed = (weights @ value).unflatten(0, query.shape[:2])
    if geometry.recompute:
        return mixed, (scaled, key, value, *(x for axis_keep in keep for x in axis_keep[:5]))
    return mixed, (scaled, key, value, weights, *(x for axis_keep in keep for x in axis_keep))


def _read(gates: Tensor, scores: Tensor, axis: str) -> tuple[Tensor, ...]:
    """Signatures of all patches and the distances between them, after what the backward pass needs on the way there."""
    last = scores.shape[-1] - 1
    sums = gates @ gates.new_ones(gates.shape[-1], gates.shape[-1]).tril()
    positions = sums.clamp(max=last)
    index = positions.long().clamp_(0, last - 1)  # NaN has no index, but must come out as NaN
    fraction = positions.sub_(index)
    at_lower = scores.gather(-1, index)
    slope = scores.gather(-1, index + 1).sub_(at_lower)
    signature = at_lower.addcmul_(fraction, slope)
    slope.masked_fill_(sums > last, 0.0)  # a position at its limit has no gradient
    signature = (signature.transpose(1, 2) if axis == 'y' else signature).flatten(1, 2)
    return gates, index, fraction, slope, signature, _distances(signature)


def _distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (B * h, N, N), from products in float64 for points in float32.

    Cancellation leaves an error of 1e-8 of the norms, less than the rounding of the points themselves.
    """
    if points.dtype == torch.float64:
        return pairwise_distances(points)
    points = points.double()
    norms = points.square().sum(-1, keepdim=True)
    ones = torch.ones_like(norms)
    squares = torch.cat([points, norms, ones], -1) @ torch.cat([-2 * points, ones, norms], -1).mT
    distances = squares.float().clamp_(min=0.0).sqrt_()
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def _backward(
    grad_output: Tensor,
    tables: Tensor,
    geometry: Geometry,
    keep: list[Tensor],
    grads: list[Tensor],
) -> Tensor:
    """Write the gradients of queries, keys and values into `grads` and return that of the tables."""
    prefix, grid = geometry.prefix, geometry.grid
    scaled, key, value, *rest = keep
    scale = key.shape[-1] ** -0.5
    if geometry.recompute:
        axes_keep = [(*rest[i : i + 5], _distances(rest[i + 4])) for i in range(0, len(rest), 5)]
        logits = scaled @ key.mT
        for axis_keep in axes_keep:
            logits[:, prefix:, prefix:] += axis_keep[-1]
        weights = logits.softmax(-1)
    else:
        weights = rest[0]
        axes_keep = [tuple(rest[i : i + 6]) for i in range(1, len(rest), 6)]

    grad_query, grad_key, grad_value = (grad.flatten(0, 1) for grad in grads)
    grad_output = grad_output.flatten(0, 1)
    torch.bmm(weights.mT, grad_output, out=grad_value)
    grad_logits = torch._softmax_backward_data(grad_output @ value.mT, weights, -1, weights.dtype)
    patches = grad_logits[:, prefix:, prefix:]
    both_ways = patches + patches.mT
    content, factor = (scaled, 1 / scale) if geometry.target == 'k' else (key, 1.0)
    grad_scores = content.new_zeros(*content.shape[:2], len(tables))
    grad_gates = []
    for axis, axis_keep, axis_grad_scores in zip(
        geometry.axes, axes_keep, _split_scores(grad_scores, geometry), strict=True
    ):
        gates, index, fraction, slope, signature, distances = axis_keep
        grad = torch.ops.aten._cdist_backward(both_ways, signature, signature, 2.0, distances).unflatten(1, grid)
        grad = grad.transpose(1, 2) if axis == 'y' else grad
        at_upper = grad * fraction
        axis_grad_scores.scatter_add_(-1, index, grad - at_upper)
        axis_grad_scores.scatter_add_(-1, index + 1, at_upper)
        if geometry.semantic:
            grad_sums = (grad * slope) @ gates.new_ones(gates.shape[-1], gates.shape[-1]).triu()
            grad_gates.append((axis, torch.ops.aten.sigmoid_backward(grad_sums, gates)))
    for axis, axis_grad_gates in grad_gates:
        _lines(patches, grid, axis).add_(axis_grad_gates)

    torch.bmm(grad_logits, key, out=grad_query)
    torch.bmm(grad_logits.mT, scaled, out=grad_key)
    grad_content = grad_query if geometry.target == 'k' else grad_key
    grad_scores = grad_scores.flatten(0, 1)
    grad_content.view(-1, grad_content.shape[-1]).addmm_(grad_scores, factor * tables)
    grad_query.mul_(scale)
    return factor * (grad_scores.t() @ content.flatten(0, 1))


def _split_scores(scores: Tensor, geometry: Geometry) -> list[Tensor]:
    """Scores of the patches with each axis' table as lines, (B * h, lines, L, n), out of (B * h, P + N, axes * n)."""
    views = scores[:, geometry.prefix :].unflatten(1, geometry.grid).chunk(len(geometry.axes), -1)
    return [view.transpose(1, 2) if axis == 'y' else view for view, axis in zip(views, geometry.axes, strict=True)]


def _lines(patches: Tensor, grid: tuple[int, int], axis: str) -> Tensor:
    """Entries of (B * h, N, N) for pairs of patches of one row ('x') or column ('y'), (B * h, lines, L, L), a view."""
    pairs = patches.unflatten(2, grid).unflatten(1, grid)
    return (pairs.diagonal(0, 1, 3) if axis == 'x' else pairs.diagonal(0, 2, 4)).permute(0, 3, 1, 2)
