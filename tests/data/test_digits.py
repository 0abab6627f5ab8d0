"""The digits: 8x8 images of scikit-learn, split once and for all."""

import numpy as np
import pytest
import torch

from timm_sape2.data.digits import Digits


def test_a_digit_is_an_image_and_its_class():
    """The first one of scikit-learn is a zero: dark in the middle, bright around it."""
    image, target = Digits('train')[0]
    assert (image.size, image.mode, target) == ((8, 8), 'L', 0)
    assert np.asarray(image)[3].tolist() == [0, 64, 191, 0, 0, 128, 128, 0]


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_mode_and_transform(mode):
    dataset = Digits('validation', mode)
    assert dataset[5][0].mode == mode
    dataset.transform = np.asarray
    assert dataset[5][0].shape[:2] == (8, 8)


def test_split_is_80_to_20_in_every_class():
    train, validation = Digits('train'), Digits('validation')
    assert (len(train), len(validation)) == (1442, 355)
    share = np.bincount(validation.targets) / (np.bincount(train.targets) + np.bincount(validation.targets))
    assert len(share) == len(train.classes) == 10
    assert np.all((share > 0.19) & (share <= 0.2))


def test_no_image_is_in_both_splits():
    train, validation = ({image.tobytes() for image in Digits(split).images} for split in ('train', 'validation'))
    assert not train & validation


def test_split_never_changes():
    """Weighted sum of the targets, which moves with any change of the selection or the order."""
    targets = torch.from_numpy(Digits('validation').targets)
    assert int((targets * torch.arange(1, 356)).sum()) == 285_014


def test_unknown_split():
    with pytest.raises(ValueError, match="not 'test'"):
        Digits('test')
