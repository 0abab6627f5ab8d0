"""Variants of the screening, an example of encodings in another package (docs/variants)."""

import importlib
import re
from pathlib import Path

import pytest
import timm
import torch

from timm_sape2.positions import ENCODINGS

FOLDER = Path(__file__).parents[1] / 'docs' / 'variants'
GRID = 3, 5


@pytest.fixture(autouse=True)
def variants(monkeypatch):
    """The names that its pyproject.toml declares, as if it were installed."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module('sape2_variants')
    declared = (FOLDER / 'pyproject.toml').read_text()
    for name, encoding in re.findall(r'^(\w+) = "sape2_variants:(\w+)"$', declared, re.MULTILINE):
        monkeypatch.setitem(ENCODINGS, name, getattr(module, encoding))


def build(position, depth=2, **options):
    torch.manual_seed(0)
    kwargs = dict(position=position, position_args={position: options}, img_size=(48, 80), depth=depth, num_classes=3)
    return timm.create_model('test_vit_sape2', **kwargs).eval()


def encoding_of(model, block=0):
    (encoding,) = model.blocks[block].attn.position.values()
    return encoding


def draw(model):
    heads, dim = model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim
    torch.manual_seed(1)
    return [torch.randn(2, heads, GRID[0] * GRID[1], dim) for _ in range(3)]


def bias_of(encoding, drawn):
    query, key = encoding.logit_channels(*drawn, GRID, encoding.prepare(GRID, torch.device('cpu')))
    return query @ key.t()


@pytest.mark.parametrize('name', ['sape2_factor', 'sape2_tied', 'axial_cope_tied', 'axial_bias'])
def test_every_parameter_trains(name):
    model = build(name, depth=3)
    model(torch.randn(2, 3, 48, 80)).square().sum().backward()
    for block in (0, 1):  # of the last block only the class token is used, which has no position
        for parameter in encoding_of(model, block).parameters():
            assert parameter.grad is not None and parameter.grad.count_nonzero() > 0


def test_a_factor_changes_sign_and_scale():
    model = build('sape2_factor', initial_factor=-1.5)
    encoding = encoding_of(model)
    drawn = draw(model)
    bias = encoding.attention_bias(*drawn, GRID)
    assert bias.max() <= 0 and bias.min() < -0.1
    torch.testing.assert_close(bias, -1.5 * ENCODINGS['sape2'].attention_bias(encoding, *drawn, GRID))


@pytest.mark.parametrize('name', ['sape2', 'axial_cope'])
def test_tied_tables_are_those_of_the_first_block(name):
    tied, untied = build(f'{name}_tied', depth=3), build(name, depth=3)
    assert all(encoding_of(tied, i).row_table is encoding_of(tied).row_table for i in range(3))
    assert encoding_of(build(f'{name}_tied')).row_table is not encoding_of(tied).row_table
    tables = sum(p.numel() for p in encoding_of(untied).parameters())
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 2 * tables

    for i in range(3):
        encoding_of(untied, i).load_state_dict(encoding_of(tied).state_dict())
    own = {k: v for k, v in tied.state_dict().items() if f'{name}_tied' not in k}
    assert not untied.load_state_dict(own, strict=False).unexpected_keys  # all but the tables, which are loaded
    image = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(tied(image), untied(image))


def test_a_term_without_content_by_hand():
    """With 3 entries, columns 0 to 4 of a row are at positions 5, 4, 3, 2, 1, of which 2 is the last."""
    encoding = encoding_of(build('axial_bias', content=False, num_positions=3))
    assert encoding.row_table is None
    with torch.no_grad():
        encoding.row_term[0] = torch.tensor([10.0, 20.0, 30.0])
        encoding.column_term[0] = torch.tensor([1.0, 2.0, 3.0])
    query = torch.randn(1, encoding.row_term.shape[0], 15, 4)
    bias = bias_of(encoding, [query, query, query])[0, 0]
    assert bias[7].reshape(GRID).tolist() == [
        [33.0, 33.0, 33.0, 33.0, 23.0],
        [33.0, 33.0, 33.0, 33.0, 23.0],
        [32.0, 32.0, 32.0, 32.0, 22.0],
    ]


def test_content_is_a_flag():
    with pytest.raises(ValueError, match="content must be true or false, got 'false'"):
        build('axial_bias', content='false')


def test_without_its_term_it_is_axial_cope_with_gates_of_1():
    model, other = build('axial_bias'), build('axial_cope', gating='none')
    drawn = draw(model)
    ours, theirs = encoding_of(model), encoding_of(other)
    with torch.no_grad():
        theirs.row_table.copy_(ours.row_table)
        theirs.column_table.copy_(ours.column_table)
    torch.testing.assert_close(bias_of(ours, drawn), bias_of(theirs, drawn))
