"""Data that the tests of training share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Folder of 40 images of noise to train on and 8 to validate, of two classes."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp('photos')
    for split, count in (('train', 20), ('validation', 4)):
        for name in ('cat', 'dog'):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder
