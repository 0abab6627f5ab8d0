"""Opening the two data sets of a run, and finding what is wrong with them before it starts."""

import os
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset, Subset

from .digits import Digits

STREAMED = ('hfids/', 'tfds/', 'wds/')


def open_train_and_validation(
    channels: int,
    *,
    dataset: str,
    data_dir: str | None,
    train_split: str = 'train',
    val_split: str = 'validation',
    train_num_samples: int | None = None,
    val_num_samples: int | None = None,
    dataset_download: bool = False,
) -> tuple[Dataset, Dataset]:
    """Open the training and the validation data.

    Args:
        channels: 1 for gray images, 3 for color.
        dataset: As in `open_split`, like `data_dir`.
        data_dir: Folder of the images.
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on.
        train_num_samples: Images to train on, evenly spaced; None for all.
        val_num_samples: Images to validate on, evenly spaced; None for all.
        dataset_download: Download the data.

    Raises:
        ValueError: If there is no such data, none in it, or the two splits do not fit together.
    """
    train, validation = (
        open_split(dataset, data_dir, split, channels, dataset_download) for split in (train_split, val_split)
    )
    _check_classes(train, validation)
    if train_num_samples is not None:
        train = EvenlySpaced(train, train_num_samples)
    if val_num_samples is not None:
        validation = EvenlySpaced(validation, val_num_samples)
    return train, validation


class EvenlySpaced(Subset):
    """Some images of a data set, evenly spaced: the same share of every class where the classes come in order.

    Args:
        dataset: The data set.
        num_samples: Number of images to take.

    Raises:
        ValueError: If it has fewer.
    """

    dataset: Any

    def __init__(self, dataset: Any, num_samples: int):
        if num_samples > len(dataset):
            raise ValueError(f'the data has {len(dataset)} images, not {num_samples}: lower --*-num-samples')
        super().__init__(dataset, [index * len(dataset) // num_samples for index in range(num_samples)])
        self.classes = class_names(dataset)

    @property
    def transform(self) -> Any:
        """What is done to an image."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def open_split(dataset: str, data_dir: str | None, split: str, in_chans: int, download: bool = False) -> Any:
    """Open one split of a data set.

    Args:
        dataset: 'digits', a type/name of timm's, as torch/cifar10, or '' for images in folders.
        data_dir: Folder of the images, or of what is downloaded.
        split: Name of the split, the folder in `data_dir` if the images are in folders.
        in_chans: 1 for gray images, 3 for color.
        download: Download a data set of torchvision.

    Raises:
        ValueError: If there is no such data, or none in it.
    """
    image_mode = {1: 'L', 3: 'RGB'}.get(in_chans)
    if image_mode is None:
        raise ValueError(f'the model takes {in_chans} channels, but images have 1 or 3: set --in-chans')
    if dataset == 'digits':
        return Digits(split, image_mode)
    if dataset.startswith(STREAMED):
        raise ValueError(f'--dataset {dataset} is streamed: a run on it could not be resumed exactly')
    if dataset and '/' not in dataset:
        raise ValueError(f"unknown --dataset {dataset!r}: 'digits', a type/name of timm's, or empty for folders")
    folder = None if dataset else data_dir
    if not dataset and not data_dir:
        raise ValueError('no data: give --data-dir DIR, or --dataset digits')
    if folder and not os.path.isdir(folder):
        raise ValueError(f'--data-dir {folder} is not a folder')
    try:
        opened = create_dataset(dataset, data_dir, split, download=download, input_img_mode=image_mode)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f'cannot open the {split!r} split of {dataset or data_dir}: {error}') from error
    if folder and os.path.samefile(opened.reader.root, folder):
        folders = ', '.join(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
        raise ValueError(f'no folder {split!r} in {folder}, which has: {folders or "none"}')
    return opened


def count_classes(dataset: Dataset) -> int | None:
    """Return the number of classes of a data set, or None where it does not tell."""
    names = class_names(dataset)
    return None if names is None else len(names)


def check_class_count(dataset: Dataset, num_classes: int) -> None:
    """Raise a ValueError if a model with so many classes does not fit the data."""
    count = count_classes(dataset)
    if count is not None and count != num_classes:
        raise ValueError(f'the data has {count} classes, the model {num_classes}: set --num-classes {count}')


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes in their order, or None where a data set does not tell."""
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or getattr(dataset, 'classes', None)
    if classes is None:
        return None
    return [name if isinstance(name, str) else ', '.join(name) for name in classes]  # torchvision's ImageNet: synonyms


def _check_classes(train: Dataset, validation: Dataset) -> None:
    expected, found = class_names(train), class_names(validation)
    if expected != found and expected is not None and found is not None:
        odd = ', '.join(sorted(set(expected) ^ set(found))) or 'their order'
        raise ValueError(f'the training and the validation data differ in their classes: {odd}')
