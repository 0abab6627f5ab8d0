"""SaPE2 with one part changed at a time."""

from types import SimpleNamespace

import pytest
import timm

from timm_sape2.__main__ import main
from timm_sape2.studies.accuracy.ablation import SEQUENCE, VARIANTS, Ablation

from ..conftest import TRAINING


def ablation(position='sape2', variants=VARIANTS):
    return Ablation(SimpleNamespace(position=position, variants=list(variants), seeds=[0]), TRAINING)


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_variant_is_what_its_name_says(variant):
    model = timm.create_model('test_vit_sape2', **ablation().model_kwargs(variant))
    names = {name for name, _ in model.blocks[0].attn.position.named_parameters()}
    if variant == SEQUENCE:
        assert model.position_name == 'cope'
        return
    encoding = model.blocks[0].attn.position['sape2']
    expected = {
        'gating none': encoding.semantic is False,
        'axes x': names == {'sape2.row_table'},
        'axes y': names == {'sape2.column_table'},
        'target q': encoding.target == 'q',
        'target qk': encoding.target == 'qk',
        'gate_source separate': 'sape2.gate_key.weight' in names,
        'gate_source value': encoding.gates_from_value is True,
    }
    number = variant.removeprefix('num_positions ')
    if number.isdecimal():
        assert encoding.row_table.shape[0] == int(number)
    elif variant == 'as in the paper':
        assert encoding.semantic and encoding.target == 'k' and encoding.row_table.shape[0] == 10
        assert not any(value for name, value in expected.items())
    else:
        assert [name for name, holds in expected.items() if holds] == [variant]


def test_variants_keep_what_else_there_is():
    model = timm.create_model('test_vit_sape2', **ablation('learned+sape2').model_kwargs(SEQUENCE))
    assert model.position_name == 'learned+cope'


def test_report_of_made_up_results():
    rows = [
        {'variant': variant, 'seed': 0, 'epoch': 1, 'top1': top1}
        for variant, top1 in (('as in the paper', 60.0), ('axes x', 57.5))
    ]
    assert '| axes x | 57.50 | -2.50 | 0 |' in ablation().report(rows).splitlines()


def test_from_the_command_line(study):
    folder = study('ablation', '--variants', 'as in the paper', 'axes x', SEQUENCE, '--seeds', '0', *TRAINING)
    text = (folder / 'results.md').read_text()
    assert all(f'| {variant} | ' in text for variant in ('as in the paper', 'axes x', SEQUENCE))
    assert (folder / 'accuracy.png').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--variants', 'axes z'], "unknown variant 'axes z'; there are: as in the paper, gating none"),
        (['--position', 'learned'], "--position must have 'sape2' in it, not 'learned'"),
        (['--position', 'sape3'], "Unknown position encoding 'sape3'"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(['study', 'ablation', '--output', str(tmp_path), *TRAINING, *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
