"""Opening the two data sets of a run, and finding what is wrong with them before it starts."""

import argparse
import os
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset

from .digits import Digits

STREAMED = ('hfids/', 'tfds/', 'wds/')


def open_datasets(args: argparse.Namespace, in_chans: int) -> tuple[Dataset, Dataset]:
    """Open the training and the validation data.

    Args:
        args: The arguments of the run.
        in_chans: 1 for gray images, 3 for color.

    Raises:
        ValueError: If there is no such data, none in it, or the two splits do not fit together.
    """
    train, validation = (open_split(args, split, in_chans) for split in (args.train_split, args.val_split))
    _check_classes(train, validation)
    return _thinned(train, args.train_num_samples), _thinned(validation, args.val_num_samples)


class EvenlySpaced(Dataset):
    """Some images of a data set, evenly spaced: the same share of every class where the classes come in order.

    Args:
        dataset: The data set.
        num_samples: Number of images to take.

    Raises:
        ValueError: If it has fewer.
    """

    def __init__(self, dataset: Any, num_samples: int):
        if num_samples > len(dataset):
            raise ValueError(f'the data has {len(dataset)} images, not {num_samples}: lower --*-num-samples')
        self.dataset = dataset
        self.num_samples = num_samples
        self.classes = class_names(dataset)

    @property
    def transform(self) -> Any:
        """What is done to an image."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int):
        return self.dataset[index * len(self.dataset) // self.num_samples]


def open_split(args: argparse.Namespace, split: str, in_chans: int) -> Any:
    """Open one split of the data that `dataset` and `data_dir` of the arguments name, as `open_datasets` does."""
    image_mode = {1: 'L', 3: 'RGB'}.get(in_chans)
    if image_mode is None:
        raise ValueError(f'the model takes {in_chans} channels, but images have 1 or 3: set --in-chans')
    return Digits(split, image_mode) if args.dataset == 'digits' else _open(args, split, image_mode)


def count_classes(dataset: Dataset) -> int | None:
    """Return the number of classes of a data set, or None where it does not tell."""
    names = class_names(dataset)
    return None if names is None else len(names)


def check_class_count(dataset: Dataset, num_classes: int) -> None:
    """Raise a ValueError if a model with so many classes does not fit the data."""
    count = count_classes(dataset)
    if count is not None and count != num_classes:
        raise ValueError(f'the data has {count} classes, the model {num_classes}: set --num-classes {count}')


def _thinned(dataset: Dataset, num_samples: int | None) -> Dataset:
    return dataset if num_samples is None else EvenlySpaced(dataset, num_samples)


def _open(args: argparse.Namespace, split: str, image_mode: str) -> Dataset:
    in_folders = not args.dataset
    if args.dataset.startswith(STREAMED):
        raise ValueError(f'--dataset {args.dataset} is streamed: a run on it could not be resumed exactly')
    if args.dataset and '/' not in args.dataset:
        raise ValueError(f"unknown --dataset {args.dataset!r}: 'digits', a type/name of timm's, or empty for folders")
    if in_folders and not args.data_dir:
        raise ValueError('no data: give --data-dir DIR, or --dataset digits')
    if in_folders and not os.path.isdir(args.data_dir):
        raise ValueError(f'--data-dir {args.data_dir} is not a folder')
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            download=args.dataset_download,
            input_img_mode=image_mode,
        )
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f'cannot open the {split!r} split of {args.dataset or args.data_dir}: {error}') from error
    if in_folders and os.path.samefile(dataset.reader.root, args.data_dir):
        folders = ', '.join(sorted(entry.name for entry in os.scandir(args.data_dir) if entry.is_dir()))
        raise ValueError(f'no folder {split!r} in {args.data_dir}, which has: {folders or "none"}')
    return dataset


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
