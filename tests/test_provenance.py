"""What a record says of versions, commit and hardware."""

import subprocess

import timm
import torch

import timm_sape2
from timm_sape2 import provenance


def test_versions_are_those_that_run():
    versions = provenance.versions()
    assert versions['timm'] == timm.__version__
    assert versions['timm_sape2'] == timm_sape2.__version__
    assert torch.__version__.startswith(versions['torch'])


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
