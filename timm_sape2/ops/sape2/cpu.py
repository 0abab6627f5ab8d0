"""SaPE2 attention on a CPU: compiled C, in which a tile of a head passes through all steps while it is in the cache.

Logits and biases are computed again in the backward pass, which costs less than to store them. Half precision becomes
float32.
"""

from typing import Any

import torch
from torch import Tensor

from ..._compat import is_in_torch_func
from . import cpu_library
from .cpu_library import Call, View
from .inputs import Inputs, distinct_inputs, empty_like_output

LOGITS_AT_ONCE = 2**15  # of a head, forward: they stay in a core's cache
TILE = 1024  # patches on each side of a tile, backward
GATES = ('none', 'key', 'other')
DIRECT = 'direct'  # target of a bias that is what queries read for the column and the row of a key
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_cpu(query: Tensor) -> str | None:
    """Tell why `cpu_attention` cannot compute attention with these queries, None if it can."""
    if query.device.type != 'cpu':
        return 'not a CPU tensor'
    if query.dtype not in DTYPES:
        return f'{query.dtype} is none of {", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)}'
    if is_in_torch_func():
        return 'no rules for torch.func'
    return why_not_compiled(query.dtype == torch.float64)


@torch.compiler.assume_constant_result
def why_not_compiled(double: bool) -> str | None:
    """`cpu_library.why_not_compiled`, asked once where a model is compiled."""
    return cpu_library.why_not_compiled(double)


def cpu_attention(
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
    """Attention with the bias of SaPE2; the arguments are those of `sape2_attention`, with at least one table.

    With `DIRECT` for the target the bias is that of `axial_cope`, `B[i, j] = u_i[c_j] + v_i[r_j]`, with both tables.

    Returns:
        Attention output, (B, h, P + N, d), laid out as (B, P + N, h, d). It cannot be differentiated twice.
    """
    axes = ('' if row_table is None else 'x') + ('' if column_table is None else 'y')
    tables = torch.cat([table for table in (row_table, column_table) if table is not None])
    tensors, gates = distinct_inputs(query, key, value, gate_key, logit_query, logit_key)
    return _attention(*tensors, tables, *grid, num_prefix_tokens, axes, gates, target, scale)[0]


@torch.library.custom_op('timm_sape2::sape2_attention_cpu', mutates_args=(), device_types='cpu')
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    logit_query: Tensor | None,
    logit_key: Tensor | None,
    tables: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    axes: str,
    gates: str,
    target: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention, and of every query the highest logit and the sum of `exp(logit - highest)`, (B, h, P + N)."""
    inputs = Inputs(query, key, value, gate_key, logit_query, logit_key)
    work = Work(inputs, tables, height, width, num_prefix_tokens, axes, gates, target, scale)
    output = empty_like_output(value, work.dtype)
    highest, sums = (torch.empty(query.shape[:3], dtype=work.dtype) for _ in range(2))
    work.call.output = work.view(output)
    work.call.highest, work.call.sums = highest.data_ptr(), sums.data_ptr()
    work.run(backward=False)
    return output.to(value.dtype), highest, sums


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    highest, sums = (query.new_empty(query.shape[:3], dtype=_dtype_of_work(query)) for _ in range(2))
    return empty_like_output(value), highest, sums


@torch.library.custom_op('timm_sape2::sape2_attention_cpu_backward', mutates_args=(), device_types='cpu')
def _attention_backward(
    grad_output: Tensor,
    output: Tensor,
    highest: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_key: Tensor | None,
    logit_query: Tensor | None,
    logit_key: Tensor | None,
    tables: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    axes: str,
    gates: str,
    target: str,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of the tensors that went into attention, without those that are None."""
    inputs = Inputs(query, key, value, gate_key, logit_query, logit_key)
    work = Work(inputs, tables, height, width, num_prefix_tokens, axes, gates, target, scale)
    grads = [None if x is None else empty_like_output(x, work.dtype) for x in inputs]
    grad_tables = torch.empty(*query.shape[:2], *tables.shape, dtype=work.dtype)
    work.call.output, work.call.grad_output = work.view(output), work.view(grad_output)
    work.call.highest, work.call.sums = highest.data_ptr(), sums.data_ptr()
    work.call.grads = (View * len(grads))(*(work.view(grad) for grad in grads))
    work.call.grad_tables = grad_tables.data_ptr()
    work.run(backward=True)
    found = [grad.to(query.dtype) for grad in grads if grad is not None]
    return [*found, grad_tables.sum((0, 1)).to(tables.dtype)]


@_attention_backward.register_fake
def _(grad_output: Tensor, output: Tensor, highest: Tensor, sums: Tensor, *inputs: Any) -> list[Tensor]:
    *tensors, tables = inputs[:7]
    return [*(empty_like_output(x) for x in tensors if x is not None), tables.new_empty(tables.shape)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs[:7])


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    output, highest, sums, *inputs = ctx.saved_tensors
    found = iter(_attention_backward(grad_output, output, highest, sums, *inputs, *ctx.options))
    return (*(None if x is None else next(found) for x in inputs), *(None for _ in ctx.options))


_attention.register_autograd(_backward, setup_context=_save_for_backward)


class Work:
    """A call of the C functions, and the tensors that they read, which it keeps alive."""

    def __init__(
        self,
        inputs: Inputs,
        tables: Tensor,
        height: int,
        width: int,
        num_prefix_tokens: int,
        axes: str,
        gates: str,
        target: str,
        scale: float,
    ) -> None:
        images, heads, _, dim = inputs.query.shape
        self.dtype = _dtype_of_work(inputs.query)
        self.tensors: list[Tensor] = []
        self.call = Call(
            images=images,
            heads=heads,
            prefix=num_prefix_tokens,
            height=height,
            width=width,
            head_dim=dim,
            positions=len(tables) // len(axes),
            axes=('x' in axes, 'y' in axes),
            contents=(target in ('k', 'qk', DIRECT), target in ('q', 'qk')),
            direct=target == DIRECT,
            gates=GATES.index(gates),
            rotated=inputs.logit_query is not None,
            logits_at_once=LOGITS_AT_ONCE,
            tile=TILE,
            threads=min(torch.get_num_threads(), images * heads),
            scale=scale,
            inputs=(View * len(inputs))(*(self.view(x) for x in inputs)),
            tables=self.keep(tables.contiguous()).data_ptr(),
        )

    def keep(self, x: Tensor) -> Tensor:
        """Return a tensor in the type that is computed in, and keep it alive."""
        x = x.to(self.dtype)
        self.tensors.append(x)
        return x

    def view(self, x: Tensor | None) -> View:
        """Describe a tensor (B, h, T, d), or nothing."""
        if x is None:
            return View()
        x = self.keep(x if x.stride(3) == 1 else x.contiguous())
        return View(x.data_ptr(), *x.stride()[:3])

    def run(self, backward: bool) -> None:
        """Call the C function, with memory for each thread."""
        library = cpu_library.library(self.dtype == torch.float64)
        memory = torch.empty(self.call.threads * library.sape2_memory(self.call, backward), dtype=self.dtype)
        self.call.memory = memory.data_ptr()
        (library.sape2_backward if backward else library.sape2_forward)(self.call)


def _dtype_of_work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
