"""Device and precision of a run."""

import pytest
import torch

from timm_sape2.training.hardware import check_precision, mixed_precision, set_up_device


def test_one_process_on_the_cpu():
    device, processes = set_up_device('cpu')
    assert device == torch.device('cpu')
    assert processes == {'distributed': False, 'rank': 0, 'local_rank': 0, 'world_size': 1}


@pytest.mark.parametrize(('amp', 'dtype'), [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_computes_products_in_its_type(amp, dtype):
    autocast, loss_scaler = mixed_precision(torch.device('cpu'), amp, 'bfloat16')
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert loss_scaler is None


@pytest.mark.parametrize(
    ('device', 'message'),
    [
        ('tpu', '--device must be cpu, cuda or cuda:N, not tpu'),
        ('cuda:x', '--device must be cpu, cuda or cuda:N'),
        ('cuda:99', 'no --device cuda:99'),
    ],
)
def test_what_is_not_there(device, message):
    with pytest.raises(ValueError, match=message):
        set_up_device(device)


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match='float16 needs a GPU: use bfloat16'):
        mixed_precision(torch.device('cpu'), True, 'float16')


@pytest.mark.parametrize(
    ('amp', 'model_dtype', 'ema', 'message'),
    [
        (True, 'bfloat16', False, '--amp keeps the weights in float32: leave out --amp, or --model-dtype bfloat16'),
        (False, 'bfloat16', True, '--model-ema stands still in --model-dtype bfloat16'),
    ],
)
def test_types_that_do_not_go_together(amp, model_dtype, ema, message):
    check_precision(amp, None, ema)
    check_precision(amp, 'float32', ema)
    with pytest.raises(ValueError, match=message):
        check_precision(amp, model_dtype, ema)


def test_an_average_in_16_bits_stands_still():
    """What `check_precision` is for: a step of 0.0002 of the way is below the digits of bfloat16."""
    average = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        average.lerp_(torch.full_like(average, 2.0), 1 - 0.9998)
    assert average.item() == 1
