"""Linear biases: slopes and distances by hand."""

import math

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.alibi import LinearBias, alibi_slopes, linear_bias

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    ('heads', 'exponents'),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_of_the_paper_and_of_its_code(heads, exponents):
    assert alibi_slopes(heads) == [2**-exponent for exponent in exponents]


@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (3, 4)])
def test_every_entry_is_a_euclidean_distance(grid):
    bias = linear_bias(grid, [0.5, 0.25], CPU)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    expected = torch.tensor([[[-slope * math.dist(i, j) for j in places] for i in places] for slope in (0.5, 0.25)])
    torch.testing.assert_close(bias[0], expected)


def test_prefix_tokens_are_at_no_distance(tiny_vit):
    position = tiny_vit('alibi', reg_tokens=2).blocks[0].attn.position
    bias = position.bias(*torch.randn(3, 1, 2, 66, 16), (7, 9))
    assert (bias[:, :, :3] == 0).all() and (bias[..., :3] == 0).all()
    assert torch.equal(bias[:, :, 3:, 3:], linear_bias((7, 9), [2**-4, 2**-8], CPU))


def test_nothing_to_store():
    assert not LinearBias(HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)).state_dict()
