"""The custom operator around the kernel: what autograd, torch.compile, autocast and checkpointing ask of it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from timm_sape2.ops.sape2 import sape2_attention
from timm_sape2.ops.sape2.operator import _attention

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')


@pytest.fixture(autouse=True)
def device(triton_device):
    torch._dynamo.reset()
    return triton_device


@pytest.fixture
def inputs(device):
    shapes = [(2, 2, 13, 16)] * 3 + [(10, 16)] * 2
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def attend(query, key, value, *tables, implementation='triton'):
    return sape2_attention(
        query, key, value, key, *tables, grid=(3, 4), num_prefix_tokens=1, implementation=implementation
    )


def gradients(function, inputs):
    return torch.autograd.grad(function(*inputs).float().square().sum(), inputs)


def test_opcheck(inputs):
    query, key, value, *tables = inputs
    torch.library.opcheck(_attention, (query, key, value, None, None, None, *tables, 3, 4, 1, 'key', 'k', 0.25))


def test_opcheck_of_views_without_columns(inputs):
    query, key, value = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs[:3])
    others = [torch.randn_like(query).requires_grad_() for _ in range(3)]
    torch.library.opcheck(_attention, (query, key, value, *others, inputs[3], None, 3, 4, 1, 'other', 'q', 0.25))


@pytest.mark.parametrize('axes', ['xy', 'x', 'y'])
def test_gradients_are_those_of_the_reference(inputs, axes):
    keep = [x for x, name in zip(inputs, '123xy', strict=True) if name in '123' + axes]

    def attend_on_axes(implementation):
        tables = [x if name in axes else None for x, name in zip(inputs[3:], 'xy', strict=True)]
        return lambda *_: attend(*inputs[:3], *tables, implementation=implementation)

    torch.testing.assert_close(
        gradients(attend_on_axes('triton'), keep), gradients(attend_on_axes('reference'), keep), rtol=1e-4, atol=5e-5
    )


def test_compiles_to_one_graph(inputs):
    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(gradients(compiled, inputs), gradients(attend, inputs))


def test_another_batch_size_needs_no_new_graph(inputs):
    counter, graphs = CompileCounterWithBackend('aot_eager'), []
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 6, 7):  # none is the size of another dimension
        more = [torch.randn(batch, *x.shape[1:], device=x.device) for x in inputs[:3]]
        torch.testing.assert_close(compiled(*more, *inputs[3:]), attend(*more, *inputs[3:]))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_checkpointing(inputs):
    def recomputed(*inputs):
        return checkpoint(attend, *inputs, use_reentrant=False)

    torch.testing.assert_close(gradients(recomputed, inputs), gradients(attend, inputs))


@pytest.mark.parametrize('compiled', [False, True])
def test_autocast_casts_all_but_the_signatures(inputs, device, compiled):
    function = torch.compile(attend, fullgraph=True, backend='aot_eager') if compiled else attend
    mixed = [inputs[0], inputs[1], inputs[2].detach().bfloat16().requires_grad_(), *inputs[3:]]
    with torch.autocast(device, torch.bfloat16):
        output = function(*mixed)
    assert output.dtype == torch.bfloat16
    halves = [x.bfloat16() for x in inputs[:3]]
    assert torch.equal(output, attend(*halves, *inputs[3:]))
    grads = torch.autograd.grad(output.float().square().sum(), mixed)
    assert [grad.dtype for grad in grads] == [x.dtype for x in mixed]


def test_nothing_is_kept_where_no_gradient_is_needed(inputs):
    with torch.no_grad():
        assert attend(*inputs).grad_fn is None
    assert attend(*(x.detach() for x in inputs)).grad_fn is None


def test_memory_is_linear_in_the_tokens(inputs):
    """What the backward pass is given: the five inputs, the output, a number and two norms a token, and its points."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend(*inputs)
    tokens = 2 * 2 * 13
    expected = [x.numel() for x in inputs] + [tokens * 16, tokens, tokens * 2, tokens * (16 + 16)]
    assert sorted(x.numel() for x in kept) == sorted(expected)
