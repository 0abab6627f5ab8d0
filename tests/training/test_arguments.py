"""The command line: what it takes, how it goes together with recipes, and that it explains itself."""

import argparse
import os
from pathlib import Path

import pytest

from timm_sape2.training.arguments import build_parser, flags_of, parse_arguments

DIGITS = Path(__file__).parents[2] / 'hub_configs' / 'vit_compact_sape2_patch4_32.digits' / 'train.yaml'


def test_command_line_wins_over_recipe(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 0.1\nepochs: 7\namp: true\nmodel_ema: true\n')
    args = parse_arguments(['-c', str(recipe), '--lr', '0.2', '--no-amp'], DIGITS)
    assert (args.lr, args.epochs, args.amp, args.model_ema) == (0.2, 7, False, True)


@pytest.mark.parametrize(
    ('recipe', 'img_size'),
    [('vit_compact_sape2_patch4_32.cifar10', 32), ('vit_compact_sape2_patch4_32.cifar10/pretrain.yaml', 20)],
)
def test_recipes_that_come_with_the_package(recipe, img_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse_arguments(['-c', recipe])
    assert (args.dataset, args.img_size, args.config) == ('torch/cifar10', (img_size, img_size), recipe)
    with pytest.raises(OSError, match='cannot read the recipe vit_nothing'):
        parse_arguments(['-c', 'vit_nothing'])
    file = tmp_path / recipe
    file.parent.mkdir(exist_ok=True)
    file.write_text('img_size: 8\n')
    assert parse_arguments(['-c', recipe]).img_size == (8, 8), 'a file of that name comes first'


def test_default_recipe_is_for_who_names_no_data():
    assert parse_arguments(['--epochs', '3'], DIGITS).dataset == 'digits'
    assert parse_arguments(['--data-dir', 'photos'], DIGITS).dataset == ''
    assert parse_arguments(['--dataset', 'torch/cifar10'], DIGITS).img_size is None


@pytest.mark.parametrize(('text', 'size'), [('16', (16, 16)), ('32 48', (32, 48))])
def test_image_size_is_a_side_or_height_and_width(text, size):
    assert parse_arguments(['--img-size', *text.split()], DIGITS).img_size == size


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ('--epoch 3', r"unrecognized arguments: --epoch 3 \(did you mean '--epochs'\?\)"),
        ('--batchsize 3', r"unrecognized arguments: --batchsize 3 \(did you mean '--batch-size'\?\)"),
        ('--img-size 1 2 3', 'takes a side, or a height and a width, not 3 numbers'),
        ('--lr nan', 'must be a number above 0'),
        ('--momentum x', 'invalid float value'),
        ('-c', 'expected one argument'),
    ],
)
def test_errors_are_raised_not_printed(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argv.split(), DIGITS)


def test_each_loader_has_its_augmentation():
    args = parse_arguments(['--dataset', 'digits'])
    assert (args.loader, args.train_crop_mode, args.color_jitter) == ('workers', None, 0.4)
    args = parse_arguments(['--dataset', 'digits', '--loader', 'memory'])
    assert (args.train_crop_mode, args.color_jitter) == ('shift', 0)
    args = parse_arguments(['--loader', 'memory', '--train-crop-mode', 'rrc', '--scale', '0.5', '1'])
    assert (args.train_crop_mode, args.scale) == ('rrc', [0.5, 1])


@pytest.mark.parametrize(
    'flag', ['--train-crop-mode rkrc', '--color-jitter 0.1', '--aa original', '--aug-repeats 2',
             '--train-interpolation bicubic'],
)  # fmt: skip
def test_what_the_loader_cannot_do_is_refused_by_name(flag):
    parse_arguments(flag.split())
    name = flag if 'mode' in flag else flag.split()[0]
    with pytest.raises(ValueError, match=f'--loader memory does not do {name}: leave it out, or use --loader workers'):
        parse_arguments([*flag.split(), '--loader', 'memory'])


def test_shifts_are_of_whole_images():
    message = '--loader memory shifts whole images: --scale, --ratio needs --train-crop-mode rrc'
    with pytest.raises(ValueError, match=message):
        parse_arguments(['--loader', 'memory', '--scale', '0.5', '1', '--ratio', '1', '1'])


@pytest.mark.parametrize('loader', ['workers', 'memory'])
def test_ranges_begin_with_the_smallest(loader):
    with pytest.raises(ValueError, match=r'--scale 1\.0 0\.5: the smallest comes first'):
        parse_arguments(f'--loader {loader} --train-crop-mode rrc --scale 1 0.5'.split())


def test_shifts_are_of_the_loader_from_memory():
    with pytest.raises(ValueError, match='--train-crop-mode shift needs --loader memory'):
        parse_arguments(['--train-crop-mode', 'shift'])


def test_no_more_loader_processes_than_cores():
    cores = len(os.sched_getaffinity(0))
    assert parse_arguments(['--workers', '1000']).workers == cores
    assert parse_arguments([]).workers == min(4, cores) and parse_arguments(['-j', '0']).workers == 0


def test_help_explains_every_flag():
    parser = build_parser()
    actions = parser._actions
    assert all(action.help for action in actions)
    assert all(
        action.metavar for action in actions if action.nargs != 0 and not action.choices and action.const is None
    )
    assert 'examples:' in parser.format_help() and 'exit codes:' in parser.format_help()


def test_names_are_those_of_timm():
    """A few that timm's recipes use, by the attribute that timm reads."""
    args = parse_arguments([], DIGITS)
    for name in (
        'validation_batch_size',
        'aug_repeats',
        'remode',
        'opt_betas',
        'grad_accum_steps',
        'mixup_switch_prob',
    ):
        assert hasattr(args, name)
    assert isinstance(args, argparse.Namespace)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--train-batch-sizes 3', '--train-batch-sizes goes with several sizes: add --train-img-sizes'),
        ('--train-img-sizes 16 32 --train-batch-sizes 3', '--train-batch-sizes takes a number for each of the 2'),
        ('--train-img-sizes 16 32 --train-size-probs 0 0', '--train-size-probs are all 0'),
        ('--train-img-sizes 16 --train-size-schedule progressive', 'give two --train-img-sizes'),
        ('--train-img-sizes 16 32 --loader memory', '--loader memory does not do --train-img-sizes'),
        ('--kd-temperature 2 --task-loss-weight 1', '--task-loss-weight, --kd-temperature needs a teacher'),
    ],
)
def test_flags_that_need_others(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags.split())


def test_steps_are_another_name_of_batches():
    assert parse_arguments(['--train-img-sizes', '8', '--train-steps-per-epoch', '3']).train_batches_per_epoch == 3


def test_a_function_gets_the_flags_that_it_takes_by_name_alone():
    def function(first, second=None, *, lr, img_size):
        return first, second, lr, img_size

    args = parse_arguments(['--dataset', 'digits', '--lr', '0.25', '--img-size', '8'])
    assert function(1, **flags_of(function, args)) == (1, None, 0.25, (8, 8))
    del args.lr
    with pytest.raises(AttributeError, match='lr'):
        flags_of(function, args)
