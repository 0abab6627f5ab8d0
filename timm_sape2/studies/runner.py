"""Running a study: its folder, its units shared by processes, and going on where it was stopped."""

import csv
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from timm.utils import world_info_from_env
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import provenance
from .._figure import check_matplotlib
from .._files import atomic_write, check_writable, write_json
from .study import Row, Study, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORTH_A_REPORT = 60  # seconds of a unit after which the results so far are written, to be looked at

_logger = logging.getLogger(__name__)


def run_study(study: Study, folder: Path, command: Sequence[str]) -> None:
    """Do the units of a study that are not done yet, and write the table, the report, the plots and run.json.

    Any number of processes, of torchrun or started one by one, may work on the same folder: each claims a unit that is
    free, and computes alone. They end when all units are done; where a process died, another takes over its unit.

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
    units = dict(zip(unit_names(study.units), study.units, strict=True))
    check_configuration(study, folder)
    rank = leave_torchrun()
    if study.one_process and rank > 0:
        return
    (folder / 'units').mkdir(parents=True, exist_ok=True)
    with results_lock(folder):
        if not (folder / 'run.json').exists():
            write_json(folder / 'run.json', {'configuration': configuration_of(study)})
    maker = {
        'command': shlex.join(command),
        'commit': provenance.commit(),
        'versions': provenance.versions(),
    }
    try:
        with UnitProgress(study.name, folder, list(units), shown=rank == 0) as progress:
            while pending := [name for name in units if not unit_file(folder, name).exists()]:
                for name in pending:
                    with claim(folder, name, study.one_process) as is_mine:
                        if is_mine:
                            progress.show(name)
                            do_unit(study, units[name], unit_file(folder, name), maker)
                            progress.show()
                            break
                else:
                    time.sleep(0.5)
    finally:
        write_results(study, folder)
    if rank == 0:
        _logger.info(f'The results are in {folder / "results.md"}')


def do_unit(study: Study, unit: Unit, file: Path, maker: dict[str, Any]) -> None:
    """Do a unit and write its file, and the results so far if it took long."""
    started, start = provenance.now(), time.perf_counter()
    rows = study.run(unit, file.parents[1])
    seconds = time.perf_counter() - start
    done = {'unit': unit, 'rows': rows, 'started': started, 'finished': provenance.now(), 'seconds': round(seconds, 1)}
    write_json(file, {**done, 'made_by': {**maker, 'hardware': provenance.hardware()}})
    if seconds > WORTH_A_REPORT:
        write_results(study, file.parents[1])


@contextmanager
def claim(folder: Path, name: str, one_process: bool) -> Iterator[bool]:
    """Hold a unit, and yield whether this process is the one to do it: no other one holds it or has finished it.

    The lock is one of the system's, which ends with the process that holds it, however that ends.

    Args:
        folder: The folder of the study.
        name: The unit.
        one_process: No two units may be done at the same time: all have the same lock.
    """
    lock = FileLock(folder / 'units' / f'.{"all" if one_process else name}.lock', blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield not unit_file(folder, name).exists()
    finally:
        lock.release()


def results_lock(folder: Path) -> FileLock:
    """Return the lock of what all processes of a study write."""
    return FileLock(folder / 'units' / '.results.lock')


def leave_torchrun() -> int:
    """Return the rank that torchrun gave this process; from here on, it computes alone, on a GPU of its own."""
    local_rank, rank, world_size = world_info_from_env()
    for name in ('LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS'):
        os.environ.pop(name, None)
    if world_size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return rank


class UnitProgress:
    """Shows how many units are done: a bar on a terminal, below what is logged, and lines elsewhere.

    Args:
        study: Name of the study.
        folder: Its folder.
        units: Names of all units.
        shown: Show anything at all.
    """

    def __init__(self, study: str, folder: Path, units: Sequence[str], shown: bool):
        self.study = study
        self.files = [unit_file(folder, name) for name in units]
        self.in_lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=study,
            total=len(units),
            initial=self.count(),
            unit='unit',
            dynamic_ncols=True,
            disable=self.in_lines or not shown,
        )
        self.logging = nullcontext() if self.bar.disable else logging_redirect_tqdm()

    def __enter__(self) -> 'UnitProgress':
        self.logging.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()
        self.logging.__exit__(*exception)

    def count(self) -> int:
        """Return how many units are done, by any process."""
        return sum(file.exists() for file in self.files)

    def show(self, name: str = '') -> None:
        """Show that a unit begins, or that one ended."""
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(self.count() - self.bar.n)
        self.bar.refresh()
        if self.in_lines:
            begins = f', {name} begins' if name else ''
            _logger.info(f'{self.study}: {self.count()} of {len(self.files)} units are done{begins}')


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
    with results_lock(folder):
        files = [unit_file(folder, name) for name in unit_names(study.units)]
        files = list(dict.fromkeys([*filter(Path.exists, files), *sorted((folder / 'units').glob('*.json'))]))
        if not files:
            return
        units = [json.loads(file.read_text()) for file in files]
        rows: list[Row] = [row for unit in units for row in unit['rows']]
        with atomic_write(folder / 'results.csv') as path, open(path, 'w', newline='') as table:
            writer = csv.DictWriter(table, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)
        plots = draw_plots(type(study), folder, rows, study.configuration)
        units.sort(key=lambda unit: unit['started'])
        made_by: list[dict[str, Any]] = []
        for unit in units:
            if unit['made_by'] not in made_by:
                made_by.append(unit['made_by'])
        record = {
            'configuration': configuration_of(study),
            'seeds': sorted({unit['unit']['seed'] for unit in units if 'seed' in unit['unit']}),
            'started': units[0]['started'],
            'finished': max(unit['finished'] for unit in units),
            'seconds': {unit_names([unit['unit']])[0]: unit['seconds'] for unit in units},
            'made_by': made_by,
        }
        write_json(folder / 'run.json', record)
        pictures = ''.join(f'\n![{name}]({name}.png)\n' for name in plots)
        with atomic_write(folder / 'results.md') as path:
            path.write_text(f'# {study.name}\n\n{study.report(rows)}\n{pictures}\n{origin(record)}')


def draw_plots(
    study: type[Study], folder: Path, rows: list[Row], configuration: Mapping[str, Any]
) -> 'dict[str, Figure]':
    """Draw the plots of a study into its folder, and return them by name."""
    plots = study.plots(rows, configuration)
    for name, figure in plots.items():
        with atomic_write(folder / f'{name}.png') as path:
            figure.savefig(path, dpi=120)
    return plots


def origin(record: dict[str, Any]) -> str:
    """Return when and how the results of run.json were made, as Markdown."""
    lines = [f'{sum(record["seconds"].values()) / 3600:.2f} hours of work, finished {record["finished"]}. Made by:\n']
    for maker in record['made_by']:
        machine = ', '.join(f'{name} {value}' for name, value in maker['hardware'].items())
        packages = ', '.join(f'{name} {version}' for name, version in maker['versions'].items())
        lines.append(f'- `{maker["command"]}` at commit {maker["commit"]}, {machine}; {packages}.')
    return '\n'.join(lines) + '\n'
