"""The arguments that name a trained model, which several commands share."""

import argparse

from ..trained.opening import TrainedModel, open_model
from ..training.arguments import KeyValues, positive_int


def add_model_arguments(parser: argparse.ArgumentParser, img_size: bool = True) -> None:
    """Add what a checkpoint may not say of itself, and what can be changed."""
    group = parser.add_argument_group('the model')
    group.add_argument('--model', metavar='NAME', help='for weights that do not name it, or none')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='and its arguments'
    )
    group.add_argument('--no-ema', action='store_true', help='not the moving average of the weights')
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
    size = getattr(arguments, 'img_size', None)
    if size is not None and len(size) > 2:
        raise ValueError(f'--img-size takes a side, or a height and a width, not {len(size)} numbers')
    return open_model(
        source,
        arguments.model,
        arguments.model_kwargs,
        None if size is None else (size[0], size[-1]),
        ema=not arguments.no_ema,
    )
