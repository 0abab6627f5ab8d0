"""What a run tells whoever watches it: progress, and what to do next."""

import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from timm.models import get_model_args
from timm.utils import setup_default_logging, unwrap_model, world_info_from_env
from torch import nn
from tqdm import tqdm

from .. import provenance
from ..models.flops import count_flops, count_parameters
from ..trained.checkpoint import ResumePoint
from ..trained.opening import evaluation_mode

_logger = logging.getLogger(__name__)


def set_up_logging() -> None:
    """Let the first process tell what it does, and every process warn."""
    if not logging.root.handlers:
        setup_default_logging(logging.WARNING)
    is_first = world_info_from_env()[1] == 0
    for name in ('timm_sape2', 'timm.models'):
        logging.getLogger(name).setLevel(logging.INFO if is_first else logging.WARNING)


class EpochProgress:
    """Shows images a second, loss and time to go, unless another process does. A context manager.

    Args:
        point: Where the epoch begins.
        num_epochs: Number of epochs of the run.
        num_batches: Number of batches of an epoch.
        num_images: Number of images of the epoch, over all processes.
        rate: The learning rate of the epoch.
        log_interval: Batches from one line to the next, where there is no terminal.
    """

    def __init__(
        self,
        point: ResumePoint,
        num_epochs: int,
        num_batches: int,
        num_images: int,
        rate: float,
        log_interval: int,
    ):
        is_quiet = logging.getLogger('timm_sape2').level > logging.INFO
        self.batches_to_go = (num_epochs - point.epoch) * num_batches
        self.num_batches = num_batches
        self.rate = rate
        self.log_interval = log_interval
        self.in_lines = not is_quiet and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=f'Epoch {point.epoch}',
            total=num_images,
            initial=point.loss_count,
            unit=' images',
            leave=False,
            dynamic_ncols=True,
            disable=is_quiet or self.in_lines,
        )
        self.clock: tuple[float, int, int] | None = None

    def __enter__(self) -> 'EpochProgress':
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, point: ResumePoint) -> None:
        """Count a batch.

        Args:
            point: Where the epoch has come to.
        """
        text = f'loss {point.mean_loss:.4f}'
        speed = ''
        if self.clock is None:
            # The first batch takes longer: loader processes start, batches of a resumed epoch are drawn again.
            self.clock = time.perf_counter(), point.num_batches, point.loss_count
        else:
            start, first_batch, first_image = self.clock
            seconds = time.perf_counter() - start
            speed = f', {(point.loss_count - first_image) / seconds:.0f} images/s'
            seconds_to_go = seconds / (point.num_batches - first_batch) * (self.batches_to_go - point.num_batches)
            text += f', run ends in {timedelta(seconds=round(seconds_to_go))}'
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(point.loss_count - self.bar.n)
        if self.in_lines and point.num_batches % self.log_interval == 0:
            batch = f'Epoch {point.epoch}, batch {point.num_batches}/{self.num_batches}'
            _logger.info(f'{batch}, {timedelta(seconds=round(point.seconds))}{speed}, rate {self.rate:.3g}, {text}')


def describe_run(
    described: nn.Module,
    num_images: tuple[int, int],
    num_batches: int,
    folder: Path,
    *,
    model: str,
    input_size: tuple[int, int, int],
    num_classes: int,
    device: str,
    world_size: int,
    amp: bool,
    amp_dtype: str,
    model_dtype: str | None,
    torchcompile: str | None,
    epochs: int,
    batch_size: int,
    grad_accum_steps: int,
    train_img_sizes: Sequence[int] | None,
    train_batch_sizes: Sequence[int] | None,
    opt: str,
    lr: float,
    kd_model_name: str | None,
) -> str:
    """Return what a run is about to do, in a few lines.

    Args:
        described: Its model.
        num_images: Images to train on and to validate.
        num_batches: Batches of an epoch in each process.
        folder: The folder of the run.
        model: Name of the model; this and what follows is settled, with nothing left to the model.
    """
    training, validation = num_images
    position = getattr(described, 'position_name', None)
    try:
        with evaluation_mode(described):  # one image is no batch for a batch norm in training
            flops = count_flops(described, input_size)
        cost = f', {flops / 1e9:.2f} GFLOPs'
    except (NotImplementedError, RuntimeError):
        cost = ''  # an operation of another package's model that does not run on the device meta
    precision = amp_dtype + ' and float32' if amp else model_dtype or 'float32'
    processes = f', {world_size} processes' if world_size > 1 else ''
    compiled = f', compiled by {torchcompile}' if torchcompile else ''
    machine = provenance.hardware()
    chip = machine.get('gpu') if device.startswith('cuda') else f'{machine["cpu"]}, {machine["threads"]} threads'
    sizes = f'{input_size[1]}x{input_size[2]}'
    batch = str(batch_size)
    if train_img_sizes is not None:
        sizes = f'{", ".join(f"{side}x{side}" for side in train_img_sizes)} (validated at {sizes})'
        batch = ', '.join(map(str, train_batch_sizes or [batch_size]))
    elif world_size * grad_accum_steps > 1:
        batch += f' ({batch_size * world_size * grad_accum_steps} images an update)'
    teacher = f', teacher {kd_model_name}' if kd_model_name else ''
    parameters = f'{count_parameters(described) / 1e6:.2f} M parameters'
    return f"""\
Model: {model}{f' with {position}' if position else ''}, {parameters}{cost}
Data: {training} images to train on and {validation} to validate, {sizes}, {num_classes} classes
Training: {epochs} epoch{'s' * (epochs != 1)} of {num_batches} batches of {batch}, {opt}, rate {lr:g}{teacher}
Device: {device} ({chip}), {precision}{processes}{compiled}
Folder: {folder}"""


def next_steps(
    trained: nn.Module,
    folder: Path,
    *,
    model: str,
    model_kwargs: Mapping[str, Any],
    input_size: tuple[int, int, int],
    dataset: str,
    data_dir: str | None,
    val_split: str,
    epochs: int,
) -> str:
    """Return the commands that load, validate, continue and vary the model of a run.

    Args:
        trained: The model.
        folder: The folder of the run.
        model: Name of the model; this and what follows is what it was trained with.
    """
    best = folder / 'model_best.pth.tar'
    height, width = input_size[1:]
    needed = {'in_chans', 'num_classes', 'img_size', *model_kwargs}
    arguments = {name: value for name, value in get_model_args(unwrap_model(trained)).items() if name in needed}
    load = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
    train = provenance.training_command()
    again = _command(f'{train} -c', folder / 'args.yaml')
    learned = _command(*(f'{name}={value}' for name, value in {**model_kwargs, 'position': 'learned'}.items()))
    data = {'--dataset': dataset, '--data-dir': data_dir}
    if val_split != 'validation':
        data['--split'] = val_split
    flags = [word for flag, value in data.items() if value for word in (flag, value)]
    steps = f"""\
Trained. The weights are in {best}, curves and numbers beside them.
Load them:
  import timm, timm_sape2
  model = timm.create_model({model!r}, checkpoint_path={str(best)!r}, {load})
Validate them:
  {_command('timm-sape2 validate', best, *flags)}
Train longer:
  {again} --resume auto --epochs {2 * epochs}
Compare with another position encoding:
  {again} --model-kwargs {learned} --experiment learned
Go on at another resolution, from these weights:
  {again} {_command('--pretrained-path', best, '--img-size', 2 * height, 2 * width)} --experiment larger"""
    if dataset != 'digits':
        return steps
    return f"""\
{steps}
Train on your images, in DIR/train/CLASS/ and DIR/validation/CLASS/:
  {train} --data-dir DIR --model {model} --num-classes N"""


def _command(start: object, *words: object) -> str:
    return ' '.join([str(start), *(shlex.quote(str(word)) for word in words)])
