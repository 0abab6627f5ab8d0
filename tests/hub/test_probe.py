"""The probe image and its logits."""

import math

import numpy as np
import pytest
import timm
import torch

from timm_sape2.hub.probe import TOLERANCE, highest_logits, largest_difference, make_probe, probe_logits
from timm_sape2.trained.opening import TrainedModel


def test_by_hand():
    """The difference is a share of the largest logit of the card."""
    logits = torch.tensor([1.0, -4.0, 2.0])
    assert highest_logits(logits) == {2: 2.0, 0: 1.0, 1: -4.0}
    assert largest_difference(logits, {2: 2.0, 1: -4.0}) == 0
    assert largest_difference(logits, {'2': 2.5, '1': -4.0}) == 0.125


def test_at_most_ten():
    assert list(highest_logits(torch.arange(1000.0))) == list(range(999, 989, -1))


def test_what_is_not_a_number_is_never_close():
    assert not largest_difference(torch.tensor([math.nan, 1.0]), {0: 1.0, 1: 1.0}) <= TOLERANCE
    assert not largest_difference(torch.tensor([1.0]), {0: math.nan}) <= TOLERANCE


@pytest.mark.parametrize('expected', [None, {}, [1, 2], {'a': 1}, {7: 1.0}, {0: 'x'}, {0: [1]}, 'text'])
def test_cards_with_other_things(expected):
    with pytest.raises(ValueError, match='the model card has no logits of the probe image'):
        largest_difference(torch.tensor([1.0, 2.0]), expected)


@pytest.mark.parametrize(('channels', 'size'), [(3, (56, 72)), (1, (8, 40)), (3, (8, 8))])
def test_the_image_has_the_size_of_the_input_and_is_always_the_same(channels, size):
    model = timm.create_model('test_vit_sape2', img_size=size, patch_size=8, in_chans=channels, num_classes=3).eval()
    trained = TrainedModel(model)
    image = make_probe(trained)
    assert image.size == size[::-1] and image.mode == {1: 'L', 3: 'RGB'}[channels]
    assert np.array_equal(np.asarray(image), np.asarray(make_probe(trained)))
    assert np.asarray(image).std() > 20
    logits = probe_logits(trained, image)
    assert logits.shape == (3,) and torch.equal(logits, probe_logits(trained, image))
