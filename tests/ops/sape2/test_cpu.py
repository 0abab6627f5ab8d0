"""SaPE2 attention on a CPU against the reference: outputs, every gradient, dtypes, threads, torch.compile, memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from timm_sape2.ops.sape2 import choose, cpu, sape2_attention

GRIDS = [(7, 9), (1, 5), (5, 1), (14, 14), (1, 128)]
INPUTS = ('query', 'key', 'value', 'gate_key', 'logit_query', 'logit_key', 'row_table', 'column_table')


def random_inputs(grid, prefix=1, batch=2, heads=2, dim=8, num_positions=4, dtype=torch.float64):
    """Queries, keys, values, another key for gates, another query and key for logits, and two tables."""
    shape = (batch, heads, prefix + grid[0] * grid[1], dim)
    tables = torch.randn(2, num_positions, dim, dtype=dtype)
    return [x.requires_grad_() for x in (*torch.randn(6, *shape, dtype=dtype).unbind(), *tables.unbind())]


def attend(inputs, grid, prefix=1, *, axes='xy', gates='key', rotated=False, implementation='cpu', **options):
    """Attention from `random_inputs`, of which it takes what the options ask for."""
    query, key, value, other, logit_query, logit_key, *tables = inputs
    return sape2_attention(
        query,
        key,
        value,
        {'key': key, 'other': other, 'value': value, 'none': None}[gates],
        *(table if axis in axes else None for axis, table in zip('xy', tables, strict=True)),
        grid,
        prefix,
        logit_query=logit_query if rotated else None,
        logit_key=logit_key if rotated else None,
        implementation=implementation,
        **options,
    )


def with_gradients(inputs, *args, **kwargs):
    """Output, and gradients by name, 0 where an input is not used."""
    output = attend(inputs, *args, **kwargs)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output.to(output.dtype), materialize_grads=True)
    return {'output': output.detach(), **dict(zip(wanted, grads, strict=True))}


def check(inputs, *args, tolerance=1e-12, **kwargs):
    """Assert that output and gradients are those of the reference in float64, in norms relative to the largest."""
    found = with_gradients(inputs, *args, **kwargs)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = with_gradients(exact, *args, **kwargs, implementation='reference')
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape
        error, norm = (found[name].double() - right).norm(), right.norm()
        assert error <= tolerance * norm, f'{name}: {error:.1e} of {norm:.1e}'


@pytest.fixture
def small_tiles(monkeypatch):
    """Work on tiles of 32 patches, and on few rows at a time."""
    monkeypatch.setattr(cpu, 'LOGITS_AT_ONCE', 2000)
    monkeypatch.setattr(cpu, 'TILE', 32)


@pytest.fixture(params=['as it comes', 'full of NaN'])
def memory(request):
    """Fresh memory, as it comes or full of NaN."""
    if request.param == 'as it comes':
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures('memory')
class TestAgainstTheReference:
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('grid', GRIDS, ids=str)
    @pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str)
    def test_grids_and_prefix_tokens(self, grid, prefix, dtype, tolerance):
        check(random_inputs(grid, prefix, dtype=dtype), grid, prefix, tolerance=tolerance)

    @pytest.mark.parametrize('rotated', [False, True])
    @pytest.mark.parametrize('target', ['k', 'q', 'qk'])
    @pytest.mark.parametrize('gates', ['key', 'other', 'value', 'none'])
    @pytest.mark.parametrize('axes', ['xy', 'x', 'y'])
    def test_options(self, axes, gates, target, rotated):
        check(random_inputs((4, 6)), (4, 6), axes=axes, gates=gates, target=target, rotated=rotated)

    @pytest.mark.parametrize(
        'options', [{}, {'target': 'qk', 'rotated': True}, {'axes': 'y', 'gates': 'none'}], ids=str
    )
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    def test_tiles_of_one_head(self, small_tiles, prefix, options):
        """99 patches in three tiles of 32 and one of 3, the first with the prefix tokens."""
        inputs = random_inputs((9, 11), prefix)
        check(inputs, (9, 11), prefix, **options)

    def test_many_images_and_heads(self):
        check(random_inputs((3, 4), batch=5), (3, 4))
        check(random_inputs((3, 4), heads=6), (3, 4))

    @pytest.mark.parametrize('logits', [1, 13 * 50, 10**6])
    def test_rows_in_parts(self, monkeypatch, logits):
        monkeypatch.setattr(cpu, 'LOGITS_AT_ONCE', logits)
        check(random_inputs((7, 9), 1), (7, 9), 1)

    @pytest.mark.parametrize('num_positions', [2, 3, 12])
    def test_positions_below_at_and_above_the_limit(self, num_positions):
        check(random_inputs((7, 9), num_positions=num_positions), (7, 9))

    def test_whole_positions(self):
        """Gates of 1 on a line of five: positions 5 to 1, of which one is at the limit."""
        check(random_inputs((5, 5), num_positions=5), (5, 5), gates='none')

    @pytest.mark.parametrize('dim', [1, 3, 16, 24, 64])
    @pytest.mark.parametrize('gates', ['key', 'other'])
    def test_head_dimensions(self, dim, gates):
        check(random_inputs((3, 4), dim=dim), (3, 4), gates=gates)

    def test_another_scale(self):
        check(random_inputs((3, 4)), (3, 4), scale=0.1)

    @pytest.mark.parametrize('which', range(8), ids=INPUTS)
    def test_some_inputs_need_no_gradient(self, which):
        inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(random_inputs((3, 4)))]
        check(inputs, (3, 4), gates='other', rotated=True, target='qk')

    @pytest.mark.parametrize('batch', [1, 2])
    def test_views_of_one_projection(self, batch):
        qkv = torch.randn(batch, 13, 3, 2, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
        inputs = random_inputs((3, 4), batch=batch)
        inputs[:3] = [x.detach().requires_grad_() for x in qkv.unbind()]
        assert not inputs[0].is_contiguous()
        check(inputs, (3, 4))
        assert attend(inputs, (3, 4)).transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize('gates', ['key', 'other'])
    def test_any_strides(self, gates):
        inputs = [x.detach().mT.contiguous().mT.requires_grad_() for x in random_inputs((3, 4), batch=1)]
        check(inputs, (3, 4), gates=gates)

    def test_no_images(self):
        found = with_gradients(random_inputs((3, 4), batch=0), (3, 4))
        assert found['output'].shape == found['query'].shape == (0, 2, 13, 8)
        assert not found['row_table'].any()


def test_gradients_by_differences():
    inputs = random_inputs((3, 2), batch=1, heads=1, dim=4)
    options = {'gates': 'other', 'rotated': True, 'target': 'qk'}
    assert torch.autograd.gradcheck(lambda *x: attend(x, (3, 2), **options), inputs)


class TestDistances:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
    def test_identical_patches_have_no_bias_and_tables_no_gradient(self, dtype):
        query, key, value, *_, rows, columns = random_inputs((1, 40), prefix=0, dtype=dtype)
        query, key = (x[:, :, :1].expand(-1, -1, 40, -1) for x in (query, key))
        # patches differ in their places, so positions must not: gates of 1 sum up to more than the tables have
        rows = rows[:1].expand(4, -1)
        output = sape2_attention(query, key, value, None, rows, columns, (1, 40), implementation='cpu')
        mean = value.float().mean(2, keepdim=True).expand(value.shape).to(dtype)
        torch.testing.assert_close(output, mean)
        grads = torch.autograd.grad(output.float().square().sum(), [rows, columns])
        assert all((grad == 0).all() for grad in grads)

    def test_a_pair_of_identical_patches(self):
        """With the same query and key on one row their signatures are the same: one distance is 0, others are not."""
        inputs = random_inputs((1, 8), prefix=0)
        for x in inputs[:2]:
            x.data[:, :, 5] = x.data[:, :, 2]
        check(inputs, (1, 8), 0)

    def test_nearly_identical_patches(self):
        """Distances of 1e-3 of the norms, where products in float32 have lost them."""
        inputs = random_inputs((3, 4), dtype=torch.float32)
        for x in inputs[:2]:
            x.data[:, :, 6:] = x.data[:, :, 5:6] + 1e-3 * torch.randn_like(x.data[:, :, 6:])
        check(inputs, (3, 4), tolerance=1e-3)

    def test_bias_near_a_thousand(self):
        inputs = random_inputs((7, 9), dtype=torch.float32)
        for table in inputs[6:]:
            table.data *= 60
        check(inputs, (7, 9), tolerance=1e-3)

    @pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
    @pytest.mark.parametrize('which', range(6), ids=INPUTS[:6])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_what_is_not_finite_spreads_as_in_the_reference(self, which, value, dtype):
        inputs = [x.detach() for x in random_inputs((3, 4), dtype=dtype)]
        inputs[which][0, 0, 5, 0] = value
        options = {'gates': 'other' if which == 3 else 'key', 'rotated': which >= 4}
        found, expected = (attend(inputs, (3, 4), implementation=name, **options) for name in ('cpu', 'reference'))
        assert torch.equal(found.isfinite(), expected.isfinite())


class TestHalfPrecision:
    @pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str)
    @pytest.mark.parametrize('gates', ['key', 'other'])
    def test_in_and_out(self, dtype, tolerance, gates):
        inputs = random_inputs((7, 9), dtype=dtype)
        check(inputs, (7, 9), gates=gates, tolerance=tolerance)
        found = with_gradients(inputs, (7, 9), gates=gates)
        assert {x.dtype for x in found.values()} == {dtype}

    def test_tiles(self, small_tiles):
        check(random_inputs((9, 11), dtype=torch.bfloat16), (9, 11), tolerance=3e-2)

    @pytest.mark.parametrize('compiled', [False, True])
    def test_autocast(self, compiled):
        torch._dynamo.reset()
        inputs = random_inputs((3, 4), dtype=torch.float32)
        inputs[2] = inputs[2].detach().bfloat16().requires_grad_()
        function = torch.compile(attend, fullgraph=True, backend='aot_eager') if compiled else attend
        with torch.autocast('cpu', torch.bfloat16):
            output = function(inputs, (3, 4), gates='other', rotated=True)
        assert output.dtype == torch.bfloat16
        halves = [x.detach().bfloat16() if i < 6 else x for i, x in enumerate(inputs)]
        assert torch.equal(output, attend(halves, (3, 4), gates='other', rotated=True))
        grads = torch.autograd.grad(output.float().square().sum(), inputs)
        assert [grad.dtype for grad in grads] == [x.dtype for x in inputs]


class TestThreads:
    @pytest.fixture(autouse=True)
    def one_thread_again(self):
        yield
        torch.set_num_threads(1)

    @pytest.mark.parametrize('tiles', [False, True])
    def test_two_compute_what_one_does(self, monkeypatch, tiles):
        if tiles:
            monkeypatch.setattr(cpu, 'TILE', 32)
        inputs = random_inputs((9, 11), heads=3, dtype=torch.float32)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(inputs, (9, 11), gates='other', target='qk'))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

    def test_results_are_the_same_in_every_run(self):
        torch.set_num_threads(2)
        inputs = random_inputs((7, 9), heads=3, dtype=torch.float32)
        first, *others = (with_gradients(inputs, (7, 9)) for _ in range(5))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)

    def test_calls_at_the_same_time(self):
        torch.set_num_threads(2)
        inputs = [[x.detach() for x in random_inputs((7, 9))] for _ in range(8)]
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda x: attend(x, (7, 9)), inputs * 4))
        for x, output in zip(inputs * 4, outputs, strict=True):
            torch.testing.assert_close(output, attend(x, (7, 9), implementation='reference'))

    @pytest.mark.skipif(not hasattr(os, 'fork'), reason='for systems with fork')
    def test_a_forked_process(self):
        """As workers of a data loader: forked after threads were at work, then on one thread."""
        script = """
import os, torch
from test_cpu import attend, random_inputs
torch.set_num_threads(2)
inputs = random_inputs((7, 9))
expected = attend(inputs, (7, 9))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.allclose(attend(inputs, (7, 9)), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(attend(inputs, (7, 9)), expected)
"""
        done = subprocess.run(
            [sys.executable, '-c', script], cwd=Path(__file__).parent, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


class TestOperator:
    @pytest.mark.parametrize('others', [False, True])
    def test_opcheck(self, others):
        query, key, value, gate_key, logit_query, logit_key, *tables = random_inputs((3, 4))
        optional = (gate_key, logit_query, logit_key) if others else (None, None, None)
        tables = torch.cat(tables).detach().requires_grad_()
        options = (3, 4, 1, 'xy', 'other' if others else 'key', 'k', 0.25)
        torch.library.opcheck(cpu._attention, (query, key, value, *optional, tables, *options))

    @pytest.mark.parametrize('options', [{}, {'gates': 'other', 'rotated': True, 'axes': 'y'}], ids=str)
    def test_compiles_to_one_graph(self, options):
        torch._dynamo.reset()
        inputs = random_inputs((3, 4))

        def gradients(function):
            output = function(inputs, (3, 4), **options)
            return torch.autograd.grad(output.square().sum(), inputs, materialize_grads=True)

        compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(gradients(compiled), gradients(attend))

    def test_another_batch_size_needs_no_new_graph(self):
        torch._dynamo.reset()
        counter, graphs = CompileCounterWithBackend('aot_eager'), []
        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
        for batch in (5, 6, 7):  # none is the size of another dimension
            inputs = [x.detach() for x in random_inputs((3, 4), batch=batch, num_positions=10)]
            torch.testing.assert_close(compiled(inputs, (3, 4)), attend(inputs, (3, 4)))
            graphs.append(counter.frame_count)
        assert graphs[0] == graphs[-1]

    def test_checkpointing(self):
        inputs = random_inputs((3, 4))
        output = checkpoint(lambda *x: attend(x, (3, 4)), *inputs, use_reentrant=False)
        found = torch.autograd.grad(output.square().sum(), inputs, materialize_grads=True)
        expected = torch.autograd.grad(attend(inputs, (3, 4)).square().sum(), inputs, materialize_grads=True)
        torch.testing.assert_close(found, expected)

    def test_it_cannot_be_differentiated_twice(self):
        inputs = random_inputs((3, 4))
        output = attend(inputs, (3, 4))
        (grad,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    def test_nothing_is_kept_where_no_gradient_is_needed(self):
        inputs = random_inputs((3, 4))
        with torch.no_grad():
            assert attend(inputs, (3, 4)).grad_fn is None
        assert attend([x.detach() for x in inputs], (3, 4)).grad_fn is None

    def test_memory_is_linear_in_the_tokens(self):
        """What the backward pass is given: the inputs, the output, and two numbers for each query."""
        kept = []
        inputs = random_inputs((8, 8), batch=1, heads=1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            attend(inputs, (8, 8))
        own = [x for x in kept if x.dim() > 2]
        assert sorted(x.numel() for x in own) == [65] * 2 + [65 * 8] * 4


class TestWhyNot:
    def test_no_reason(self):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert choose(torch.zeros(1, 1, 13, 8, dtype=dtype), (3, 4))[0] == 'cpu'

    def test_other_devices_and_dtypes(self):
        x = torch.zeros(1, 1, 13, 8)
        assert cpu.why_not_cpu(x.to('meta')) == 'not a CPU tensor'
        assert cpu.why_not_cpu(x.long()) == 'torch.int64 is none of float32, float64, bfloat16, float16'

    def test_torch_func(self):
        reasons = []
        torch.func.grad(lambda x: reasons.append(cpu.why_not_cpu(x)) or x.sum())(torch.zeros(1, 1, 13, 8))
        assert reasons == ['no rules for torch.func']

    def test_not_compiled(self, monkeypatch):
        monkeypatch.setattr(cpu.cpu_library, 'why_not_compiled', lambda double: 'no C compiler')
        name, reasons = choose(torch.zeros(1, 1, 13, 8), (3, 4))
        assert (name, reasons['cpu']) == ('reference', 'no C compiler')
