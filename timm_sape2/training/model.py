"""Creating the model of a run and its optimizer, with errors that say which flag to change."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import create_model, parse_model_name, resolve_model_input_args
from timm.optim import Muon, create_optimizer_v2, get_optimizer_class, get_optimizer_info
from torch import nn
from torch.optim import Optimizer

from .._names import did_you_mean
from ..trained.checkpoint import Checkpoint
from ..trained.encodings import check_encodings, encodings_of
from ..trained.opening import check_model_name, open_model

NO_OPTIONS = {'params', 'model_or_params', 'param_group_fn', 'kwargs', 'args'}
OPTIONS_WITH_A_FLAG = {
    'opt': '--opt',
    'lr': '--lr',
    'weight_decay': '--weight-decay',
    'momentum': '--momentum',
    'eps': '--opt-eps',
    'betas': '--opt-betas',
    'layer_decay': '--layer-decay',
}


def build_model(
    with_weights: bool = True,
    *,
    model: str,
    model_kwargs: Mapping[str, Any],
    img_size: Sequence[int] | None,
    in_chans: int | None,
    num_classes: int | None,
    drop: float,
    drop_path: float | None,
    pretrained: bool,
    pretrained_path: str,
    initial_checkpoint: str,
    grad_checkpointing: bool,
) -> Any:
    """Create the model that the flags describe, with the weights that they name.

    Args:
        with_weights: Load weights; a run that is resumed does not need them.
        model: Name of the model, or where it comes from.
        model_kwargs: Its other arguments.
        img_size: Height and width, None for those of the model, as with all that follows.
        in_chans: Channels of the images.
        num_classes: Number of classes.
        drop: Dropout before the classifier.
        drop_path: Stochastic depth.
        pretrained: Start from the published weights.
        pretrained_path: Start from these weights, which are adapted.
        initial_checkpoint: Start from these weights, which must fit.
        grad_checkpointing: Compute activations again in the backward pass.

    Raises:
        OSError: If a file of weights is missing.
        ValueError: If there is no such model, it does not take the arguments, or the weights do not fit it.
    """
    source, name = parse_model_name(model)
    if source is None:
        check_model_name(name, '--model')
    created: Any = None
    exact = Checkpoint.read(initial_checkpoint) if initial_checkpoint and with_weights else None
    try:
        arguments = resolve_model_input_args(
            model,
            dict(img_size=img_size, in_chans=in_chans),
            **{'num_classes': num_classes, 'drop_rate': drop, 'drop_path_rate': drop_path, **model_kwargs},
        )
        if not (pretrained_path and with_weights):
            created = create_model(**arguments, pretrained=pretrained and with_weights)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f'cannot create {model} with {_listed(model_kwargs)}: {error}') from error
    if created is None:
        adapted = {key: value for key, value in arguments.items() if key not in ('model_name', 'pretrained_cfg')}
        name = model if source is None else arguments['model_name']
        created = open_model(pretrained_path, name, adapted, to_train=True).model
    if exact is not None:
        try:
            check_encodings(exact.encodings(), encodings_of(created))
        except ValueError as error:
            raise ValueError(f'--initial-checkpoint {exact.path}: {error}') from error
        try:
            created.load_state_dict(exact.weights if exact.average is None else exact.average)
        except RuntimeError as error:
            raise ValueError(
                f'--initial-checkpoint does not fit the model, --pretrained-path would adapt it: {error}'
            ) from error
    if grad_checkpointing:
        created.set_grad_checkpointing()
    return created


def check_compilation(backend: str | None, mode: str | None) -> None:
    """Raise a ValueError if torch.compile has no such backend or that has no such mode; None for neither."""
    if mode is not None and backend != 'inductor':
        raise ValueError(f'--torchcompile-mode {mode} is one of the backend inductor: add --torchcompile')
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        backends = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'unknown backend of --torchcompile: {backend}; backends: {backends}')


def create_optimizer(
    model: nn.Module, opt: str, opt_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Optimizer:
    """Create the optimizer of a model.

    Muon orthogonalizes the updates of weight matrices only. Position tables have the shape of a matrix but are none:
    they go, with all else that gets no weight decay, to its AdamW, unless `opt_kwargs` has fallback_no_weight_decay.

    Args:
        model: The module whose parameters are trained.
        opt: timm's name of the optimizer.
        opt_kwargs: More options, by the names of its own arguments or of those of `timm.optim.create_optimizer_v2`.
        **options: What flags of their own say, as `timm.optim.optimizer_kwargs` returns it.

    Raises:
        ValueError: If there is no such optimizer, or it does not have one of the options that are given.
    """
    more = dict(opt_kwargs or {})
    info = get_optimizer_info(opt)
    if options.get('eps') is not None and not info.has_eps:
        raise ValueError(f'--opt {opt} has no --opt-eps')
    betas = options.get('betas')
    if betas is not None and len(betas) != (info.num_betas if info.has_betas else 0):
        raise ValueError(f'--opt {opt} takes {info.num_betas if info.has_betas else "no"} --opt-betas')
    optimizer_class = get_optimizer_class(opt, bind_defaults=False)
    own, factory = (
        {*inspect.signature(function).parameters} - NO_OPTIONS for function in (optimizer_class, create_optimizer_v2)
    )
    for name in more:
        if name in OPTIONS_WITH_A_FLAG:
            raise ValueError(f'--opt-kwargs {name}: use {OPTIONS_WITH_A_FLAG[name]}')
        if name not in own | factory:
            raise ValueError(f'--opt {opt} has no --opt-kwargs {name}{did_you_mean(name, sorted(own))}')
    if optimizer_class is Muon:
        more.setdefault('fallback_no_weight_decay', True)
    try:
        return create_optimizer_v2(model, opt, **{**options, **more})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f'cannot create --opt {opt} with {_listed(opt_kwargs or {})}: {error}') from error


def _listed(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in arguments.items()) or 'these arguments'
