"""A checkpoint file is read whole and safely, or refused."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from timm_sape2.trained.checkpoint import Checkpoint, ResumePoint, read_checkpoint


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


class TestCheckpoint:
    def test_of_a_run(self, tmp_path):
        args = argparse.Namespace(model='test_vit', model_kwargs={'depth': 2}, gp='avg', lr=0.1)
        state = dict(epoch=3, metric=50.0, optimizer={}, args=args, class_names=['a', 'b'])
        weights, average = {'module.head.weight': torch.ones(2, 3)}, {'head.weight': torch.zeros(2, 3)}
        torch.save({'state_dict': weights, 'state_dict_ema': average, **state}, tmp_path / 'last.pth.tar')
        checkpoint = Checkpoint.read(tmp_path / 'last.pth.tar')
        assert checkpoint.weights['head.weight'].sum() == 6 and checkpoint.average['head.weight'].sum() == 0
        assert (checkpoint.model_name, checkpoint.args['lr']) == ('test_vit', 0.1)
        assert checkpoint.model_kwargs == {'global_pool': 'avg', 'depth': 2}
        assert checkpoint.class_names == ['a', 'b'] and checkpoint.resume_point == ResumePoint(4)
        assert checkpoint.state == {'epoch': 3, 'metric': 50.0, 'optimizer': {}}

    @pytest.mark.parametrize('key', ['state_dict', 'model', 'state_dict_ema', 'model_ema', None])
    def test_of_weights(self, key, tmp_path):
        weights = {'head.weight': torch.ones(2, 3)}
        torch.save(weights if key is None else {key: weights}, tmp_path / 'weights.pth')
        checkpoint = Checkpoint.read(tmp_path / 'weights.pth')
        assert torch.equal(checkpoint.weights['head.weight'], weights['head.weight'])
        assert (checkpoint.average is not None) == (key in ('state_dict_ema', 'model_ema'))
        assert (checkpoint.model_name, checkpoint.args, checkpoint.class_names) == (None, {}, None)
        assert checkpoint.encodings() is None
        with pytest.raises(ValueError, match='it has weights but no state of a training run'):
            checkpoint.resume_point  # noqa: B018

    def test_of_a_configuration(self, tmp_path):
        """What timm is told is what it says of the weights, not where they are nor of the model around them."""
        about = {'mean': [0.5], 'tag': 'x', 'url': 'https://example.org', 'classifier': 'fc', 'of_a_newer_timm': 1}
        config = {'architecture': 'test_vit', 'model_args': {'img_size': [32, 48]}, 'label_names': ['a', 'b']}
        weights = {'head.weight': torch.ones(2, 3)}
        checkpoint = Checkpoint.of_config(tmp_path, weights, {**config, 'pretrained_cfg': about})
        of_model = {'input_size': (3, 32, 48), 'num_classes': 2}
        assert checkpoint.describe('test_vit') == {'mean': [0.5], 'tag': 'x', 'label_names': ['a', 'b'], **of_model}
        flat = Checkpoint.of_config(tmp_path, weights, {'architecture': 'test_vit', **about})
        assert flat.describe('test_vit') == {'mean': [0.5], 'tag': 'x', 'num_classes': 2}

    def test_description_of_a_run(self, tmp_path):
        """Of its input, unless flags say nothing, and of its classes."""
        args = argparse.Namespace(input_size=(1, 8, 16), img_size=None, mean=(0.5,), std=None, crop_pct=0.8)
        torch.save({'state_dict': {'head.weight': torch.ones(4, 3)}, 'args': args}, tmp_path / 'last.pth')
        description = Checkpoint.read(tmp_path / 'last.pth').describe('test_vit')
        assert description == {'input_size': (1, 8, 16), 'mean': (0.5,), 'crop_pct': 0.8, 'num_classes': 4}
