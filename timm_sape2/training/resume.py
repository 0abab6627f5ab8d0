"""Resuming: checkpoints that say where in the run they were taken, and going on from the right one."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, NativeScaler

from ..trained.checkpoint import Checkpoint, ResumePoint
from ..trained.encodings import check_encodings, encodings_by_name
from .task import ResumableTask

_logger = logging.getLogger(__name__)

# A checkpoint continues only a run that agrees in these. They go by the names of their flags.
MODEL = ('model', 'model_kwargs', 'num_classes', 'input_size')
OPTIMIZER = ('opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay', 'opt_kwargs')
OTHERS = ('loader', 'model_dtype', 'kd_model_name', 'kd_distill_type')
BATCHES = (
    *('batch_size', 'grad_accum_steps', 'world_size', 'train_img_sizes', 'train_batch_sizes', 'train_size_probs'),
    *('train_size_schedule', 'train_size_schedule_spread', 'train_size_random_mix', 'train_batches_per_epoch'),
)
# These change nothing in the weights of a run that goes on; the last ones are not flags.
FREE = {
    *('config', 'output', 'experiment', 'resume', 'pretrained', 'pretrained_path', 'initial_checkpoint'),
    *('device', 'workers', 'validation_batch_size', 'log_interval', 'recovery_interval', 'checkpoint_hist'),
    *('log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id', 'log_tensorboard'),
    *('rank', 'local_rank', 'distributed', 'input_size'),
}


def newest_checkpoint(folder: Path) -> tuple[Path | None, ResumePoint]:
    """Return the checkpoint of a run that is furthest in training, and where it goes on.

    A run that was killed leaves some of `last`, `model_best`, `checkpoint-EPOCH`, `recovery-EPOCH-BATCH` and temporary
    files behind, and the file it was writing may be cut off. All are considered; those cut off are skipped.
    """
    newest, newest_point = None, ResumePoint()
    for path in sorted(folder.glob('*.pth.tar')):
        try:
            point = Checkpoint.read(path, mmap=True).resume_point
        except ValueError as error:
            _logger.warning(f'Skipping {path}: {error}')
            continue
        if newest is None or point.is_after(newest_point):
            newest, newest_point = path, point
    return newest, newest_point


def find_checkpoint(resume: str, folder: Path) -> Checkpoint | None:
    """Return the checkpoint to resume from, None for a fresh start.

    Args:
        resume: 'auto', a file, or nothing, as in `--resume`.
        folder: The folder of the run.

    Raises:
        ValueError: If going on from there would mix two runs in the folder.
    """
    newest, newest_point = newest_checkpoint(folder)
    if resume == 'auto':
        return None if newest is None else Checkpoint.read(newest)
    checkpoint, point = (Checkpoint.read(resume) if resume else None), ResumePoint()
    if checkpoint is not None:
        try:
            point = checkpoint.resume_point
        except ValueError as error:
            raise ValueError(f'cannot resume from {resume}: {error}; use it as --initial-checkpoint') from None
    if newest is not None:
        is_here = checkpoint is not None and checkpoint.path.parent.samefile(folder)
        if not is_here or newest_point.is_after(point):
            raise ValueError(
                f'{folder} holds a run that got as far as {newest.name}: '
                '--resume auto continues it, --experiment NAME starts another'
            )
    return checkpoint


def check_same_run(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> None:
    """Compare a checkpoint with the run that is to go on from it, and list the other flags that differ in the log.

    Args:
        checkpoint: The checkpoint.
        arguments: All arguments of the run.

    Raises:
        ValueError: It is of another model, optimizer or batch size; the message names what differs.
    """
    names: tuple[str, ...] = MODEL + OPTIMIZER + OTHERS
    if checkpoint.resume_point.num_batches:
        names += BATCHES
        if arguments.get('train_size_schedule') == 'progressive':
            names += ('epochs',)
    differences = [name for name in names if _differs(name, checkpoint, arguments)]
    if differences:
        listed = _listed(differences, _arguments_of(checkpoint), arguments)
        raise ValueError(f'cannot resume from {checkpoint.path}, which was trained with {listed}')
    changed = [name for name in arguments if name not in FREE and _differs(name, checkpoint, arguments)]
    if changed:
        listed = _listed(changed, arguments, _arguments_of(checkpoint))
        _logger.info(f'Resumed with other flags, which make another run of it from here on: {listed}')


def load_run(
    checkpoint: Checkpoint,
    task: ResumableTask,
    optimizer: torch.optim.Optimizer,
    loss_scaler: NativeScaler | None,
) -> ResumePoint:
    """Load model, EMA, optimizer and loss scaler, and return where the run goes on."""
    state = checkpoint.state
    try:
        task.load_checkpoint_state(checkpoint.weights, state.get('task_state'))
        if task.has_ema():
            average, key = checkpoint.average, 'task_state_ema'
            if average is None:
                average, key = checkpoint.weights, 'task_state'
            task.load_checkpoint_state(average, state.get(key), ema=True)
        optimizer.load_state_dict(state['optimizer'])
        if loss_scaler is not None and loss_scaler.state_dict_key in state:
            loss_scaler.load_state_dict(state[loss_scaler.state_dict_key])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'cannot resume from {checkpoint.path}: {error}') from error
    task.resume_point = checkpoint.resume_point
    return task.resume_point


def restore_saver(saver: CheckpointSaver, checkpoint: Checkpoint) -> None:
    """Give a saver the history it had when it wrote a checkpoint, and let it finish what it was doing.

    A checkpoint of a finished epoch holds the history from before it. A kill can come between the file and its copies
    `last`, `checkpoint-EPOCH` and `model_best`, so the save is done once more, from the weights that were loaded.
    """
    state = checkpoint.state
    if checkpoint.path.parent.samefile(saver.checkpoint_dir):
        saver.load_state_dict(dict(state.get('saver', {}), pending=(None, None)))
    if not checkpoint.resume_point.num_batches:
        saver.save_checkpoint(state['epoch'], state.get('metric'))


def _differs(name: str, checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> bool:
    """Return whether a run that goes on has another value than the checkpoint; what that does not say is the same."""
    trained_with = _arguments_of(checkpoint)
    if name not in trained_with or name not in arguments or (name in MODEL and trained_with[name] is None):
        return False  # timm leaves what it takes from the model open
    was, wanted = trained_with[name], arguments[name]
    if name == 'model_kwargs' and _plain(was) != _plain(wanted) and _same_encoding(checkpoint, arguments):
        was, wanted = ({k: v for k, v in kwargs.items() if not k.startswith('position')} for kwargs in (was, wanted))
    return _plain(was) != _plain(wanted)


def _arguments_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint was trained with; older ones do not name what there was no choice of."""
    return {'loader': 'workers', 'model_dtype': None, 'kd_model_name': None, 'train_img_sizes': None, **checkpoint.args}


def _listed(names: Iterable[str], values: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {values[name]!r} instead of {others[name]!r}' for name in names)


def _same_encoding(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> bool:
    try:
        trained, asked = checkpoint.encodings(), encodings_by_name(arguments['model'], arguments['model_kwargs'])
        check_encodings(trained, asked)
    except ValueError:
        return False
    return trained is not None and asked is not None


def _plain(value: Any) -> str:
    """Make what was a tuple on the command line equal to the list it is in a recipe."""
    return json.dumps(value, sort_keys=True, default=str)
