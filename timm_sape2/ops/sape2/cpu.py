"""SaPE2 attention on a CPU, forward and backward by hand, one operation an axis where the reference takes many.

Gates are sigmoids of dot products that attention computes anyway: those of the patches of one row or column lie on
diagonals of the logits. So there is one product of queries and keys forward, and its gradients take those of the gates
along. A few heads at a time pass through all steps, in buffers that stay allocated. For the backward pass it keeps
weights and inverse distances, or computes them again.
"""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat import is_in_torch_func

LOGITS_AT_ONCE = 2**20  # in the heads that are worked on at a time
ZERO_BELOW = 2.0**-46  # of the squared norms: distances below the rounding of float32 are 0


class Geometry(NamedTuple):
    """What the steps need to know besides tensors."""

    grid: tuple[int, int]
    prefix: int  # tokens before the patches
    axes: str  # 'xy', 'x' or 'y'
    semantic: bool  # gates are sigmoids, else 1
    target: str  # 'k' or 'q'
    scale: float  # factor of the dot products
    recompute: bool  # compute what has N x N numbers again in the backward pass


class Axis(NamedTuple):
    """What the gradients need of one axis, for G heads: signatures (G, N, L), and (G, lines, L, L) on the way there."""

    inverse: Tensor  # inverse distances between signatures, (G, N, N), 0 for a distance of 0
    signature: Tensor
    gates: Tensor
    below: Tensor  # index of the embedding below a position
    fraction: Tensor  # of the way to the next
    slope: Tensor  # score of the next embedding less that of the one below, 0 for a position at its limit


def why_not_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    target: str,
    rotated: bool,
) -> str | None:
    """Tell why `cpu_attention` cannot compute attention with these arguments of `choose`, None if it can."""
    if query.device.type != 'cpu':
        return 'not a CPU tensor'
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return 'the model is being exported or compiled'
    if torch.is_autocast_enabled('cpu') or query.dtype not in (torch.float32, torch.float64):
        return 'not in float32 or float64'
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return 'queries, keys and values have different dtypes'
    if is_in_torch_func():
        return 'no rules for torch.func'
    if target == 'qk':
        return "target='qk' has two signatures an axis"
    if rotated or (gate_key is not None and gate_key is not key):
        return 'gates do not come from the dot products of attention'
    return None


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_table: Tensor | None,
    column_table: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    semantic: bool = True,
    target: str = 'k',
    scale: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """Attention with the bias of SaPE2, `softmax(scale * q k^T + B) v`, and gates from keys or of 1.

    Args:
        query: Queries, (B, h, P + N, d).
        key: Keys, (B, h, P + N, d).
        value: Values, (B, h, P + N, d).
        row_table: Position embeddings along rows, (n, d), or None to leave this axis out.
        column_table: Position embeddings along columns, (n, d), or None to leave this axis out.
        grid: Rows and columns of patches (H, W), N = H * W.
        num_prefix_tokens: Tokens P before the patches, with bias 0.
        semantic: Gates are `sigmoid(scale * q_x . k_t)`, else 1.
        target: 'k' (signatures of queries) or 'q' (of keys).
        scale: Factor of the dot products, by default d ** -0.5.
        recompute: Compute weights and distances again in the backward pass instead of storing them.

    Returns:
        Attention output, (B, h, P + N, d), laid out as (B, P + N, h, d). It cannot be differentiated twice.
    """
    tables = torch.cat([table for table in (row_table, column_table) if table is not None]).to(query.dtype)
    axes = ('' if row_table is None else 'x') + ('' if column_table is None else 'y')
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    geometry = Geometry(grid, num_prefix_tokens, axes, semantic, target, scale, recompute)
    return _CPUAttention.apply(query, key, value, tables, geometry)


class _CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tables: Tensor, geometry: Geometry) -> Tensor:
        batch, heads, tokens, dim = query.shape
        output = query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
        keeps = any(ctx.needs_input_grad) and not geometry.recompute
        kept: list[Tensor] = []
        parts = _parts(query)
        for part in parts:
            part_query, part_key, part_value = _load(query[part], key[part], value[part], geometry)
            weights, axes = _weights(part_query, part_key, tables, geometry, keeps)
            mixed = torch.bmm(weights, part_value, out=_buffer('mixed', part_value.shape, value.dtype))
            output[part] = mixed.view(output[part].shape)
            if keeps:
                kept += [weights, *(x for axis in axes for x in axis)]
        ctx.save_for_backward(query, key, value, tables, *kept)
        ctx.geometry, ctx.parts = geometry, parts
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, tables, *kept = ctx.saved_tensors
        grads = [torch.empty(query.shape, dtype=query.dtype) for _ in range(3)]
        grad_tables = torch.zeros_like(tables)
        size = len(kept) // max(1, len(ctx.parts))
        for i, part in enumerate(ctx.parts):
            inputs = _load(query[part], key[part], value[part], ctx.geometry)
            if ctx.geometry.recompute:
                weights, axes = _weights(*inputs[:2], tables, ctx.geometry, keep=False)
            else:
                weights, *rest = kept[i * size : (i + 1) * size]
                axes = [Axis(*rest[j : j + len(Axis._fields)]) for j in range(0, len(rest), len(Axis._fields))]
            part_grads = [grad[part].flatten(0, 1) for grad in grads]
            grad_tables += _backward(grad_output[part], *inputs, tables, weights, axes, ctx.geometry, part_grads)
        return *grads, grad_tables, None


class _Buffers(threading.local):
    """Memory by name and dtype that stays allocated between calls, as fresh memory is slow to touch."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_BUFFERS = _Buffers()


def _buffer(name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of this thread's memory of that name, with what was left in it."""
    size = torch.Size(shape).numel()
    found = _BUFFERS.tensors.get((name, dtype))
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = _BUFFERS.tensors[name, dtype] = torch.empty(size, dtype=dtype)
    return found[:size].view(shape)


def release_buffers() -> None:
    """Free the memory that this thread's calls of `cpu_attention` have left for the next ones."""
    _BUFFERS.tensors.clear()


def _parts(query: Tensor) -> list[tuple[slice, slice]]:
    """Images and heads that are worked on at a time: several images, or some heads of one, evenly by thread."""
    batch, heads, tokens, _ = query.shape
    threads = torch.get_num_threads()
    at_once = max(1, round(LOGITS_AT_ONCE / (tokens * tokens * threads))) * threads
    images, some_heads = max(1, at_once // heads), min(at_once, heads)
    return [
        (slice(image, image + images), slice(head, head + some_heads))
        for image in range(0, batch, images)
        for head in range(0, heads, some_heads)
    ]


def _load(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values of a part, (G, P + N, d), in buffers."""
    buffers = [_buffer(name, query.shape, query.dtype) for name in ('query', 'key', 'value')]
    torch.mul(query, geometry.scale, out=buffers[0])
    buffers[1].copy_(key)
    buffers[2].copy_(value)
    return buffers[0].flatten(0, 1), buffers[1].flatten(0, 1), buffers[2].flatten(0, 1)


def _weights(
    query: Tensor,
    key: Tensor,
    tables: Tensor,
    geometry: Geometry,
    keep: bool,
) -> tuple[Tensor, list[Axis]]:
    """Attention weights (G, P + N, P + N) and what the gradients need of each axis, in fresh memory to `keep` them."""
    content, factor = _content(query, key, geometry)
    scores = content @ (factor * tables).t()
    shape = (*query.shape[:2], query.shape[1])
    logits = query.new_empty(shape) if keep else _buffer('logits', shape, query.dtype)
    torch.bmm(query, key.mT, out=logits)
    patches = logits[:, geometry.prefix :, geometry.prefix :]
    lines = [
        _read(patches, axis_scores, axis, geometry)
        for axis, axis_scores in zip(geometry.axes, _split_scores(scores, geometry), strict=True)
    ]
    axes = []
    for axis, line in zip(geometry.axes, lines, strict=True):
        shape = patches.shape
        inverse = query.new_empty(shape) if keep else _buffer(f'inverse {axis}', shape, query.dtype)
        squares = _squared_distances(line[0])
        torch.rsqrt(squares, out=inverse).nan_to_num_(nan=float('nan'), posinf=0.0)
        patches.addcmul_(squares, inverse)
        axes.append(Axis(inverse, *line))
    return torch.softmax(logits, -1, out=logits), axes


def _content(query: Tensor, key: Tensor, geometry: Geometry) -> tuple[Tensor, float]:
    """What reads the embeddings, and what to multiply these with if it is scaled queries."""
    return (query, 1 / geometry.scale) if geometry.target == 'k' else (key, 1.0)


def _read(patches: Tensor, scores: Tensor, axis: str, geometry: Geometry) -> tuple[Tensor, ...]:
    """Signatures along one axis from dot products (G, N, N) and scores (G, lines, L, n), and the rest of `Axis`."""
    last = scores.shape[-1] - 1
    gates = _lines(patches, geometry.grid, axis).clone(memory_format=torch.contiguous_format)
    gates = gates.sigmoid_() if geometry.semantic else gates.fill_(1.0)
    sums = gates @ gates.new_ones(gates.shape[-1], gates.shape[-1]).tril()
    fraction = sums.clamp(max=last)
    index = fraction.long().clamp_(0, last - 1)  # NaN has no index, but must come out as NaN
    fraction.sub_(index)
    at_lower = scores.gather(-1, index)
    slope = scores[..., 1:].gather(-1, index).sub_(at_lower)
    signature = at_lower.addcmul_(fraction, slope)
    slope.masked_fill_(sums > last, 0.0)
    signature = (signature.transpose(1, 2) if axis == 'y' else signature).flatten(1, 2)
    return signature, gates, index, fraction, slope


def _squared_distances(points: Tensor) -> Tensor:
    """Squared distances of all pairs of points (G, N, L), exactly 0 for equal ones, (G, N, N) in a buffer.

    They come from products in float64. Cancellation leaves an error of 1e-8 of the norms in a distance, less than the
    rounding of points in float32.
    """
    heads, patches, length = points.shape
    shape = (heads, patches, patches)
    left, right = (_buffer(name, (heads, patches, length + 2), torch.float64) for name in ('left', 'right'))
    left[..., :length] = points
    torch.mul(left[..., :length], -2, out=right[..., :length])
    norms = torch.linalg.vector_norm(left[..., :length], dim=-1).square_().mul_(1 - ZERO_BELOW)
    left[..., length], right[..., length] = norms, 1
    left[..., length + 1], right[..., length + 1] = 1, norms
    squares = torch.bmm(left, right.mT, out=_buffer('squares', shape, torch.float64))
    return _buffer('distances', shape, points.dtype).copy_(squares).clamp_(min=0.0)


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    weights: Tensor,
    axes: list[Axis],
    geometry: Geometry,
    grads: list[Tensor],
) -> Tensor:
    """Write the gradients of queries, keys and values of a part into `grads` and return that of the tables."""
    grad_query, grad_key, grad_value = grads
    grad_mixed = _buffer('mixed', grad_output.shape, grad_output.dtype).copy_(grad_output).flatten(0, 1)
    torch.bmm(weights.mT, grad_mixed, out=grad_value)
    grad_weights = torch.bmm(grad_mixed, value.mT, out=_buffer('gradient', weights.shape, weights.dtype))
    grad_logits = torch.ops.aten._softmax_backward_data.out(
        grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
    )

    patches = grad_logits[:, geometry.prefix :, geometry.prefix :]
    both_ways = torch.add(patches, patches.mT, out=_buffer('both ways', patches.shape, patches.dtype))
    content, factor = _content(query, key, geometry)
    grad_scores = content.new_zeros(*content.shape[:2], len(tables))
    grad_gates = []
    for name, axis, axis_grad_scores in zip(geometry.axes, axes, _split_scores(grad_scores, geometry), strict=True):
        grad = _signature_gradient(both_ways, axis.inverse, axis.signature).unflatten(1, geometry.grid)
        grad = grad.transpose(1, 2) if name == 'y' else grad
        at_upper = grad * axis.fraction
        axis_grad_scores.scatter_add_(-1, axis.below, grad - at_upper)
        axis_grad_scores[..., 1:].scatter_add_(-1, axis.below, at_upper)
        if geometry.semantic:
            grad_sums = (grad * axis.slope) @ grad.new_ones(grad.shape[-1], grad.shape[-1]).triu()
            grad_gates.append((name, torch.ops.aten.sigmoid_backward(grad_sums, axis.gates)))
    for name, axis_grad_gates in grad_gates:
        _lines(patches, geometry.grid, name).add_(axis_grad_gates)

    torch.bmm(grad_logits, key, out=grad_query)
    torch.bmm(grad_logits.mT, query, out=grad_key)
    grad_content = grad_query if geometry.target == 'k' else grad_key
    grad_scores = grad_scores.flatten(0, 1)
    grad_content.view(-1, grad_content.shape[-1]).addmm_(grad_scores, factor * tables)
    grad_query.mul_(geometry.scale)
    return factor * (grad_scores.t() @ content.flatten(0, 1))


def _signature_gradient(grad_distances: Tensor, inverse: Tensor, points: Tensor) -> Tensor:
    """Gradient of points (G, N, L) from that of their distances in both orders added up, and the inverse distances.

    With `R = grad_distances * inverse` it is `(sum_j R_ij) u_i - sum_j R_ij u_j`. As R is symmetric, it may stand on
    the right, where the product takes a fraction of the time.
    """
    ratio = torch.mul(grad_distances, inverse, out=_buffer('distances', inverse.shape, inverse.dtype))
    return ratio.sum(-1, keepdim=True) * points - (points.mT @ ratio).mT


def _split_scores(scores: Tensor, geometry: Geometry) -> list[Tensor]:
    """Scores of the patches with each axis' table as lines, (G, lines, L, n), out of (G, P + N, axes * n)."""
    views = scores[:, geometry.prefix :].unflatten(1, geometry.grid).chunk(len(geometry.axes), -1)
    return [view.transpose(1, 2) if axis == 'y' else view for view, axis in zip(views, geometry.axes, strict=True)]


def _lines(patches: Tensor, grid: tuple[int, int], axis: str) -> Tensor:
    """Entries of (G, N, N) for pairs of patches of one row ('x') or column ('y'), (G, lines, L, L), a view."""
    pairs = patches.unflatten(2, grid).unflatten(1, grid)
    return (pairs.diagonal(0, 1, 3) if axis == 'x' else pairs.diagonal(0, 2, 4)).permute(0, 3, 1, 2)
