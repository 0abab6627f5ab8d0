"""Names such as 'learned+sape2:reference', and the models that they stand for."""

import pytest
import torch

from timm_sape2.studies.cost.variants import (
    Variant,
    create_variant,
    draw_tables,
    parse_variant,
    use_reference,
)

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('nope', ('nope', '')),
        ('nope:compiled', ('nope', 'compiled')),
        ('learned+sape2:reference', ('learned+sape2', 'reference')),
    ],
)
def test_names(name, expected):
    assert parse_variant(name) == Variant(name, *expected)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('sape2:triton', "sape2:triton: sape2 has no implementation 'triton', only reference, compiled"),
        ('sape2:reference:compiled', "no implementation 'reference:compiled', only reference, compiled"),
        ('learned:reference', "learned:reference: learned has no implementation 'reference', only compiled"),
        (':reference', "Unknown position encoding ''"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(name)


@pytest.mark.parametrize(('name', 'fused'), [('sape2', 'sape2'), ('sape2:reference', '')])
def test_implementations(name, fused):
    model = create_variant('test_vit_sape2', parse_variant(name), '32/8', CPU)
    for block in model.blocks:
        assert block.attn.position.fused_encoding == fused


def test_the_reference_stores_the_bias(monkeypatch, tiny_vit):
    model, images = tiny_vit('sape2'), torch.randn(1, 3, 56, 72)
    expected = model(images)
    use_reference(model)
    monkeypatch.delattr('timm_sape2.positions.sape2.sape2_attention')
    torch.testing.assert_close(model(images), expected)


def test_tables_are_drawn_and_nothing_else(tiny_vit):
    model = tiny_vit('learned+sape2')
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    draw_tables(model, std=3.0)
    for name, parameter in model.named_parameters():
        if name.endswith(('sape2.row_table', 'sape2.column_table')):
            assert 2 < parameter.std() < 4
        else:
            assert torch.equal(parameter, before[name])
