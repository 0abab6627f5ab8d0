"""Relative position bias: a table looked up by distance, as in timm."""

import logging

import pytest
import timm
import torch
from timm.layers import RelPosBias, resize_rel_pos_bias_table_simple

from timm_sape2.positions import HostShape
from timm_sape2.positions.relbias import RelativePositionBias, relative_bias, relative_index, resample_table

CPU = torch.device('cpu')
HOST = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)


def test_two_patches_by_hand():
    """One row, table entries for distances -1, 0 and 1 of the query's column from the key's."""
    table = torch.tensor([[[10.0, 20.0, 30.0]]])
    assert relative_bias(table, None, relative_index((1, 2), CPU), (1, 2), 0)[0, 0].tolist() == [[20, 10], [30, 20]]


def test_class_token_by_hand():
    """1 where a prefix token attends to a patch, 2 where a patch attends to it, 3 among themselves."""
    table, prefix_bias = torch.tensor([[[10.0, 20.0, 30.0]]]), torch.tensor([[1.0], [2.0], [3.0]])
    bias = relative_bias(table, prefix_bias, relative_index((1, 2), CPU), (1, 2), 1)
    assert bias[0, 0].tolist() == [[3, 1, 1], [2, 20, 10], [2, 30, 20]]


@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (7, 9), (9, 7), (14, 14)])
@pytest.mark.parametrize('prefix', [0, 1])
def test_is_timms_with_and_without_class_token(grid, prefix):
    ours = RelativePositionBias(HOST._replace(grid=grid, num_prefix_tokens=prefix))
    timms = RelPosBias(grid, num_heads=2, prefix_tokens=prefix)
    parts = [ours.bias_table.flatten(1).t(), *([ours.prefix_bias] if prefix else [])]
    timms.load_state_dict({'relative_position_bias_table': torch.cat(parts)})
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in timms.parameters())
    query = torch.randn(2, 2, grid[0] * grid[1], 16)
    assert torch.equal(ours.attention_bias(query, query, query, grid, ours.prepare(grid, CPU)), timms.get_bias())


def test_registers_share_the_numbers_of_the_class_token(tiny_vit):
    attention = tiny_vit('relbias', reg_tokens=3).blocks[0].attn
    query, key, value = torch.randn(3, 1, 2, 4 + 63, 16)
    bias, numbers = attention.position.bias(query, key, value, (7, 9))[0], attention.position['relbias'].prefix_bias
    for head in range(2):
        to_patch, to_prefix, among = numbers[:, head]
        assert (bias[head, :4, :4] == among).all()
        assert (bias[head, :4, 4:] == to_patch).all() and (bias[head, 4:, :4] == to_prefix).all()


class TestAnotherGrid:
    @pytest.mark.parametrize('grid', [(9, 7), (14, 14), (1, 5), (1, 1)])
    def test_table_is_resampled_as_by_timms_simple_function(self, grid):
        table = torch.randn(2, 13, 17)
        size = (2 * grid[0] - 1, 2 * grid[1] - 1)
        expected = resize_rel_pos_bias_table_simple(table, grid, (2, *size))
        torch.testing.assert_close(resample_table(table, grid), expected)

    def test_distance_zero_stays_in_the_middle(self):
        """A table that is odd in the distance stays so, -3 0 3 for distances -1 0 1."""
        resampled = resample_table(torch.tensor([[[-3.0, 0.0, 3.0]]]), (1, 4))[0, 0]
        assert len(resampled) == 7 and resampled[3] == 0 and resampled[4] > 1
        torch.testing.assert_close(resampled, -resampled.flip(0))

    def test_native_grid_is_not_resampled_at_all(self):
        table = torch.randn(2, 13, 17)
        assert torch.equal(resample_table(table, (7, 9)), table)

    def test_same_grid_keeps_the_parameter_that_an_optimizer_knows(self):
        encoding = RelativePositionBias(HOST)
        table = encoding.bias_table
        encoding.set_grid((7, 9))
        assert encoding.bias_table is table

    @pytest.mark.parametrize('grid', [(9, 7), (14, 14), (1, 5)])
    def test_on_the_fly_is_the_same_as_a_new_native_grid(self, grid):
        encoding, query = RelativePositionBias(HOST), torch.randn(1, 2, grid[0] * grid[1], 16)
        index = encoding.prepare(grid, CPU)
        on_the_fly = encoding.attention_bias(query, query, query, grid, index)
        encoding.bias_table.requires_grad_(False)
        encoding.set_grid(grid)
        assert encoding.bias_table.shape == (2, 2 * grid[0] - 1, 2 * grid[1] - 1)
        assert not encoding.bias_table.requires_grad and encoding.prefix_bias.requires_grad
        assert torch.equal(encoding.attention_bias(query, query, query, grid, index), on_the_fly)

    def test_checkpoint_is_resampled_by_the_shape_of_its_table(self, caplog):
        source, target = RelativePositionBias(HOST._replace(grid=(3, 5))), RelativePositionBias(HOST)
        state = {f'p.{name}': value for name, value in source.state_dict().items()}
        with caplog.at_level(logging.INFO, 'timm_sape2'):
            target.adapt_state_dict(state, 'p.', None)
        assert 'Resampling p.bias_table from (5, 9) to (13, 17)' in caplog.text
        target.load_state_dict({name.removeprefix('p.'): value for name, value in state.items()})
        source.set_grid((7, 9))
        assert torch.equal(target.bias_table, source.bias_table)

    @pytest.mark.parametrize('table', [None, torch.zeros(2, 13, 17), torch.zeros(4)])
    def test_nothing_to_resample(self, table):
        state = {} if table is None else {'p.bias_table': table}
        RelativePositionBias(HOST).adapt_state_dict(state, 'p.', (3, 5))
        assert list(state.values()) == ([] if table is None else [table])

    def test_saved_model_loads_at_another_size(self, tmp_path):
        tiny = dict(position='relbias', patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)
        source = timm.create_model('test_vit_sape2', img_size=(56, 72), **tiny).eval()
        torch.save(source.state_dict(), tmp_path / 'model.pth')
        overlay = dict(file=str(tmp_path / 'model.pth'), input_size=(3, 56, 72), num_classes=5)
        model = timm.create_model(
            'test_vit_sape2', pretrained=True, pretrained_cfg_overlay=overlay, img_size=(40, 48), **tiny
        ).eval()
        source.set_input_size((40, 48))
        images = torch.randn(2, 3, 40, 48)
        assert torch.equal(model(images), source(images))


def test_bias_is_the_same_for_all_pairs_at_one_distance():
    encoding = RelativePositionBias(HOST._replace(num_prefix_tokens=0))
    bias = encoding.attention_bias(*torch.randn(3, 1, 2, 63, 16), (7, 9), encoding.prepare((7, 9), CPU))
    grid = bias[0].reshape(2, 7, 9, 7, 9)
    torch.testing.assert_close(grid[:, :5, :6, :5, :6], grid[:, 2:, 3:, 2:, 3:], rtol=0, atol=0)
