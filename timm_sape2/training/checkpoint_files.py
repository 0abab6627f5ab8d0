"""Reading checkpoint files that may be truncated, foreign or hostile, and finding the newest good one."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch

from .task import ResumePoint

_logger = logging.getLogger(__name__)


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


def newest_checkpoint(folder: Path) -> tuple[Path | None, ResumePoint]:
    """Return the checkpoint of a run that is furthest in training, and where it goes on.

    A run that was killed leaves some of `last`, `model_best`, `checkpoint-EPOCH`, `recovery-EPOCH-BATCH` and temporary
    files behind, and the file it was writing may be cut off. All are considered; those cut off are skipped.
    """
    newest, newest_point = None, ResumePoint()
    for path in sorted(folder.glob('*.pth.tar')):
        try:
            point = ResumePoint.of_checkpoint(read_checkpoint(path, mmap=True))
        except ValueError as error:
            _logger.warning(f'Skipping {path}: {error}')
            continue
        if newest is None or point.is_after(newest_point):
            newest, newest_point = path, point
    return newest, newest_point


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is truncated or no checkpoint') from error
