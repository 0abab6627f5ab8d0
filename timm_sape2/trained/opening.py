"""Opening a trained model, be it a checkpoint file, a folder or a repository of the Hub, with all it says of itself."""

import argparse
import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import clean_state_dict, get_model_input_config, get_pretrained_cfg, is_model, parse_model_name

from ..factory import create_model
from ..models.convert import checkpoint_filter_fn
from ..models.vit import PositionVisionTransformer
from .checkpoint import read_checkpoint

_logger = logging.getLogger(__name__)

AVERAGES = ('state_dict_ema', 'model_ema')
WEIGHTS = ('state_dict', 'model')
PREPROCESSING = ('mean', 'std', 'crop_pct', 'interpolation')
LAST = 'last.pth.tar'
REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
FILE = re.compile(r'.+\.(pth|pt|tar|bin|ckpt|safetensors)')


@dataclasses.dataclass
class TrainedModel:
    """A model with its weights.

    Args:
        model: The model, on the CPU, in evaluation mode.
        weights: Which weights these are: 'weights', or 'moving average of the weights'.
        training: What a checkpoint says of its training, some of 'args' (a mapping), 'epoch' and 'metric'.
        folder: The folder that it came from, None for a file and for the Hub.
        run: The folder that its checkpoint lies in, that of the run if it is one of train.py; None for other sources.
    """

    model: Any
    weights: str = 'weights'
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    run: Path | None = None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, from the checkpoint or the configuration; None if they have none."""
        names = self.model.pretrained_cfg.get('label_names')
        return list(names) if names is not None and len(names) == self.model.num_classes else None

    @property
    def data_config(self) -> dict[str, Any]:
        """Input size, normalization, cropping and interpolation, as timm's transforms and loaders take them."""
        return resolve_input_data_config(self.model, {'input_size': get_model_input_config(self.model)['input_size']})


def open_model(
    source: str,
    model_name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: tuple[int, int] | None = None,
    ema: bool = True,
) -> TrainedModel:
    """Open a trained model.

    Args:
        source: A checkpoint file, the folder of a run of train.py (its last weights), a folder with config.json and
            weights, or 'OWNER/NAME' on the Hub, with '@REVISION' after it or not; 'local-dir:' or 'hf-hub:' before it
            decides what it is.
        model_name: The model, for a checkpoint that names none or is to be converted.
        model_kwargs: More of its arguments.
        img_size: Height and width to use it at, by default those it was trained at.
        ema: Prefer the moving average of the weights where a checkpoint has both.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is no such model, or it does not load; the message says why.
    """
    if Path(source, LAST).is_file():
        source = str(Path(source, LAST))
    if Path(source).is_file() or (FILE.fullmatch(source) and ':' not in source):
        opened = _open_checkpoint(Path(source), model_name, model_kwargs or {}, img_size, ema)
    else:
        opened = _open_configured(source, dict(model_kwargs or {}, img_size=img_size))
        if model_name not in (None, opened.model.pretrained_cfg['architecture']):
            raise ValueError(f'{source} is a {opened.model.pretrained_cfg["architecture"]}, not a {model_name}')
    opened.model.eval()
    return opened


def fingerprint(model: torch.nn.Module) -> str:
    """Return a SHA-256 over names and values of the weights, the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open_configured(source: str, arguments: dict[str, Any]) -> TrainedModel:
    if Path(source).is_dir():
        source = f'local-dir:{source}'
    elif REPOSITORY.fullmatch(source.partition('@')[0]):
        source = f'hf-hub:{source}'
    elif ':' not in source:
        raise ValueError(f'{source} is no checkpoint, no folder and no OWNER/NAME on the Hub')
    kind, name = parse_model_name(source)
    model = create_model(source, pretrained=True, **arguments)
    if arguments.keys() - {'img_size'}:
        trained, asked = (getattr(m, 'position_name', None) for m in (create_model(source, device='meta'), model))
        if asked != trained:
            raise ValueError(f'{source} was trained with position={trained!r}, not {asked!r}')
    return TrainedModel(model, folder=Path(name) if kind == 'local-dir' else None)


def _open_checkpoint(
    path: Path,
    model_name: str | None,
    model_kwargs: Mapping[str, Any],
    img_size: tuple[int, int] | None,
    ema: bool,
) -> TrainedModel:
    checkpoint = read_checkpoint(path)
    entry = next((key for key in (*(AVERAGES if ema else ()), *WEIGHTS) if checkpoint.get(key) is not None), None)
    state_dict = clean_state_dict(checkpoint if entry is None else checkpoint[entry])
    args = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    name = model_name or args.get('model')
    if name is None:
        raise ValueError(f'{path} does not say which model it is of: add --model NAME')
    kwargs = {'global_pool': args.get('gp'), **(args.get('model_kwargs') or {}), **model_kwargs}
    try:
        description = _description(name, {**args, **kwargs}, state_dict)
        description['label_names'] = _class_names(checkpoint.get('class_names'))
        if img_size is not None:
            kwargs['img_size'] = img_size
        if (model_name or model_kwargs) and is_model(args.get('model') or ''):
            _check_encoding(args, name, kwargs)
        model: Any = timm.create_model(name, pretrained_cfg_overlay=description, **kwargs)
        if isinstance(model, PositionVisionTransformer):
            state_dict = checkpoint_filter_fn(state_dict, model)
        model.load_state_dict(state_dict)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f'{path} does not load as {name}: {" ".join(str(error).split())}') from error
    if entry in AVERAGES:
        _logger.info(f'{path} has a moving average of the weights, which is taken')
    training = dict({key: checkpoint[key] for key in ('epoch', 'metric') if checkpoint.get(key) is not None}, args=args)
    if entry not in AVERAGES and any(checkpoint.get(key) is not None for key in AVERAGES):
        training.pop('metric', None)  # it is that of the moving average
    weights = 'moving average of the weights' if entry in AVERAGES else 'weights'
    return TrainedModel(model, weights, training, run=path.parent)


def _class_names(names: Any) -> list[str] | None:
    """Return the names that a checkpoint says its classes have, None for what could not be names."""
    are_names = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return names if are_names else None


def _check_encoding(args: Mapping[str, Any], name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a model has another position encoding than the one that was trained.

    Encodings without parameters have the same weights, so that loading does not notice.
    """
    trained, asked = (
        getattr(timm.create_model(model, device='meta', **arguments), 'position_name', None)
        for model, arguments in ((args['model'], args.get('model_kwargs') or {}), (name, kwargs))
    )
    if trained is not None and asked != trained:
        raise ValueError(f'it was trained with position={trained!r}, not {asked!r}')


def _description(name: str, args: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Describe weights to timm: what they were trained with, where that is not what the model has by default."""
    description = {key: args[key] for key in PREPROCESSING if args.get(key)}
    if args.get('input_size') or args.get('img_size'):
        description['input_size'] = tuple(
            args.get('input_size') or (args.get('in_chans') or 3, *to_2tuple(args['img_size']))
        )
    cfg = get_pretrained_cfg(name)
    head = state_dict.get(f'{cfg.classifier}.weight') if cfg is not None else None
    if head is not None:
        description['num_classes'] = len(head)
    return description
