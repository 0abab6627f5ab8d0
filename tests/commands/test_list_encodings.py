"""The table of `timm-sape2 list --encodings`."""

import pytest
import torch
from torch import Tensor

from timm_sape2.__main__ import main
from timm_sape2.commands.list_encodings import describe_translation, is_independent_of_grid, measure_cost
from timm_sape2.positions import ENCODINGS, PositionEncoding

TRANSLATION = {
    'nope': 'none',
    'learned': 'absolute',
    'sincos': 'absolute',
    'relbias': 'relative',
    'cpe': 'relative inside',
    'rope': 'relative',
    'rope_mixed': 'relative',
    'cope': 'content-based',
    'sape2': 'content-based',
    'learned+sape2': 'absolute',
    'learned+rope': 'absolute',
    'relbias+rope': 'relative',
    'rope+cpe': 'relative inside',
    'rope+sape2': 'content-based',
}


def add_encoding(monkeypatch, **hooks):
    monkeypatch.setitem(ENCODINGS, 'toy', type('Toy', (PositionEncoding,), hooks | {'__init__': initialise}))


def initialise(self, host, *, device=None, dtype=None):
    PositionEncoding.__init__(self)


class TestTranslation:
    @pytest.mark.parametrize(('position', 'expected'), TRANSLATION.items())
    def test_is_what_the_equations_say(self, position, expected):
        assert describe_translation(position) == expected

    def test_no_encoding_is_left_out(self):
        assert set(ENCODINGS) <= set(TRANSLATION)

    def test_the_row_of_a_patch_is_absolute(self, monkeypatch):
        def add_row(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
            return tokens + torch.arange(grid[0]).repeat_interleave(grid[1])[:, None]

        add_encoding(monkeypatch, add_to_tokens=add_row)
        assert describe_translation('toy') == 'absolute'

    def test_the_distance_of_rows_is_relative(self, monkeypatch):
        def penalty(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
            row = torch.arange(grid[0]).repeat_interleave(grid[1])
            return -(row[:, None] - row).abs().to(query.dtype)

        add_encoding(monkeypatch, attention_bias=penalty)
        assert describe_translation('toy') == 'relative'

    def test_attention_to_like_patches_knows_no_positions(self, monkeypatch):
        def likeness(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
            return query @ query.transpose(2, 3)

        add_encoding(monkeypatch, attention_bias=likeness)
        assert describe_translation('toy') == 'none'

    def test_random_numbers_of_the_caller_are_left_alone(self):
        state = torch.get_rng_state()
        describe_translation('sape2')
        assert torch.equal(torch.get_rng_state(), state)


class TestCost:
    """12 blocks of 6 heads of 64 channels, 196 patches and a class token."""

    @pytest.mark.parametrize(
        ('position', 'parameters', 'flops'),
        [
            ('learned', 197 * 384, 0),
            ('sincos', 0, 0),
            ('relbias', 12 * 6 * (27 * 27 + 3), 0),
            ('cpe', 10 * 384, 2 * 9 * 196 * 384),
            ('rope', 0, 0),
            ('rope_mixed', 12 * 384, 0),
            ('cope', 12 * 64 * 64, 12 * 2 * 196 * 384 * (196 + 64)),
            ('sape2', 12 * 2 * 10 * 64, 12 * 2 * 196 * 384 * 2 * (14 + 10)),
        ],
    )
    def test_what_an_encoding_adds(self, position, parameters, flops):
        base, cost = measure_cost('nope'), measure_cost(position)
        assert (cost[0] - base[0], cost[1] - base[1]) == (parameters, flops)


def test_only_learned_embeddings_and_relative_bias_depend_on_the_grid():
    assert {name for name in ENCODINGS if not is_independent_of_grid(name)} == {'learned', 'relbias'}


def test_table(capsys):
    assert main(['list', '--encodings']) is None
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split('  ')[0] == 'position' and header.endswith('MFLOPs')
    assert [row.split()[0] for row in rows] == [*ENCODINGS, 'learned+sape2']
    assert [row.split()[1] for row in rows[:3]] == ['none', 'learned', 'fixed']
