"""A checkpoint file is read whole and safely, or refused; the newest good one of a run is found."""

import argparse
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from timm_sape2.training.checkpoint_files import newest_checkpoint, read_checkpoint
from timm_sape2.training.task import ResumePoint


def save(path, **state):
    torch.save({'optimizer': {}, 'weights': torch.ones(3000), **state}, path)


def test_read_what_timm_writes(tmp_path):
    """Weights, plain values, and the arguments of the run."""
    save(tmp_path / 'last.pth.tar', epoch=3, args=argparse.Namespace(model='test_vit', img_size=(16, 16)))
    for mmap in (False, True):
        checkpoint = read_checkpoint(tmp_path / 'last.pth.tar', mmap=mmap)
        assert checkpoint['weights'].sum() == 3000
        assert checkpoint['args'] == argparse.Namespace(model='test_vit', img_size=(16, 16))


def test_safetensors(tmp_path):
    save_file({'weights': torch.ones(3000)}, tmp_path / 'model.safetensors')
    assert read_checkpoint(tmp_path / 'model.safetensors')['weights'].sum() == 3000
    os.truncate(tmp_path / 'model.safetensors', 5000)
    with pytest.raises(ValueError, match='is truncated or no checkpoint'):
        read_checkpoint(tmp_path / 'model.safetensors')


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('length', [0, 1, 3, 100, 4096, 8192, -200, -1])
def test_cut_off_anywhere(length, mmap, tmp_path):
    path = tmp_path / 'last.pth.tar'
    save(path)
    os.truncate(path, length % path.stat().st_size if length else 0)
    with pytest.raises(ValueError, match=r'last.pth.tar is truncated or no checkpoint'):
        read_checkpoint(path, mmap=mmap)


class Bomb:
    def __reduce__(self):
        return (os._exit, (3,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    save(tmp_path / 'bomb.pth', extra=Bomb())
    with pytest.raises(ValueError, match=r'bomb.pth holds pickled Python objects'):
        read_checkpoint(tmp_path / 'bomb.pth')


def test_other_contents(tmp_path):
    torch.save(torch.ones(3), tmp_path / 'tensor.pth')
    with pytest.raises(ValueError, match='holds no weights but a Tensor'):
        read_checkpoint(tmp_path / 'tensor.pth')
    for path in (tmp_path / 'missing.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'no checkpoint {path}'):
            read_checkpoint(path)


def test_newest_is_furthest_in_training(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / 'missing') == (None, ResumePoint())
    save(tmp_path / 'model_best.pth.tar', epoch=2)
    save(tmp_path / 'checkpoint-10.pth.tar', epoch=10)
    save(tmp_path / 'recovery-11-300.pth.tar', epoch=11, resume_point=vars(ResumePoint(11, num_batches=300)))
    save(tmp_path / 'tmp.pth.tar', epoch=11)
    assert newest_checkpoint(tmp_path) == (tmp_path / 'tmp.pth.tar', ResumePoint(12))
    os.truncate(tmp_path / 'tmp.pth.tar', 5000)
    with caplog.at_level(logging.WARNING):
        newest, point = newest_checkpoint(tmp_path)
    assert (newest.name, point.epoch, point.num_batches) == ('recovery-11-300.pth.tar', 11, 300)
    assert 'Skipping' in caplog.text and 'tmp.pth.tar is truncated' in caplog.text
