"""The handwritten digits that come with scikit-learn, as a data set that needs no download."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

VALIDATION_SHARE = 5  # every fifth digit of a class is for validation


class Digits(Dataset):
    """1,797 gray images of 8x8 pixels in ten classes, split 80 to 20 in the same way for ever.

    Args:
        split: 'train' or 'validation'.
        image_mode: Mode of the PIL images, 'L' or 'RGB'.
    """

    classes = tuple('0123456789')

    def __init__(self, split: str, image_mode: str = 'L'):
        if split not in ('train', 'validation'):
            raise ValueError(f"the digits have the splits 'train' and 'validation', not {split!r}")
        images, targets = _load()
        indices = _validation_indices(targets)
        if split == 'train':
            indices = np.setdiff1d(np.arange(len(targets)), indices)
        self.images = images[indices]
        self.targets = targets[indices]
        self.image_mode = image_mode
        self.transform = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert(self.image_mode)
        return image if self.transform is None else self.transform(image), int(self.targets[index])


def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'timm_sape2[demo]'") from None
    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def _validation_indices(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    by_class = (np.flatnonzero(targets == target) for target in np.unique(targets))
    return np.sort(np.concatenate([indices[VALIDATION_SHARE - 1 :: VALIDATION_SHARE] for indices in by_class]))
