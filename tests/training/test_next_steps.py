"""The commands that a run ends with can be pasted."""

import ast
import shlex
from pathlib import Path

import yaml

from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.next_steps import next_steps


def test_commands_are_valid(tmp_path):
    folder = tmp_path / 'my runs' / 'first'
    folder.mkdir(parents=True)
    args = parse_arguments(['--dataset', 'digits', '--model-kwargs', 'depth=2', "position='sape2'"], None)
    (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in vars(args).items() if k != 'config'}))
    args.input_size, args.num_classes = (3, 16, 16), 10
    lines = [line.strip() for line in next_steps(args, folder).splitlines()]
    commands = [
        shlex.split(line.replace('classes N', 'classes 5'))[2:] for line in lines if line.startswith('python train.py')
    ]
    parsed = [parse_arguments(command, Path()) for command in commands]
    longer, encoding, larger, own = parsed
    assert (longer.resume, longer.epochs) == ('auto', 2 * args.epochs)
    assert encoding.model_kwargs == {'depth': 2, 'position': 'learned'}
    assert (larger.img_size, larger.pretrained_path) == ((32, 32), str(folder / 'model_best.pth.tar'))
    assert own.data_dir == 'DIR' and own.model == args.model
    ast.parse(next(line for line in lines if line.startswith('model = ')))
