"""Implementations of attention with SaPE2: the same results, and the reason where one cannot run."""

import pytest
import torch
import torch.nn.functional as F

from timm_sape2.studies.attentions import NAMES, attentions, draw_inputs, plain_attention, reference_attention, why_not

CPU = torch.device('cpu')
GRID = (3, 5)


@pytest.fixture
def inputs():
    return draw_inputs(2, 2, 16, GRID, torch.float32, CPU)


def test_inputs_are_views_of_one_projection(inputs):
    query, key, value, row_table, column_table = inputs
    assert query.shape == key.shape == value.shape == (2, 2, 16, 16)
    assert query.stride() == (16 * 3 * 2 * 16, 16, 3 * 2 * 16, 1)
    assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == 4 * 2 * 16
    assert row_table.shape == column_table.shape == (10, 16)


def test_without_signatures_the_reference_is_plain_attention(inputs):
    """With tables of 0 all distances are 0."""
    nothing = inputs._replace(row_table=0 * inputs.row_table, column_table=0 * inputs.column_table)
    expected = F.scaled_dot_product_attention(*inputs[:3])
    torch.testing.assert_close(plain_attention(inputs, GRID), expected)
    torch.testing.assert_close(reference_attention(nothing, GRID), expected)
    assert (reference_attention(inputs, GRID) - expected).abs().max() > 0.1


@pytest.mark.parametrize('name', ['cpu', 'cpu, recompute', 'triton'])
def test_all_compute_the_same(inputs, name, request):
    device = request.getfixturevalue('triton_device') if name == 'triton' else CPU
    inputs = type(inputs)(*(x.to(device) for x in inputs))
    torch.testing.assert_close(
        attentions()[name](inputs, GRID), reference_attention(inputs, GRID), rtol=1e-3, atol=1e-4
    )


def test_reasons(inputs, monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert {name: why_not(name, inputs, GRID) for name in NAMES} == dict.fromkeys(NAMES) | {
        'triton': 'not a CUDA tensor'
    }
    half = type(inputs)(*(x.bfloat16() for x in inputs))
    assert why_not('cpu', half, GRID) == why_not('cpu, recompute', half, GRID) == 'not in float32 or float64'
