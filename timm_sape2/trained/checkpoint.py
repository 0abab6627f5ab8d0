"""Reading checkpoint files that may be truncated, foreign or hostile."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


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
        return _read_safetensors(path)
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


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is truncated or no checkpoint') from error
