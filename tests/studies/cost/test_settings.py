"""Sizes at which costs are measured."""

import pytest
import torch

from timm_sape2.studies.cost.settings import default_batch_size, image_and_patch, refuse_too_large, units_at

UNIT = {'setting': '32/4', 'batch_size': 8}


@pytest.mark.parametrize(
    ('setting', 'device', 'expected'),
    [('32/4', 'cpu', 16), ('224/16', 'cpu', 4), ('512/16', 'cpu', 1), ('1024/16', 'cpu', 1), ('224/16', 'cuda:1', 64)],
)
def test_default_batch_sizes(setting, device, expected):
    """1,024 patches on a CPU, 16,384 on a GPU, the largest power of two of images with no more."""
    assert default_batch_size(setting, device) == expected


def test_settings():
    assert image_and_patch('224/16') == (224, 16)


@pytest.mark.parametrize(('batch_sizes', 'expected'), [(None, [16, 4]), ([], [16, 4]), ([3], [3, 3]), ([3, 5], [3, 5])])
def test_a_unit_for_each_setting(batch_sizes, expected):
    units = units_at(['32/4', '224/16'], batch_sizes, 'cpu')
    assert [unit['setting'] for unit in units] == ['32/4', '224/16']
    assert [unit['batch_size'] for unit in units] == expected


def test_lack_of_memory_is_an_error_of_the_user():
    with (
        pytest.raises(ValueError, match='32/4 with batches of 8 is too large for cpu: lower --batch-size'),
        refuse_too_large(UNIT, torch.device('cpu')),
    ):
        torch.empty(2**55)


def test_other_errors_are_not():
    with pytest.raises(RuntimeError, match='shape'), refuse_too_large(UNIT, torch.device('cpu')):
        torch.ones(2).view(3)
