"""The command `timm-sape2 list`."""

import pytest
import timm

from timm_sape2.__main__ import main


def test_shows_every_model(capsys):
    assert main(['list']) is None
    header, *rows = capsys.readouterr().out.split('\n\n')[0].splitlines()
    assert header.split() == ['model', 'position', 'input', 'patch', 'parameters']
    assert [row.split()[0] for row in rows] == timm.list_models(module='vision_transformer_sape2')


def test_takes_a_pattern_as_timm_does(capsys):
    main(['list', 'test_vit_sape?'])
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ['test_vit_sape2', 'learned+sape2', '3x64x64', '16x16', '0.27', 'M']


def test_counts_gmacs_on_demand(capsys):
    main(['list', 'test_vit_sape2', '--gmacs'])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == 'GMACs'
    assert row.split()[-1] == '0.00355'


@pytest.mark.parametrize(
    ('pattern', 'position'),
    [
        ('vit_small_pos_nope', 'nope'),
        ('vit_small_pos_learned', 'learned'),
        ('vit_small_pos_rope_mixed', 'rope_mixed'),
        ('vit_small_pos_sape2', 'sape2'),
        ('vit_small_sape2', 'learned+sape2'),
    ],
)
def test_position_is_what_the_model_was_built_with(capsys, pattern, position):
    main(['list', pattern])
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[1] == position


def test_those_that_have_weights(capsys):
    """By the names that load them."""
    main(['list', '--pretrained', '*compact_sape2*'])
    names = [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]]
    assert 'vit_compact_sape2_patch4_32.cifar10' in names
    assert all(timm.create_model(name, pretrained=True).pretrained_cfg['tag'] == name.split('.')[1] for name in names)


def test_parameters_are_those_of_the_real_model(capsys):
    main(['list', 'vit_compact_sape2_patch4_32'])
    model = timm.create_model('vit_compact_sape2_patch4_32')
    count = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out.endswith(f'  {count / 1e6:.2f} M\n')


def test_no_model_is_allocated(monkeypatch):
    models, create_model = [], timm.create_model

    def create(*args, **kwargs):
        models.append(create_model(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(timm, 'create_model', create)
    main(['list', 'vit_large_sape2'])
    assert {parameter.device.type for parameter in models[0].parameters()} == {'meta'}


def test_columns_are_aligned(capsys):
    main(['list', '*compact*'])
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index('position')
    assert all(line[column - 2 : column] == '  ' and line[column] != ' ' for line in lines)


def test_no_match(refusal):
    assert refusal('list', 'resnet*') == "no model matches 'resnet*'; 'timm-sape2 list' shows them all"
    message = "no model with weights matches 'vit_small*'; 'timm-sape2 list --pretrained' shows them all"
    assert refusal('list', 'vit_small*', '--pretrained') == message


@pytest.mark.parametrize(
    'argv', [['--encodings', 'vit_*'], ['--encodings', '--gmacs'], ['--encodings', '--pretrained']]
)
def test_encodings_go_alone(refusal, argv):
    assert refusal('list', *argv) == '--encodings goes alone, without names of models, --gmacs and --pretrained'
