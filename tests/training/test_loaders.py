"""The loaders repeat themselves exactly when they are seeded alike."""

from contextlib import closing

import pytest
import timm
import torch

from timm_sape2.trained.checkpoint import ResumePoint
from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.digits import Digits
from timm_sape2.training.loaders import (
    create_mixup,
    create_train_loader,
    create_validation_loader,
    epoch_batches,
    resolve_data,
)

CPU = torch.device('cpu')


def arguments(*flags):
    args = parse_arguments(['--dataset', 'digits', '--batch-size', '64', '--workers', '0', *flags], None)
    args.distributed, args.world_size, args.rank = False, 1, 0
    return args


def data_config(args, **kwargs):
    return resolve_data(args, timm.create_model('test_vit_sape2', **kwargs))


def train_batches(args, epoch, count=2):
    """First batches of an epoch."""
    loader = create_train_loader(args, Digits('train', 'RGB'), data_config(args), CPU, None)
    with closing(epoch_batches(args, loader, None, ResumePoint(epoch), CPU)) as batches:
        return [next(batches) for _ in range(count)]


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_epoch_can_be_repeated_and_is_like_no_other(workers):
    args = arguments('--workers', workers, '--img-size', '16', '--aa', 'rand-m9-mstd0.5', '--reprob', '0.5')
    first, again, other = train_batches(args, epoch=3), train_batches(args, epoch=3), train_batches(args, epoch=4)
    for (images, targets), (same_images, same_targets) in zip(first, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(targets, same_targets)
    assert not torch.equal(first[0][1], other[0][1])


def test_validation_goes_through_all_images_in_order():
    args = arguments('--img-size', '16', '-vb', '100')
    loader = create_validation_loader(args, Digits('validation', 'RGB'), data_config(args), CPU)
    sizes, targets = zip(*((len(targets), targets) for _, targets in loader), strict=True)
    assert sizes == (100, 100, 100, 55)
    assert torch.cat(targets).tolist() == Digits('validation').targets.tolist()


def test_data_follows_the_model_unless_flags_say_else():
    config = data_config(arguments())
    assert config['input_size'] == (3, 64, 64)
    assert data_config(arguments('--img-size', '16', '32'))['input_size'] == (3, 16, 32)
    assert data_config(arguments(), in_chans=1, img_size=16)['input_size'] == (1, 16, 16)
    assert data_config(arguments(), in_chans=1)['mean'] == pytest.approx((sum(config['mean']) / 3,))
    flags = ('--mean', '0.5', '--std', '0.1', '0.2', '0.3', '--crop-pct', '0.5', '--interpolation', 'nearest')
    config = data_config(arguments(*flags))
    assert (config['mean'], config['std'], config['crop_pct']) == ((0.5,) * 3, (0.1, 0.2, 0.3), 0.5)
    assert config['interpolation'] == 'nearest'


def test_mixup():
    assert create_mixup(arguments(), 10, CPU) is None
    mixup = create_mixup(arguments('--mixup', '0.8', '--smoothing', '0'), 10, CPU)
    _, targets = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert torch.equal(targets[0, [0, 3]], targets[3, [3, 0]]), 'the first image is mixed with the last'
    with pytest.raises(ValueError, match='must be even'):
        create_mixup(arguments('--cutmix', '1', '--batch-size', '5'), 10, CPU)


def test_mixup_ends_at_its_epoch():
    args = arguments('--mixup', '0.8', '--mixup-off-epoch', '3')
    mixup = create_mixup(args, 10, CPU)
    loader = create_train_loader(args, Digits('train', 'RGB'), data_config(args), CPU, mixup)
    for epoch in (2, 3):
        with closing(epoch_batches(args, loader, mixup, ResumePoint(epoch), CPU)) as batches:
            _, targets = next(batches)
        num_labels = (targets > targets.min(1, keepdim=True).values).sum(1).max()
        assert num_labels == (2 if epoch < 3 else 1)
