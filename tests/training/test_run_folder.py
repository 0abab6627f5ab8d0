"""The folder of a run is checked without a trace, and its files are replaced whole."""

import copy
import json
import logging
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_sape2 import _figure, provenance
from timm_sape2._files import atomic_write, check_writable, write_json
from timm_sape2.training import run_folder
from timm_sape2.training.run_folder import (
    add_to_record,
    add_to_summary,
    begin_record,
    begin_summary,
    check_free_space,
    path_of_run,
    read_record,
    summarize_record,
    training_history,
    write_arguments,
)


def test_folder_is_the_same_for_the_same_command():
    paths = [path_of_run('runs', '', 'vit_small_sape2.cifar10') for _ in range(2)]
    assert paths == [Path('runs/vit_small_sape2_cifar10')] * 2
    assert path_of_run('runs', 'first', 'test_vit') == Path('runs/first')


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'notes.txt'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    with atomic_write(path) as temporary:
        temporary.write_text(temporary.read_text() + ' and new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'old and new'
    assert os.listdir(tmp_path) == ['notes.txt']


def test_summary_has_one_row_an_epoch_also_after_a_resume(tmp_path):
    begin_summary(tmp_path, 0)
    for epoch in (0, 1, 2):
        add_to_summary(tmp_path, epoch, {'loss': 0.5}, {'top1': 10.0 * epoch}, lr=0.1)
    begin_summary(tmp_path, 1)
    add_to_summary(tmp_path, 1, {'loss': 0.5}, {'top1': 90.0}, lr=0.1)
    assert (tmp_path / 'summary.csv').read_text().split() == [
        'epoch,train_loss,eval_top1,lr',
        '0,0.5,0.0,0.1',
        '1,0.5,90.0,0.1',
    ]


def test_arguments_are_written_as_a_recipe(tmp_path):
    write_arguments(tmp_path, {'lr': 0.1, 'img_size': (16, 32)})
    assert (tmp_path / 'args.yaml').read_text().split('\n')[:4] == ['img_size:', '- 16', '- 32', 'lr: 0.1']


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / 'new' / 'run')
    assert os.listdir(tmp_path) == []
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'cannot write to the output folder .*file/run: Not a directory'):
        check_writable(tmp_path / 'file' / 'run')


@pytest.mark.parametrize(('hist', 'free_kib', 'fits'), [(1, 38, True), (1, 34, False), (3, 38, False)])
def test_free_space(hist, free_kib, fits, tmp_path, monkeypatch):
    """1,000 weights of 4 bytes, 2 numbers of the optimizer for each: 12 kB a checkpoint, `hist` + 2 of them."""
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(0, 0, free_kib * 1024))
    settings = dict(checkpoint_hist=hist, recovery_interval=0, model_ema=False)
    model = torch.nn.Linear(1000, 1, bias=False)
    if fits:
        check_free_space(tmp_path / 'run', model, **settings)
    else:
        with pytest.raises(OSError, match=rf'{hist + 2} checkpoints need about 0 MiB'):
            check_free_space(tmp_path / 'run', model, **settings)


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


@pytest.fixture
def folder(tmp_path):
    """Folder of a run with a summary of three epochs."""
    for epoch in range(3):
        evaluation = {'loss': 1 / (epoch + 1), 'top1': 20.0 * epoch, 'top5': 30.0 * epoch}
        add_to_summary(tmp_path, epoch, {'loss': 2 / (epoch + 1)}, evaluation, lr=0.1)
    return tmp_path


def test_curves_are_a_picture(folder):
    run_folder.draw_curves(folder)
    assert Image.open(folder / 'curves.png').size == (1080, 480)
    assert {path.name for path in folder.iterdir()} == {'summary.csv', 'curves.png'}


def test_without_matplotlib_the_extra_is_named_once(folder, monkeypatch, caplog):
    _figure._figure_class.cache_clear()
    run_folder._say_what_to_install.cache_clear()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with caplog.at_level(logging.WARNING):
        run_folder.draw_curves(folder)
        run_folder.draw_curves(folder)
    assert caplog.text.count("pip install 'timm_sape2[demo]'") == 1
    assert not (folder / 'curves.png').exists()
