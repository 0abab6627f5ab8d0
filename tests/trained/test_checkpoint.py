"""A checkpoint file is read whole and safely, or refused."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from timm_sape2.trained.checkpoint import ResumePoint, read_checkpoint


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


def test_resume_points_are_ordered():
    """A checkpoint at the end of epoch 3 goes on with epoch 4, and so is after one in the middle of epoch 3."""
    end_of_epoch_3 = ResumePoint.of_checkpoint({'epoch': 3, 'optimizer': {}})
    assert end_of_epoch_3 == ResumePoint(epoch=4, num_batches=0)
    assert end_of_epoch_3.is_after(ResumePoint(epoch=3, num_batches=70))
    assert ResumePoint(epoch=4, num_batches=1).is_after(end_of_epoch_3)
