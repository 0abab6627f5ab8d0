"""Conditional positions are a depthwise 3x3 convolution of the patches after the first block."""

import pytest
import torch
from timm.models.twins import PosConv

from timm_sape2.positions import HostShape
from timm_sape2.positions.cpe import ConditionalPosition


def encoding(channels=3):
    return ConditionalPosition(HostShape(embed_dim=channels, num_heads=1, grid=(7, 9), num_prefix_tokens=1))


@torch.no_grad()
def test_one_channel_by_hand():
    """A filter that reads the left neighbour only: patches 1 2 3 / 4 5 6 get 0 1 2 / 0 4 5 and the bias of 10."""
    cpe = encoding(channels=1)
    cpe.conv.weight.zero_()
    cpe.conv.weight[0, 0, 1, 0] = 1
    cpe.conv.bias.fill_(10)
    tokens = torch.tensor([1.0, 2, 3, 4, 5, 6]).reshape(1, 6, 1)
    assert cpe.mix_tokens(tokens, (2, 3), 0).flatten().tolist() == [11, 13, 15, 14, 19, 21]


@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (7, 9)])
@torch.no_grad()
def test_every_patch_adds_its_neighbours_weighed_by_channel(grid):
    cpe, (rows, columns) = encoding(), grid
    tokens = torch.randn(2, rows * columns, 3)
    expected = tokens.clone()
    for row in range(rows):
        for column in range(columns):
            total = cpe.conv.bias.expand(2, -1).clone()
            for i in range(max(row - 1, 0), min(row + 2, rows)):
                for j in range(max(column - 1, 0), min(column + 2, columns)):
                    total += cpe.conv.weight[:, 0, i - row + 1, j - column + 1] * tokens[:, i * columns + j]
            expected[:, row * columns + column] += total
    torch.testing.assert_close(cpe.mix_tokens(tokens, grid, 0), expected)


@torch.no_grad()
def test_is_timms_position_convolution():
    cpe, timms = encoding(), PosConv(3, 3)
    timms.load_state_dict({'proj.0.weight': cpe.conv.weight, 'proj.0.bias': cpe.conv.bias})
    tokens = torch.randn(2, 63, 3)
    torch.testing.assert_close(cpe.mix_tokens(tokens, (7, 9), 0), timms(tokens, (7, 9)))


def test_later_blocks_are_left_alone():
    assert encoding().mix_tokens(torch.randn(1, 63, 3), (7, 9), 1) is None


def test_prefix_tokens_pass_by(tiny_vit):
    model = tiny_vit('cpe', reg_tokens=2)
    tokens = torch.randn(2, 3 + 63, 32)
    mixed = model.position.mix(tokens, (7, 9), 0)
    assert torch.equal(mixed[:, :3], tokens[:, :3])
    assert (mixed[:, 3:] != tokens[:, 3:]).all()


def test_ten_parameters_a_channel_with_decay_on_the_weights(tiny_vit):
    model = tiny_vit('cpe')
    names = {name for name, _ in model.named_parameters() if 'position.' in name}
    assert names == {'position.cpe.conv.weight', 'position.cpe.conv.bias'}
    assert sum(p.numel() for p in model.position.parameters()) == 10 * 32
    assert not names & model.no_weight_decay()
