"""Creating the model of a run and its optimizer, with errors that say which flag to change."""

import argparse
from typing import Any

import torch
from timm.models import create_model, parse_model_name, resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from torch import nn
from torch.optim import Optimizer

from ..trained.checkpoint import Checkpoint
from ..trained.encodings import check_encodings, encodings_of
from ..trained.opening import check_model_name, open_model


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
    if source is None:
        check_model_name(name, '--model')
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        backends = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'unknown backend of --torchcompile: {args.torchcompile}; backends: {backends}')
    exact = Checkpoint.read(args.initial_checkpoint) if args.initial_checkpoint and with_weights else None
    try:
        arguments = _model_arguments(args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f'cannot create {args.model} with {_listed(args)}: {error}') from error
    if args.pretrained_path and with_weights:
        adapted = {key: value for key, value in arguments.items() if key not in ('model_name', 'pretrained_cfg')}
        name = args.model if source is None else arguments['model_name']
        model = open_model(args.pretrained_path, name, adapted, to_train=True).model
    else:
        try:
            model = create_model(**arguments, pretrained=args.pretrained and with_weights)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f'cannot create {args.model} with {_listed(args)}: {error}') from error
    if exact is not None:
        try:
            check_encodings(exact.encodings(), encodings_of(model))
        except ValueError as error:
            raise ValueError(f'--initial-checkpoint {exact.path}: {error}') from error
        try:
            model.load_state_dict(exact.weights if exact.average is None else exact.average)
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


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return resolve_model_input_args(
        args.model,
        dict(img_size=args.img_size, in_chans=args.in_chans),
        **{
            'num_classes': args.num_classes,
            'drop_rate': args.drop,
            'drop_path_rate': args.drop_path,
            **args.model_kwargs,
        },
    )


def _listed(args: argparse.Namespace) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in args.model_kwargs.items()) or 'these arguments'
