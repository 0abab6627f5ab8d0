"""Checkpoints of the task say where the run goes on."""

import pytest
import torch
from torch import nn

from timm_sape2.trained.checkpoint import ResumePoint
from timm_sape2.training.task import ResumableTask


def test_mean_loss_of_an_epoch():
    """Losses 1 and 4 of batches with 2 and 1 images: (1 * 2 + 4 * 1) / 3."""
    point = ResumePoint(epoch=5)
    point.add_batch(1.0, 2)
    point.add_batch(4.0, 1)
    assert (point.num_batches, point.mean_loss) == (2, 2.0)


def test_checkpoint_carries_the_resume_point(tmp_path):
    task = ResumableTask(nn.Linear(2, 2), verbose=False)
    assert set(task.get_checkpoint_state()) == {'state_dict'}
    task.resume_point = ResumePoint(3, 7, 1.5, 28, random_states=[{'torch': torch.get_rng_state()}])
    torch.save(dict(task.get_checkpoint_state(), optimizer={}), tmp_path / 'checkpoint.pth')
    loaded = ResumePoint.of_checkpoint(torch.load(tmp_path / 'checkpoint.pth', weights_only=True))
    assert torch.equal(loaded.random_states[0].pop('torch'), task.resume_point.random_states[0].pop('torch'))
    assert loaded == task.resume_point
    assert 'resume_point' not in task.get_checkpoint_state(ema=True)


def test_weights_alone_say_nothing():
    with pytest.raises(ValueError, match='no state of a training run'):
        ResumePoint.of_checkpoint({'state_dict': {}})
