"""What the README says holds: its code runs, its table is what the command prints, its flags exist."""

import csv
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest
import timm
import torch

from timm_sape2 import __main__ as command_line
from timm_sape2.__main__ import main
from timm_sape2.positions import ENCODINGS, valid_options
from timm_sape2.training.arguments import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
ENCODINGS_PAGE = (ROOT / 'docs' / 'encodings.md').read_text()


def blocks(language, page=README):
    return re.findall(rf'```{language}\n(.*?)```', page, flags=re.DOTALL)


def block_with(language, text, page=README):
    (block,) = [block for block in blocks(language, page) if text in block]
    return block


def results(study):
    with open(ROOT / 'docs' / 'studies' / study / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_models_of_the_first_example():
    names = {}
    exec(block_with('python', 'registers the models'), names)
    assert names['model'].blocks[0].attn.position.sape2.target == 'q'


def test_trained_weights_that_come_with_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_with('python', '.cifar10'), names)
    assert names['model'].pretrained_cfg['label_names'][4] == 'deer'


def test_loading_at_another_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'output' / 'train' / 'mine'
    folder.mkdir(parents=True)
    trained = timm.create_model('vit_compact_sape2_patch4_32')
    torch.save({'state_dict': trained.state_dict()}, folder / 'model_best.pth.tar')
    names = {'timm': timm}
    exec(block_with('python', 'img_size=48'), names)
    assert names['model'].patch_embed.grid_size == (12, 12)


def test_an_encoding_of_your_own():
    exec(block_with('python', 'class RowDistance'), {})
    try:
        model = timm.create_model('test_vit_sape2', position='learned+rowdistance', img_size=(48, 64), num_classes=3)
        model(torch.randn(2, 3, 48, 64)).sum().backward()
        assert model.blocks[0].attn.position.rowdistance.slope.grad.abs().sum() > 0
        with pytest.raises(ValueError, match=r'Valid options: start'):
            timm.create_model('test_vit_sape2', position='rowdistance', position_args={'rowdistance': {'stop': 1}})
    finally:
        del ENCODINGS['rowdistance']


@pytest.mark.parametrize(('options', 'column'), [(['--gmacs', '*sape2*'], 'GMACs'), (['--encodings'], 'MFLOPs')])
def test_a_table_is_what_the_command_prints(capsys, options, column):
    main(['list', *options])
    first_table = capsys.readouterr().out.split('\n\n')[0]
    assert block_with('text', column, ENCODINGS_PAGE).rstrip() == first_table.rstrip()


def test_every_encoding_has_a_row_with_its_options():
    rows = dict(re.findall(r'^\| `(\w+)` \|.*\| (.*)\|$', ENCODINGS_PAGE, flags=re.MULTILINE))
    assert re.findall(r'^\| `(\w+)` \|', README, flags=re.MULTILINE) == list(rows)
    assert {name: re.findall(r'`(\w+)`', options) for name, options in rows.items()} == {
        name: valid_options(name) for name in ENCODINGS
    }


def test_flags_of_train_commands():
    commands = re.findall(r'^python train.py (.+)$', '\n'.join(blocks('bash')), flags=re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_commands_are_those_of_the_command_line():
    commands = re.findall(r'^timm-sape2 ([^#\n]+)', '\n'.join(blocks('bash')), flags=re.MULTILINE)
    assert {command.split()[0] for command in commands} >= {'list', 'run', 'study', 'visualize'}
    for command in commands:
        arguments, flags = command_line.build_parser().parse_known_args(shlex.split(command))
        assert arguments.takes_flags or not flags, command


def test_accuracy_that_was_found():
    found = {}
    for row in results('compare'):
        if row['epoch'] == '2':
            found.setdefault((row['encoding'], row['layer_scale']), []).append(float(row['top1']))
    top1 = {key: mean(values) for key, values in found.items()}
    learned, ours = (top1[encoding, 'off'] for encoding in ('learned', 'learned+sape2'))
    assert f'SaPE2 + learned is {ours - learned:.1f} points above learned' in ' '.join(README.split())
    assert abs(top1['learned+sape2', '0.0001'] - top1['learned', '0.0001']) < 0.05
    assert [round(top1['rope', 'off'] - other) for other in (ours, learned)] == [8, 10]
    assert 'rotary is 8 to 10 points ahead of both' in README


def test_cost_that_was_found():
    rows = [row for study in ('overhead_small', 'overhead_compact') for row in results(study)]

    def extremes(encoding, column):
        ratios = [float(row[column]) for row in rows if row['encoding'] == encoding]
        return min(ratios), max(ratios)

    least, most = extremes('learned+sape2', 'training_time_ratio')
    assert f'a training step with SaPE2 takes {least:.2f} to {most:.2f} of that without, in the same memory' in README
    assert extremes('learned+sape2', 'training_peak_bytes_ratio')[1] < 1.005
    least, most = extremes('learned+sape2:reference', 'training_time_ratio')
    memory = extremes('learned+sape2:reference', 'training_peak_bytes_ratio')[1]
    text = f'it takes {least:.2f} to {most:.2f} of the time and up to {memory:.1f} times the memory'
    assert text in ' '.join(README.split())
