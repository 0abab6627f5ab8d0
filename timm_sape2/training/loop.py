"""A training run: `set_up` finds what is wrong with it, `fit` goes through its epochs.

Every epoch is seeded anew from (seed, epoch, rank), so that it can be repeated exactly: a run that was killed at any
moment and resumed ends with the weights of one that was not, on a CPU bit for bit.
"""

import argparse
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from filelock import FileLock, Timeout
from timm import utils
from timm.data import Mixup
from timm.optim import optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .._files import check_writable
from ..data import datasets
from ..data.memory import check_memory
from ..trained.accuracy import evaluate
from ..trained.checkpoint import Checkpoint, ResumePoint
from . import hardware, loaders, resume, run_folder
from .arguments import flags_of
from .console import EpochProgress, describe_run
from .model import build_model, check_compilation, create_optimizer
from .processes import SignalCatcher, all_random_states, any_process, mean_loss_and_stop
from .task import Resumable, ResumableTask, check_sizes, create_distillation, open_teacher
from .tracking import TensorBoard, Wandb, check_trackers

_logger = logging.getLogger(__name__)


LOSS_SCALES = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}  # exponents of the number of images


@dataclasses.dataclass
class Run:
    """All that the loop needs. Only the primary process has a saver, and the lock of the folder."""

    args: argparse.Namespace
    device: torch.device
    images_as: dict[str, Any]
    train_loader: DataLoader
    val_loader: DataLoader
    mixup: Mixup | None
    task: Resumable
    optimizer: Optimizer
    scheduler: Scheduler | None
    num_epochs: int
    autocast: Callable[[], AbstractContextManager]
    loss_scaler: utils.NativeScaler | None
    folder: Path
    start: ResumePoint
    saver: utils.CheckpointSaver | None = None
    lock: FileLock | None = None
    trackers: Sequence[Wandb | TensorBoard] = ()


def set_up(args: argparse.Namespace, initialize: Callable[[nn.Module], None] | None = None) -> Run:
    """Check the arguments against device, disk, model and data; only then write to the folder of the run.

    Args:
        args: The arguments of the run, from `parse_arguments`.
        initialize: Changes the initial weights of the model in place.

    Raises:
        ValueError: If an argument does not fit the others, the device, the data or the run to be resumed.
        OSError: If a file is missing, or the folder cannot be written to.
    """
    recipe = {name: value for name, value in vars(args).items() if name != 'config'}
    check_trackers(args.log_wandb, args.log_tensorboard)
    hardware.check_precision(args.amp, args.model_dtype, args.model_ema)
    check_compilation(args.torchcompile, args.torchcompile_mode)
    device, processes = hardware.set_up_device(args.device)
    autocast, loss_scaler = hardware.mixed_precision(device, args.amp, args.amp_dtype)
    vars(args).update(processes, device=str(device))
    images_as = hardware.format_of_images(args.model_dtype, args.channels_last)
    folder = run_folder.path_of_run(args.output, args.experiment, args.model)
    check_writable(folder)
    run_folder.read_record(folder)
    checkpoint = resume.find_checkpoint(args.resume, folder)

    utils.random_seed(args.seed)
    model = build_model(checkpoint is None, **flags_of(build_model, args))
    if initialize is not None:
        initialize(model)
    model.to(device, **images_as)
    data_config = loaders.resolve_data(model, **flags_of(loaders.resolve_data, args))
    training_sizes = [(side, side) for side in args.train_img_sizes or ()]
    check_sizes(model, data_config['input_size'][0], training_sizes, f'--model {args.model}')
    args.num_classes, args.input_size = model.num_classes, data_config['input_size']
    if checkpoint:
        resume.check_same_run(checkpoint, vars(args))
    run_folder.check_free_space(folder, model, args.checkpoint_hist, args.recovery_interval, args.model_ema)

    open_both = datasets.open_train_and_validation
    train_set, val_set = open_both(args.input_size[0], **flags_of(open_both, args))
    datasets.check_class_count(train_set, args.num_classes)
    num_images = len(cast(Sized, train_set)), len(cast(Sized, val_set))
    if args.loader == 'memory':
        check_memory(sum(num_images), args.input_size, device)
    mixup = loaders.create_mixup(args.num_classes, device, **flags_of(loaders.create_mixup, args))
    of_training, of_validation = (
        flags_of(create, args) for create in (loaders.create_train_loader, loaders.create_validation_loader)
    )
    train_loader = loaders.create_train_loader(train_set, data_config, device, mixup, **of_training)
    val_loader = loaders.create_validation_loader(val_set, data_config, device, **of_validation)

    task = create_task(args, model, data_config, device, images_as['dtype'], soft_targets=mixup is not None)
    task.class_names = datasets.class_names(train_set)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    optimizer = create_optimizer(task.trainable_module, opt_kwargs=args.opt_kwargs, **optimizer_kwargs(args))
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    start = resume.load_run(checkpoint, task, optimizer, loss_scaler) if checkpoint else ResumePoint()
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    run = Run(
        args=args,
        device=device,
        images_as=images_as,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        autocast=autocast,
        loss_scaler=loss_scaler,
        folder=folder,
        start=start,
    )
    if utils.is_primary(args):
        flags = flags_of(describe_run, args)
        _logger.info(describe_run(utils.unwrap_model(model), num_images, len(train_loader), folder, **flags))
        run.saver = open_folder(run, recipe, checkpoint)
        if start.epoch < num_epochs:
            run.trackers = open_trackers(run, recipe)
    return run


def create_task(
    args: argparse.Namespace,
    model: nn.Module,
    data_config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    soft_targets: bool,
) -> Any:
    """Create the task of the run: classification, or learning from a teacher beside it."""
    loss = dict(loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=soft_targets)
    if args.kd_model_name is None:
        return ResumableTask(model, criterion_kwargs=loss, device=device, dtype=dtype, verbose=False)
    kind = args.kd_distill_type
    teacher = open_teacher(args.kd_model_name, args.input_size, None if kind == 'feature' else args.num_classes)
    channels, height, width = args.input_size
    sizes = [(height, width), *((side, side) for side in args.train_img_sizes or ())]
    check_sizes(teacher, channels, sizes, f'--kd-model-name {args.kd_model_name}')
    options = dict(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if kind == 'feature':
        options |= dict(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim
        )
    else:
        options['temperature'] = args.kd_temperature
    if kind == 'token':
        options['distill_type'] = args.kd_token_distill_type
    mean, std = data_config['mean'], data_config['std']
    return create_distillation(kind, model, teacher, mean, std, device, dtype, criterion_kwargs=loss, **options)


def open_folder(run: Run, recipe: dict[str, Any], checkpoint: Checkpoint | None) -> utils.CheckpointSaver:
    """Make the folder of the run, or put it in order after a kill, and return what saves checkpoints to it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = FileLock(run.folder / '.lock', blocking=False)
    try:
        run.lock.acquire()
    except Timeout:
        raise ValueError(
            f'another process is training in {run.folder}: wait for it, stop it, or choose another --experiment'
        ) from None
    if run.start.epoch < run.num_epochs:
        run_folder.begin_record(
            run.folder,
            run.start.epoch,
            processes=run.args.world_size,
            training_images=len(cast(Sized, run.train_loader.dataset)),
            validation_images=len(cast(Sized, run.val_loader.dataset)),
        )
    run_folder.write_arguments(run.folder, recipe)
    run_folder.write_class_names(run.folder, run.task.class_names)
    run_folder.begin_summary(run.folder, run.start.epoch)
    saver = utils.CheckpointSaver(
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=run.args,
        amp_scaler=run.loss_scaler,
        checkpoint_dir=str(run.folder),
        recovery_dir=str(run.folder),
        decreasing=run.args.eval_metric == 'loss',
        max_history=run.args.checkpoint_hist,
        task=run.task,
    )
    if checkpoint is not None:
        resume.restore_saver(saver, checkpoint)
        _logger.info(f'Resumed {checkpoint.path} at epoch {run.start.epoch}, batch {run.start.num_batches}')
    return saver


def open_trackers(run: Run, recipe: dict[str, Any]) -> list[Wandb | TensorBoard]:
    """Open what the run is to be reported to."""
    args = run.args
    trackers: list[Wandb | TensorBoard] = []
    if args.log_wandb:
        is_resumed = (run.start.epoch, run.start.num_batches) > (0, 0)
        trackers.append(
            Wandb(run.folder, is_resumed, recipe, args.wandb_project, args.wandb_tags, args.wandb_resume_id)
        )
    if args.log_tensorboard:
        trackers.append(TensorBoard(run.folder, run.start.epoch))
    return trackers


def fit(run: Run, signals: SignalCatcher) -> None:
    """Train and validate the epochs that are left, then leave the folder to others."""
    try:
        if run.start.epoch >= run.num_epochs:
            _logger.info(f'All {run.num_epochs} epochs are trained; --epochs N trains more')
        for epoch in range(run.start.epoch, run.num_epochs):
            if run.scheduler is not None:
                run.scheduler.step(epoch)
            point = train_one_epoch(run, epoch, signals)
            metrics, started = None, time.perf_counter()
            if (epoch + 1) % run.args.val_interval == 0 or epoch + 1 == run.num_epochs:
                metrics = validate(run, signals)
                if metrics is not None and run.task.has_ema():
                    metrics = validate(run, signals, ema=True)
                if metrics is None:
                    stop(run, point, signals)
            if run.saver is not None:
                run_folder.add_to_record(
                    run.folder, epoch, point.loss_count, point.seconds, time.perf_counter() - started
                )
            if metrics is not None:
                save_epoch(run, point, metrics)
        for tracker in run.trackers:
            tracker.close()
    finally:
        if run.lock is not None:
            run.lock.release()


def train_one_epoch(run: Run, epoch: int, signals: SignalCatcher) -> ResumePoint:
    """Train one epoch, from its first batch or from where the run was resumed, and return how it went."""
    args, task = run.args, run.task
    point = dataclasses.replace(run.start) if epoch == run.start.epoch else ResumePoint(epoch)
    num_batches = len(run.train_loader)
    num_images = loaders.images_of_epoch(run.train_loader, epoch) * args.world_size
    updates_per_epoch = math.ceil(num_batches / args.grad_accum_steps)
    rate = max(group['lr'] for group in run.optimizer.param_groups)
    progress = EpochProgress(point, run.num_epochs, num_batches, num_images, rate, args.log_interval)
    average, exponent = loaders.average_batch_size(run.train_loader), LOSS_SCALES[args.variable_batch_loss_scale]
    flags = flags_of(loaders.epoch_batches, args)
    batches = loaders.epoch_batches(run.train_loader, run.mixup, point, run.device, **run.images_as, **flags)
    task.trainable_module.train()
    run.optimizer.zero_grad()
    started = time.perf_counter() - point.seconds
    with progress, closing(batches):
        for input, target in batches:
            num_updates, batches_before = divmod(point.num_batches, args.grad_accum_steps)
            batches_of_update = min(args.grad_accum_steps, num_batches - num_updates * args.grad_accum_steps)
            need_update = batches_before + 1 == batches_of_update
            with nullcontext() if need_update else task.no_sync():
                with run.autocast():
                    loss = task(input, target)['loss']
                mean_loss, stopping = mean_loss_and_stop(loss, signals.caught, args.world_size)
                check_finite(run, mean_loss, f'in epoch {epoch}, batch {point.num_batches}')
                backward(run, loss * (len(input) / average) ** exponent / batches_of_update, need_update)
            point.add_batch(mean_loss, len(input) * args.world_size)
            point.seconds = time.perf_counter() - started
            progress.update(point)
            if not need_update:
                continue
            run.optimizer.zero_grad()
            task.update_ema(step=epoch * updates_per_epoch + num_updates + 1)
            if stopping:
                stop(run, point, signals)
            if args.recovery_interval and (num_updates + 1) % args.recovery_interval == 0:
                save_recovery(run, point)
    return point


def backward(run: Run, loss: Tensor, need_update: bool) -> None:
    """Add the gradient of a batch, and update the weights if it is the last one of the update."""
    clip_grad, parameters = run.args.clip_grad, run.task.get_clip_parameters()
    create_graph = getattr(run.optimizer, 'is_second_order', False)
    if run.loss_scaler is not None:
        run.loss_scaler(
            loss, run.optimizer, clip_grad, parameters=parameters, create_graph=create_graph, need_update=need_update
        )
        return
    loss.backward(create_graph=create_graph)
    if need_update:
        if clip_grad is not None:
            utils.dispatch_clip_grad(parameters, clip_grad)
        run.optimizer.step()


def validate(run: Run, signals: SignalCatcher, ema: bool = False) -> dict[str, float] | None:
    """Validate the weights, or their EMA; return None if a signal came in between."""
    return evaluate(
        run.task.evaluated_module(ema),
        run.val_loader,
        run.device,
        run.autocast,
        distributed=run.args.distributed,
        after_batch=lambda *batch: any_process(signals.caught, run.args.world_size, run.device),
        **run.images_as,
    )


def save_epoch(run: Run, point: ResumePoint, metrics: dict[str, float]) -> None:
    """Write what an epoch ends with: a row of the summary, then the checkpoint that makes it count, then the curves."""
    epoch = point.epoch
    check_finite(run, metrics['loss'], f'in validation after epoch {epoch}')
    run.task.resume_point = ResumePoint(epoch + 1)
    if run.saver is None:
        return
    rates = [group['lr'] for group in run.optimizer.param_groups]
    row = run_folder.add_to_summary(run.folder, epoch, {'loss': point.mean_loss}, metrics, lr=sum(rates) / len(rates))
    best, best_epoch = run.saver.save_checkpoint(epoch, metric=metrics[run.args.eval_metric])
    for outdated in run.folder.glob('recovery*.pth.tar'):
        outdated.unlink()
    run_folder.draw_curves(run.folder)
    for tracker in run.trackers:
        tracker.log(row)
    speed = f'{point.seconds:.0f} s, {point.loss_count / max(point.seconds, 1e-9):.0f} images/s'
    _logger.info(
        f'Epoch {epoch}, {speed}, rate {max(rates):.3g}, loss {point.mean_loss:.4f}, '
        f'validation: loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f} % '
        f'(best {run.args.eval_metric}: {best:.5g} in epoch {best_epoch})'
    )


def save_recovery(run: Run, point: ResumePoint) -> None:
    """Write a checkpoint in the middle of an epoch."""
    point.random_states = all_random_states(run.args.world_size)
    run.task.resume_point = point
    if run.saver is not None:
        run.saver.save_recovery(point.epoch, point.num_batches)


def stop(run: Run, point: ResumePoint, signals: SignalCatcher) -> NoReturn:
    """Save and leave, because of a signal to this process or to another one."""
    save_recovery(run, point)
    if run.args.distributed:
        torch.distributed.barrier()
    if run.saver is not None:
        _logger.info(f'Stopped and saved in {run.folder}; the same command with --resume auto goes on from here')
    sys.exit(signals.exit_code)


def check_finite(run: Run, loss: float, where: str) -> None:
    """Raise a FloatingPointError, before the weights are touched, if training has diverged."""
    if not math.isfinite(loss):
        good = resume.newest_checkpoint(run.folder)[0] or 'none'
        raise FloatingPointError(f'the loss is {loss} {where}; last good checkpoint: {good}; try a lower --lr')
