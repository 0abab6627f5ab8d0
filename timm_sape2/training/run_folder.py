"""The folder of a run: arguments, class names, summary, record and curves, never left with half a file by a kill."""

import csv
import functools
import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.models import safe_model_name
from timm.utils import trim_summary, update_summary
from torch import nn

from .. import provenance
from .._figure import new_figure
from .._files import atomic_write, existing_parent, write_json
from .recipe import read_recipe

_logger = logging.getLogger(__name__)


def path_of_run(output: str, experiment: str, model: str) -> Path:
    """Return the folder of a run, the same for the same command, so that the run can find its checkpoints again."""
    return Path(output, experiment or safe_model_name(model))


def check_free_space(
    folder: Path, model: nn.Module, checkpoint_hist: int, recovery_interval: int, model_ema: bool
) -> None:
    """Raise an OSError if the checkpoints that the run is going to keep do not fit on the disk.

    A checkpoint has the weights, two numbers of the optimizer for each, and their moving average if there is one.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    num_checkpoints = checkpoint_hist + 2 + (2 if recovery_interval else 0)
    needed = num_checkpoints * weights * (4 if model_ema else 3)
    kept = sum(file.stat().st_size for file in folder.glob('checkpoint-*.pth.tar'))
    free = shutil.disk_usage(existing_parent(folder)).free + kept
    if free < needed:
        raise OSError(
            f'{num_checkpoints} checkpoints need about {needed / 2**20:.0f} MiB in {folder}, where '
            f'{free / 2**20:.0f} MiB are free: lower --checkpoint-hist or choose another --output'
        )


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
) -> dict[str, float]:
    """Add the row of an epoch to summary.csv, and return it."""
    with atomic_write(folder / 'summary.csv') as path:
        update_summary(epoch, train_metrics, eval_metrics, path, lr=lr)
    parts = (('train', train_metrics), ('eval', eval_metrics))
    named = {f'{part}_{name}': value for part, metrics in parts for name, value in metrics.items()}
    return {'epoch': epoch, **named, 'lr': lr}


def begin_record(folder: Path, epoch: int, **numbers: int) -> None:
    """Add a start of the run to run.json: command, commit, versions and hardware.

    Args:
        folder: The folder of the run.
        epoch: The epoch it begins with. The record drops those from there on: they are about to be trained again.
        numbers: What else to say of it, as `processes=2`.
    """
    record = read_record(folder)
    start = {
        'command': shlex.join(provenance.command()),
        'started': provenance.now(),
        'epoch': epoch,
        'commit': provenance.commit(),
        'versions': provenance.versions(),
        'hardware': provenance.hardware(),
        **numbers,
    }
    epochs = [done for done in record['epochs'] if done['epoch'] < epoch]
    write_json(folder / 'run.json', {'starts': [*record['starts'], start], 'epochs': epochs})


def add_to_record(
    folder: Path, epoch: int, num_images: int, training_seconds: float, validation_seconds: float
) -> None:
    """Add an epoch to run.json: images trained on, and seconds of training, loading included, and of validation."""
    record = read_record(folder)
    done = {
        'epoch': epoch,
        'finished': provenance.now(),
        'images': num_images,
        'training_seconds': round(training_seconds, 3),
        'validation_seconds': round(validation_seconds, 3),
    }
    write_json(folder / 'run.json', {**record, 'epochs': [*record['epochs'], done]})


def read_record(folder: Path) -> dict[str, Any]:
    """Return run.json of a folder, an empty record if it has none.

    Raises:
        ValueError: If the file is not one that train.py wrote.
    """
    path = folder / 'run.json'
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.keys() == {'starts', 'epochs'}:
            return record
    except FileNotFoundError:
        return {'starts': [], 'epochs': []}
    except ValueError:
        pass
    raise ValueError(f'{path} is no record of train.py: move it away, or choose another --experiment')


def summarize_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run, of at least one epoch, in a few numbers.

    Returns:
        'epochs'; 'images_per_second' of training, loading included; 'hours' of training and validation; and of the
        last start 'processes', 'hardware' (a text), 'commit', 'torch' (its version) and 'date'.
    """
    epochs, start = record['epochs'], record['starts'][-1]
    training, validation = (sum(epoch[f'{part}_seconds'] for epoch in epochs) for part in ('training', 'validation'))
    hardware = start['hardware']
    return {
        'epochs': len(epochs),
        'images_per_second': round(sum(epoch['images'] for epoch in epochs) / training),
        'hours': round((training + validation) / 3600, 2),
        'processes': start['processes'],
        'hardware': hardware.get('gpu') or f'{hardware["cpu"]}, {hardware["cores"]} cores',
        'commit': start['commit'],
        'torch': start['versions']['torch'],
        'date': epochs[-1]['finished'].partition('T')[0],
    }


def training_history(folder: Path | None) -> list[dict[str, Any]]:
    """Return the summaries of a run and of those whose weights it started from, the first of them first.

    Args:
        folder: The folder of the run. Where there is none, or no record in it, the history begins after it.
    """
    history: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        try:
            record, weights = read_record(folder), _weights_before(folder / 'args.yaml')
        except (ValueError, OSError):
            break
        if not record['epochs']:
            break
        history.insert(0, summarize_record(record))
        folder = Path(weights).parent if weights else None
    return history


def _weights_before(path: Path) -> str | None:
    recipe = read_recipe(path)
    resumed = recipe.get('resume') if recipe.get('resume') != 'auto' else None
    return resumed or recipe.get('initial_checkpoint') or recipe.get('pretrained_path')


def draw_curves(folder: Path) -> None:
    """Draw summary.csv of a run as curves.png beside it; without matplotlib, say once how to get it."""
    try:
        figure = new_figure(9, 4)
    except ImportError:
        _say_what_to_install()
        return
    with open(folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) for row in rows]
    panels = {
        'loss': {'train_loss': 'training', 'eval_loss': 'validation'},
        'accuracy in %': {'eval_top1': 'top-1', 'eval_top5': 'top-5'},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for column, label in lines.items():
            axes.plot(epochs, [float(row[column]) for row in rows], marker='.', label=label)
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(folder / 'curves.png') as path:
        figure.savefig(path, dpi=120)


@functools.cache
def _say_what_to_install() -> None:
    _logger.warning("No curves.png without matplotlib: pip install 'timm_sape2[demo]'")
