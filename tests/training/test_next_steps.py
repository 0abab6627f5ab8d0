"""The commands that a run ends with can be pasted."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import train
from timm_sape2.__main__ import main
from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.model import build_model
from timm_sape2.training.next_steps import next_steps


@pytest.fixture
def steps(tmp_path):
    """Function that returns the lines for a run with these flags; its weights are there."""

    def lines(*flags, input_size):
        folder = tmp_path / 'my runs'
        folder.mkdir()
        args = parse_arguments(['--dataset', 'digits', '--num-classes', '10', *flags], None)
        (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in vars(args).items() if k != 'config'}))
        args.input_size = input_size
        model = build_model(args)
        torch.save(model.state_dict(), folder / 'model_best.pth.tar')
        text = next_steps(args, nn.DataParallel(model), folder)
        return [line.strip() for line in text.replace('classes N', 'classes 5').splitlines()]

    return lines


def test_commands_of_train_are_valid(steps, tmp_path):
    flags = ['--model', 'test_vit_sape2', '--img-size', '16', '--model-kwargs', 'depth=2', "position='sape2'"]
    lines = steps(*flags, input_size=(3, 16, 16))
    commands = [shlex.split(line)[2:] for line in lines if line.startswith('python train.py')]
    longer, encoding, larger, own = (parse_arguments(command, Path()) for command in commands)
    assert (longer.resume, longer.epochs) == ('auto', 200)
    assert encoding.model_kwargs == {'depth': 2, 'position': 'learned'}
    assert (larger.img_size, larger.pretrained_path) == ((32, 32), str(tmp_path / 'my runs' / 'model_best.pth.tar'))
    assert own.data_dir == 'DIR' and own.model == 'test_vit_sape2'


@pytest.mark.parametrize(
    ('flags', 'input_size'),
    [
        ('--model test_vit_sape2 --img-size 16 32 --in-chans 1 --model-kwargs position=nope', (1, 16, 32)),
        ('--model test_resnet', (3, 160, 160)),
    ],
)
def test_model_is_loaded_with_what_it_needs(flags, input_size, steps):
    loaded = {}
    for line in steps(*flags.split(), input_size=input_size)[2:4]:
        exec(line, loaded)
    assert loaded['model'].num_classes == 10


def test_command_that_validates(tmp_path, photos, capsys):
    """The one that train.py prints, on the images that it was trained on."""
    flags = ['--model', 'test_vit_sape2', '--img-size', '16', '32', '--model-kwargs', 'depth=1', '--num-classes', '2']
    data = ['--data-dir', str(photos), '-b', '4', '--epochs', '1', '--warmup-epochs', '0', '--workers', '0']
    assert train.main([*flags, *data, '--output', str(tmp_path), '--experiment', 'my run']) == 0
    printed = capsys.readouterr().out.splitlines()
    (command,) = (line for line in printed if line.strip().startswith('timm-sape2 validate'))
    main([*shlex.split(command)[1:-1], str(photos), '-j', '0'])
    assert 'top-1' in capsys.readouterr().out
