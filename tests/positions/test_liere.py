"""Learned rotations: their closed form is the matrix exponential."""

import math

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.liere import LieRotaryPosition, rotation_blocks, unit_coordinates

CPU = torch.device('cpu')
HOST = HostShape(embed_dim=16, num_heads=2, grid=(3, 4), num_prefix_tokens=1)


def skew_symmetric(numbers):
    """The block of 4 x 4 that six numbers stand for, (..., 6) to (..., 4, 4)."""
    s1, s2, s3, t1, t2, t3 = numbers.unbind(-1)
    upper = numbers.new_zeros(*numbers.shape[:-1], 4, 4)
    upper[..., 0, 1], upper[..., 0, 2], upper[..., 0, 3] = -s1 - t1, -s2 - t2, -s3 - t3
    upper[..., 1, 2], upper[..., 1, 3], upper[..., 2, 3] = t3 - s3, s2 - t2, t1 - s1
    return upper - upper.transpose(-1, -2)


def test_a_quarter_turn_by_hand():
    """S and T with equal first numbers turn the plane of the channels 0 and 1 by their sum, and no other."""
    numbers = torch.zeros(2, 1, 1, 6)
    numbers[0, ..., [0, 3]] = math.pi / 4
    block = rotation_blocks(numbers, torch.tensor([[1.0], [0.0]]))[0, 0, 0]
    expected = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(block, expected)


@pytest.mark.parametrize('grid', [(3, 4), (1, 5)])
def test_rotations_are_matrix_exponentials(grid):
    encoding = LieRotaryPosition(HOST).double()
    x, y = unit_coordinates(grid, CPU).double().view(2, -1, 1, 1, 1)
    generators = skew_symmetric(encoding.generators).unsqueeze(2)  # (2, h, 1, d / 4, 4, 4)
    expected = torch.matrix_exp(x * generators[0] + y * generators[1])
    found = rotation_blocks(encoding.generators, unit_coordinates(grid, CPU).double())
    torch.testing.assert_close(found, expected)


def test_gradients_of_no_rotation_are_finite():
    generators = torch.zeros(2, 1, 1, 6, requires_grad=True)
    rotation_blocks(generators, torch.zeros(2, 3))[..., 0, 1].sum().backward()
    rotation_blocks(generators, torch.ones(2, 3))[..., 0, 1].sum().backward()
    assert generators.grad.isfinite().all() and generators.grad.any()


def test_queries_keep_their_length_and_the_first_patch_its_channels():
    encoding = LieRotaryPosition(HOST)
    query = torch.randn(2, 2, 12, 8)
    turned, _ = encoding.rotate(query, query, (3, 4), encoding.prepare((3, 4), CPU))
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], query[:, :, 0])
    assert not torch.allclose(turned[:, :, 1], query[:, :, 1])


def test_generators_start_between_0_and_2_pi_signs_apart():
    entries = skew_symmetric(LieRotaryPosition(HOST._replace(embed_dim=800)).generators.detach())
    rows, columns = torch.triu_indices(4, 4, 1)
    above = entries[..., rows, columns].abs()
    assert above.max() < 2 * math.pi and (above.mean() - math.pi).abs() < 0.1


def test_head_dimension_must_be_divisible_by_four():
    with pytest.raises(ValueError, match=r"position='liere' needs a head dimension .* divisible by 4, got 6"):
        LieRotaryPosition(HOST._replace(embed_dim=12))
