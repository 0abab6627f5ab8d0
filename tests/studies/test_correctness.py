"""A model that gives wrong numbers is found out."""

import pytest
import torch
from torch import nn

from timm_sape2.positions.sape2 import SaPE2
from timm_sape2.studies.correctness import check_bias, check_logits


class Logits(nn.Module):
    """A model that gives prepared logits, one after the other."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = list(logits)

    def forward(self, images):
        return self.logits.pop(0)


def test_good_logits_pass():
    check_logits('sape2', Logits(torch.ones(2, 5), torch.ones(2, 5)), torch.zeros(2, 3, 8, 8), 5)


@pytest.mark.parametrize(
    ('logits', 'message'),
    [
        ([torch.ones(2, 4)], r'sape2: logits of shape \(2, 4\) instead of \(2, 5\)'),
        ([torch.ones(1, 5)], r'sape2: logits of shape \(1, 5\)'),
        ([torch.tensor([[0, 0, 0, 0, torch.nan]] * 2)], 'sape2: logits are not finite'),
        ([torch.tensor([[0, 0, 0, 0, torch.inf]] * 2)], 'sape2: logits are not finite'),
        ([torch.ones(2, 5), torch.ones(2, 5) + 1e-6], 'sape2: logits differ when they are computed again'),
    ],
)
def test_bad_logits(logits, message):
    with pytest.raises(RuntimeError, match=message):
        check_logits('sape2', Logits(*logits), torch.zeros(2, 3, 8, 8), 5)


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)]
)
def test_sape2_passes_in_every_precision(tiny_vit, dtype, tolerance):
    model = tiny_vit('learned+sape2', reg_tokens=1).to(dtype)
    with torch.no_grad():
        check_bias('learned+sape2', model, torch.randn(2, 3, 56, 72, dtype=dtype), tolerance)


def test_encodings_without_sape2_pass(tiny_vit):
    check_bias('learned', tiny_vit('learned'), torch.randn(1, 3, 56, 72), 0.0)


@pytest.mark.parametrize('wrong', [lambda bias: bias * 1.01, torch.zeros_like, lambda bias: bias * torch.nan])
def test_a_wrong_bias(monkeypatch, tiny_vit, wrong):
    attention_bias = SaPE2.attention_bias
    monkeypatch.setattr(SaPE2, 'attention_bias', lambda self, *inputs: wrong(attention_bias(self, *inputs)))
    with pytest.raises(RuntimeError, match=r'^sape2, block 0: the bias of SaPE2 differs from the reference by'):
        check_bias('sape2', tiny_vit('sape2'), torch.randn(1, 3, 56, 72), 1e-3)
