"""Options, parameters and initial state of the SaPE2 encoding."""

import pytest
import torch

from timm_sape2.ops.sape2 import sape2_bias
from timm_sape2.ops.sape2.reference import pairwise_distances, sape2_signatures
from timm_sape2.positions import HostShape
from timm_sape2.positions.sape2 import SaPE2

HOST = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)


def inputs(grid=(7, 9), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, grid[0] * grid[1], 16, generator=generator, dtype=dtype) for _ in range(3)]


def bias(encoding, grid=(7, 9)):
    return encoding.attention_bias(*inputs(grid), grid)


class TestParameters:
    def test_two_tables_shared_by_all_heads(self):
        shapes = {name: tuple(p.shape) for name, p in SaPE2(HOST).named_parameters()}
        assert shapes == {'row_table': (10, 16), 'column_table': (10, 16)}

    @pytest.mark.parametrize(
        ('options', 'names'),
        [
            ({'axes': 'x'}, {'row_table'}),
            ({'axes': 'y'}, {'column_table'}),
            ({'gate_source': 'separate'}, {'row_table', 'column_table', 'gate_key.weight'}),
            ({'distance_scale': 'grid'}, {'row_table', 'column_table', 'reference_grid'}),
        ],
    )
    def test_state_holds_what_an_option_needs_and_no_more(self, options, names):
        assert set(SaPE2(HOST, **options).state_dict()) == names

    def test_state_is_independent_of_the_grid(self):
        other = HOST._replace(grid=(14, 14))
        assert {k: v.shape for k, v in SaPE2(HOST).state_dict().items()} == {
            k: v.shape for k, v in SaPE2(other).state_dict().items()
        }

    def test_tables_start_near_two_hundredths_and_train(self):
        encoding = SaPE2(HOST, num_positions=500)
        assert 0.015 < encoding.row_table.std() < 0.025
        assert 0.15 < SaPE2(HOST, num_positions=500, initial_std=0.2).row_table.std() < 0.25
        bias(encoding).sum().backward()
        assert encoding.row_table.grad.abs().sum() > 0

    def test_bias_is_proportional_to_the_tables_and_its_gradient_does_not_shrink_with_them(self):
        """So small tables are a gain near 0 that learns at once; at 0 itself, the gradient of distances is 0."""
        biases, gradients = {}, {}
        for share in (1.0, 0.005, 0.0):
            torch.manual_seed(0)
            encoding = SaPE2(HOST, dtype=torch.float64)
            with torch.no_grad():
                encoding.row_table *= share
                encoding.column_table *= share
            biases[share] = encoding.attention_bias(*inputs(dtype=torch.float64), (7, 9))
            biases[share].square().sum().sqrt().backward()
            gradients[share] = encoding.row_table.grad
        torch.testing.assert_close(biases[0.005], 0.005 * biases[1.0])
        torch.testing.assert_close(gradients[0.005], gradients[1.0])
        assert gradients[1.0].abs().max() > 1 and not gradients[0.0].nan_to_num().any()

    def test_reset_parameters_after_the_meta_device(self):
        encoding = SaPE2(HOST, distance_scale='grid', device=torch.device('meta')).to_empty(device='cpu')
        encoding.reset_parameters()
        assert encoding.reference_grid.tolist() == [7, 9]
        assert encoding.row_table.isfinite().all() and encoding.row_table.std() > 0.01


class TestOptions:
    @pytest.mark.parametrize('target', ['k', 'q', 'qk'])
    @pytest.mark.parametrize('gate_source', ['key', 'value'])
    def test_is_the_reference(self, target, gate_source):
        encoding = SaPE2(HOST, target=target, gate_source=gate_source)
        query, key, value = inputs()
        gate_key = {'key': key, 'value': value}[gate_source]
        expected = sape2_bias(query, key, gate_key, encoding.row_table, encoding.column_table, (7, 9), 16**-0.5, target)
        assert torch.equal(bias(encoding), expected)

    def test_separate_gates_read_mapped_keys(self):
        separate, plain = SaPE2(HOST, gate_source='separate'), SaPE2(HOST)
        plain.load_state_dict({k: v for k, v in separate.state_dict().items() if 'gate_key' not in k})
        assert not torch.allclose(bias(separate), bias(plain))
        torch.nn.init.eye_(separate.gate_key.weight)
        torch.testing.assert_close(bias(separate), bias(plain))

    def test_without_gating_values_and_keys_do_not_move_positions(self):
        encoding = SaPE2(HOST, gating='none')
        query, key, value = inputs()
        first = encoding.attention_bias(query, key, value, (7, 9))
        assert torch.equal(first, encoding.attention_bias(query, -key, value, (7, 9)))

    def test_grid_scale_is_neutral_on_the_reference_grid(self):
        scaled, plain = SaPE2(HOST, distance_scale='grid'), SaPE2(HOST)
        plain.load_state_dict({k: v for k, v in scaled.state_dict().items() if k != 'reference_grid'})
        torch.testing.assert_close(bias(scaled), bias(plain))
        assert not torch.allclose(bias(scaled, (14, 14)), bias(plain, (14, 14)))

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'target': 'v'}, "target must be one of 'k', 'q', 'qk', got 'v'"),
            ({'gating': 'hard'}, "gating must be one of 'semantic', 'none'"),
            ({'gate_source': 'query'}, "gate_source must be one of 'key', 'separate', 'value'"),
            ({'axes': 'yx'}, "axes must be one of 'xy', 'x', 'y'"),
            ({'distance_scale': 'sqrt'}, "distance_scale must be one of 'none', 'grid'"),
            ({'num_positions': 1}, 'num_positions must be a whole number of at least 2, got 1'),
            ({'num_positions': 2.5}, 'num_positions must be a whole number'),
            ({'num_positions': True}, 'num_positions must be a whole number'),
            ({'initial_std': 0}, 'initial_std must be a positive number, got 0'),
            ({'recompute': 1}, 'recompute must be true or false, got 1'),
            ({'distance': 'cubed'}, "distance must be one of 'euclidean', 'squared', got 'cubed'"),
            ({'distance': 'squared', 'recompute': True}, "recompute has no effect with distance='squared'"),
            ({'gating': 'none', 'gate_source': 'value'}, "gate_source='value' has no effect with gating='none'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            SaPE2(HOST, **options)


class TestSquaredDistances:
    @pytest.mark.parametrize('options', [{}, {'target': 'qk'}, {'axes': 'y'}, {'distance_scale': 'grid'}], ids=str)
    @pytest.mark.parametrize('grid', [(7, 9), (1, 5)])
    def test_channels_give_the_squares_of_the_reference(self, options, grid):
        encoding, tensors = SaPE2(HOST, distance='squared', **options).double(), inputs(grid, torch.float64)
        with torch.no_grad():
            for table in encoding.parameters():
                table.normal_()
        query, key, value = tensors
        rows, columns = sape2_signatures(
            query,
            key,
            key,
            encoding.row_table,
            encoding.column_table,
            grid,
            16**-0.5,
            encoding.target,
            encoding.reference_grid,
        )
        expected = sum(pairwise_distances(signature).square() for signature in rows + columns)
        query_channels, key_channels = encoding.logit_channels(query, key, value, grid)
        torch.testing.assert_close(query_channels @ key_channels.transpose(2, 3), expected)
        assert encoding.attention_bias(query, key, value, grid) is None

    def test_no_more_channels_than_the_grid_is_high_and_wide_and_two(self):
        for channels in SaPE2(HOST, distance='squared').logit_channels(*inputs(), (7, 9)):
            assert channels.shape == (2, 2, 63, 7 + 9 + 2)

    def test_attention_of_a_model_is_that_of_its_bias(self, tiny_vit):
        position = tiny_vit('sape2', position_args={'sape2': {'distance': 'squared'}}, reg_tokens=2)
        position = position.blocks[0].attn.position
        query, key, value = torch.randn(3, 2, 2, 3 + 63, 16)
        bias = position.bias(query, key, value, (7, 9))
        assert (bias[:, :, :3] == 0).all() and (bias[..., :3] == 0).all() and bias.max() > 1
        weights = (query @ key.transpose(2, 3) / 4 + bias).softmax(-1)
        torch.testing.assert_close(position.attend(query, key, value, (7, 9)), weights @ value)


class TestAdaptStateDict:
    @pytest.fixture
    def tables(self):
        return {f'p.{k}': v for k, v in SaPE2(HOST).state_dict().items()}

    def test_unscaled_checkpoint_brings_its_grid_as_the_reference(self, tables):
        SaPE2(HOST, distance_scale='grid').adapt_state_dict(tables, 'p.', (3, 5))
        assert tables['p.reference_grid'].tolist() == [3, 5]

    def test_reference_in_the_checkpoint_stays(self, tables):
        tables['p.reference_grid'] = torch.tensor([2, 2])
        SaPE2(HOST, distance_scale='grid').adapt_state_dict(tables, 'p.', (3, 5))
        assert tables['p.reference_grid'].tolist() == [2, 2]

    def test_nothing_to_do_without_scale(self, tables):
        before = dict(tables)
        SaPE2(HOST).adapt_state_dict(tables, 'p.', (3, 5))
        assert tables == before
