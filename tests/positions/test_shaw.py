"""Relative embeddings on keys and values, against a slow loop over their equations."""

import pytest
import torch

from timm_sape2.positions import HostShape, Positions
from timm_sape2.positions.shaw import RelativeEmbedding, clipped_embeddings

HOST = HostShape(embed_dim=8, num_heads=2, grid=(3, 4), num_prefix_tokens=1, block=0)


def test_clipped_distances_by_hand():
    """A row of four, embeddings -1, 0, 1 for distances up to 1: what is further away counts as 1."""
    table = torch.tensor([[-1.0], [0.0], [1.0]])
    assert clipped_embeddings(table, 1, 4)[..., 0].tolist() == [
        [0, 1, 1, 1],
        [-1, 0, 1, 1],
        [-1, -1, 0, 1],
        [-1] * 3 + [0],
    ]


def slow_attention(query, key, value, encoding, grid, prefix):
    """The equations, one patch at a time."""
    clip, output = encoding.clip, torch.empty_like(value)
    tables = [encoding.key_row_table, encoding.key_column_table]
    tables += [encoding.value_row_table, encoding.value_column_table]

    def embedding(rows, columns, i, j):
        if min(i, j) < prefix or rows is None:
            return torch.zeros(query.shape[-1], dtype=query.dtype)
        (row, column), (to_row, to_column) = divmod(i - prefix, grid[1]), divmod(j - prefix, grid[1])
        down, right = (max(-clip, min(clip, x)) for x in (to_row - row, to_column - column))
        return rows[down + clip] + columns[right + clip]

    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                keys = torch.stack([x + embedding(*tables[:2], i, j) for j, x in enumerate(key[b, h])])
                values = torch.stack([x + embedding(*tables[2:], i, j) for j, x in enumerate(value[b, h])])
                weights = (query.shape[-1] ** -0.5 * keys @ query[b, h, i]).softmax(-1)
                output[b, h, i] = weights @ values
    return output


@pytest.mark.parametrize('options', [{}, {'values': False}, {'clip': 1}], ids=str)
@pytest.mark.parametrize('grid', [(3, 4), (1, 5)])
@pytest.mark.parametrize('prefix', [0, 2])
def test_values_and_gradients_are_those_of_the_equations(options, grid, prefix):
    host = HOST._replace(num_prefix_tokens=prefix, grid=grid)
    positions = Positions({'shaw': options}, host, dtype=torch.float64)
    encoding = positions['shaw']
    with torch.no_grad():
        for table in encoding.parameters():
            table.normal_()
    inputs = [
        torch.randn(1, 2, prefix + grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    fast, slow = positions.attend(*inputs, grid), slow_attention(*inputs, encoding, grid, prefix)
    torch.testing.assert_close(fast, slow)
    wanted, weight = [*inputs, *encoding.parameters()], torch.randn_like(fast)
    gradients = [torch.autograd.grad((x * weight).sum(), wanted) for x in (fast, slow)]
    torch.testing.assert_close(*gradients)


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in RelativeEmbedding(HOST, clip=3).named_parameters()}
    assert shapes == {f'{of}_{axis}_table': (7, 4) for of in ('key', 'value') for axis in ('row', 'column')}
    assert len(RelativeEmbedding(HOST, values=False).state_dict()) == 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'clip': 0}, 'clip must be a whole number of at least 1, got 0'),
        ({'values': 'yes'}, "values must be true or false, got 'yes'"),
        ({'initial_std': -1}, 'initial_std must be a positive number, got -1'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeEmbedding(HOST, **options)
