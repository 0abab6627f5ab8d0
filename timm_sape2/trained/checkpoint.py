"""What a file of weights says of itself, read once; the file may be truncated, foreign or hostile."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, clean_state_dict, get_pretrained_cfg
from torch import Tensor

from ..models.equip import SOURCES
from .encodings import Encodings, encodings_by_name

WEIGHTS = ('state_dict', 'model')
AVERAGES = ('state_dict_ema', 'model_ema')
PREPROCESSING = ('mean', 'std', 'crop_pct', 'interpolation')
# What a pretrained_cfg says of weights, wherever they go: not where they come from, nor of the model they were in.
ABOUT_WEIGHTS = {field.name for field in dataclasses.fields(PretrainedCfg)} - {
    *SOURCES,
    *('architecture', 'min_input_size', 'fixed_input_size', 'pool_size', 'test_pool_size', 'first_conv', 'classifier'),
}


@dataclasses.dataclass
class ResumePoint:
    """Where a run goes on.

    Args:
        epoch: The epoch to train.
        num_batches: Batches of it that were trained on already.
        loss_sum: Sum of the losses of their images.
        loss_count: Number of their images.
        random_states: The generators of each process after them.
        seconds: Time that they took.
    """

    epoch: int = 0
    num_batches: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    random_states: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the images of the epoch up to here."""
        return self.loss_sum / max(self.loss_count, 1)

    def add_batch(self, loss: float, num_images: int) -> None:
        """Count a batch."""
        self.num_batches += 1
        self.loss_sum += loss * num_images
        self.loss_count += num_images

    def is_after(self, other: 'ResumePoint') -> bool:
        """Return whether this is further in training."""
        return (self.epoch, self.num_batches) > (other.epoch, other.num_batches)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> 'ResumePoint':
        """Read it from a training checkpoint, ours or one that timm wrote at the end of an epoch."""
        if 'resume_point' in checkpoint:
            return cls(**checkpoint['resume_point'])
        if 'epoch' not in checkpoint or 'optimizer' not in checkpoint:
            raise ValueError('it has weights but no state of a training run')
        return cls(epoch=checkpoint['epoch'] + 1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights, and all that was stored with them.

    Args:
        path: The file.
        weights: The weights as they were trained.
        average: Their EMA, None if there is none.
        model_name: The model that they are of, None if that is not said.
        model_kwargs: Its arguments.
        args: The arguments of the run that trained them, {} if they are not known.
        pretrained_cfg: What a config.json says of them, {} if there is none.
        class_names: Names of the classes, None if they have none.
        state: The other entries, such as 'epoch', 'metric', and the state of the optimizer.
    """

    path: Path
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None = None
    model_name: str | None = None
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: list[str] | None = None
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str], mmap: bool = False) -> 'Checkpoint':
        """Read a checkpoint of train.py, of timm's script, or weights alone. See `read_checkpoint`."""
        content = read_checkpoint(path, mmap)
        weights, average = (
            next((content[key] for key in keys if isinstance(content.get(key), dict)), None)
            for keys in (WEIGHTS, AVERAGES)
        )
        known = {*WEIGHTS, *AVERAGES, 'args', 'class_names'}
        is_bare = weights is None and average is None and not {'args', 'optimizer'} & content.keys()
        args = vars(content['args']) if isinstance(content.get('args'), argparse.Namespace) else {}
        return cls(
            path=Path(path),
            weights=clean_state_dict(content if is_bare else weights or average or {}),
            average=None if average is None else clean_state_dict(average),
            model_name=args.get('model'),
            model_kwargs={'global_pool': args.get('gp'), **(args.get('model_kwargs') or {})},
            args=args,
            class_names=_names(content.get('class_names')),
            state={} if is_bare else {key: value for key, value in content.items() if key not in known},
        )

    @classmethod
    def of_config(cls, path: Path, weights: dict[str, Tensor], config: Mapping[str, Any]) -> 'Checkpoint':
        """Return the checkpoint that weights and the config.json beside them are."""
        said = config.get('pretrained_cfg', config)  # an old one of timm says all at one level
        pretrained_cfg = {key: value for key, value in said.items() if key in ABOUT_WEIGHTS}
        return cls(
            path=path,
            weights=weights,
            model_name=config['architecture'],
            model_kwargs=config.get('model_args') or {},
            pretrained_cfg=pretrained_cfg,
            class_names=_names(config.get('label_names') or pretrained_cfg.get('label_names')),
        )

    @property
    def resume_point(self) -> ResumePoint:
        """Where its run goes on; a ValueError if it is not of a run."""
        return ResumePoint.of_checkpoint(self.state)

    def encodings(self) -> Encodings | None:
        """Return the position encodings of the model that was trained, None if it does not say."""
        if self.model_name is None:
            return None
        input_size = self.describe(self.model_name).get('input_size')
        size = {} if input_size is None else {'img_size': tuple(input_size[1:])}
        return encodings_by_name(self.model_name, {**size, **self.model_kwargs})

    def describe(self, model_name: str, model_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Describe the weights to timm, in the words of its `pretrained_cfg`, where they say more than the model does.

        Args:
            model_name: The model that they are going to be loaded into.
            model_kwargs: What else is known of the model that was trained.
        """
        said = {**self.args, **self.model_kwargs, **(model_kwargs or {})}
        description = dict(self.pretrained_cfg)
        channels = description.get('input_size', (3,))[0]
        description |= {key: said[key] for key in PREPROCESSING if said.get(key)}
        if said.get('input_size') or said.get('img_size'):
            description['input_size'] = tuple(
                said.get('input_size') or (said.get('in_chans') or channels, *to_2tuple(said['img_size']))
            )
        cfg = get_pretrained_cfg(model_name)
        head = self.weights.get(f'{cfg.classifier}.weight') if cfg is not None else None
        if head is not None:
            description['num_classes'] = len(head)
        if self.class_names is not None:
            description['label_names'] = self.class_names
        return description


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: The file.
        mmap: Leave the tensors in the file until they are used; the file must not change as long as they live.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If it is not a whole checkpoint of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint {path}')
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is truncated or no checkpoint') from error
    path.open('rb').close()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # what torch raises for bytes that make no sense depends on the bytes, even OSError
        unsafe = 'unsupported global' in str(error).lower()
        problem = 'holds pickled Python objects, which may run code' if unsafe else 'is truncated or no checkpoint'
        raise ValueError(f'{path} {problem}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds no weights but a {type(checkpoint).__name__}')
    return checkpoint


def _names(names: Any) -> list[str] | None:
    """Return names of classes, None for what could not be some."""
    are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name.isprintable() for name in names)
    return list(names) if are_names else None
