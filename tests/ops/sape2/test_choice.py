"""Which implementation runs, why not the other, and what bad input gets."""

import pytest
import torch
from timm.layers import set_fused_attn

from timm_sape2.ops.sape2 import choice, sape2_attention, sape2_bias, sape2_signatures, why_not_triton

GRID = (3, 4)


def random_inputs(dtype=torch.float32, dim=16):
    query, key, value = (torch.randn(2, 2, 13, dim, dtype=dtype) for _ in range(3))
    return [query, key, value, torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 3)]


def attend(*inputs, **kwargs):
    return sape2_attention(*inputs, **({'grid': GRID, 'num_prefix_tokens': 1} | kwargs))


class TestWhyNotTriton:
    def test_not_on_a_cpu(self):
        assert why_not_triton(torch.zeros(1, 1, 13, 16), GRID) == 'not a CUDA tensor'

    def test_no_reason(self, triton_device):
        assert why_not_triton(torch.zeros(1, 1, 13, 16, device=triton_device), GRID) is None

    @pytest.mark.parametrize(
        ('query', 'grid', 'options', 'reason'),
        [
            ({'dtype': torch.float64}, GRID, {}, 'torch.float64 is none of float32, bfloat16 and float16'),
            ({'size': (1, 1, 13, 8)}, GRID, {}, 'head dimension 8 is outside 16 to 128'),
            ({'size': (1, 1, 13, 136)}, GRID, {}, 'head dimension 136 is outside 16 to 128'),
            ({}, (129, 3), {}, 'the grid 129x3 has more than 128 rows or columns'),
            ({}, (3, 129), {}, 'the grid 3x129 has more than 128 rows or columns'),
            ({}, GRID, {'attn_mask': torch.zeros(13, 13)}, 'the kernel has no attention masks'),
            ({}, GRID, {'is_causal': True}, 'the kernel has no attention masks'),
            ({}, GRID, {'dropout_p': 0.1}, 'the kernel has no attention dropout'),
        ],
    )
    def test_what_the_kernel_cannot_do(self, triton_device, query, grid, options, reason):
        query = torch.zeros(**({'size': (1, 1, 13, 16)} | query), device=triton_device)
        assert why_not_triton(query, grid, **options) == reason

    def test_triton_is_not_installed(self, triton_device, monkeypatch):
        monkeypatch.setattr(choice, '_HAS_TRITON', False)
        assert why_not_triton(torch.zeros(1, 1, 13, 16), GRID) == 'triton is not installed'

    def test_fused_attention_switched_off_in_timm(self, triton_device):
        set_fused_attn(False)
        try:
            assert 'set_fused_attn' in why_not_triton(torch.zeros(1, 1, 13, 16), GRID)
        finally:
            set_fused_attn(True)

    def test_export_and_tracing(self, triton_device):
        reasons = []

        class Ask(torch.nn.Module):
            def forward(self, query):
                reasons.append(why_not_triton(query, GRID))
                return query + 1

        torch.jit.trace(Ask(), torch.zeros(1, 1, 13, 16), check_trace=False)
        torch.export.export(Ask(), (torch.zeros(1, 1, 13, 16),))
        assert len(reasons) >= 2 and set(reasons) == {'the model is being exported'}


class TestImplementations:
    def test_signatures_and_attention_are_attention_with_the_bias(self):
        query, key, value, *_ = random_inputs()
        tables = torch.randn(2, 10, 16)
        patches = [x[:, :, 1:] for x in (query, key)]
        rows, columns = sape2_signatures(*patches, patches[1], *tables, GRID, 0.25)
        bias = torch.nn.functional.pad(sape2_bias(*patches, patches[1], *tables, GRID, 0.25), [1, 0, 1, 0])
        expected = (0.25 * query @ key.mT + bias).softmax(-1) @ value
        torch.testing.assert_close(attend(query, key, value, rows[0], columns[0]), expected)

    def test_triton_refuses_with_the_reason(self):
        with pytest.raises(ValueError, match="implementation='triton' cannot run: not a CUDA tensor"):
            attend(*random_inputs(), implementation='triton')

    @pytest.mark.parametrize('kind', ['bool', 'float', 'causal', 'dropout', 'float64', 'none'])
    def test_auto_falls_back_and_runs(self, triton_device, kind):
        inputs = [x.to(triton_device) for x in random_inputs()]
        lower = torch.ones(13, 13, dtype=torch.bool, device=triton_device).tril()
        additive = torch.zeros(13, 13, device=triton_device).masked_fill_(~lower, float('-inf'))
        options = {
            'bool': {'attn_mask': lower},
            'float': {'attn_mask': additive},
            'causal': {'is_causal': True},
            'dropout': {'dropout_p': 1e-9},
        }.get(kind, {})
        if kind == 'float64':
            inputs = [x.double() for x in inputs]
        bias = torch.zeros_like(inputs[0] @ inputs[1].mT)
        bias[..., 1:, 1:] = torch.cdist(inputs[3], inputs[3]) + torch.cdist(inputs[4], inputs[4])
        if kind in ('bool', 'float', 'causal'):
            bias = bias + additive
        expected = (0.25 * inputs[0] @ inputs[1].mT + bias).softmax(-1) @ inputs[2]
        torch.testing.assert_close(attend(*inputs, **options), expected, rtol=1e-3, atol=1e-3)

    def test_without_signatures_it_is_plain_attention(self):
        query, key, value, *_ = random_inputs()
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert torch.equal(attend(query, key, value, None, None), plain)


class TestBadInput:
    @pytest.mark.parametrize(
        ('position', 'change', 'message'),
        [
            (0, lambda x: x[0], r'query must be \(B, h, P \+ N, d\), got 3 dimensions'),
            (1, lambda x: x[:, :, 1:], r'key has shape \(2, 2, 12, 16\), query has \(2, 2, 13, 16\)'),
            (2, lambda x: x.bfloat16(), r'value is torch.bfloat16, query is torch.float32'),
            (1, lambda x: x.to('meta'), 'All tensors must be on one device, got cpu, meta'),
            (3, lambda x: x[..., 1:], r'row_signature must have shape \(2, 2, 12, 4\), got \(2, 2, 12, 3\)'),
            (4, lambda x: x[:, :1], r'column_signature must have shape \(2, 2, 12, 3\), got \(2, 1, 12, 3\)'),
            (4, lambda x: x.to('meta'), 'All tensors must be on one device'),
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
        with pytest.raises(ValueError, match="implementation must be one of auto, triton, reference, got 'cuda'"):
            attend(*random_inputs(), implementation='cuda')
