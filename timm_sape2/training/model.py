"""Creating the model of a run and its optimizer, with errors that say which flag to change."""

import argparse
import difflib
from typing import Any

import torch
from timm.models import (
    create_model,
    is_model,
    list_models,
    load_checkpoint,
    parse_model_name,
    resolve_model_input_args,
)
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from torch import nn
from torch.optim import Optimizer

from ..trained.checkpoint import read_checkpoint


def build_model(args: argparse.Namespace, with_weights: bool = True) -> Any:
    """Create the model that the flags describe, with the weights that they name.

    Args:
        args: The arguments of the run.
        with_weights: Load them; a run that is resumed does not need them.

    Raises:
        OSError: If a file of weights is missing.
        ValueError: If there is no such model, it does not take the arguments, or the weights do not fit it.
    """
    source, name = parse_model_name(args.model)
    if source is None and not is_model(name):
        close = difflib.get_close_matches(name.split('.')[0], list_models(), n=3, cutoff=0.5)
        raise ValueError(f'unknown --model {name}' + (f'; close names: {", ".join(close)}' if close else ''))
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        backends = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'unknown backend of --torchcompile: {args.torchcompile}; backends: {backends}')
    weights = [path for path in (args.initial_checkpoint, args.pretrained_path) if path and with_weights]
    for path in weights:
        read_checkpoint(path)
    try:
        model: Any = create_model(**_model_arguments(args, with_weights))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        arguments = ', '.join(f'{name}={value!r}' for name, value in args.model_kwargs.items()) or 'these arguments'
        raise ValueError(f'cannot create {args.model} with {arguments}: {error}') from error
    if args.initial_checkpoint and with_weights:
        try:
            load_checkpoint(model, args.initial_checkpoint)
        except RuntimeError as error:
            raise ValueError(
                f'--initial-checkpoint does not fit the model, --pretrained-path would adapt it: {error}'
            ) from error
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """Create the optimizer of a model.

    Raises:
        ValueError: If there is no such optimizer, or it does not have one of the options that are given.
    """
    info = get_optimizer_info(args.opt)
    if args.opt_eps is not None and not info.has_eps:
        raise ValueError(f'--opt {args.opt} has no --opt-eps')
    if args.opt_betas is not None and len(args.opt_betas) != (info.num_betas if info.has_betas else 0):
        raise ValueError(f'--opt {args.opt} takes {info.num_betas if info.has_betas else "no"} --opt-betas')
    return create_optimizer_v2(model, **optimizer_kwargs(args))


def _model_arguments(args: argparse.Namespace, with_weights: bool) -> dict[str, Any]:
    arguments = resolve_model_input_args(
        args.model,
        dict(img_size=args.img_size, in_chans=args.in_chans),
        **{
            'num_classes': args.num_classes,
            'drop_rate': args.drop,
            'drop_path_rate': args.drop_path,
            **args.model_kwargs,
        },
    )
    if not with_weights:
        return arguments
    if args.pretrained_path:
        arguments['pretrained_cfg'].update(_description(args.pretrained_path, arguments['pretrained_cfg']))
    return dict(arguments, pretrained=args.pretrained or bool(args.pretrained_path))


def _description(path: str, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """Describe a file of weights to timm, which adapts them to the model where the two differ."""
    checkpoint = read_checkpoint(path)
    description: dict[str, Any] = dict(file=path, source='', custom_load=False)
    trained_with = vars(checkpoint.get('args', argparse.Namespace()))
    if 'input_size' in trained_with:
        description['input_size'] = tuple(trained_with['input_size'])
    head = checkpoint.get('state_dict', checkpoint).get(f'{pretrained_cfg["classifier"]}.weight')
    if head is not None:
        description['num_classes'] = len(head)
    return description
