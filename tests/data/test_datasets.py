"""Data sets are opened, or refused with the reason, before anything else happens."""

import shutil

import pytest
from torch.utils.data import Dataset

from timm_sape2.data.datasets import check_class_count, count_classes, open_train_and_validation


def open_datasets(folder, in_chans=3, dataset='', **kwargs):
    return open_train_and_validation(in_chans, dataset=dataset, data_dir=str(folder), **kwargs)


def test_folders(photos):
    """DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE."""
    train, validation = open_datasets(photos)
    assert (len(train), len(validation), count_classes(train)) == (40, 8, 2)
    image, target = validation[0]
    assert (image.size, image.mode, target) == ((32, 32), 'RGB', 0)
    assert open_datasets(photos, in_chans=1)[0][0][0].mode == 'L'


def test_evenly_spaced_images_keep_the_shares_of_the_classes(photos):
    train, validation = open_datasets(photos, train_num_samples=10, val_num_samples=2)
    assert [target for _, target in train] == [0] * 5 + [1] * 5
    assert (len(validation), count_classes(train)) == (2, 2)


def test_evenly_spaced_images_are_transformed(photos):
    train, _ = open_datasets(photos, train_num_samples=10)
    train.transform = lambda image: image.size
    assert train[9] == (train.dataset[36][0], 1) and train.dataset.transform is train.transform


def test_more_images_than_there_are(photos):
    with pytest.raises(ValueError, match='the data has 40 images, not 41'):
        open_datasets(photos, train_num_samples=41)


def test_split_goes_by_other_names_too(photos, tmp_path):
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'validation').rename(tmp_path / 'photos' / 'val')
    assert len(open_datasets(tmp_path / 'photos')[1]) == 8


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(val_split='test'), r"no folder 'test' in .*, which has: train, validation"),
        (dict(data_dir=None), 'no data: give --data-dir DIR'),
        (dict(dataset='wds/photos'), 'is streamed'),
        (dict(dataset='cifar10'), "unknown --dataset 'cifar10'"),
        (dict(dataset='torch/cifar10'), "cannot open the 'train' split of torch/cifar10: Dataset not found"),
        (dict(dataset='torch/cifar11'), 'Unknown torchvision dataset cifar11'),
        (dict(dataset='digits', val_split='test'), "not 'test'"),
    ],
)
def test_what_is_missing_is_named(kwargs, message, photos):
    with pytest.raises(ValueError, match=message):
        open_train_and_validation(**{'channels': 3, 'dataset': '', 'data_dir': str(photos), **kwargs})


def test_class_that_validation_lacks(photos, tmp_path):
    """timm numbers the classes of each split by itself, so that a missing one would shift the others."""
    shutil.copytree(photos, tmp_path / 'photos')
    shutil.copytree(photos / 'train' / 'cat', tmp_path / 'photos' / 'train' / 'bird')
    with pytest.raises(ValueError, match='differ in their classes: bird'):
        open_datasets(tmp_path / 'photos')


def test_images_have_one_or_three_channels(photos):
    with pytest.raises(ValueError, match='the model takes 4 channels'):
        open_datasets(photos, in_chans=4)


def test_class_count(photos):
    train, _ = open_datasets(photos)
    check_class_count(train, 2)
    with pytest.raises(ValueError, match='the data has 2 classes, the model 10: set --num-classes 2'):
        check_class_count(train, 10)
    check_class_count(Dataset(), 10)
