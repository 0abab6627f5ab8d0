"""The table of the position encodings, which `timm-sape2 list --encodings` prints."""

import pytest

from timm_sape2.__main__ import main
from timm_sape2.models.encoding_table import encodings, measure_cost
from timm_sape2.positions import ENCODINGS

pytestmark = pytest.mark.once


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
            ('liere', 12 * 3 * 384, 12 * 6 * 196 * 16 * 2 * 4**3),
            ('alibi', 0, 0),
            ('lookhere', 0, 0),
            ('fire', 12 * (32 * 9 + 6 + 1), 12 * 27**2 * 2 * 32 * (2 + 6)),
            ('pape', 12 * 2 * 2 * 6 * (384 + 2), 12 * 2 * (196 * 384 * 24 + 6 * 197**2 * 5)),
            ('shaw', 12 * 4 * 5 * 64, 12 * 6 * 2 * 28 * (2 * 196 * 64 + 2 * 197**2)),
            ('cope', 12 * 64 * 64, 12 * 2 * 196 * 384 * (196 + 64)),
            ('axial_cope', 12 * 2 * 10 * 64, 12 * 6 * 2 * 28 * (196 * 64 + 197**2) + 12 * 2 * 196 * 384 * 2 * 10),
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


def test_rows_are_what_the_command_prints(capsys):
    table = encodings()
    main(['list', '--encodings'])
    assert capsys.readouterr().out == f'{table!r}\n' == f'{table}\n'
    (learned,) = [row for row in table if row.position == 'learned']
    assert (learned.kind, learned.translation, learned.other_grids) == ('learned', 'absolute', 'resampled')
    assert (learned.parameters, learned.flops) == (197 * 384, 0)
    both, sape2 = table[-1], next(row for row in table if row.position == 'sape2')
    assert both.parameters == learned.parameters + sape2.parameters and both.flops == sape2.flops > 0
