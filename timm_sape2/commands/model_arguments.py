"""The arguments that name a trained model, which several commands share."""

import argparse
from typing import Any

import timm

from .._arguments import KeyValues, positive_int
from ..trained.opening import TrainedModel, check_model_name, open_model


def add_model_arguments(parser: argparse.ArgumentParser, img_size: bool = True) -> None:
    """Add what a checkpoint may not say of itself, and what can be changed."""
    group = parser.add_argument_group('the model')
    group.add_argument('--model', metavar='NAME', help='model, if the checkpoint does not say which')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='arguments of the model'
    )
    group.add_argument('--no-ema', action='store_true', help='use the raw weights instead of their EMA')
    if img_size:
        group.add_argument(
            '--img-size',
            type=positive_int,
            nargs='+',
            metavar='N',
            help="side, or height and width (default: the model's)",
        )


def open_named_model(arguments: argparse.Namespace, source: str) -> TrainedModel:
    """Open the model that the arguments name."""
    size = _image_size(arguments)
    return open_model(source, arguments.model, arguments.model_kwargs, size, ema=not arguments.no_ema)


def create_named_model(arguments: argparse.Namespace) -> TrainedModel:
    """Create the model that the arguments name, without weights.

    Raises:
        ValueError: There is no such model, or it does not take these arguments.
    """
    check_model_name(arguments.model, '--model')
    kwargs: dict[str, Any] = {'img_size': _image_size(arguments), **arguments.model_kwargs}
    try:
        return TrainedModel(timm.create_model(arguments.model, **kwargs).eval())
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f'cannot create {arguments.model}: {error}') from error


def _image_size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    size = getattr(arguments, 'img_size', None)
    if size is not None and len(size) > 2:
        raise ValueError(f'--img-size takes a side, or a height and a width, not {len(size)} numbers')
    return None if size is None else (size[0], size[-1])
