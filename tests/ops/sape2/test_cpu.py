"""The path for CPUs against the reference: outputs, every gradient, and what it stores."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from timm_sape2.ops.sape2 import choose, cpu, release_buffers, sape2_bias
from timm_sape2.ops.sape2.cpu import cpu_attention

GRIDS = [(7, 9), (1, 5), (5, 1), (14, 14)]


def random_inputs(grid, prefix=1, batch=2, heads=2, dim=8, num_positions=4, dtype=torch.float64):
    query, key, value = (torch.randn(batch, heads, prefix + grid[0] * grid[1], dim, dtype=dtype) for _ in range(3))
    tables = torch.randn(2, num_positions, dim, dtype=dtype)
    return [x.requires_grad_() for x in (query, key, value, *tables.unbind())]


def by_reference(
    query, key, value, row_table, column_table, grid, prefix, semantic=True, target='k', scale=None, recompute=False
):
    patches = [x[:, :, prefix:] for x in (query, key)]
    gate_key = patches[1] if semantic else None
    bias = sape2_bias(*patches, gate_key, row_table, column_table, grid, query.shape[-1] ** -0.5, target)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, [prefix, 0, prefix, 0]))


def outputs_and_gradients(attend, inputs, *args, **kwargs):
    output = attend(*inputs, *args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad_output)]


def check(inputs, *args, rtol=1e-10, atol=1e-10, **kwargs):
    expected = outputs_and_gradients(by_reference, inputs, *args, **kwargs)
    torch.testing.assert_close(
        outputs_and_gradients(cpu_attention, inputs, *args, **kwargs), expected, rtol=rtol, atol=atol
    )


class TestAgainstTheReference:
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('grid', GRIDS, ids=str)
    def test_grids_and_prefix_tokens(self, grid, prefix):
        check(random_inputs(grid, prefix), grid, prefix)

    @pytest.mark.parametrize('target', ['k', 'q'])
    @pytest.mark.parametrize('semantic', [True, False])
    @pytest.mark.parametrize('recompute', [True, False])
    @pytest.mark.parametrize('axes', ['xy', 'x', 'y'])
    def test_options(self, axes, recompute, semantic, target):
        inputs = random_inputs((4, 6))
        inputs[3:] = [table if axis in axes else None for axis, table in zip('xy', inputs[3:], strict=True)]
        check(inputs, (4, 6), 1, semantic, target, recompute=recompute)

    @pytest.mark.parametrize('recompute', [True, False])
    def test_images_in_parts(self, monkeypatch, recompute):
        monkeypatch.setattr(cpu, 'LOGITS_AT_ONCE', 2 * 2 * 13 * 13)
        inputs = random_inputs((3, 4), batch=5)
        assert len(cpu._parts(inputs[0])) == 3
        check(inputs, (3, 4), 1, recompute=recompute)

    def test_heads_in_parts_that_threads_share_evenly(self, monkeypatch):
        """Room for three heads and four threads: four at a time, out of six."""
        monkeypatch.setattr(cpu, 'LOGITS_AT_ONCE', 3 * 13 * 13)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
        inputs = random_inputs((3, 4), heads=6)
        assert [part[1] for part in cpu._parts(inputs[0])] == [slice(0, 4), slice(4, 8)] * 2
        check(inputs, (3, 4), 1)

    @pytest.mark.parametrize('recompute', [True, False])
    def test_another_number_of_threads_in_the_backward_pass(self, monkeypatch, recompute):
        """The backward pass works on the same parts as the forward pass, one head at a time here."""
        monkeypatch.setattr(cpu, 'LOGITS_AT_ONCE', 1)
        inputs = random_inputs((3, 4), heads=6)
        output = cpu_attention(*inputs, (3, 4), 1, recompute=recompute)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
        found = torch.autograd.grad(output.square().sum(), inputs)
        expected = torch.autograd.grad(by_reference(*inputs, (3, 4), 1).square().sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize('num_positions', [2, 3, 12])
    def test_positions_below_at_and_above_the_limit(self, num_positions):
        check(random_inputs((7, 9), num_positions=num_positions), (7, 9), 1)

    def test_gradients_by_differences(self):
        inputs = random_inputs((3, 2), batch=1, heads=1, dim=4)
        assert torch.autograd.gradcheck(lambda *x: cpu_attention(*x, (3, 2), 1), inputs)

    def test_views_of_one_projection(self):
        qkv = torch.randn(2, 13, 3, 2, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
        tables = torch.randn(2, 4, 8, dtype=torch.float64)
        inputs = [x.detach().requires_grad_() for x in (*qkv.unbind(), *tables)]
        check(inputs, (3, 4), 1)
        assert cpu_attention(*inputs, (3, 4), 1).transpose(1, 2).is_contiguous()

    def test_another_scale(self):
        inputs = random_inputs((3, 4))
        quarter = [inputs[0] / 4, *inputs[1:3], *(4 * x for x in inputs[3:])]
        found = cpu_attention(*inputs, (3, 4), 1, scale=8**-0.5 / 4)
        torch.testing.assert_close(found, by_reference(*quarter, (3, 4), 1))

    def test_float32(self):
        inputs = random_inputs((7, 9), dtype=torch.float32)
        check(inputs, (7, 9), 1, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('which', range(5))
    def test_some_inputs_need_no_gradient(self, which):
        inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(random_inputs((3, 4)))]
        check(inputs, (3, 4), 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_identical_patches_have_no_bias_and_tables_no_gradient(dtype):
    query, key, value, rows, columns = random_inputs((1, 4), prefix=0, dtype=dtype)
    query, key = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (query, key))
    output = cpu_attention(query, key, value, rows, columns, (1, 4), 0)
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(value))
    assert all((grad == 0).all() for grad in torch.autograd.grad(output.square().sum(), [rows, columns]))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('which', range(3))
def test_what_is_not_finite_spreads_as_in_the_reference(which, value):
    inputs = [x.detach() for x in random_inputs((3, 4))]
    inputs[which][0, 0, 5, 0] = value
    found, expected = (attend(*inputs, (3, 4), 1) for attend in (cpu_attention, by_reference))
    assert torch.equal(found.isfinite(), expected.isfinite())


class TestBuffers:
    def test_calls_of_other_shapes_in_between_leave_nothing_behind(self):
        inputs = random_inputs((3, 4))
        output = cpu_attention(*inputs, (3, 4), 1)
        with torch.inference_mode():
            cpu_attention(*random_inputs((7, 9)), (7, 9), 1)
        grads = torch.autograd.grad(output.square().sum(), inputs)
        expected = torch.autograd.grad(by_reference(*inputs, (3, 4), 1).square().sum(), inputs)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)

    def test_threads_do_not_share_them(self):
        inputs = [[x.detach() for x in random_inputs((7, 9))] for _ in range(8)]
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda x: cpu_attention(*x, (7, 9), 1), inputs * 4))
        for x, output in zip(inputs * 4, outputs, strict=True):
            torch.testing.assert_close(output, by_reference(*x, (7, 9), 1))

    def test_they_can_be_released(self):
        cpu_attention(*random_inputs((3, 4)), (3, 4), 1)
        assert cpu._BUFFERS.tensors
        release_buffers()
        assert not cpu._BUFFERS.tensors


class TestMemory:
    def saved(self, **kwargs):
        """Numbers that the backward pass is given for one image, of a grid of 8x8 and a class token."""
        kept = []
        inputs = random_inputs((8, 8), batch=1, heads=1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            cpu_attention(*inputs, (8, 8), 1, **kwargs)
        return [x.numel() for x in kept]

    def test_nothing_is_kept_where_no_gradient_is_needed(self):
        inputs = [x.detach() for x in random_inputs((3, 4))]
        assert cpu_attention(*inputs, (3, 4), 1).grad_fn is None

    def test_three_square_tensors_are_kept(self):
        assert sorted(self.saved())[-3:] == [64 * 64, 64 * 64, 65 * 65]

    def test_recompute_keeps_nothing_square(self):
        assert max(self.saved(recompute=True)) <= 65 * 16


class TestWhyNot:
    def why_not(self, query, key, value, gate_key, **options):
        return choose(query, key, value, gate_key, (3, 4), **options)[1].get('cpu')

    def test_no_reason(self):
        query, key, value, *_ = random_inputs((3, 4))
        assert self.why_not(query, key, value, key) is None
        assert self.why_not(query, key, value, None) is None

    def test_other_devices_and_dtypes(self):
        x = torch.zeros(1, 1, 13, 8)
        assert self.why_not(*[x.to('meta')] * 4) == 'not a CPU tensor'
        assert self.why_not(*[x.bfloat16()] * 4) == 'not in float32 or float64'
        assert self.why_not(x, x, x.double(), x) == 'queries, keys and values have different dtypes'
        with torch.autocast('cpu', torch.bfloat16):
            assert self.why_not(x, x, x, x) == 'not in float32 or float64'

    def test_gates_that_are_no_logits(self):
        query, key, value, *_ = random_inputs((3, 4))
        assert self.why_not(query, key, value, value) == 'gates do not come from the dot products of attention'
        assert 'dot products of attention' in self.why_not(query, key, value, key, rotated=True)
        assert self.why_not(query, key, value, key, target='qk') == "target='qk' has two signatures an axis"

    def test_torch_func(self):
        reasons = []
        torch.func.grad(lambda x: reasons.append(self.why_not(x, x, x, x)) or x.sum())(torch.zeros(1, 1, 13, 8))
        assert reasons == ['no rules for torch.func']


def test_no_images():
    inputs = random_inputs((3, 4), batch=0)
    output, *grads = outputs_and_gradients(cpu_attention, inputs, (3, 4), 1)
    assert output.shape == (0, 2, 13, 8)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
