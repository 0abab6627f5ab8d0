"""Fixed sinusoidal embeddings are those of MAE."""

import math

import pytest
import timm
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.sincos import SinCosPosition, sincos_embedding

CPU = torch.device('cpu')


def test_four_channels_by_hand():
    """One frequency, 1: sine and cosine of the column, then of the row."""
    embedding = sincos_embedding((3, 2), 4, CPU)
    assert embedding.shape == (6, 4)
    row_2_column_1 = embedding[2 * 2 + 1]
    expected = [math.sin(1), math.cos(1), math.sin(2), math.cos(2)]
    torch.testing.assert_close(row_2_column_1, torch.tensor(expected))
    assert embedding[0].tolist() == [0, 1, 0, 1]


def mae(grid, channels):
    """The formula of MAE written out: a half for columns, a half for rows, in each all sines before all cosines."""

    def half(position):
        angles = [position / 10000 ** (k / (channels / 4)) for k in range(channels // 4)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    rows, columns = grid
    return torch.tensor([half(column) + half(row) for row in range(rows) for column in range(columns)])


@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (7, 9), (14, 14)])
@pytest.mark.parametrize('channels', [4, 48])
def test_every_entry_follows_the_formula(grid, channels):
    torch.testing.assert_close(sincos_embedding(grid, channels, CPU), mae(grid, channels), rtol=0, atol=1e-5)


def test_is_added_to_patches_and_the_class_token_gets_none():
    model = timm.create_model('test_vit_sape2', position='sincos', img_size=(56, 72), patch_size=8)
    plain = timm.create_model('test_vit_sape2', position='nope', img_size=(56, 72), patch_size=8)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 56, 72)
    added = model.embed(images)[0] - plain.embed(images)[0]
    assert (added[:, 0] == 0).all()
    torch.testing.assert_close(added[:, 1:], mae((7, 9), 64).expand(2, -1, -1), rtol=0, atol=1e-5)


def test_nothing_is_learned_or_stored():
    encoding = SinCosPosition(HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1))
    assert not list(encoding.parameters()) and not list(encoding.buffers())


def test_channels_must_be_divisible_by_four():
    with pytest.raises(ValueError, match=r"position='sincos' needs an embed_dim divisible by 4, .* got 6"):
        SinCosPosition(HostShape(embed_dim=6, num_heads=2, grid=(7, 9), num_prefix_tokens=1))
