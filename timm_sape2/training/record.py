"""run.json of a run: what it was started with, each time, and how long its epochs took; and all in a few numbers."""

import json
import shlex
from pathlib import Path
from typing import Any

from .. import provenance
from .recipe import read_recipe
from .run_folder import write_json


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
