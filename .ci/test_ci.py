"""The parts of ci.py that decide what is tested and whether it passed."""

import importlib.util
import shutil
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / 'ci.py'
spec = importlib.util.spec_from_file_location('ci', SCRIPT)
ci = sys.modules['ci'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ci)


@pytest.mark.parametrize(
    ('available', 'expected'),
    [
        (['2.12.1', '2.12.0', '2.11.0', '2.10.2'], ['2.11.0', '2.12.1']),
        (['2.9.9', '2.13.0+cpu', '2.13.0', '2.12.10', '2.12.9'], ['2.12.10', '2.13.0']),
        (['3.0.0', '2.100.0', '2.99.0'], ['2.99.0', '2.100.0', '3.0.0']),
        (['2.13.0rc1', '2.12.0.dev20260101', '2.11.0'], ['2.11.0']),
        (['2.10.0'], []),
    ],
)
def test_newest_patch_of_each_minor_version(available, expected):
    assert ci.newest_patches(available, '2.11.0') == expected


def test_every_python_has_its_turn():
    pythons = {(3, 10): 'old', (3, 13): 'new', (3, 12): 'middle'}
    assert ci.take_turns(['2.12', '2.13', '2.14', '2.15'], pythons) == [
        ('2.15', 'new'),
        ('2.14', 'middle'),
        ('2.13', 'old'),
        ('2.12', 'new'),
    ]


def test_a_contract_does_not_start_late(tmp_path):
    run = ci.Run(tmp_path)
    run.begin -= ci.LAST_START + 1
    ci.test_contract(run, 'torch 2.13', 'no-such-python')
    assert 'contract: torch 2.13' in run.table() and 'not run, 65 minutes are over' in run.table()
    assert list(tmp_path.iterdir()) == []


def test_the_floor_is_what_the_package_asks_for():
    lines = (ci.ROOT / 'pyproject.toml').read_text().splitlines()
    pinned = ci.pinned((ci.ROOT / '.ci' / 'floor.txt').read_text())
    bounds = dict(line.strip(' ",').split('>=') for line in lines if '>=' in line and line.startswith('    "'))
    assert bounds['torch'] and bounds['timm']
    for name, bound in bounds.items():
        assert ci.split_version(pinned[name])[: len(ci.split_version(bound))] == ci.split_version(bound), name


def test_pythons_that_are_found():
    found = ci.find_pythons()
    assert found[sys.version_info[:2]] and min(found) >= ci.oldest_python() == (3, 10)


def test_paths_of_the_contract():
    assert all(
        list((ci.ROOT / path).glob('test_*.py')) or list((ci.ROOT / path).glob('*/test_*.py')) for path in ci.CONTRACT
    )


class TestBrowser:
    """Programs that stand in for the system's, as root."""

    @pytest.fixture(autouse=True)
    def programs(self, tmp_path, monkeypatch):
        for name in ('sh', 'cp'):
            (tmp_path / name).symlink_to(shutil.which(name))
        monkeypatch.setenv('PATH', str(tmp_path))
        monkeypatch.setattr(ci.os, 'geteuid', lambda: 0)
        return tmp_path

    def write(self, path, *lines):
        path.write_text('\n'.join(['#!/bin/sh', *lines]))
        path.chmod(0o755)

    def test_one_that_is_here(self, programs):
        self.write(programs / 'apt-get', 'exit 1')
        self.write(programs / 'google-chrome')
        assert ci.find_browser() == str(programs / 'google-chrome')

    def test_it_is_installed(self, programs):
        self.write(programs / 'apt-get', f'if [ "$1" = install ]; then cp {programs}/apt-get {programs}/chromium; fi')
        assert ci.find_browser() == str(programs / 'chromium')

    def test_it_cannot_be_installed(self, programs):
        assert ci.find_browser() == 'none'
        self.write(programs / 'apt-get', 'echo no network', 'exit 100')
        assert ci.find_browser() == 'none, it did not install: no network'


class TestAccuracy:
    def write(self, folder, *values):
        (folder / 'run').mkdir()
        (folder / 'run' / 'summary.csv').write_text('\n'.join(('epoch,eval_top1', *values)) + '\n')
        return folder

    def test_is_that_of_the_best_epoch(self, tmp_path):
        assert ci.best_top1(self.write(tmp_path, '0,9.5', '1,97.25', '2,96.0')) == 'top-1 97.25 %'

    def test_below_the_least(self, tmp_path):
        with pytest.raises(ValueError, match=r'94\.00 % is below'):
            ci.best_top1(self.write(tmp_path, '0,94.0', '1,93.0'))

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError):
            ci.best_top1(tmp_path)


class TestParts:
    @pytest.fixture
    def run(self, tmp_path):
        return ci.Run(tmp_path)

    def test_the_result_is_what_the_last_action_says(self, run):
        assert run.part('name', lambda: 'first', lambda: 'second')
        assert (run.parts[0].result, run.parts[0].is_good) == ('second', True)

    def test_a_failure_ends_its_part_alone(self, run, capfd):
        def never():
            raise AssertionError

        fails = [sys.executable, '-c', 'print("2 failed, 3 passed\\n"); raise SystemExit(1)']
        assert not run.part('fails', lambda: ci.execute(fails), never)
        assert run.part('passes', lambda: ci.execute([sys.executable, '-c', 'print("=== 5 passed ===")']))
        assert [part.result for part in run.parts] == ['FAILED: 2 failed, 3 passed', '5 passed']
        assert '2 failed, 3 passed' in capfd.readouterr().out

    def test_a_command_that_is_not_there(self, run):
        assert not run.part('name', lambda: ci.execute(['no-such-command']))

    def test_what_hangs_is_stopped_with_its_children(self, run):
        hangs = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])'
        start = time.monotonic()
        assert not run.part('hangs', lambda: ci.execute([sys.executable, '-c', hangs], limit=1.0))
        assert run.parts[0].result == 'FAILED: stopped after 1 seconds'
        assert time.monotonic() - start < 30

    def test_nothing_can_be_asked(self):
        assert ci.execute([sys.executable, '-c', 'import sys; print(len(sys.stdin.read()))']) == '0'

    def test_table(self, run):
        run.versions = {'python': '3.11.7', 'torch': '2.14.1', 'torchvision': '0.29.2', 'triton': '-', 'numpy': '2.4.6'}
        run.part('contract', lambda: '7 passed')
        run.say('another', 'not on this machine')
        header, first, second = run.table().splitlines()
        assert first.split() == ['contract', '3.11.7', '2.14.1', '0.29.2', '-', '2.4.6', '0', '7', 'passed']
        assert header.index('result') == first.index('7 passed') == second.index('not on this machine')
