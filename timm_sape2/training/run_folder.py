"""The folder of a run: checked before the run, and never left with half a file by a kill."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from timm.models import safe_model_name
from timm.utils import trim_summary, update_summary
from torch import nn


def path_of_run(args: argparse.Namespace) -> Path:
    """Return the folder of a run, the same for the same command, so that the run can find its checkpoints again."""
    return Path(args.output, args.experiment or safe_model_name(args.model))


def check_writable(folder: Path) -> None:
    """Raise an OSError if the folder could not be made or written to; leave nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b'probe')
    except OSError as error:
        raise OSError(f'cannot write to the output folder {folder}: {error.strerror}') from error


def check_free_space(folder: Path, model: nn.Module, args: argparse.Namespace) -> None:
    """Raise an OSError if the checkpoints that the run is going to keep do not fit on the disk.

    A checkpoint has the weights, two numbers of the optimizer for each, and their moving average if there is one.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    num_checkpoints = args.checkpoint_hist + 2 + (2 if args.recovery_interval else 0)
    needed = num_checkpoints * weights * (4 if args.model_ema else 3)
    kept = sum(file.stat().st_size for file in folder.glob('checkpoint-*.pth.tar'))
    free = shutil.disk_usage(_existing(folder)).free + kept
    if free < needed:
        raise OSError(
            f'{num_checkpoints} checkpoints need about {needed / 2**20:.0f} MiB in {folder}, where '
            f'{free / 2**20:.0f} MiB are free: lower --checkpoint-hist or choose another --output'
        )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a copy of a file, or a new one, that takes its place all at once when the block is through."""
    temporary = path.with_name(f'tmp-{path.name}')
    if path.exists():
        shutil.copyfile(path, temporary)
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON, all at once."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + '\n')


def write_arguments(folder: Path, arguments: Mapping[str, object]) -> None:
    """Write args.yaml, which is a recipe of the run."""
    with atomic_write(folder / 'args.yaml') as path:
        path.write_text(yaml.safe_dump(dict(arguments), default_flow_style=False))


def write_class_names(folder: Path, names: Sequence[str] | None) -> None:
    """Write class_names.txt, one name a line, if the data has names; `hub push --class-names` takes such a file."""
    if names is not None:
        with atomic_write(folder / 'class_names.txt') as path:
            path.write_text(''.join(f'{" ".join(name.split())}\n' for name in names), encoding='utf-8')


def begin_summary(folder: Path, epoch: int) -> None:
    """Drop the rows of summary.csv from this epoch on: they are about to be written again."""
    with atomic_write(folder / 'summary.csv') as path:
        trim_summary(path, epoch)


def add_to_summary(
    folder: Path,
    epoch: int,
    train_metrics: Mapping[str, float],
    eval_metrics: Mapping[str, float],
    lr: float,
) -> None:
    """Add the row of an epoch to summary.csv."""
    with atomic_write(folder / 'summary.csv') as path:
        update_summary(epoch, train_metrics, eval_metrics, path, lr=lr)
