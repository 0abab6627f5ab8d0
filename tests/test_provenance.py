"""What a record says of versions, commit and hardware."""

import subprocess

import pytest
import timm
import torch

import timm_sape2
from timm_sape2 import provenance


def test_versions_are_those_that_run():
    versions = provenance.versions()
    assert versions['timm'] == timm.__version__
    assert versions['timm_sape2'] == timm_sape2.__version__
    assert torch.__version__.startswith(versions['torch'])


@pytest.mark.parametrize(
    ('argv', 'processes', 'command'),
    [
        (['/a/train.py', '--epochs', '3'], None, 'python train.py --epochs 3'),
        (['/a/train.py'], '2', 'torchrun --nproc_per_node=2 train.py'),
        (['/bin/timm-sape2', 'study', 'compare'], None, 'timm-sape2 study compare'),
        (['/a/timm_sape2/__main__.py', 'list'], '4', 'torchrun --nproc_per_node=4 -m timm_sape2 list'),
    ],
)
def test_command_can_be_repeated(monkeypatch, argv, processes, command):
    monkeypatch.setattr('sys.argv', argv)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    if processes:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
    assert ' '.join(provenance.command()) == command


@pytest.mark.parametrize(
    ('program', 'commands'),
    [
        ('/a/train.py', ['python train.py', 'torchrun --nproc-per-node 4 train.py']),
        ('/bin/timm-sape2', ['timm-sape2 train', 'torchrun --nproc-per-node 4 -m timm_sape2 train']),
        ('/a/timm_sape2/__main__.py', ['timm-sape2 train', 'torchrun --nproc-per-node 4 -m timm_sape2 train']),
    ],
)
def test_training_starts_as_this_process_did(monkeypatch, program, commands):
    monkeypatch.setattr('sys.argv', [program])
    assert [provenance.training_command(processes) for processes in (1, 4)] == commands


def repository(folder):
    (folder / 'timm_sape2').mkdir()
    file = folder / 'timm_sape2' / 'provenance.py'
    file.touch()
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
    for command in (['init', '-q'], ['add', '.'], [*identity, 'commit', '-qm', 'first']):
        subprocess.run(['git', *command], cwd=folder, check=True)
    return file


def test_commit_and_local_changes(tmp_path, monkeypatch):
    file = repository(tmp_path)
    monkeypatch.setattr(provenance, '__file__', str(file))
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=tmp_path, capture_output=True, text=True).stdout
    assert head.startswith(provenance.commit())
    file.write_text('changed')
    assert provenance.commit().endswith(' and local changes')


def test_no_commit_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, '__file__', str(tmp_path / 'lib' / 'timm_sape2' / 'provenance.py'))
    assert provenance.commit() is None


def test_hardware_of_a_cpu():
    hardware = provenance.hardware()
    assert hardware['threads'] == 1
    assert hardware['cores'] >= 1 and hardware['cpu']
    assert 'gpu' not in hardware
