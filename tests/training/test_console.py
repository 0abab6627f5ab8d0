"""Progress is a bar on a terminal, lines elsewhere, and nothing from the other processes."""

import io
import logging
import re
import shlex
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from timm_sape2.__main__ import main
from timm_sape2.commands import train
from timm_sape2.trained.checkpoint import ResumePoint
from timm_sape2.training.arguments import flags_of, parse_arguments
from timm_sape2.training.console import EpochProgress, describe_run, next_steps
from timm_sape2.training.model import build_model


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(stream, point=None, seconds=0):
    """Go through 4 batches of 8 images, of the first of two epochs."""
    point = point or ResumePoint()
    with redirect_stderr(stream), EpochProgress(point, 2, 4, 32, 0.003, log_interval=2) as progress:
        while point.num_batches < 4:
            time.sleep(seconds)
            point.add_batch(0.5, 8)
            point.seconds = 7.1
            progress.update(point)


def test_lines(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO):
        watch(stream)
    assert stream.getvalue() == ''
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.fullmatch(
        r'Epoch 0, batch 2/4, 0:00:07, \d+ images/s, rate 0.003, loss 0.5000, run ends in 0:00:00', lines[0]
    )


def test_bar(caplog):
    stream = Terminal()
    with caplog.at_level(logging.INFO):
        watch(stream, seconds=0.11)
    assert not caplog.records
    assert re.search(r'Epoch 0:.*24/32.* images/s.*loss 0.5000, run ends in 0:00:01', stream.getvalue())


def test_resumed_epoch_begins_where_it_was_left(caplog):
    with caplog.at_level(logging.INFO):
        watch(io.StringIO(), point=ResumePoint(num_batches=3, loss_sum=12.0, loss_count=24))
    assert [record.getMessage()[:18] for record in caplog.records] == ['Epoch 0, batch 4/4']


@pytest.mark.parametrize('stream', [io.StringIO(), Terminal()])
def test_silence(stream, caplog):
    with caplog.at_level(logging.WARNING, 'timm_sape2'):
        watch(stream)
    assert not caplog.records and stream.getvalue() == ''


@pytest.fixture
def steps(tmp_path):
    """Function that returns the lines for a run with these flags; its weights are there."""

    def lines(*flags, input_size):
        folder = tmp_path / 'my runs'
        folder.mkdir()
        args = parse_arguments(['--dataset', 'digits', '--num-classes', '10', *flags], None)
        (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in vars(args).items() if k != 'config'}))
        args.input_size = input_size
        model = build_model(**flags_of(build_model, args))
        torch.save(model.state_dict(), folder / 'model_best.pth.tar')
        text = next_steps(nn.DataParallel(model), folder, **flags_of(next_steps, args))
        return [line.strip() for line in text.replace('classes N', 'classes 5').splitlines()]

    return lines


@pytest.mark.parametrize(('argv', 'start'), [('/a/train.py', 'python train.py'), ('timm-sape2', 'timm-sape2 train')])
def test_commands_of_train_are_valid(steps, tmp_path, monkeypatch, argv, start):
    monkeypatch.setattr('sys.argv', [argv])
    flags = ['--model', 'test_vit_sape2', '--img-size', '16', '--model-kwargs', 'depth=2', "position='sape2'"]
    lines = steps(*flags, input_size=(3, 16, 16))
    commands = [shlex.split(line)[2:] for line in lines if line.startswith(start)]
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


def describe(args, *what):
    return describe_run(*what, **flags_of(describe_run, args)).splitlines()


def test_a_run_is_described():
    args = parse_arguments(['--dataset', 'digits', '--num-classes', '10', '--model', 'test_vit_sape2', '--lr', '0.002'])
    args.input_size, args.device, args.world_size = (3, 32, 48), 'cpu', 2
    model = timm.create_model('test_vit_sape2', img_size=(32, 48), num_classes=10)
    lines = describe(args, model, (1442, 355), 11, Path('output/train/mine'))
    size = f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters'
    assert lines[0].startswith(f'Model: test_vit_sape2 with learned+sape2, {size}, 0.0')
    assert lines[1] == 'Data: 1442 images to train on and 355 to validate, 32x48, 10 classes'
    assert lines[2] == 'Training: 100 epochs of 11 batches of 128 (256 images an update), adamw, rate 0.002'
    assert re.fullmatch(r'Device: cpu \(.+, \d+ threads\), float32, 2 processes', lines[3])
    assert lines[4:] == ['Folder: output/train/mine']


def test_flops_of_a_model_that_takes_no_single_image_in_training():
    """Batch norm on a feature map of one pixel."""
    args = parse_arguments(['--dataset', 'digits', '--model', 'resnet10t'])
    args.input_size, args.device, args.world_size = (3, 32, 32), 'cpu', 1
    model = timm.create_model('resnet10t').train()
    assert 'GFLOPs' in describe(args, model, (40, 8), 7, Path('here'))[0]
    assert model.training and model.bn1.training


def test_a_less_usual_run_is_described():
    flags = '--train-img-sizes 16 32 --train-batch-sizes 8 2 --kd-model-name runs/large --model-dtype bfloat16'
    args = parse_arguments(
        ['--dataset', 'digits', '--model', 'test_vit_sape2', '--torchcompile', '--epochs', '1', *flags.split()]
    )
    args.input_size, args.device, args.world_size = (3, 32, 32), 'cpu', 1
    model = timm.create_model('test_vit_sape2', dynamic_img_size=True).bfloat16()
    lines = describe(args, model, (40, 8), 7, Path('here'))
    assert 'GFLOPs' in lines[0]
    assert ', 16x16, 32x32 (validated at 32x32), ' in lines[1]
    assert lines[2] == 'Training: 1 epoch of 7 batches of 8, 2, adamw, rate 0.0005, teacher runs/large'
    assert lines[3].endswith(', bfloat16, compiled by inductor')


def test_command_that_validates(tmp_path, photos, capsys):
    """The one that train.py prints, on the images that it was trained on."""
    flags = ['--model', 'test_vit_sape2', '--img-size', '16', '32', '--model-kwargs', 'depth=1', '--num-classes', '2']
    data = ['--data-dir', str(photos), '-b', '4', '--epochs', '1', '--warmup-epochs', '0', '--workers', '0']
    assert train.main([*flags, *data, '--output', str(tmp_path), '--experiment', 'my run']) == 0
    printed = capsys.readouterr().out.splitlines()
    (command,) = (line for line in printed if line.strip().startswith('timm-sape2 validate'))
    assert 'DIR' not in command and not any('Train on your images' in line for line in printed)
    main([*shlex.split(command)[1:], '-j', '0'])
    assert 'top-1' in capsys.readouterr().out
