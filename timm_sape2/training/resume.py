"""Resuming: which checkpoint a run goes on from, whether it belongs to the same run, and loading it."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler

from ..trained.checkpoint import ResumePoint, read_checkpoint
from .task import ResumableTask

_logger = logging.getLogger(__name__)

# A checkpoint continues only a run that agrees in these. They go by the names of their flags.
MODEL = ('model', 'model_kwargs', 'num_classes', 'input_size')
OPTIMIZER = ('opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay')
BATCHES = ('batch_size', 'grad_accum_steps', 'world_size')


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


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start.

    Args:
        resume: 'auto', a file, or nothing, as in `--resume`.
        folder: The folder of the run.

    Raises:
        ValueError: If going on from there would mix two runs in the folder.
    """
    newest, newest_point = newest_checkpoint(folder)
    if resume == 'auto':
        return newest
    path = Path(resume) if resume else None
    point = ResumePoint.of_checkpoint(_read_training_checkpoint(path)) if path else ResumePoint()
    if newest is not None and (path is None or not path.parent.samefile(folder) or newest_point.is_after(point)):
        raise ValueError(
            f'{folder} holds a run that got as far as {newest.name}: '
            '--resume auto continues it, --experiment NAME starts another'
        )
    return path


def check_same_run(path: Path, args: argparse.Namespace) -> None:
    """Raise a ValueError that names what differs if a checkpoint is of another model, optimizer or batch size."""
    checkpoint = _read_training_checkpoint(path)
    trained_with = vars(checkpoint.get('args', argparse.Namespace()))
    names: tuple[str, ...] = MODEL + OPTIMIZER
    if ResumePoint.of_checkpoint(checkpoint).num_batches:
        names += BATCHES
    differences = [
        f'{name} {trained_with[name]!r} instead of {getattr(args, name)!r}'
        for name in names
        if name in trained_with
        and not (name in MODEL and trained_with[name] is None)  # timm leaves what it takes from the model open
        and _plain(trained_with[name]) != _plain(getattr(args, name))
    ]
    if differences:
        raise ValueError(f'cannot resume from {path}, which was trained with {", ".join(differences)}')


def load_run(
    path: Path,
    task: ResumableTask,
    optimizer: torch.optim.Optimizer,
    loss_scaler: NativeScaler | None,
) -> ResumePoint:
    """Load model, moving average, optimizer and loss scaler, and return where the run goes on."""
    try:
        resume_task_checkpoint(task, str(path), optimizer, loss_scaler, log_info=False)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except RuntimeError as error:
        raise ValueError(f'cannot resume from {path}: {error}') from error
    task.resume_point = ResumePoint.of_checkpoint(read_checkpoint(path))
    return task.resume_point


def restore_saver(saver: CheckpointSaver, path: Path) -> None:
    """Give a saver the history it had when it wrote a checkpoint, and let it finish what it was doing.

    A checkpoint of a finished epoch holds the history from before it. A kill can come between the file and its copies
    `last`, `checkpoint-EPOCH` and `model_best`, so the save is done once more, from the weights that were loaded.
    """
    checkpoint = read_checkpoint(path)
    if path.parent.samefile(saver.checkpoint_dir):
        saver.load_state_dict(dict(checkpoint.get('saver', {}), pending=(None, None)))
    if not ResumePoint.of_checkpoint(checkpoint).num_batches:
        saver.save_checkpoint(checkpoint['epoch'], checkpoint.get('metric'))


def _read_training_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    try:
        ResumePoint.of_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f'cannot resume from {path}: {error}; use it as --initial-checkpoint') from None
    return checkpoint


def _plain(value: Any) -> str:
    """Make what was a tuple on the command line equal to the list it is in a recipe."""
    return json.dumps(value, sort_keys=True, default=str)
