"""Recipes are command lines in another form, and are checked as strictly."""

import pytest

from timm_sape2.training.arguments import build_parser
from timm_sape2.training.recipe import recipe_arguments


@pytest.fixture
def recipe(tmp_path):
    """Function that writes a recipe and returns its path."""

    def write(text):
        path = tmp_path / 'recipe.yaml'
        path.write_text(text)
        return path

    return write


def test_recipe_is_a_command_line(recipe):
    path = recipe('lr: 5e-4\nimg_size: [32, 48]\namp: true\nmodel_ema: false\ndrop_path: null\n')
    assert recipe_arguments(path, build_parser()) == ['--lr=5e-4', '--img-size', '32', '48', '--amp']


def test_values_keep_their_types(recipe):
    path = recipe("model_kwargs: {position: sape2, depth: 2, position_args: {sape2: {target: q}}}\nexperiment: '007'\n")
    args = build_parser().parse_args(recipe_arguments(path, build_parser()))
    assert args.model_kwargs == {'position': 'sape2', 'depth': 2, 'position_args': {'sape2': {'target': 'q'}}}
    assert args.experiment == '007'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 3', r"unknown key 'epoch' \(did you mean 'epochs'\?\)"),
        ('batch-size: 3\nxyz: 1', r"unknown keys 'batch-size' \(did you mean 'batch_size'\?\), 'xyz'"),
        ('config: other.yaml', "unknown key 'config'"),
        ('epochs: many', "epochs: argument --epochs: must be a whole number above 0, not 'many'"),
        ('epochs: 1.5', "epochs: argument --epochs: must be a whole number above 0, not '1.5'"),
        ('lr: true', "lr: argument --lr: must be a number above 0, not 'True'"),
        ('hflip: 2', "hflip: argument --hflip: must be a number from 0 to 1, not '2'"),
        ('batch_size: [32, 64]', 'batch_size: '),
        ('scale: 0.5', 'scale: argument --scale: expected 2 arguments'),
        ('amp: 3', 'amp: must be true or false, not 3'),
        ('sched: cosin', 'sched: argument --sched: invalid choice'),
        ('model_kwargs: sape2', 'model_kwargs: argument --model-kwargs: must be KEY=VALUE'),
        ('- lr', 'must be a mapping of flags'),
        ('lr: [1', 'is not a YAML file'),
        ('', 'must be a mapping of flags'),
    ],
)
def test_what_a_recipe_says_wrong_is_named(text, message, recipe):
    with pytest.raises(ValueError, match=rf'recipe.yaml:? .*{message}'):
        recipe_arguments(recipe(text), build_parser())


def test_missing_recipe(tmp_path):
    with pytest.raises(OSError, match=r'cannot read the recipe .*missing.yaml: No such file'):
        recipe_arguments(tmp_path / 'missing.yaml', build_parser())
