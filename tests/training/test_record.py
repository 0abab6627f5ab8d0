"""run.json of a run: its starts and its epochs, also after a resume."""

import copy
import json

import pytest

from timm_sape2 import provenance
from timm_sape2.training.record import (
    add_to_record,
    begin_record,
    read_record,
    summarize_record,
    training_history,
)
from timm_sape2.training.run_folder import write_arguments, write_json


def test_record_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    monkeypatch.setattr('sys.argv', ['/somewhere/train.py', '--data-dir', 'my photos'])
    begin_record(tmp_path, 0, processes=1, training_images=100)
    for epoch in (0, 1, 2):
        add_to_record(tmp_path, epoch, 96, training_seconds=9.9999, validation_seconds=0.5)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    begin_record(tmp_path, 1, processes=2, training_images=100)
    add_to_record(tmp_path, 1, 96, training_seconds=5, validation_seconds=0.5)
    record = json.loads((tmp_path / 'run.json').read_text())
    first, second = record['starts']
    assert first['command'] == "python train.py --data-dir 'my photos'"
    assert second['command'] == "torchrun --nproc_per_node=2 train.py --data-dir 'my photos'"
    assert [(start['epoch'], start['processes']) for start in record['starts']] == [(0, 1), (1, 2)]
    assert first['versions'] == provenance.versions()
    assert first['commit'] == provenance.commit()
    assert first['training_images'] == 100
    assert first['started'] <= second['started'] <= record['epochs'][1]['finished']
    times = [
        (row['epoch'], row['images'], row['training_seconds'], row['validation_seconds']) for row in record['epochs']
    ]
    assert times == [(0, 96, 10.0, 0.5), (1, 96, 5, 0.5)]


RECORD = {
    'starts': [
        {'processes': 1, 'hardware': {'cpu': 'old', 'cores': 1}, 'commit': 'a', 'versions': {'torch': '2.11.0'}},
        {'processes': 2, 'hardware': {'cpu': 'EPYC', 'cores': 4}, 'commit': 'b', 'versions': {'torch': '2.15.0'}},
    ],
    'epochs': [
        {'images': 1000, 'training_seconds': 5, 'validation_seconds': 1, 'finished': '2026-01-01T23:59:00+00:00'},
        {'images': 1000, 'training_seconds': 3, 'validation_seconds': 1791, 'finished': '2026-01-02T00:29:00+00:00'},
    ],
}


def test_summary_by_hand():
    """2,000 images in 5 + 3 seconds, and half an hour in all."""
    assert summarize_record(RECORD) == {
        'epochs': 2,
        'images_per_second': 250,
        'hours': 0.5,
        'processes': 2,
        'hardware': 'EPYC, 4 cores',
        'commit': 'b',
        'torch': '2.15.0',
        'date': '2026-01-02',
    }


def test_summary_names_the_gpu():
    record = copy.deepcopy(RECORD)
    record['starts'][-1]['hardware']['gpu'] = 'NVIDIA H200'
    assert summarize_record(record)['hardware'] == 'NVIDIA H200'


def make_run(folder, pretrained_path=''):
    folder.mkdir()
    write_arguments(folder, {'pretrained_path': str(pretrained_path)})
    write_json(folder / 'run.json', RECORD)
    return folder


def test_history_follows_the_weights_back(tmp_path):
    first = make_run(tmp_path / 'first')
    second = make_run(tmp_path / 'second', first / 'last.pth.tar')
    assert training_history(second) == [summarize_record(RECORD)] * 2
    assert training_history(first) == [summarize_record(RECORD)]


@pytest.mark.parametrize('content', ['{', '[]', '{"configuration": {}}'])
def test_files_of_other_programs(tmp_path, content):
    """They are never overwritten, and are no history."""
    (tmp_path / 'run.json').write_text(content)
    with pytest.raises(ValueError, match='is no record of train'):
        begin_record(tmp_path, 0)
    assert (tmp_path / 'run.json').read_text() == content
    assert training_history(tmp_path) == []


@pytest.mark.parametrize('flag', ['initial_checkpoint', 'resume'])
def test_other_ways_to_start_from_weights(tmp_path, flag, monkeypatch):
    """The path may be spelled in another way than that of the folder."""
    first, second = make_run(tmp_path / 'first'), make_run(tmp_path / 'second')
    write_arguments(second, {'pretrained_path': '', 'resume': 'auto', flag: str(first / 'last.pth.tar')})
    write_arguments(first, {'pretrained_path': 'second/last.pth.tar'})
    monkeypatch.chdir(tmp_path)
    assert len(training_history(second)) == 2


def test_history_begins_where_nothing_is_recorded(tmp_path):
    assert training_history(None) == training_history(tmp_path) == []
    assert len(training_history(make_run(tmp_path / 'run', tmp_path / 'gone' / 'last.pth.tar'))) == 1
    (make_run(tmp_path / 'broken') / 'args.yaml').write_text('{')
    assert training_history(tmp_path / 'broken') == []
    assert len(training_history(make_run(tmp_path / 'circle', tmp_path / 'circle' / 'last.pth.tar'))) == 1


def test_folder_without_a_record(tmp_path):
    assert read_record(tmp_path) == {'starts': [], 'epochs': []}
