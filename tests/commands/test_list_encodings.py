"""The table of `timm-sape2 list --encodings`."""

import pytest

from timm_sape2.__main__ import main
from timm_sape2.commands.list_encodings import measure_cost
from timm_sape2.positions import ENCODINGS


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


def test_table(capsys):
    assert main(['list', '--encodings']) is None
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split('  ')[0] == 'position' and header.endswith('MFLOPs')
    assert [row.split()[0] for row in rows] == [*ENCODINGS, 'learned+sape2']
    assert [row.split()[1] for row in rows[:3]] == ['none', 'learned', 'fixed']
