"""Contextual positions, against a slow loop over their equations."""

import math

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.cope import ContextualPosition, cope_bias

HOST = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)


def test_three_patches_by_hand():
    """Queries and keys at right angles: all gates are 1/2, and positions 1.5, 1, 0.5 whoever asks."""
    query, key = torch.tensor([0.0, 1.0]).expand(1, 1, 3, 2), torch.tensor([3.0, 0.0]).expand(1, 1, 3, 2)
    table = torch.tensor([[7.0, 0.0], [7.0, 2.0], [7.0, 10.0]])  # the query reads 0, 2 and 10
    assert cope_bias(query, key, table, 2**-0.5)[0, 0].tolist() == [[6, 2, 1]] * 3
    clamped = cope_bias(query, key, table[:2], 2**-0.5)  # positions 1, 1, 0.5
    assert clamped[0, 0].tolist() == [[2, 2, 1]] * 3


def slow_bias(query, key, table, scale):
    """The equations, one number at a time."""
    batch, heads, length, _ = query.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                q = query[b, h, i]
                gates = [torch.sigmoid(scale * (q @ key[b, h, t])) for t in range(length)]
                for j in range(length):
                    position = sum(gates[j:]).clamp(max=len(table) - 1)
                    low = min(math.floor(position.item()), len(table) - 2)
                    rows.append(q @ ((1 - (position - low)) * table[low] + (position - low) * table[low + 1]))
    return torch.stack(rows).reshape(batch, heads, length, length)


@pytest.mark.parametrize(('length', 'num_positions'), [(1, 2), (5, 3), (9, 64), (12, 4)])
def test_values_and_gradients_are_those_of_the_equations(length, num_positions):
    query, key = (torch.randn(2, 2, length, 4, dtype=torch.float64) for _ in range(2))
    table, weight = torch.randn(num_positions, 4, dtype=torch.float64), torch.randn(2, 2, length, length)
    inputs = [tensor.requires_grad_() for tensor in (query, key, table)]
    fast, slow = cope_bias(*inputs, 0.5), slow_bias(*inputs, 0.5)
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad((bias * weight).sum(), inputs) for bias in (fast, slow)]
    torch.testing.assert_close(*gradients)


def test_positions_count_patches_to_the_end_of_the_sequence():
    """Open gates count every patch, closed ones none."""
    table = torch.arange(64.0).unsqueeze(1)  # a query of 1 reads the position itself
    query, key = torch.ones(1, 1, 6, 1), torch.full((1, 1, 6, 1), 100.0)
    torch.testing.assert_close(cope_bias(query, key, table, 1.0)[0, 0], torch.arange(6.0, 0, -1).expand(6, 6))
    assert (cope_bias(query, -key, table, 1.0) == 0).all()


def test_long_sums_are_exact_under_autocast():
    """bfloat16 cannot count beyond 256."""
    table = torch.zeros(400, 1)
    table[300] = 1
    query, key = torch.ones(1, 1, 300, 1), torch.full((1, 1, 300, 1), 100.0)
    with torch.autocast('cpu', torch.bfloat16):
        bias = cope_bias(query.bfloat16(), key.bfloat16(), table, 1.0)
    assert bias.dtype == torch.bfloat16
    assert bias[0, 0, 0, 0] == 1 and (bias[0, 0, :, 1:] == 0).all()


def test_nan_spreads_to_the_rows_that_read_it():
    query, key = torch.randn(2, 1, 1, 8, 4)
    key[0, 0, 3] = float('nan')
    bias = cope_bias(query, key, torch.randn(16, 4), 0.5)[0, 0]
    assert bias[:, :4].isnan().all() and bias[:, 4:].isfinite().all()


def test_one_table_a_block_shared_by_heads_on_any_grid():
    for grid in ((7, 9), (14, 14)):
        shapes = {name: tuple(p.shape) for name, p in ContextualPosition(HOST._replace(grid=grid)).named_parameters()}
        assert shapes == {'position_table': (64, 16)}


def test_prefix_tokens_are_not_counted(tiny_vit):
    attention = tiny_vit('cope', reg_tokens=2).blocks[0].attn
    query, key, value = torch.randn(3, 1, 2, 3 + 63, 16)
    bias = attention.position.bias(query, key, value, (7, 9))
    assert (bias[:, :, :3] == 0).all() and (bias[..., :3] == 0).all()
    expected = cope_bias(query[:, :, 3:], key[:, :, 3:], attention.position['cope'].position_table, 0.25)
    assert torch.equal(bias[:, :, 3:, 3:], expected)


@pytest.mark.parametrize('num_positions', [1, 2.0, True, '64'])
def test_bad_number_of_positions(num_positions):
    with pytest.raises(ValueError, match='num_positions must be a whole number of at least 2'):
        ContextualPosition(HOST, num_positions=num_positions)
