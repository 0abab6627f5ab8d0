"""Running a study: its folder, its units shared by the processes of torchrun, and going on where it was stopped."""

import csv
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import world_info_from_env
from tqdm import tqdm

from .. import provenance
from ..training.run_folder import atomic_write, check_writable, write_json
from .study import Row, Study, Unit

WORTH_A_REPORT = 60  # seconds of a unit after which the results so far are written, to be looked at

_logger = logging.getLogger(__name__)


def run_study(study: Study, folder: Path, command: Sequence[str]) -> None:
    """Do the units of a study that are not done yet, and write the table, the report, the plots and run.json.

    Under torchrun every process takes its share of the units and works alone; the first one writes the report.

    Args:
        study: The study.
        folder: Its folder, new or of the same study.
        command: The command line, for the record.

    Raises:
        ValueError: If the folder holds a study with another configuration, or matplotlib is missing.
        OSError: If the folder cannot be written to.
    """
    check_matplotlib()
    check_writable(folder)
    names = unit_names(study.units)
    check_configuration(study, folder)
    maker = {
        'command': shlex.join(command),
        'commit': provenance.commit(),
        'versions': provenance.versions(),
    }
    pending = [name for name in names if not unit_file(folder, name).exists()]
    rank, mine = my_share(pending, study.one_process)
    (folder / 'units').mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(folder / 'run.json', {'configuration': configuration_of(study)})
    bar = tqdm(mine, desc=study.name, unit='unit', disable=rank > 0, dynamic_ncols=True)
    try:
        for name in bar:
            bar.set_postfix_str(name)
            unit = study.units[names.index(name)]
            started, start = provenance.now(), time.perf_counter()
            rows = study.run(unit, folder)
            seconds = time.perf_counter() - start
            done = {
                'unit': unit,
                'rows': rows,
                'started': started,
                'finished': provenance.now(),
                'seconds': round(seconds, 1),
            }
            made_by = {**maker, 'hardware': provenance.hardware()}
            write_json(unit_file(folder, name), {**done, 'made_by': made_by})
            if rank == 0 and seconds > WORTH_A_REPORT:
                write_results(study, folder)
        while rank == 0 and not all(unit_file(folder, name).exists() for name in names):
            time.sleep(0.5)
    finally:
        if rank == 0:
            write_results(study, folder)
    if rank == 0:
        _logger.info(f'The results are in {folder / "results.md"}')


def my_share(pending: list[str], one_process: bool) -> tuple[int, list[str]]:
    """Share units among the processes of torchrun; from here on, each computes alone, on a GPU of its own.

    Args:
        pending: The units to be done; those that the first process sees count.
        one_process: Leave all of them to the first process.

    Returns:
        Rank of this process, and its units.
    """
    local_rank, rank, world_size = world_info_from_env()
    if world_size > 1:
        pending = of_first_process(pending)
    for name in ('LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS'):
        os.environ.pop(name, None)
    if world_size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if one_process:
        return rank, pending if rank == 0 else []
    return rank, pending[rank::world_size]


def of_first_process(names: list[str]) -> list[str]:
    """Return the list of the first process, in every process."""
    torch.distributed.init_process_group('gloo')
    lists = [names]
    torch.distributed.broadcast_object_list(lists)
    torch.distributed.destroy_process_group()
    return lists[0]


def check_matplotlib() -> None:
    """Raise a ValueError that says what to install if there is nothing to draw plots with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'timm_sape2[studies]'") from None


def unit_names(units: Sequence[Unit]) -> list[str]:
    """Return a name for each unit that can be a file's; raise a ValueError if a unit is listed twice."""
    names = [re.sub(r'[^\w.+=-]+', '-', '_'.join(str(value) for value in unit.values())) for unit in units]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'listed twice: {", ".join(twice)}')
    return names


def unit_file(folder: Path, name: str) -> Path:
    """Return the file of a finished unit."""
    return folder / 'units' / f'{name}.json'


def configuration_of(study: Study) -> dict[str, Any]:
    """Return the configuration of a study as it comes back from a file."""
    return json.loads(json.dumps({'study': study.name, **study.configuration}, default=str))


def check_configuration(study: Study, folder: Path) -> None:
    """Raise a ValueError that names the differences if a folder holds a study with another configuration."""
    path = folder / 'run.json'
    if not path.exists():
        return
    wanted, there = configuration_of(study), json.loads(path.read_text()).get('configuration', {})
    differences = [
        f'{name}={there.get(name)!r} instead of {wanted.get(name)!r}'
        for name in sorted({*wanted, *there})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f'{folder} holds a study with {", ".join(differences)}; --experiment NAME puts this one into another folder'
        )


def write_results(study: Study, folder: Path) -> None:
    """Write results.csv, results.md, the plots and run.json from all units that are finished, if there are any.

    Units of an earlier command of the same configuration, such as other seeds, are among them.
    """
    names = unit_names(study.units)
    files = [unit_file(folder, name) for name in names if unit_file(folder, name).exists()]
    files += sorted(set((folder / 'units').glob('*.json')) - set(files))
    if not files:
        return
    units = [json.loads(file.read_text()) for file in files]
    rows: list[Row] = [row for unit in units for row in unit['rows']]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / 'results.csv') as path, open(path, 'w', newline='') as table:
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
    plots = study.plots(rows)
    for name, figure in plots.items():
        with atomic_write(folder / f'{name}.png') as path:
            figure.savefig(path, dpi=120)
    units.sort(key=lambda unit: unit['started'])
    record = {
        'configuration': configuration_of(study),
        'seeds': sorted({unit['unit']['seed'] for unit in units if 'seed' in unit['unit']}),
        'started': units[0]['started'],
        'finished': max(unit['finished'] for unit in units),
        'seconds': {unit_names([unit['unit']])[0]: unit['seconds'] for unit in units},
        'made_by': [unit['made_by'] for i, unit in enumerate(units) if unit['made_by'] not in made_by_of(units[:i])],
    }
    write_json(folder / 'run.json', record)
    pictures = ''.join(f'\n![{name}]({name}.png)\n' for name in plots)
    with atomic_write(folder / 'results.md') as path:
        path.write_text(f'# {study.name}\n\n{study.report(rows)}\n{pictures}\n{origin(record)}')


def made_by_of(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how units were made."""
    return [unit['made_by'] for unit in units]


def origin(record: dict[str, Any]) -> str:
    """Return when and how the results of run.json were made, as Markdown."""
    lines = [f'{sum(record["seconds"].values()) / 3600:.2f} hours of work, finished {record["finished"]}. Made by:\n']
    for maker in record['made_by']:
        machine = ', '.join(f'{name} {value}' for name, value in maker['hardware'].items())
        packages = ', '.join(f'{name} {version}' for name, version in maker['versions'].items())
        lines.append(f'- `{maker["command"]}` at commit {maker["commit"]}, {machine}; {packages}.')
    return '\n'.join(lines) + '\n'
