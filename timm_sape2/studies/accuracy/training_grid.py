"""Training one model in variants that differ in their position encoding alone."""

import argparse
import ast
import copy
import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm import utils
from torch import nn

from ...data import datasets
from ...models.vit import PositionVisionTransformer
from ...positions import parse_position
from ...training.arguments import flags_of, parse_arguments, recipe_and_data
from ...training.loop import fit, set_up
from ...training.model import build_model
from ...training.processes import SignalCatcher
from ...training.run_folder import path_of_run
from ..study import Row, Unit

MODEL_FLAGS = ('--model', 'vit_compact_sape2_patch4_32', '--num-classes', '10', '--checkpoint-hist', '1')
DIGITS_FLAGS = (
    *('--dataset', 'digits', '--epochs', '8', '--warmup-epochs', '1', '--batch-size', '64', '--lr', '1e-3'),
    *('--clip-grad', '1', '--hflip', '0', '--color-jitter', '0', '--scale', '0.6', '1', '--workers', '0'),
)
NOT_OF_THE_RESULT = ('output', 'experiment', 'resume', 'device', 'log_interval', 'recovery_interval', 'checkpoint_hist')


def parse_training_flags(flags: Sequence[str]) -> argparse.Namespace:
    """Parse flags of train.py. Without a recipe the model is the compact one, and without data it learns the digits.

    Raises:
        ValueError: A flag is wrong, the model is not one of this package, or the data does not fit it.
    """
    named = recipe_and_data(flags)
    defaults = () if named.config else MODEL_FLAGS if named.data_dir or named.dataset else (*MODEL_FLAGS, *DIGITS_FLAGS)
    args = parse_arguments([*defaults, *flags])
    for name in ('position', 'position_args'):
        if name in args.model_kwargs:
            raise ValueError(f'--model-kwargs {name}=... is what the study varies; leave it out')
    model = check_model(args, {})
    open_both = datasets.open_train_and_validation
    train_set, _ = open_both(args.in_chans or model.in_chans, **flags_of(open_both, args))
    datasets.check_class_count(train_set, model.num_classes)
    return args


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that the result of a run depends on, apart from the factors of a study."""
    return {name: value for name, value in vars(args).items() if name not in (*NOT_OF_THE_RESULT, 'seed')}


def encoding_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a model for encodings with options, such as 'learned+rope(coordinates=max, jitter=2)'.

    Raises:
        ValueError: It is not of this form, or an encoding or an option is unknown.
    """
    arguments: dict[str, dict[str, Any]] = {}
    names = []
    for part in re.split(r'\+(?![^(]*\))', name):
        match = re.fullmatch(r'([^()]*)(?:\(([^()]*)\))?', part)
        options = [option.partition('=') for option in match[2].split(',')] if match and match[2] else []
        if match is None or not all(equals for _, equals, _ in options):
            raise ValueError(f"{name!r} is not like 'rope', 'learned+rope' or 'rope(coordinates=max, jitter=2)'")
        names.append(match[1])
        if options:
            arguments[match[1]] = {option.strip(): _literal(value.strip()) for option, _, value in options}
    parse_position('+'.join(names), arguments)
    return {'position': '+'.join(names), **({'position_args': arguments} if arguments else {})}


def encoding_with_options(position: str, position_args: Mapping[str, Mapping[str, Any]]) -> str:
    """Return encodings and their options as `encoding_arguments` reads them."""
    named = []
    for name in position.split('+'):
        options = ', '.join(f'{option}={value}' for option, value in position_args.get(name, {}).items())
        named.append(f'{name}({options})' if options else name)
    return '+'.join(named)


def _literal(text: str) -> Any:
    """Return a value that is written as in Python, or true or false as in YAML; all else is text."""
    if text in ('true', 'false'):
        return text == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_model(args: argparse.Namespace, model_kwargs: Mapping[str, Any]) -> PositionVisionTransformer:
    """Create the model of a run on the meta device, with some of its arguments changed.

    Raises:
        ValueError: It cannot be created with these arguments, or is not one of this package.
    """
    try:
        kwargs = {'num_classes': args.num_classes, **args.model_kwargs, **model_kwargs, 'device': 'meta'}
        model = timm.create_model(args.model, img_size=args.img_size, in_chans=args.in_chans, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'cannot create {args.model} with {dict(model_kwargs)}: {error}') from error
    if not isinstance(model, PositionVisionTransformer):
        raise ValueError(f"--model {args.model} has no exchangeable position encoding; 'timm-sape2 list' shows those")
    return model


def train(args: argparse.Namespace, name: str, model_kwargs: Mapping[str, Any], seed: int, folder: Path) -> list[Row]:
    """Train one variant, or go on with it, and return what the epochs gave.

    For one seed, all variants get the same batches in the same order, and the same initial weights except those of
    the position encoding.

    Args:
        args: The arguments that all variants share.
        name: Name of the variant, its folder.
        model_kwargs: What the variant changes in the model.
        seed: Seed of the run.
        folder: Folder of the study.

    Returns:
        Epoch, training and validation loss and top-1 accuracy in percent; one row of NaN if training diverged.
    """
    args = copy.deepcopy(args)
    args.model_kwargs.update(model_kwargs)
    args.seed, args.output, args.experiment, args.resume = seed, str(folder / 'runs'), name, 'auto'
    try:
        return train_run(args, initialize=partial(share_initial_weights, args=args))
    except FloatingPointError:
        return [{'epoch': args.epochs - 1, 'train_loss': math.nan, 'eval_loss': math.nan, 'top1': math.nan}]


def train_run(args: argparse.Namespace, initialize: Callable[[nn.Module], None] | None = None) -> list[Row]:
    """Do a run of train.py, or what is left of it, and return what its epochs gave, as `train` does.

    Raises:
        FloatingPointError: If training diverges.
    """
    run = set_up(args, initialize)
    with SignalCatcher() as signals:
        fit(run, signals)
    with open(path_of_run(args.output, args.experiment, args.model) / 'summary.csv', newline='') as file:
        return [
            {
                'epoch': int(row['epoch']),
                'train_loss': float(row['train_loss']),
                'eval_loss': float(row['eval_loss']),
                'top1': float(row['eval_top1']),
            }
            for row in csv.DictReader(file)
        ]


def share_initial_weights(model: nn.Module, args: argparse.Namespace) -> None:
    """Give a model the initial weights that it would have without position encoding, apart from the encoding's own."""
    plain = copy.deepcopy(args)
    plain.model_kwargs = {name: value for name, value in args.model_kwargs.items() if name != 'position_args'}
    plain.model_kwargs['position'] = 'nope'
    utils.random_seed(args.seed)
    shared = build_model(with_weights=False, **flags_of(build_model, plain)).state_dict()
    model.load_state_dict({**model.state_dict(), **shared})


def last_epochs(rows: Sequence[Row], factors: Sequence[str]) -> list[Row]:
    """Return the row of the last epoch of every run, runs being told apart by some factors."""
    last: dict[tuple, Row] = {}
    for row in rows:
        run = tuple(row[factor] for factor in factors)
        if run not in last or row['epoch'] > last[run]['epoch']:
            last[run] = row
    return list(last.values())


def with_seeds(variants: Sequence[Unit], seeds: Sequence[int]) -> list[Unit]:
    """Return every variant with every seed, a seed after the other, so that a study stopped early is even."""
    return [{**variant, 'seed': seed} for seed in seeds for variant in variants]
