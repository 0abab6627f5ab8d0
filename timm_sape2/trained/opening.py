"""The one way to open a model that was trained: a checkpoint, a folder, the Hub, or a name whose weights are here."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from timm.models import get_model_input_config, get_pretrained_cfg, is_model, list_models, parse_model_name

from .._names import close_names
from ..models.convert import checkpoint_filter_fn
from ..models.equip import SOURCES
from ..models.vit import PositionVisionTransformer
from .checkpoint import Checkpoint, read_checkpoint
from .config import MODULE, PLUGIN, is_ours, load_config
from .encodings import check_encodings, encodings_by_name, encodings_of
from .errors import explained

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
FILE = re.compile(r'.+\.(pth|pt|tar|bin|ckpt|safetensors)')
FILES_OF_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
RAW, EMA = 'weights', 'moving average of the weights'


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
    weights: str = RAW
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
    to_train: bool = False,
) -> TrainedModel:
    """Open a trained model as it was trained, at another image size if one is given; or take its weights to train on.

    Args:
        source: A checkpoint file, the folder of a run of train.py (its last weights), a folder with config.json and
            weights, 'OWNER/NAME' on the Hub, with '@REVISION' after it or not, or the name of a model whose weights
            come with this package; 'local-dir:' or 'hf-hub:' before it decides what it is.
        model_name: The model, for a checkpoint that names none or is to be converted.
        model_kwargs: More of its arguments.
        img_size: Height and width to use it at, by default those it was trained at.
        ema: Prefer the EMA of the weights where a checkpoint has both.
        to_train: The model is the one that `model_name` and `model_kwargs` say in full, and the weights are adapted to
            its size, channels, classes and patch size. It may have position encodings that the weights do not; these
            begin at their initial values.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is no such model, folder, repository, revision or file, the Hub refuses the token or cannot
            be reached, config.json is refused, the weights are damaged or do not fit, or were trained with another
            position encoding. The message says what to do.
    """
    kwargs = dict(model_kwargs or {}) | ({} if img_size is None else {'img_size': img_size})
    path = checkpoint_file(source)
    if path is not None:
        source, checkpoint, folder = str(path), Checkpoint.read(path), None
    else:
        asked, source = source, _with_prefix(source)
        kind, place = parse_model_name(source)
        folder = Path(place) if kind == 'local-dir' else None
        with explained(source):
            config = _read_config(source)
            if not to_train and model_name not in (None, config['architecture']):
                raise ValueError(f'{asked} is a {config["architecture"]}, not a {model_name}')
            if not (to_train or is_ours(config['architecture'])):
                return TrainedModel(_create_timms_own(source, kwargs), folder=folder)
            checkpoint = _read_weights(source, config)
    name = model_name or checkpoint.model_name
    if name is None:
        raise ValueError(f'{source} does not say which model it is of: add --model NAME')
    is_ema = ema and checkpoint.average is not None
    weights = checkpoint.average if is_ema else checkpoint.weights
    create = _create_to_train if to_train else _create_as_trained
    try:
        check_model_name(name)
        if not weights:
            raise ValueError('there are no weights in it')
        model = create(checkpoint, weights, name, kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f'{source} does not load as {name}: {" ".join(str(error).split())}') from error
    if is_ema:
        _logger.info(f'{source} has an EMA of the weights, which is taken')
    training = {key: checkpoint.state[key] for key in ('epoch', 'metric') if checkpoint.state.get(key) is not None}
    if checkpoint.average is not None and not is_ema:
        training.pop('metric', None)  # it is that of the EMA
    training['args'] = checkpoint.args
    return TrainedModel(model, EMA if is_ema else RAW, training if path else {}, folder, path.parent if path else None)


def as_trained(model: Any) -> TrainedModel:
    """Return a model of timm as it is, or open the one that a checkpoint, folder or repository is.

    Args:
        model: A `TrainedModel`, a model of timm, or what `open_model` takes.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is no model of timm, or does not open.
    """
    if isinstance(model, TrainedModel):
        return model
    if isinstance(model, (str, Path)):
        return open_model(str(model))
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'a model of timm, a checkpoint, a folder or OWNER/NAME is needed, not {type(model).__name__}')
    return TrainedModel(model)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode, and put back the mode of every module of it in the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_file(source: str) -> Path | None:
    """Return the file that a source is or, as the folder of a run, means; None for other sources."""
    if Path(source, LAST).is_file():
        return Path(source, LAST)
    if Path(source).is_file() or (FILE.fullmatch(source) and ':' not in source):
        return Path(source)
    return None


def split_revision(source: str) -> tuple[str, str | None]:
    """Split 'OWNER/NAME@REVISION', with 'hf-hub:' before it or not, in two; without a revision, the second is None."""
    repo_id, _, revision = source.removeprefix('hf-hub:').partition('@')
    return repo_id, revision or None


def shipped_folder(name: str) -> Path | None:
    """Return the folder of the weights that come with this package for the name of a model, None if there are none."""
    cfg = get_pretrained_cfg(name) if is_ours(name.partition('.')[0]) else None
    return Path(cfg.file).parent if cfg is not None and cfg.file else None


def fingerprint(model: torch.nn.Module) -> str:
    """Return a SHA-256 over names and values of the weights, the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_model_name(name: str, what: str = 'model') -> None:
    """Raise a ValueError that lists close names if no such model is registered; `what` is what to call it."""
    architecture = name.partition('.')[0]
    if not is_model(architecture):
        raise ValueError(f'unknown {what} {name}{close_names(architecture, list_models())}')


def _create_as_trained(
    checkpoint: Checkpoint, weights: dict[str, torch.Tensor], name: str, kwargs: dict[str, Any]
) -> Any:
    arguments = {**checkpoint.model_kwargs, **kwargs}
    description = checkpoint.describe(name, kwargs if checkpoint.model_name is None else {})
    if arguments.get('num_classes') is not None:
        description['num_classes'] = arguments['num_classes']  # others are not adapted here
    model: Any = timm.create_model(name, pretrained_cfg_overlay=description, **arguments)
    if name != checkpoint.model_name or kwargs:
        check_encodings(checkpoint.encodings(), encodings_of(model))
    if isinstance(model, PositionVisionTransformer):
        weights = checkpoint_filter_fn(weights, model)
    model.load_state_dict(weights)
    return model.eval()


def _create_to_train(
    checkpoint: Checkpoint, weights: dict[str, torch.Tensor], name: str, kwargs: dict[str, Any]
) -> Any:
    added = check_encodings(checkpoint.encodings(), encodings_by_name(name, kwargs), may_add=True)
    given = {**dict.fromkeys(SOURCES), 'state_dict': weights, 'custom_load': False}
    overlay = {**checkpoint.describe(name), **given}
    model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    del model.pretrained_cfg['state_dict']
    if added:
        names = ', '.join(added)
        _logger.info(f'{checkpoint.path} was trained without {names}; what is new begins at its initial values')
    return model


def _create_timms_own(source: str, kwargs: dict[str, Any]) -> Any:
    """Create a model of timm from a folder or the Hub; timm knows in which ways its own are stored."""
    try:
        return timm.create_model(source, pretrained=True, **kwargs).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{source} does not load: {" ".join(str(error).split())}') from error


def _with_prefix(source: str) -> str:
    if Path(source).is_dir():
        return f'local-dir:{source}'
    if ':' in source:
        return source
    if REPOSITORY.fullmatch(split_revision(source)[0]):
        return f'hf-hub:{source}'
    folder = shipped_folder(source)
    if folder is None:
        names = ', '.join(list_models(module=MODULE, pretrained=True))
        raise ValueError(
            f'{source} is no checkpoint, no folder, no OWNER/NAME on the Hub and no model whose weights come with '
            f'{PLUGIN}; these do: {names}'
        )
    return f'local-dir:{folder}'


def _read_config(source: str) -> dict[str, Any]:
    kind, place = parse_model_name(source)
    path = Path(place, 'config.json') if kind == 'local-dir' else _download(place, 'config.json')
    if not path.is_file():
        raise ValueError(f'{source}: {"no config.json in the folder" if path.parent.is_dir() else "no such folder"}')
    config = load_config(path, source)
    if not is_model(config['architecture']):
        raise ValueError(
            f'{source}: unknown architecture {config["architecture"]!r}: import the package that registers it first'
        )
    return config


def _read_weights(source: str, config: Mapping[str, Any]) -> Checkpoint:
    kind, place = parse_model_name(source)
    if kind == 'local-dir':
        paths = [Path(place, name) for name in FILES_OF_WEIGHTS if Path(place, name).is_file()]
        if not paths:
            raise ValueError(f'{source}: no weights in the folder, {FILES_OF_WEIGHTS[0]} is missing')
        path = paths[0]
    else:
        try:
            path = _download(place, FILES_OF_WEIGHTS[0])
        except EntryNotFoundError:
            path = _download(place, FILES_OF_WEIGHTS[1])
    weights = load_file(path) if path.suffix == '.safetensors' else read_checkpoint(path)
    return Checkpoint.of_config(path, weights, config)


def _download(place: str, name: str) -> Path:
    repo_id, revision = split_revision(place)
    return Path(hf_hub_download(repo_id, name, revision=revision))
