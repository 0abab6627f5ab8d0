"""Options, parameters and initial state of the SaPE2 encoding."""

import pytest
import torch

from timm_sape2.ops.sape2 import sape2_bias
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
        bias(encoding).sum().backward()
        assert encoding.row_table.grad.abs().sum() > 0

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
            ({'recompute': 1}, 'recompute must be true or false, got 1'),
            ({'gating': 'none', 'gate_source': 'value'}, "gate_source='value' has no effect with gating='none'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            SaPE2(HOST, **options)


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
