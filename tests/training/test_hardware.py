"""Device and precision of a run."""

import argparse

import pytest
import torch

from timm_sape2.training.hardware import mixed_precision, set_up_device


def flags(device='cpu', amp=False, amp_dtype='bfloat16'):
    return argparse.Namespace(device=device, amp=amp, amp_dtype=amp_dtype)


def test_one_process_on_the_cpu():
    args = flags()
    assert set_up_device(args) == torch.device('cpu')
    assert (args.distributed, args.rank, args.world_size) == (False, 0, 1)


@pytest.mark.parametrize(('amp', 'dtype'), [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_computes_products_in_its_type(amp, dtype):
    autocast, loss_scaler = mixed_precision(flags(amp=amp), torch.device('cpu'))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert loss_scaler is None


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (flags('tpu'), '--device must be cpu, cuda or cuda:N, not tpu'),
        (flags('cuda:x'), '--device must be cpu, cuda or cuda:N'),
        (flags('cuda:99'), 'no --device cuda:99'),
        (flags(amp=True, amp_dtype='float16'), 'float16 needs a GPU: use bfloat16'),
    ],
)
def test_what_is_not_there(args, message):
    with pytest.raises(ValueError, match=message):
        set_up_device(args)
