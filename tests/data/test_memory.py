"""Images in memory: augmented by the batch, and otherwise what timm's loader gives."""

import math
import random

import numpy as np
import pytest
import torch
from timm.data import create_loader
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from timm_sape2.data import memory
from timm_sape2.data.datasets import EvenlySpaced
from timm_sape2.data.digits import Digits
from timm_sape2.data.memory import (
    ImagesInMemory,
    check_memory,
    create_memory_loader,
    draw_crops,
    read_images,
    resize_crops,
    shift_images,
)

CPU = torch.device('cpu')
PLAIN = dict(mean=(0.0,), std=(1.0,))


def numbered(count=6, size=(5, 7)):
    """Images whose pixels all have the number of the image, from 1."""
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, *size).contiguous()
    return images, torch.arange(count)


def test_shift_by_hand():
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).expand(3, 1, 2, 3)
    shifted = shift_images(image, torch.tensor([1, 0, -1]), torch.tensor([0, -2, 1]))
    assert shifted.squeeze(1).tolist() == [[[0, 0, 0], [1, 2, 3]], [[3, 0, 0], [6, 0, 0]], [[0, 4, 5], [0, 0, 0]]]
    assert shifted.dtype == torch.uint8


def test_shift_is_a_crop_of_the_padded_image():
    images = torch.randint(0, 256, (40, 3, 9, 6), dtype=torch.uint8)
    down, right = torch.randint(-4, 5, (40,)), torch.randint(-3, 4, (40,))
    padded = torch.nn.functional.pad(images, (3, 3, 4, 4))
    for image, shifted, i, j in zip(padded, shift_images(images, down, right), down, right, strict=True):
        assert torch.equal(shifted, image[:, 4 - i : 13 - i, 3 - j : 9 - j])


def test_every_shift_comes_up_and_no_larger_one():
    images = torch.full((2000, 1, 8, 16), 255, dtype=torch.uint8)
    batch, _ = ImagesInMemory(images, torch.zeros(2000), **PLAIN, shift=(1, 2)).__getitems__(list(range(2000)))
    black_rows, black_columns = (batch == 0).all(3).sum(2).flatten(), (batch == 0).all(2).sum(2).flatten()
    assert (batch.max(), black_rows.max(), black_columns.max()) == (1, 1, 2)
    shares = torch.bincount(black_rows) / 2000, torch.bincount(black_columns) / 2000
    torch.testing.assert_close(shares[0], torch.tensor([1 / 3, 2 / 3]), atol=0.05, rtol=0)
    torch.testing.assert_close(shares[1], torch.tensor([0.2, 0.4, 0.4]), atol=0.05, rtol=0)


def test_crop_by_hand():
    """The middle two columns of the lower row, over a whole of 2 rows and 4 columns."""
    image = torch.tensor([[1, 2, 3, 4], [10, 20, 40, 80]], dtype=torch.uint8).view(1, 1, 2, 4)
    part = torch.tensor([1, 1, 1, 2]).view(4, 1)
    expected = torch.tensor([[20.0, 25, 35, 40]]).expand(2, 4)
    torch.testing.assert_close(resize_crops(image, part)[0, 0], expected)


@pytest.mark.parametrize('size', [(9, 6), (16, 16), (1, 5)])
def test_crops_are_those_of_torchvision(size):
    images = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8)
    crops = draw_crops(40, size, (0.1, 1), (0.5, 2))
    resized = resize_crops(images, crops)
    for image, ours, (top, left, height, width) in zip(images.float(), resized, crops.t().tolist(), strict=True):
        torch.testing.assert_close(ours, resized_crop(image, top, left, height, width, size), atol=1e-3, rtol=0)


@pytest.mark.parametrize('size', [(12, 20), (20, 12)])
@pytest.mark.parametrize(('scale', 'ratio'), [((0.3, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.9, 1.1))])
def test_parts_are_drawn_as_by_torchvision(size, scale, ratio):
    """Their mean place and size, with many and with few that fit at once, and none outside the image."""
    crops = draw_crops(4000, size, scale, ratio)
    top, left, height, width = crops
    assert crops[:2].min() == 0 and crops[2:].min() > 0
    assert (top + height).max() <= size[0] and (left + width).max() <= size[1]
    image = torch.empty(1, *size)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    torch.testing.assert_close(crops.float().mean(1), theirs.float().mean(0), atol=0.35, rtol=0)
    torch.testing.assert_close(crops.float().std(1), theirs.float().std(0), atol=0.35, rtol=0)


def test_parts_that_never_fit_are_as_large_as_their_shape_allows():
    for size, ratio, part in [((10, 30), (0.5, 2), [0, 5, 10, 20]), ((30, 10), (0.5, 2), [5, 0, 20, 10])]:
        assert draw_crops(3, size, (1, 1), ratio).t().tolist() == [part] * 3


def test_the_whole_is_a_part():
    images, targets = numbered(size=(5, 7))
    data = ImagesInMemory(images, targets, **PLAIN, crops=((1, 1), (1.4, 1.4)))
    batch, _ = data.__getitems__([1, 3])
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, images[[1, 3]] / 255)


def test_mirrored_at_the_given_rate():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 1, 2)
    batch, _ = ImagesInMemory(images, torch.zeros(1000), **PLAIN, hflip=0.3).__getitems__(list(range(1000)))
    assert batch[:, 0, 0, 0].mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(batch[..., 0], 1 - batch[..., 1])


def test_erasing_comes_after_normalization():
    images = torch.full((100, 1, 8, 8), 51, dtype=torch.uint8)
    erasing = RandomErasing(1.0, mode='const', device='cpu')
    batch, _ = ImagesInMemory(images, torch.zeros(100), (0.1,), (0.5,), erasing=erasing).__getitems__([*range(100)])
    assert sorted({round(value, 5) for value in batch.flatten().tolist()}) == [0.0, 0.2]


def test_images_and_classes_belong_together():
    images, targets = numbered()
    loader = create_memory_loader(ImagesInMemory(images, targets, **PLAIN), 2, is_training=True)
    for batch, classes in loader:
        assert torch.equal((255 * batch[:, 0, 2, 3]).round().long(), classes + 1)
    image, target = ImagesInMemory(images, targets, **PLAIN)[4]
    assert (image.shape, target) == ((1, 5, 7), 4)


def test_training_shuffles_and_drops_what_fills_no_batch_and_validation_does_not():
    data = ImagesInMemory(*numbered(50), **PLAIN)
    training = [classes for _, classes in create_memory_loader(data, 8, is_training=True)]
    assert [len(classes) for classes in training] == [8] * 6
    assert len(set(torch.cat(training).tolist())) == 48 and torch.cat(training).tolist() != list(range(48))
    validation = [classes for _, classes in create_memory_loader(data, 8)]
    assert torch.cat(validation).tolist() == list(range(50))


def test_an_epoch_that_is_seeded_alike_is_the_same():
    def epoch(seed):
        random.seed(seed)
        torch.manual_seed(seed)
        erasing = RandomErasing(0.5, mode='pixel', device='cpu')
        data = ImagesInMemory(*numbered(20), **PLAIN, shift=(2, 2), hflip=0.5, erasing=erasing)
        return torch.cat([images.flatten() for images, _ in create_memory_loader(data, 4, is_training=True)])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))


def test_processes_share_the_images_out(process_group, monkeypatch):
    data = ImagesInMemory(*numbered(9), **PLAIN)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda group=None: 2)
    training, validation = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, 'get_rank', lambda group=None, rank=rank: rank)
        training += [classes.tolist() for _, classes in create_memory_loader(data, 2, True, distributed=True)]
        loader = create_memory_loader(data, 4, distributed=True)
        validation += torch.cat([classes for _, classes in loader]).tolist()[: loader.sampler.num_valid_samples]
    assert sorted(validation) == list(range(9))
    assert len(training) == 4 and len({image for batch in training for image in batch}) == 8


@pytest.mark.parametrize('size', [(8, 8), (6, 10)])
@pytest.mark.parametrize('crop_pct', [1.0, 0.75])
def test_validation_images_are_those_of_timms_loader(size, crop_pct):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    data = EvenlySpaced(Digits('validation', 'RGB'), 30)
    settings = dict(input_size=(3, *size), interpolation='bicubic', crop_pct=crop_pct, crop_mode='center')
    images, targets = read_images(data, **settings)
    ours = create_memory_loader(ImagesInMemory(images, targets, mean, std), 8)
    theirs = create_loader(data, batch_size=8, use_prefetcher=False, num_workers=0, mean=mean, std=std, **settings)
    for (our_images, our_targets), (their_images, their_targets) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_images, their_images, atol=1e-6, rtol=0)
        assert torch.equal(our_targets, their_targets)


def test_images_read_by_processes_are_in_order():
    settings = dict(input_size=(1, 8, 8), interpolation='bicubic', crop_pct=1.0, crop_mode=None)
    images, targets = read_images(Digits('validation'), **settings, workers=2)
    assert np.array_equal(images[:, 0].numpy(), Digits('validation').images)
    assert targets.tolist() == Digits('validation').targets.tolist()


def test_more_than_the_memory_holds(monkeypatch):
    check_memory(1000, (3, 32, 32), CPU)
    with pytest.raises(ValueError, match=r'1000000000 images of 224x192 need 120163.0 GiB .* use --loader workers'):
        check_memory(10**9, (3, 224, 192), CPU)
    monkeypatch.setattr(memory, 'free_memory', lambda device: math.inf)
    check_memory(10**9, (3, 224, 192), CPU)


def test_free_memory_is_what_the_system_and_the_container_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, 'PROC', tmp_path)
    monkeypatch.setattr(memory, 'CGROUP', tmp_path)
    assert memory.free_memory(CPU) == math.inf
    (tmp_path / 'meminfo').write_text('MemTotal:       2000 kB\nMemAvailable:   1000 kB\nHugePages_Total:       0\n')
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.free_memory(CPU) == 1000 * 1024
    (tmp_path / 'memory.max').write_text('500000\n')
    (tmp_path / 'memory.stat').write_text('anon 200000\nfile 300000\n')
    assert memory.free_memory(CPU) == 300_000
