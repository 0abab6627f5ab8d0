"""SaPE2 attention in Triton: gates, positions, signatures, distances and attention, forward and backward.

Memory is linear in the tokens: of the N x N logits and distances only one tile at a time exists. Forward there are two
launches: the signatures of all patches (triton_signatures.py), then attention with the bias that they make
(triton_attention.py). Backward there are four: sums that the softmax's gradient needs, attention, signatures, and the
sum of the tables' gradients over heads; one to three more where registers are not enough for all of attention at once.

Importing this module imports triton. operator.py makes an operator of it.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import triton_attention as attention
from . import triton_signatures as signatures
from .operator import UNIT_OF_STRIDES, has_exact_distances, length_of_points, padded
from .triton_tiles import MOST_REGISTERS


class Problem(NamedTuple):
    """Attention to compute: the arguments of `triton_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate_key: Tensor | None
    logit_query: Tensor | None
    logit_key: Tensor | None
    row_table: Tensor | None
    column_table: Tensor | None
    height: int
    width: int
    prefix: int
    gates: str
    target: str
    scale: float

    @property
    def logit_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of attention."""
        query = self.query if self.logit_query is None else self.logit_query
        return query, self.key if self.logit_key is None else self.logit_key, self.value

    @property
    def signature_inputs(self) -> tuple[Tensor, ...]:
        """Queries, keys, keys of gates and both tables; what is not there is one of the others."""
        row_table, column_table = self.row_table, self.column_table
        table = row_table if row_table is not None else column_table
        assert table is not None
        tables = (table if one is None else one for one in (row_table, column_table))
        return self.query, self.key, self.key if self.gate_key is None else self.gate_key, *tables

    @property
    def lines(self) -> tuple[int, int]:
        """Lengths of rows and columns, 0 where there is no table."""
        return 0 if self.row_table is None else self.width, 0 if self.column_table is None else self.height

    @property
    def counts(self) -> tuple[int, int]:
        """Entries of both tables that can be read: no position is above the length of a line."""
        *_, row_table, column_table = self.signature_inputs
        return min(len(row_table), self.width + 1), min(len(column_table), self.height + 1)

    @property
    def blocks(self) -> dict[str, int]:
        """Compile-time sizes of memory: of channels, of points, and of what points are as factors."""
        width, height = self.lines
        return {
            'DIM': self.query.shape[-1],
            'BLOCK_DIM': padded(self.query.shape[-1]),
            'BLOCK_WIDTH': length_of_points(width, self.by_differences),
            'BLOCK_HEIGHT': length_of_points(height, self.by_differences),
            'FACTOR_WIDTH': padded(width),
            'FACTOR_HEIGHT': padded(height),
        }

    @property
    def by_differences(self) -> bool:
        """Tell whether distances come from differences, as `has_exact_distances` says."""
        return has_exact_distances(self.lines, self.query.dtype)

    @property
    def sizes(self) -> tuple[int, int, bool]:
        """What configurations depend on: channels, blocks of points, and how distances are computed."""
        blocks = self.blocks
        points = max(blocks['BLOCK_WIDTH'], blocks['BLOCK_HEIGHT'])
        return blocks['DIM'], points, self.by_differences

    def signature_constants(self, is_backward: bool) -> dict[str, Any]:
        """Compile-time arguments of both kernels of signatures."""
        line = max(self.blocks['FACTOR_WIDTH'], self.blocks['FACTOR_HEIGHT'])
        dim, is_exact = padded(self.query.shape[-1]), self.query.dtype == torch.float32
        return {
            'DIM': self.query.shape[-1],
            'BLOCK_DIM': dim,
            'BLOCK_LINE': line,
            'BLOCK_COUNT': padded(max(self.counts)),
            'GATES': self.gates,
            'TARGET': self.target,
            **signatures.tile(line, dim, is_exact, is_backward),
        }

    @property
    def attention_constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels of attention."""
        width, height = self.lines
        distances = 'differences' if self.by_differences else 'tf32'
        return self.blocks | {'WIDTH': width, 'HEIGHT': height, 'DISTANCES': distances}


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Return strides in units, so that the compiler knows where rows start."""
    return [tuple(stride // UNIT_OF_STRIDES for stride in x.stride()[:3]) for x in tensors]


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute signatures and attention.

    Args:
        problem: Its tensors have stride 1 along their last dimension, and multiples of UNIT_OF_STRIDES along others.

    Returns:
        Output (B, h, P + N, d), laid out as (B, P + N, h, d), and for the backward pass logarithms (to base 2) of the
        softmax denominators, (B, h, P + N), points of all patches (B, h, N, .), and their squared norms (B, h, 2, N).
    """
    query, key, value = problem.logit_inputs
    batch, heads, tokens, dim = query.shape
    height, width, prefix = problem.height, problem.width, problem.prefix
    blocks = problem.blocks
    points = query.new_empty(batch, heads, tokens, blocks['BLOCK_WIDTH'] + blocks['BLOCK_HEIGHT'], dtype=torch.float32)
    make_norms = query.new_zeros if problem.by_differences or 0 in problem.lines else query.new_empty  # all are written
    norms = make_norms(batch, heads, 2, tokens, dtype=torch.float32)
    axes, lines = sum(size > 0 for size in problem.lines), max(height, width)
    constants = problem.signature_constants(is_backward=False)
    signatures.signature_kernel[(batch * heads, axes, triton.cdiv(lines, signatures.LINES))](
        *problem.signature_inputs,
        points,
        norms,
        *_strides(*problem.signature_inputs[:3]),
        heads,
        prefix,
        height,
        width,
        *problem.counts,
        problem.scale,
        BLOCK_WIDTH=blocks['BLOCK_WIDTH'],
        BLOCK_HEIGHT=blocks['BLOCK_HEIGHT'],
        PARTS=triton.cdiv(max(blocks['BLOCK_WIDTH'], blocks['BLOCK_HEIGHT']), constants['BLOCK_LINE']),
        CUT_OFF=not problem.by_differences,
        LINES=signatures.LINES,
        **constants,
    )
    output = query.new_empty(batch, tokens, heads, dim)
    logsumexp = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    tuned = attention.tuned(attention.forward_kernel, attention.forward_configs, *problem.sizes)
    tuned[lambda constants: (batch * heads * triton.cdiv(tokens, constants['BLOCK_OWN']),)](
        query,
        key,
        value,
        points,
        norms,
        output,
        logsumexp,
        *_strides(query, key, value),
        heads,
        tokens,
        prefix,
        problem.scale * math.log2(math.e),
        **{name: size for name, size in problem.attention_constants.items() if 'FACTOR' not in name},
    )
    return output.transpose(1, 2), logsumexp, points, norms


def backward(
    problem: Problem, grad_output: Tensor, output: Tensor, logsumexp: Tensor, points: Tensor, norms: Tensor
) -> list[Tensor | None]:
    """Compute the gradients of all tensors of the problem, None for those that are None.

    Args:
        problem: What `forward` was given.
        grad_output: Gradient of the output, (B, h, P + N, d), with strides as above.
        output: What `forward` returned, and so are the others.
        logsumexp: See `output`.
        points: See `output`.
        norms: See `output`.

    Returns:
        Gradients of the tensors of `Problem`, in their order. Those of queries, keys and values are laid out like the
        output.
    """
    query, key, value = problem.logit_inputs
    batch, heads, tokens, dim = query.shape
    blocks = problem.blocks
    factor_pitch = blocks['FACTOR_WIDTH'] + blocks['FACTOR_HEIGHT']
    delta = torch.empty_like(logsumexp)
    roles = attention.share_out(*problem.sizes)
    grad_points = points.new_empty(sum(role.OF_POINTS for role in roles), batch, heads, tokens, factor_pitch)
    has_factors = not problem.by_differences
    factors = torch.empty_like(grad_points[0], dtype=torch.bfloat16) if has_factors else points
    attention.delta_kernel[(batch * heads, triton.cdiv(tokens, 32))](
        output,
        grad_output,
        points,
        delta,
        factors,
        *_strides(grad_output),
        heads,
        tokens,
        HAS_FACTORS=has_factors,
        BLOCK_OWN=32,
        maxnreg=MOST_REGISTERS,
        **{name: size for name, size in problem.attention_constants.items() if name != 'DISTANCES'},
    )
    grad_logit_query, grad_logit_key, grad_value = (query.new_empty(batch, tokens, heads, dim) for _ in range(3))
    tuned = attention.tuned(attention.backward_kernel, attention.backward_configs, *problem.sizes)
    for index, role in enumerate(sorted(roles, key=lambda role: not role.OF_POINTS)):
        tuned[lambda constants: (batch * heads * triton.cdiv(tokens, constants['BLOCK_OWN']),)](
            query,
            key,
            value,
            points,
            norms,
            factors,
            logsumexp,
            delta,
            grad_output,
            grad_logit_query,
            grad_logit_key,
            grad_value,
            grad_points[min(index, len(grad_points) - 1)],
            *_strides(query, key, value, grad_output),
            heads,
            tokens,
            problem.prefix,
            problem.scale * math.log2(math.e),
            **role._asdict(),
            **problem.attention_constants,
        )
    grad_query, grad_key, grad_gate_key = (
        own if other is None else torch.zeros_like(own)
        for own, other in (
            (grad_logit_query, problem.logit_query),
            (grad_logit_key, problem.logit_key),
            (grad_value, grad_value if problem.gate_key is not None else None),
        )
    )
    row_count, column_count = problem.counts
    grad_tables = points.new_empty(batch * heads, row_count + column_count, dim)
    signatures.signature_backward_kernel[(batch * heads,)](
        *problem.signature_inputs,
        grad_points,
        grad_query,
        grad_key,
        grad_gate_key,
        grad_tables,
        grad_tables[:, row_count:],
        grad_points.stride(0),
        *_strides(*problem.signature_inputs[:3]),
        heads,
        problem.prefix,
        problem.height,
        problem.width,
        *problem.counts,
        problem.scale,
        FACTOR_WIDTH=blocks['FACTOR_WIDTH'],
        FACTOR_HEIGHT=blocks['FACTOR_HEIGHT'],
        ROLES=len(grad_points),
        WORK=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
        **problem.signature_constants(is_backward=True),
    )
    total = grad_tables.sum(0).split([row_count, column_count])
    found = [grad_query, grad_key, grad_value, grad_gate_key, grad_logit_query, grad_logit_key]
    return [
        *(None if x is None else grad.transpose(1, 2) for x, grad in zip(problem[:6], found, strict=True)),
        *(None if x is None else _padded(grad, x) for x, grad in zip(problem[6:8], total, strict=True)),
    ]


def _padded(grad: Tensor, table: Tensor) -> Tensor:
    """Give the gradient of a table 0 for the entries that are never read, and the table's dtype."""
    return F.pad(grad, (0, 0, 0, len(table) - len(grad))).to(table.dtype)
