"""SaPE2 attention: who computes it and why not another, the same results from each, and what bad input gets."""

import pytest
import torch
from timm.layers import apply_rot_embed_cat, set_fused_attn

from timm_sape2.ops.sape2 import IMPLEMENTATIONS, attention, choose, sape2_attention, sape2_bias

GRID = (3, 4)


def random_inputs(dtype=torch.float32, dim=16):
    """Queries, keys, values, keys of gates and both tables."""
    query, key, value = (torch.randn(2, 2, 13, dim, dtype=dtype) for _ in range(3))
    return [query, key, value, key, *torch.randn(2, 10, dim, dtype=dtype)]


def attend(*inputs, **kwargs):
    return sape2_attention(*inputs, **({'grid': GRID, 'num_prefix_tokens': 1} | kwargs))


@pytest.fixture
def device(implementation, triton_device):
    """Device on which an implementation runs."""
    return 'cpu' if implementation == 'cpu' else triton_device


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr('timm_sape2.ops.sape2.cpu_library.why_not_compiled', lambda double: 'no C compiler')


class TestChoose:
    def test_on_a_cpu(self):
        assert choose(torch.zeros(1, 1, 13, 16), GRID) == (
            'cpu',
            {'triton': 'not a CUDA tensor', 'recompute': 'not asked for', 'reference': 'cpu is better'},
        )

    def test_the_kernel_comes_first(self, triton_device):
        name, against = choose(torch.zeros(1, 1, 13, 16, device=triton_device), GRID, recompute=True)
        assert name == 'triton'
        assert set(against) == {'cpu', 'recompute', 'reference'} and against['recompute'] == 'triton is better'

    @pytest.mark.parametrize(
        ('query', 'grid', 'options', 'reason'),
        [
            ({'dtype': torch.float64}, GRID, {}, 'torch.float64 is none of float32, bfloat16 and float16'),
            ({'size': (1, 1, 13, 8)}, GRID, {}, 'head dimension 8 is outside 16 to 128'),
            ({'size': (1, 1, 13, 136)}, GRID, {}, 'head dimension 136 is outside 16 to 128'),
            ({'size': (1, 1, 13, 20)}, GRID, {}, 'head dimension 20 is not divisible by 8'),
            ({}, (65, 3), {}, 'the grid 65x3 has more than 64 rows or columns'),
            ({}, (3, 65), {}, 'the grid 3x65 has more than 64 rows or columns'),
            ({}, GRID, {'target': 'qk'}, "target='qk' has two signatures an axis"),
            ({'size': (1, 1, 17, 72)}, (1, 17), {}, '72 channels of float32 take more registers than a GPU has'),
            (
                {'size': (1, 1, 33, 104), 'dtype': torch.bfloat16},
                (33, 1),
                {},
                'the grid 33x1 has more than 32 rows or columns, which with 104 channels take more registers than a '
                'GPU has',
            ),
        ],
    )
    def test_what_the_kernel_cannot_do(self, triton_device, query, grid, options, reason):
        query = torch.zeros(**({'size': (1, 1, 13, 16)} | query), device=triton_device)
        assert choose(query, grid, **options)[1]['triton'] == reason

    @pytest.mark.parametrize(
        ('dtype', 'line', 'dim'),
        [(torch.float32, 64, 64), (torch.bfloat16, 32, 128), (torch.float16, 64, 96)],
    )
    def test_largest_heads_and_lines(self, triton_device, dtype, line, dim):
        query = torch.zeros(1, 1, line, dim, dtype=dtype, device=triton_device)
        assert choose(query, (1, line))[0] == 'triton'

    def test_triton_is_not_installed(self, triton_device, monkeypatch):
        monkeypatch.setattr(attention, '_HAS_TRITON', False)
        assert choose(torch.zeros(1, 1, 13, 16), GRID)[1]['triton'] == 'triton is not installed'

    def test_fused_attention_switched_off_in_timm(self, triton_device):
        set_fused_attn(False)
        try:
            name, against = choose(torch.zeros(1, 1, 13, 16), GRID)
        finally:
            set_fused_attn(True)
        assert name == 'reference' and 'set_fused_attn' in against['triton'] and against['cpu'] == against['triton']

    def test_export_and_tracing(self, triton_device):
        found = []

        class Ask(torch.nn.Module):
            def forward(self, query):
                found.append(choose(query, GRID, recompute=True))
                return query + 1

        torch.jit.trace(Ask(), torch.zeros(1, 1, 13, 16), check_trace=False)
        torch.export.export(Ask(), (torch.zeros(1, 1, 13, 16),))
        assert len(found) >= 2
        for name, against in found:
            assert name == 'reference'
            assert {against[other] for other in ('triton', 'cpu', 'recompute')} == {'the model is being exported'}

    def test_recompute_where_nothing_else_can_run(self, no_compiler):
        query = torch.zeros(1, 1, 13, 16)
        assert choose(query, GRID, recompute=True)[0] == 'recompute'
        assert choose(query, GRID)[0] == 'reference'
        with torch.no_grad():
            name, against = choose(query, GRID, recompute=True)
        assert (name, against['recompute']) == ('reference', 'no gradients are computed')


class TestImplementations:
    @pytest.mark.parametrize('implementation', ['auto', *IMPLEMENTATIONS])
    def test_each_is_attention_with_the_bias(self, device, implementation):
        query, key, value, _, *tables = inputs = [x.to(device) for x in random_inputs()]
        patches = [x[:, :, 1:] for x in (query, key)]
        bias = torch.nn.functional.pad(sape2_bias(*patches, patches[1], *tables, GRID, 0.25), [1, 0, 1, 0])
        expected = (0.25 * query @ key.mT + bias).softmax(-1) @ value
        torch.testing.assert_close(attend(*inputs, implementation=implementation), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize('implementation', ['auto', *IMPLEMENTATIONS])
    @pytest.mark.parametrize('target', ['k', 'q'])
    def test_rotation_moves_logits_and_no_signatures(self, device, implementation, target):
        inputs = [x.to(device) for x in random_inputs()]
        sines = torch.randn(13, 32, device=device)
        query, key = (apply_rot_embed_cat(x, sines) for x in inputs[:2])
        patches = [x[:, :, 1:] for x in inputs[:2]]
        bias = sape2_bias(*patches, patches[1], *inputs[4:], GRID, 0.25, target)
        expected = (0.25 * query @ key.mT + torch.nn.functional.pad(bias, [1, 0, 1, 0])).softmax(-1) @ inputs[2]
        found = attend(*inputs, target=target, logit_query=query, logit_key=key, implementation=implementation)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
    def test_scale_of_all_dot_products(self, device, implementation):
        """A quarter of the usual scale is a quarter of the queries, and tables that make up for it in signatures."""
        query, key, value, _, *tables = (x.to(device) for x in random_inputs())
        found = attend(query, key, value, key, *tables, scale=16**-0.5 / 4, implementation=implementation)
        tables = [4 * x for x in tables]
        expected = attend(query / 4, key, value, key, *tables, implementation=implementation)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
    def test_distances_scaled_to_the_grid(self, device, implementation):
        """Trained on 12 rows and 1 column: half of the column distances' tables here, and twice of the rows'."""
        *inputs, row_table, column_table = (x.to(device) for x in random_inputs())
        native = torch.tensor([12, 1], device=device)
        found = attend(*inputs, row_table, column_table, reference_grid=native, implementation=implementation)
        expected = attend(*inputs, row_table / 2, column_table * 2, implementation=implementation)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize('implementation', ['triton', 'cpu'])
    def test_what_cannot_run_says_why(self, implementation):
        meta = [x.to('meta') for x in random_inputs()]
        reason = {'triton': 'not a CUDA tensor', 'cpu': 'not a CPU tensor'}[implementation]
        with pytest.raises(ValueError, match=f"implementation='{implementation}' cannot run: {reason}"):
            attend(*meta, implementation=implementation)

    def test_float64_is_left_to_another(self, triton_device):
        inputs = [x.to(triton_device) for x in random_inputs(torch.float64)]
        torch.testing.assert_close(attend(*inputs), attend(*inputs, implementation='reference'))

    @pytest.mark.parametrize('implementation', ['auto', 'reference'])
    def test_without_tables_it_is_plain_attention(self, implementation):
        query, key, value, *_ = random_inputs()
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        found = attend(query, key, value, key, None, None, implementation=implementation)
        torch.testing.assert_close(found, plain)


class TestBadInput:
    @pytest.mark.parametrize(
        ('position', 'change', 'message'),
        [
            (0, lambda x: x[0], r'query must be \(B, h, P \+ N, d\), got 3 dimensions'),
            (1, lambda x: x[:, :, 1:], r'key has shape \(2, 2, 12, 16\), query has \(2, 2, 13, 16\)'),
            (2, lambda x: x.bfloat16(), r'value is torch.bfloat16, query is torch.float32'),
            (1, lambda x: x.to('meta'), 'All tensors must be on one device, got cpu, meta'),
            (3, lambda x: x[:, :1], r'gate_key has shape \(2, 1, 13, 16\), query has \(2, 2, 13, 16\)'),
            (4, lambda x: x[:, 1:], r'row_table must be \(n, 16\) with n of at least 2, got \(10, 15\)'),
            (5, lambda x: x[:1], r'column_table must be \(n, 16\) with n of at least 2, got \(1, 16\)'),
            (5, lambda x: x.to('meta'), 'All tensors must be on one device'),
        ],
    )
    @pytest.mark.parametrize('implementation', ['auto', 'reference'])
    def test_tensors_that_do_not_fit(self, position, change, message, implementation):
        inputs = random_inputs()
        inputs[position] = change(inputs[position])
        with pytest.raises(ValueError, match=message):
            attend(*inputs, implementation=implementation)

    @pytest.mark.parametrize(('grid', 'prefix'), [((4, 4), 1), ((3, 4), 0), ((3, 5), -2)])
    def test_grid_that_does_not_match_the_tokens(self, grid, prefix):
        with pytest.raises(ValueError, match=f'There are 13 tokens, but a grid of {grid[0]}x{grid[1]} patches'):
            attend(*random_inputs(), grid=grid, num_prefix_tokens=prefix)

    def test_unknown_implementation(self):
        with pytest.raises(ValueError, match="must be one of auto, triton, cpu, recompute, reference, got 'cuda'"):
            attend(*random_inputs(), implementation='cuda')

    def test_unknown_target(self):
        with pytest.raises(ValueError, match="target must be one of 'k', 'q', 'qk', got 'v'"):
            attend(*random_inputs(), target='v')
