"""Which encodings a model has, and whether weights of one belong to another."""

import pytest
import timm

from timm_sape2.positions import ENCODINGS
from timm_sape2.trained.encodings import check_encodings, encodings_by_name, encodings_of


def of(position, **position_args):
    return encodings_by_name('test_vit_sape2', {'position': position, 'position_args': position_args})


@pytest.mark.parametrize('position', [*ENCODINGS, 'learned+sape2'])
def test_names(position):
    assert list(of(position)) == [name for name in position.split('+') if name != 'nope']


def test_options_in_full_but_for_those_that_are_free():
    """Options that are not given have their defaults, so that `{}` and the defaults are the same."""
    paper = {'axes': 'xy', 'distance': 'euclidean', 'gate_source': 'key', 'gating': 'semantic', 'num_positions': 10}
    paper['target'] = 'k'
    assert of('sape2') == of('sape2', sape2={'target': 'k', 'recompute': True}) == {'sape2': paper}
    rope = {'coordinates': 'patches', 'temperature': 5.0}
    assert of('sape2+rope', rope={'temperature': 5.0}) == {'sape2': paper, 'rope': rope}


@pytest.mark.parametrize(
    ('name', 'names'),
    [
        ('vit_tiny_patch16_224', ['learned']),
        ('vit_small_patch16_rope_224', ['rope']),
        ('vit_small_patch16_rope_ape_224', ['learned', 'rope']),
        ('vit_small_patch16_rope_mixed_224', ['rope_mixed']),
        ('vit_small_patch16_rope_mixed_ape_224', ['learned', 'rope_mixed']),
    ],
)
def test_models_of_timm(name, names):
    assert list(encodings_by_name(name, {'depth': 1})) == names


@pytest.mark.parametrize(
    'name', ['test_resnet', 'vit_relpos_small_patch16_224', 'vit_small_patch16_dinov3', 'none', None]
)
def test_others_are_not_known(name):
    assert encodings_by_name(name, {}) is None
    if name is not None and name != 'none':
        assert encodings_of(timm.create_model(name)) is None
    assert check_encodings(None, of('rope')) == check_encodings(of('rope'), None) == []


def test_the_order_of_names_does_not_matter():
    assert check_encodings(of('learned+sape2'), of('sape2+learned')) == []


@pytest.mark.parametrize('may_add', [False, True])
@pytest.mark.parametrize(
    ('trained', 'asked', 'both'), [('rope', 'nope', 'rope'), ('rope', 'sape2+learned', 'rope+sape2+learned')]
)
def test_an_encoding_is_not_dropped(trained, asked, both, may_add):
    with pytest.raises(ValueError) as raised:
        check_encodings(of(trained), of(asked), may_add)
    way_out = f"; position='{both}' keeps what was trained" if may_add else ''
    assert str(raised.value) == f"it was trained with position='{trained}', not '{asked}'{way_out}"


def test_one_is_added_to_be_trained_alone():
    assert check_encodings(of('learned'), of('sape2+learned'), may_add=True) == ['sape2']
    assert check_encodings(of('nope'), of('rope'), may_add=True) == ['rope']
    with pytest.raises(ValueError, match=r"it was trained with position='learned', not 'sape2\+learned'$"):
        check_encodings(of('learned'), of('sape2+learned'))


@pytest.mark.parametrize('may_add', [False, True])
def test_options_that_change_the_result(may_add):
    with pytest.raises(ValueError, match=r'^it was trained with rope temperature=100\.0, not 5\.0$'):
        check_encodings(of('rope'), of('rope', rope={'temperature': 5.0}), may_add)


def test_a_model_that_cannot_be_built():
    with pytest.raises(ValueError, match='Unknown position encoding'):
        of('sap2')
    with pytest.raises(ValueError, match='colour'):
        encodings_by_name('test_vit_sape2', {'colour': 1})
