"""The loaders repeat themselves exactly when they are seeded alike."""

import shlex
from contextlib import closing

import pytest
import timm
import torch
from timm.data import Mixup

from timm_sape2.data.digits import Digits
from timm_sape2.trained.checkpoint import ResumePoint
from timm_sape2.training import loaders
from timm_sape2.training.arguments import flags_of, parse_arguments
from timm_sape2.training.hardware import format_of_images
from timm_sape2.training.loaders import average_batch_size, images_of_epoch

CPU = torch.device('cpu')


def arguments(*flags):
    args = parse_arguments(['--dataset', 'digits', '--batch-size', '64', '--workers', '0', *flags], None)
    args.distributed, args.world_size, args.rank = False, 1, 0
    return args


def data_config(args, **kwargs):
    model = timm.create_model('test_vit_sape2', **kwargs)
    return loaders.resolve_data(model, **flags_of(loaders.resolve_data, args))


def train_loader(args, mixing=None):
    flags = flags_of(loaders.create_train_loader, args)
    return loaders.create_train_loader(Digits('train', 'RGB'), data_config(args), CPU, mixing, **flags)


def validation_loader(args):
    flags = flags_of(loaders.create_validation_loader, args)
    return loaders.create_validation_loader(Digits('validation', 'RGB'), data_config(args), CPU, **flags)


def create_mixup(args, num_classes, device):
    return loaders.create_mixup(num_classes, device, **flags_of(loaders.create_mixup, args))


def epoch_batches(args, loader, *what, **formats):
    return loaders.epoch_batches(loader, *what, **formats, **flags_of(loaders.epoch_batches, args))


def train_batches(args, epoch, count=2):
    """First batches of an epoch."""
    loader = train_loader(args)
    with closing(epoch_batches(args, loader, None, ResumePoint(epoch), CPU)) as batches:
        return [next(batches) for _ in range(count)]


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_epoch_can_be_repeated_and_is_like_no_other(workers):
    args = arguments('--workers', workers, '--img-size', '16', '--aa', 'rand-m9-mstd0.5', '--reprob', '0.5')
    first, again, other = train_batches(args, epoch=3), train_batches(args, epoch=3), train_batches(args, epoch=4)
    for (images, targets), (same_images, same_targets) in zip(first, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(targets, same_targets)
    assert not torch.equal(first[0][1], other[0][1])


def test_images_from_memory():
    """Shifted by up to an eighth, mirrored and erased; without augmentation as they are."""
    args = arguments('--loader', 'memory', '--reprob', '0.5', '--remode', 'const')
    loader = train_loader(args)
    data = loader.dataset
    assert (data.shift, data.hflip, data.erasing.probability, data.erasing.mode) == ((8, 8), 0.5, 0.5, 'const')
    assert data.crops is None
    first, again, other = train_batches(args, epoch=3), train_batches(args, epoch=3), train_batches(args, epoch=4)
    assert all(torch.equal(images, same) for (images, _), (same, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])

    plain = arguments('--loader', 'memory', '--no-aug', '--reprob', '0.5', '--img-size', '8')
    data = train_loader(plain).dataset
    assert (data.crops, data.shift, data.hflip, data.erasing) == (None, (0, 0), 0, None)
    assert torch.equal(data.images[:, 0], torch.from_numpy(Digits('train').images))
    validation = validation_loader(plain)
    assert torch.cat([targets for _, targets in validation]).tolist() == Digits('validation').targets.tolist()


def test_crops_from_memory():
    """In place of shifts; their defaults are those of the other loader."""
    args = arguments('--loader', 'memory', '--train-crop-mode', 'rrc')
    data = train_loader(args).dataset
    assert (data.crops, data.shift) == (((0.08, 1), (3 / 4, 4 / 3)), (0, 0))
    args = arguments('--loader', 'memory', '--train-crop-mode', 'rrc', '--scale', '0.5', '1', '--ratio', '1', '1.5')
    assert train_loader(args).dataset.crops == ([0.5, 1], [1, 1.5])
    first, again, other = train_batches(args, epoch=3), train_batches(args, epoch=3), train_batches(args, epoch=4)
    assert all(torch.equal(images, same) for (images, _), (same, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_images_from_memory_are_mixed_on_the_device():
    args = arguments('--loader', 'memory', '--mixup', '0.8', '--cutmix', '1')
    mixup = create_mixup(args, 10, torch.device('cuda'))
    assert type(mixup) is Mixup, 'not in loader processes, which there are none of'
    args.batch_size = 5000
    with pytest.raises(ValueError, match='1442 training images do not fill one batch: lower --batch-size 5000'):
        train_loader(args)


def test_validation_goes_through_all_images_in_order():
    args = arguments('--img-size', '16', '-vb', '100')
    loader = validation_loader(args)
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
    loader = train_loader(args, mixup)
    for epoch in (2, 3):
        with closing(epoch_batches(args, loader, mixup, ResumePoint(epoch), CPU)) as batches:
            _, targets = next(batches)
        num_labels = (targets > targets.min(1, keepdim=True).values).sum(1).max()
        assert num_labels == (2 if epoch < 3 else 1)


SIZES = ('--train-img-sizes', '8', '16', '32', '--train-batch-sizes', '64', '32', '16', '--no-aug')


def test_batches_of_several_sizes():
    """Every image once, but for a last batch that is not full; the same again in an epoch that is repeated."""
    args = arguments(*SIZES)
    loader = train_loader(args)

    def shapes(epoch):
        with closing(epoch_batches(args, loader, None, ResumePoint(epoch), CPU)) as batches:
            return [tuple(images.shape) for images, _ in batches]

    first, again, other = shapes(0), shapes(0), shapes(1)
    assert set(first) == {(64, 3, 8, 8), (32, 3, 16, 16), (16, 3, 32, 32)}
    assert first == again != other and sorted(first) == sorted(other)
    assert sum(shape[0] for shape in first) == images_of_epoch(loader, 0) > 1442 - 16
    assert average_batch_size(loader) == pytest.approx((64 + 32 + 16) / 3)


def test_sizes_that_grow():
    """With no spread and nothing at random: of three sizes in three epochs, one an epoch."""
    flags = shlex.split('--train-size-schedule progressive --train-size-schedule-spread 0 --train-size-random-mix 0')
    args = arguments(*SIZES, *flags, '--epochs', '3', '--train-batches-per-epoch', '4')
    loader = train_loader(args)
    for epoch, (batch_size, side) in enumerate([(64, 8), (32, 16), (16, 32)]):
        with closing(epoch_batches(args, loader, None, ResumePoint(epoch), CPU)) as batches:
            assert [tuple(images.shape) for images, _ in batches] == [(batch_size, 3, side, side)] * 4
        assert images_of_epoch(loader, epoch) == 4 * batch_size


def test_mixup_pairs_the_images_of_every_size():
    with pytest.raises(ValueError, match='--train-batch-sizes 5 7 must be even'):
        create_mixup(
            arguments('--cutmix', '1', '--train-img-sizes', '8', '16', '32', '--train-batch-sizes', '5', '4', '7'),
            10,
            CPU,
        )


def test_images_come_in_the_type_and_format_of_the_weights():
    args = arguments('--img-size', '16')
    loader = train_loader(args)
    formats = format_of_images('bfloat16', channels_last=True)
    with closing(epoch_batches(args, loader, None, ResumePoint(0), CPU, **formats)) as batches:
        images, targets = next(batches)
    assert images.dtype == torch.bfloat16 and targets.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)
