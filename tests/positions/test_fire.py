"""A learned function of interpolated distances, against a slow loop over its equation."""

import math

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.fire import FunctionalBias

CPU = torch.device('cpu')
HOST = HostShape(embed_dim=8, num_heads=2, grid=(3, 4), num_prefix_tokens=1)


def bias(encoding, grid):
    query = torch.zeros(1, 2, grid[0] * grid[1], 4, dtype=encoding.steepness.dtype)
    return encoding.attention_bias(query, query, query, grid, encoding.prepare(grid, CPU))


@torch.no_grad()
def test_one_row_by_hand():
    """f(x, y) = relu(3 y), c = 1: a step to the right is log 2 / log 3 of the two that the row has."""
    encoding = FunctionalBias(HOST._replace(num_heads=1), hidden=1)
    encoding.steepness.fill_(1)
    encoding.hidden.weight.copy_(torch.tensor([[5.0, 3.0]]))
    encoding.output.weight.fill_(1)
    for layer in (encoding.hidden, encoding.output):
        layer.bias.zero_()
    step = 3 * math.log(2) / math.log(3)
    torch.testing.assert_close(
        bias(encoding, (1, 3))[0, 0], torch.tensor([[0, step, 3], [0, 0, step], [0, 0, 0]]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize('grid', [(3, 4), (1, 5)])
@torch.no_grad()
def test_values_are_those_of_the_equation(grid):
    encoding = FunctionalBias(HOST).double()
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]

    def psi(x):
        return math.log(encoding.steepness.item() * x + 1)

    def interpolate(step, length):
        return math.copysign(psi(abs(step)) / (psi(max(length - 1, 1)) + 1e-6), step)

    expected = []
    for row, column in places:
        for other_row, other_column in places:
            inputs = interpolate(other_row - row, grid[0]), interpolate(other_column - column, grid[1])
            hidden = encoding.hidden(torch.tensor(inputs, dtype=torch.float64)).relu()
            expected.append(encoding.output(hidden))
    expected = torch.stack(expected, dim=1).reshape(1, 2, len(places), len(places))
    torch.testing.assert_close(bias(encoding, grid), expected)


@torch.no_grad()
def test_other_grids_stretch_the_bias_and_keep_its_range():
    encoding = FunctionalBias(HOST)
    small, large = bias(encoding, (3, 4))[0], bias(encoding, (9, 16))[0]
    torch.testing.assert_close(small[:, 0, -1], large[:, 0, -1])
    torch.testing.assert_close(small[:, 5, 5], large[:, 40, 40])


@torch.no_grad()
def test_prefix_tokens_have_none(tiny_vit):
    position = tiny_vit('fire', reg_tokens=2).blocks[0].attn.position
    added = position.bias(*torch.randn(3, 1, 2, 66, 16), (7, 9))
    assert (added[:, :, :3] == 0).all() and (added[..., :3] == 0).all() and added.std() > 0.01


def test_bad_options():
    with pytest.raises(ValueError, match='hidden must be a whole number of at least 1, got 0'):
        FunctionalBias(HOST, hidden=0)
