"""Parabolas of relative positions, against a slow loop over their equation."""

import math

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.pape import ParabolicPosition, parabola_channels

HOST = HostShape(embed_dim=8, num_heads=2, grid=(3, 4), num_prefix_tokens=1)
OPTIONS = [{}, {'num_parabolas': 3}, {'rotation_invariant': True}]


def bias(encoding, tokens, grid):
    """The bias that the channels add to the logits, (B, h, N, N)."""
    query = torch.zeros(())
    query_channels, key_channels = encoding.logit_channels(query, query, query, grid, encoding.look(tokens, grid))
    return query_channels @ key_channels.transpose(-2, -1)


def test_one_row_by_hand():
    """Curvatures of 1, p twice the column: 4 of penalty for neighbours, 16 for the next, and 3 a step to the right."""
    log_of_one = math.log(math.e - 1)
    coefficients = torch.tensor([log_of_one, 1.5]).expand(1, 1, 3, 2)
    of_queries, of_keys = parabola_channels(coefficients, torch.tensor([[[7.0, 2.0]]]), (1, 3))
    expected = torch.tensor([[0.0, -1, -10], [-7, 0, -1], [-22, -7, 0]])
    torch.testing.assert_close((of_queries @ of_keys.mT)[0, 0], expected)


def slow_bias(encoding, tokens, grid):
    """The equation, one number at a time; a rotation-invariant head has the axes for directions, and no slopes."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    heads, numbers = encoding.num_heads, encoding.coefficients(tokens)
    result = []
    for sample in numbers:
        for head, own in enumerate(sample.reshape(len(places), heads, -1).unbind(1)):
            directions = [(1.0, 0.0), (0.0, 1.0)] if encoding.directions is None else encoding.directions[head]
            for i, (row, column) in enumerate(places):
                for other_row, other_column in places:
                    total = 0
                    for m, (down, right) in enumerate(directions):
                        step = down * (other_row - row) + right * (other_column - column)
                        if encoding.directions is None:
                            total -= math.log(1 + math.exp(own[i, 0])) * step**2
                        else:
                            bend, slope = own[i, m], own[i, len(directions) + m]
                            total += -torch.log(1 + bend.exp()) * step**2 + slope * step
                    result.append(torch.as_tensor(total, dtype=tokens.dtype))
    return torch.stack(result).reshape(len(tokens), heads, len(places), len(places))


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('grid', [(3, 4), (1, 5)])
@torch.no_grad()
def test_values_are_those_of_the_equation(options, grid):
    encoding = ParabolicPosition(HOST, **options).double()
    encoding.coefficients.weight.normal_()
    encoding.coefficients.bias.normal_()
    tokens = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    found = bias(encoding, tokens, grid)
    torch.testing.assert_close(found, slow_bias(encoding, tokens, grid))
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found.diagonal(0, -2, -1), torch.zeros(2, 2, grid[0] * grid[1], dtype=torch.float64))


@torch.no_grad()
def test_only_the_variant_without_directions_is_the_same_for_a_turned_grid():
    """A quarter turn of a square grid, with the tokens on it."""
    tokens = torch.randn(1, 9, 8)
    turned = torch.arange(9).reshape(3, 3).rot90().flatten()
    for options in ({}, {'rotation_invariant': True}):
        encoding = ParabolicPosition(HOST, **options)
        straight, rotated = bias(encoding, tokens, (3, 3)), bias(encoding, tokens[:, turned], (3, 3))
        same = torch.allclose(straight[:, :, turned][..., turned], rotated, atol=1e-5)
        assert same == bool(options)


def test_begins_as_a_gentle_penalty():
    """A distance of 5 patches costs log(2) * 2 * 1 on average, less and more among heads."""
    host = HostShape(embed_dim=64, num_heads=64, grid=(1, 6), num_prefix_tokens=0)
    first = bias(ParabolicPosition(host), torch.randn(1, 6, 64), (1, 6))[0, :, 0, 5]
    assert first.mean().item() == pytest.approx(-2 * math.log(2), rel=0.4)
    assert first.max() > -0.5 and first.min() < -2.5


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@torch.no_grad()
def test_attention_of_a_model_is_that_of_its_bias(tiny_vit, options):
    """The terms of i alone count too, since prefix tokens have bias 0."""
    attention = tiny_vit('pape', position_args={'pape': options}, reg_tokens=2).blocks[0].attn
    tokens, (query, key, value) = torch.randn(2, 66, 32), torch.randn(3, 2, 2, 66, 16)
    shared = attention.position.look(tokens, (7, 9))
    added = torch.zeros(2, 2, 66, 66)
    added[:, :, 3:, 3:] = bias(attention.position['pape'], tokens[:, 3:], (7, 9))
    assert added.abs().max() > 1
    weights = (query @ key.transpose(2, 3) / 4 + added).softmax(-1)
    torch.testing.assert_close(attention.position.attend(query, key, value, (7, 9), shared), weights @ value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_parabolas': 0}, 'num_parabolas must be a whole number of at least 1, got 0'),
        ({'rotation_invariant': 1}, 'rotation_invariant must be true or false, got 1'),
        ({'initial_std': 0}, 'initial_std must be a positive number, got 0'),
        ({'rotation_invariant': True, 'num_parabolas': 3}, 'has one parabola for each axis; leave num_parabolas out'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ParabolicPosition(HOST, **options)
