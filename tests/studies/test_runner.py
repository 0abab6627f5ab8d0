"""A study goes on where it was stopped, shares its work, and refuses the folder of another."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_sape2.studies import Study, runner
from timm_sape2.studies.report import new_figure
from timm_sape2.studies.runner import run_study, unit_names

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

    def plots(self, rows):
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
    """Function that makes this look like one of two processes, which agreed to do some units."""

    def become(rank, *agreed):
        monkeypatch.setattr(runner, 'world_info_from_env', lambda: (rank, rank, 2))
        monkeypatch.setattr(runner, 'of_first_process', lambda names: list(agreed))

    return become


def test_processes_share_the_units_and_the_first_one_waits_and_reports(tmp_path, as_rank):
    first, second = Squares(), Squares()
    as_rank(0, '1_7', '2_7', '3_7')
    waiting = threading.Thread(target=run_study, args=(first, tmp_path, []))
    waiting.start()
    waiting.join(timeout=2)
    assert waiting.is_alive() and first.done == [1, 3]
    as_rank(1, '1_7', '2_7', '3_7')
    run_study(second, tmp_path, [])
    assert second.done == [2]
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert [row['number'] for row in table(tmp_path)] == ['1', '1', '2', '2', '3', '3']


def test_what_the_first_process_found_pending_is_shared(tmp_path, as_rank, monkeypatch):
    run_study(Squares([1, 3]), tmp_path, [])
    found = []
    as_rank(1)
    monkeypatch.setattr(runner, 'of_first_process', lambda names: found.extend(names) or names)
    second = Squares([1, 2, 3, 4])
    run_study(second, tmp_path, [])
    assert (found, second.done) == (['2_7', '4_7'], [4])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='no gloo')
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


def test_measurements_of_time_are_left_to_the_first_process(tmp_path, as_rank):
    class Timed(Squares):
        one_process = True

    as_rank(1, '1_7', '2_7', '3_7')
    second = Timed()
    run_study(second, tmp_path, [])
    assert second.done == []
    as_rank(0, '1_7', '2_7', '3_7')
    first = Timed()
    run_study(first, tmp_path, [])
    assert first.done == [1, 2, 3]


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
