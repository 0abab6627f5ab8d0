"""Encodings of another package: a small one is made, with the entry points that an installer would write."""

import subprocess
import sys

import pytest
import timm
import torch

from timm_sape2.positions import ENCODINGS, all_encodings, facts, parse_position

MODULE = """
import torch

from timm_sape2 import PositionEncoding


class Ramp(PositionEncoding):
    kind, translation = 'fixed', 'absolute'

    def __init__(self, host, *, slope=1.0, device=None, dtype=None):
        super().__init__()
        self.slope = slope

    def add_to_tokens(self, tokens, grid):
        return tokens + self.slope * torch.arange(grid[0] * grid[1], device=tokens.device)[:, None]


class NoEncoding:
    pass
"""
ENTRY_POINTS = """
[timm_sape2.encodings]
ramp = their_positions:Ramp
sape2 = their_positions:Ramp
no_encoding = their_positions:NoEncoding
not_there = their_positions:Missing
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Folder of an installed package; it is forgotten afterwards."""
    (tmp_path / 'their_positions.py').write_text(MODULE)
    info = tmp_path / 'their_positions-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: their_positions\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(ENCODINGS)
    yield tmp_path
    sys.modules.pop('their_positions', None)
    ENCODINGS.clear()
    ENCODINGS.update(before)


@pytest.mark.usefixtures('package')
def test_its_name_works_wherever_ours_do():
    assert 'ramp' not in ENCODINGS
    kwargs = dict(position='ramp+rope', position_args={'ramp': {'slope': 2.0}}, img_size=(48, 64), num_classes=3)
    model = timm.create_model('test_vit_sape2', **kwargs)
    assert model.position['ramp'].slope == 2
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 3)
    assert facts('ramp+rope') == ('fixed', 'absolute', 'as it is')
    with pytest.raises(ValueError, match=r"Unknown option 'start' of position encoding 'ramp'. Valid options: slope\."):
        parse_position('ramp', {'ramp': {'start': 1}})


@pytest.mark.usefixtures('package')
def test_ours_are_not_replaced_and_what_is_broken_is_left_out(caplog):
    ours = dict(ENCODINGS)
    assert all_encodings() == [*ours, 'ramp']
    assert {name: ENCODINGS[name] for name in ours} == ours
    assert sorted(record.message.split("'")[1] for record in caplog.records) == ['no_encoding', 'not_there']
    with pytest.raises(ValueError, match=r"Unknown position encoding 'rampe'.*sape2, ramp\."):
        parse_position('rampe')


@pytest.mark.usefixtures('package')
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('no_encoding', r"'no_encoding', which the entry point their_positions:NoEncoding names, is <class .*>, not a"),
        ('not_there', r"'not_there', which the entry point .* names, cannot be loaded: AttributeError.*Missing"),
    ],
)
def test_what_is_broken_says_so_when_it_is_asked_for(name, message):
    with pytest.raises(ValueError, match=message):
        parse_position(f'learned+{name}')
    assert name not in ENCODINGS


def test_importing_this_package_loads_none(package):
    code = "import sys, timm_sape2; assert 'their_positions' not in sys.modules"
    code += "; timm_sape2.positions.parse_position('learned+sape2'); assert 'their_positions' not in sys.modules"
    code += "; timm_sape2.positions.parse_position('ramp'); assert 'their_positions' in sys.modules"
    code = f'import sys; sys.path.insert(0, {str(package)!r}); {code}'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)
