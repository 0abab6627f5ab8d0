"""A study goes on where it was stopped, shares its work, and refuses the folder of another."""

import argparse
import csv
import json
import logging
import os
import re
import select
import struct
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_sape2._figure import new_figure
from timm_sape2.studies import Study, runner
from timm_sape2.studies.runner import run_study, unit_names
from timm_sape2.training.console import EpochProgress, set_up_logging
from timm_sape2.training.resume import ResumePoint

from .conftest import TRAINING


class Squares(Study):
    """Squares of numbers, each number a unit with two rows."""

    name = 'squares'
    summary = description = examples = ''

    def __init__(self, numbers=(1, 2, 3), **configuration):
        self.units = [{'number': number, 'seed': 7} for number in numbers]
        self.configuration = configuration
        self.done = []

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None: ...

    def run(self, unit, folder):
        self.done.append(unit['number'])
        return [{**unit, 'sign': sign, 'square': (sign * unit['number']) ** 2} for sign in (1, -1)]

    def report(self, rows):
        return f'{len(rows)} squares'

    @staticmethod
    def plots(rows, configuration):
        return {'curve': new_figure(2, 1)}


def table(folder):
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_table_report_plot_and_record(tmp_path):
    run_study(Squares([3], power=2), tmp_path / 'a', ['timm-sape2', 'study', 'squares'])
    assert table(tmp_path / 'a') == [
        {'number': '3', 'seed': '7', 'sign': '1', 'square': '9'},
        {'number': '3', 'seed': '7', 'sign': '-1', 'square': '9'},
    ]
    assert (tmp_path / 'a' / 'curve.png').read_bytes().startswith(b'\x89PNG')
    record = json.loads((tmp_path / 'a' / 'run.json').read_text())
    (maker,) = record['made_by']
    assert maker['command'] == 'timm-sape2 study squares'
    assert {'torch', 'timm', 'python'} <= set(maker['versions'])
    assert {'cpu', 'cores', 'threads'} <= set(maker['hardware'])
    assert record['configuration'] == {'study': 'squares', 'power': 2}
    assert (record['seeds'], list(record['seconds'])) == ([7], ['3_7'])
    text = (tmp_path / 'a' / 'results.md').read_text()
    assert text.startswith('# squares\n\n2 squares\n\n![curve](curve.png)\n\n0.00 hours of work, finished ')
    assert '\n- `timm-sape2 study squares` at commit ' in text


def test_finished_units_are_not_done_again(tmp_path):
    run_study(Squares(), tmp_path, [])
    again = Squares()
    run_study(again, tmp_path, [])
    assert again.done == []


def test_stopped_half_way_and_resumed_gives_the_same_table(tmp_path):
    run_study(Squares(), tmp_path / 'undisturbed', [])

    class Stopped(Squares):
        def run(self, unit, folder):
            if unit['number'] == 2:
                raise KeyboardInterrupt
            return super().run(unit, folder)

    with pytest.raises(KeyboardInterrupt):
        run_study(Stopped(), tmp_path / 'stopped', [])
    assert [row['number'] for row in table(tmp_path / 'stopped')] == ['1', '1']
    resumed = Squares()
    run_study(resumed, tmp_path / 'stopped', [])
    assert resumed.done == [2, 3]
    assert table(tmp_path / 'stopped') == table(tmp_path / 'undisturbed')


def test_more_units_of_the_same_configuration_join_the_table(tmp_path):
    run_study(Squares([1]), tmp_path, ['first'])
    for _ in range(2):
        run_study(Squares([2]), tmp_path, ['second'])
    assert [row['number'] for row in table(tmp_path)] == ['2', '2', '1', '1']
    makers = json.loads((tmp_path / 'run.json').read_text())['made_by']
    assert [maker['command'] for maker in makers] == ['first', 'second']


def test_folder_of_another_configuration_is_refused_and_left_alone(tmp_path):
    run_study(Squares(power=2, base='a'), tmp_path, ['first'])
    before = {file: file.read_bytes() for file in tmp_path.rglob('*') if file.is_file()}
    other = Squares([9], power=3, base='a')
    with pytest.raises(
        ValueError, match=re.escape(f'{tmp_path} holds a study with power=2 instead of 3; --experiment')
    ):
        run_study(other, tmp_path, ['second'])
    assert other.done == []
    assert {file: file.read_bytes() for file in tmp_path.rglob('*') if file.is_file()} == before


def test_folder_of_another_study_is_refused(tmp_path):
    class Cubes(Squares):
        name = 'cubes'

    run_study(Squares(), tmp_path, [])
    with pytest.raises(ValueError, match="study='squares' instead of 'cubes'"):
        run_study(Cubes(), tmp_path, [])


@pytest.fixture
def as_rank(monkeypatch):
    """Function that makes this look like one of two processes of torchrun."""
    return lambda rank: monkeypatch.setattr(runner, 'world_info_from_env', lambda: (rank, rank, 2))


def in_background(study, folder):
    """Begin a study in a thread."""
    thread = threading.Thread(target=run_study, args=(study, folder, []), daemon=True)
    thread.start()
    return thread


class Waiting(Squares):
    """The units of some numbers take until `go_on` is set."""

    def __init__(self, slow, *arguments, **configuration):
        super().__init__(*arguments, **configuration)
        self.slow, self.go_on, self.begun = slow, threading.Event(), threading.Event()

    def run(self, unit, folder):
        if unit['number'] in self.slow:
            self.begun.set()
            assert self.go_on.wait(30)
        return super().run(unit, folder)


def test_two_at_work_on_one_folder_share_the_units_and_both_end_when_all_are_done(tmp_path):
    first, second = Waiting([1]), Squares()
    one = in_background(first, tmp_path)
    assert first.begun.wait(30)
    two = in_background(second, tmp_path)
    two.join(timeout=2)
    assert two.is_alive() and second.done == [2, 3]
    first.go_on.set()
    for thread in (one, two):
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert first.done == [1]
    assert [row['number'] for row in table(tmp_path)] == ['1', '1', '2', '2', '3', '3']


def test_the_unit_of_a_process_that_was_killed_is_taken_over(tmp_path):
    """The other process holds the claim of unit 1 until it is killed."""
    (tmp_path / 'units').mkdir()
    hold = (
        'import sys, time; from pathlib import Path; from timm_sape2.studies.runner import claim\n'
        "with claim(Path(sys.argv[1]), '1_7', False) as is_mine: print(is_mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, '-c', hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'True\n'
        study = Squares()
        thread = in_background(study, tmp_path)
        thread.join(timeout=2)
        assert thread.is_alive() and study.done == [2, 3]
        process.kill()
        thread.join(timeout=30)
    assert study.done == [2, 3, 1]


def test_measurements_of_time_are_never_beside_each_other(tmp_path):
    class Timed(Waiting):
        one_process = True

    first, second = Timed([1]), Timed([])
    one = in_background(first, tmp_path)
    assert first.begun.wait(30)
    two = in_background(second, tmp_path)
    two.join(timeout=1)
    assert second.done == []
    first.go_on.set()
    one.join(timeout=30)
    two.join(timeout=30)
    assert sorted(first.done + second.done) == [1, 2, 3]


def test_folder_of_a_run_of_train(tmp_path):
    """Its run.json is of another kind: the folder is refused, and stays as it is."""
    (tmp_path / 'run.json').write_text('{"starts": [], "epochs": []}')
    with pytest.raises(ValueError, match='holds a study with '):
        run_study(Squares(), tmp_path, ['timm-sape2'])
    assert [path.name for path in tmp_path.iterdir()] == ['run.json']


def test_under_torchrun(tmp_path):
    """Two processes, each with a model of its own."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_sape2']
    flags = ['--encodings', 'nope', 'learned', '--layer-scale', 'off', '--seeds', '0', *TRAINING]
    done = subprocess.run(
        [*launch, 'study', 'compare', '--output', str(tmp_path), *flags],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [row['encoding'] for row in table(tmp_path / 'compare')] == ['nope'] * 2 + ['learned'] * 2


def test_measurements_of_time_are_left_to_the_first_process_of_torchrun(tmp_path, as_rank):
    class Timed(Squares):
        one_process = True

    as_rank(1)
    second = Timed()
    run_study(second, tmp_path, [])
    assert second.done == []
    as_rank(0)
    first = Timed()
    run_study(first, tmp_path, [])
    assert first.done == [1, 2, 3]


class Training(Squares):
    """Units that show what a run of train.py does: a bar of its own, and a line for each epoch."""

    def run(self, unit, folder):
        for epoch in range(2):
            with EpochProgress(
                ResumePoint(epoch), num_epochs=2, num_batches=1, num_images=8, rate=0.1, log_interval=1
            ) as bar:
                bar.update(ResumePoint(epoch, 1))
            logging.getLogger('timm_sape2.training.loop').info(f'Epoch {epoch} of unit {unit["number"]}')
        return super().run(unit, folder)


@pytest.fixture
def log_to(monkeypatch):
    """Function that lets this process tell what it does to a stream, as its standard error."""

    def log(stream):
        monkeypatch.setattr(sys, 'stderr', stream)
        monkeypatch.setattr(logging.root, 'handlers', [])
        set_up_logging()

    return log


def screen(text):
    """Return the lines that a terminal shows: '\\r' goes to the start of the line, ESC [A a line up."""
    lines, row, column = [''], 0, 0
    for token in re.findall(r'\x1b\[A|.', text, re.DOTALL):
        if token == '\r':
            column = 0
        elif token == '\n':
            row, column = row + 1, 0
            lines += [''] * (row + 1 - len(lines))
        elif token == '\x1b[A':
            row -= 1
        else:
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


EPOCHS = [f'Epoch {epoch} of unit {number}' for number in (1, 2) for epoch in (0, 1)]


def test_on_a_terminal_a_bar_stays_below_what_is_logged(tmp_path, log_to):
    pty, fcntl, termios = map(pytest.importorskip, ('pty', 'fcntl', 'termios'))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 100, 0, 0))
    with open(ours, 'rb', buffering=0) as reader, open(theirs, 'w') as terminal:
        log_to(terminal)
        run_study(Training([1, 2]), tmp_path, [])
        terminal.flush()
        written = b''
        while select.select([reader], [], [], 0.5)[0]:
            written += os.read(reader.fileno(), 2**12)
        *lines, bar, end = screen(written.decode())
    assert lines == EPOCHS
    assert bar.startswith('squares: 100%|') and '2/2' in bar
    assert end == f'The results are in {tmp_path / "results.md"}'


def test_a_file_of_the_log_has_whole_lines_and_no_bar(tmp_path, log_to):
    with open(tmp_path / 'log', 'w') as file:
        log_to(file)
        run_study(Training([1, 2]), tmp_path, [])
    text = (tmp_path / 'log').read_text()
    assert '\r' not in text and '\x1b' not in text
    lines = text.splitlines()
    assert lines[0] == 'squares: 0 of 2 units are done, 1_7 begins'
    assert [line for line in lines if ' of unit ' in line] == EPOCHS
    assert lines[-2:] == ['squares: 2 of 2 units are done', f'The results are in {tmp_path / "results.md"}']
    assert all(re.match(r'squares: \d of 2 units|Epoch \d|The results', line) for line in lines)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ValueError, match=re.escape("plots need matplotlib: pip install 'timm_sape2[studies]'")):
        run_study(Squares(), tmp_path / 'study', [])
    assert not (tmp_path / 'study').exists()


def test_a_unit_listed_twice(tmp_path):
    with pytest.raises(ValueError, match='listed twice: 2_7'):
        run_study(Squares([1, 2, 2]), tmp_path / 'study', [])
    assert not (tmp_path / 'study').exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='cannot write to the output folder'):
        run_study(Squares(), tmp_path / 'file' / 'study', [])


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_names_of_units_are_names_of_files(values):
    (name,) = unit_names([dict(enumerate(values))])
    assert '/' not in name and '\0' not in name
