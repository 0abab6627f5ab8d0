"""Recipes: YAML files whose keys are the flags of training, with underscores."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from .._names import did_you_mean
from .._shipped import shipped


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: the one of this path or, if there is none, the one that comes with the package.

    Args:
        name: A path; or a model and its tag, such as 'vit_compact_sape2_patch4_32.cifar10', for train.yaml of its
            folder in hub_configs, and with '/pretrain.yaml' after it for the other recipe there.
    """
    candidates = (Path(name), shipped() / name / 'train.yaml', shipped() / name)
    return next((path for path in candidates if path.is_file()), Path(name))


def recipe_arguments(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Read a recipe as the command line that says the same, so that one set of rules checks both.

    `{'lr': 0.001, 'img_size': [32, 48], 'amp': True}` is `--lr 0.001 --img-size 32 48 --amp`. A null is left out.

    Args:
        path: The YAML file.
        parser: The parser of the command line; it must raise its errors as ValueError.

    Raises:
        ValueError: If the file is no mapping, or for a key or a value that the parser does not know; it names them.
    """
    recipe = read_recipe(path)
    defaults = vars(parser.parse_args([]))
    defaults.pop('config')
    unknown = [key for key in recipe if key not in defaults]
    if unknown:
        raise ValueError(f'{path}: unknown {_listed(unknown, list(defaults))}')
    arguments = []
    for key, value in recipe.items():
        try:
            words = _words(key, value, is_flag=isinstance(defaults[key], bool))
            parser.parse_args(words)
        except ValueError as error:
            raise ValueError(f'{path}: {key}: {error}') from None
        arguments += words
    return arguments


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe as it stands.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise OSError(f'cannot read the recipe {path}: {error.strerror}') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not a YAML file: {" ".join(str(error).split())}') from None
    if not isinstance(recipe, dict):
        raise ValueError(f'{path} must be a mapping of flags, as `batch_size: 128`')
    return recipe


def _listed(unknown: list[Any], known: list[str]) -> str:
    names = [repr(key) + did_you_mean(str(key).replace('-', '_'), known) for key in unknown]
    return f'{"key" if len(unknown) == 1 else "keys"} {", ".join(names)}'


def _words(key: str, value: Any, is_flag: bool) -> list[str]:
    option = '--' + key.replace('_', '-')
    if value is None:
        return []
    if is_flag:
        if not isinstance(value, bool):
            raise ValueError(f'must be true or false, not {value!r}')
        return [option] if value else []
    if isinstance(value, dict):
        return [option, *(f'{name}={content!r}' for name, content in value.items())]
    if isinstance(value, (list, tuple)):
        return [option, *map(str, value)]
    return [f'{option}={value}']
