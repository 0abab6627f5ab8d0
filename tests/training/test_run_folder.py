"""The folder of a run is checked without a trace, and its files are replaced whole."""

import argparse
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from timm_sape2.training.run_folder import (
    add_to_summary,
    atomic_write,
    begin_summary,
    check_free_space,
    check_writable,
    path_of_run,
    write_arguments,
)


def test_folder_is_the_same_for_the_same_command():
    args = argparse.Namespace(output='runs', experiment='', model='vit_small_sape2.cifar10')
    assert path_of_run(args) == path_of_run(args) == Path('runs/vit_small_sape2_cifar10')
    assert path_of_run(argparse.Namespace(output='runs', experiment='first', model='test_vit')) == Path('runs/first')


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
    args = argparse.Namespace(checkpoint_hist=hist, recovery_interval=0, model_ema=False)
    model = torch.nn.Linear(1000, 1, bias=False)
    if fits:
        check_free_space(tmp_path / 'run', model, args)
    else:
        with pytest.raises(OSError, match=rf'{hist + 2} checkpoints need about 0 MiB'):
            check_free_space(tmp_path / 'run', model, args)
