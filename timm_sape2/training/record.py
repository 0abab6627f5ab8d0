"""run.json of a run: what it was started with, each time, and how long its epochs took."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from .. import provenance
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
        'command': shlex.join([*_launcher(), Path(sys.argv[0]).name, *sys.argv[1:]]),
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
        'training_seconds': round(training_seconds, 1),
        'validation_seconds': round(validation_seconds, 1),
    }
    write_json(folder / 'run.json', {**record, 'epochs': [*record['epochs'], done]})


def read_record(folder: Path) -> dict[str, Any]:
    """Return run.json of a folder, an empty record if it has none."""
    try:
        return json.loads((folder / 'run.json').read_text())
    except FileNotFoundError:
        return {'starts': [], 'epochs': []}


def _launcher() -> list[str]:
    processes = os.environ.get('LOCAL_WORLD_SIZE')
    return ['torchrun', f'--nproc_per_node={processes}'] if processes else ['python']
