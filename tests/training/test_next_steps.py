"""The commands that a run ends with can be pasted."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

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
    ('flags', 'input_size', 'validate'),
    [
        (
            '--model test_vit_sape2 --img-size 16 32 --in-chans 1 --model-kwargs position=nope',
            (1, 16, 32),
            "--num-classes 10 --input-size 1 16 32 --model-kwargs position=nope 'img_size=(16, 32)'",
        ),
        ('--model test_resnet', (3, 160, 160), '--num-classes 10 --input-size 3 160 160'),
    ],
)
def test_model_is_loaded_and_validated_with_what_it_needs(flags, input_size, validate, steps):
    lines = steps(*flags.split(), input_size=input_size)
    loaded = {}
    for line in lines[2:4]:
        exec(line, loaded)
    assert loaded['model'].num_classes == 10
    command = next(line for line in lines if line.startswith('timm-sape2 run validate.py'))
    assert shlex.split(command)[8:] == shlex.split(validate)
