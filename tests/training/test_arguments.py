"""The command line: what it takes, how it goes together with recipes, and that it explains itself."""

import argparse
from pathlib import Path

import pytest

from timm_sape2.training.arguments import build_parser, parse_arguments

DIGITS = Path(__file__).parents[2] / 'hub_configs' / 'vit_compact_sape2_patch4_32.digits' / 'train.yaml'


def test_command_line_wins_over_recipe(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 0.1\nepochs: 7\namp: true\nmodel_ema: true\n')
    args = parse_arguments(['-c', str(recipe), '--lr', '0.2', '--no-amp'], DIGITS)
    assert (args.lr, args.epochs, args.amp, args.model_ema) == (0.2, 7, False, True)


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
        ('--epoch 3', 'unrecognized arguments: --epoch 3'),
        ('--img-size 1 2 3', 'takes a side, or a height and a width, not 3 numbers'),
        ('--lr nan', 'must be a number above 0'),
        ('--momentum x', 'invalid float value'),
        ('-c', 'expected one argument'),
    ],
)
def test_errors_are_raised_not_printed(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argv.split(), DIGITS)


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
