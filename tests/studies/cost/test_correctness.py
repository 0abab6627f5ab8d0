"""A model or an operator that gives wrong numbers is found out."""

import pytest
import torch
from torch import nn

from timm_sape2.ops.sape2 import sape2_attention
from timm_sape2.positions.sape2 import SaPE2
from timm_sape2.studies.cost.attention import draw_inputs, plain_attention
from timm_sape2.studies.cost.correctness import (
    Inputs,
    check_against_reference,
    check_attention,
    check_bias,
    check_fused,
    check_logits,
    output_and_gradients,
    sape2_by,
)

cpu_attention, reference_attention = sape2_by('cpu'), sape2_by('reference')


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


@pytest.mark.parametrize('position', ['learned', 'rope', 'sape2', 'learned+sape2'])
def test_models_pass(tiny_vit, position):
    model, images = tiny_vit(position, reg_tokens=1), torch.randn(2, 3, 56, 72)
    with torch.inference_mode():
        check_against_reference(position, model, model, images, 1e-5)
        check_fused(position, model, images, 1e-5)
    assert all(block.attn.position.fused_encoding == ('sape2' if 'sape2' in position else '') for block in model.blocks)


@pytest.mark.parametrize('wrong', [lambda x: x * 1.01, torch.zeros_like, lambda x: x * torch.nan])
def test_a_model_that_is_measured_in_another_way(tiny_vit, wrong):
    model, images = tiny_vit('sape2'), torch.randn(2, 3, 56, 72)
    with torch.no_grad(), pytest.raises(RuntimeError, match='sape2: logits differ from those of the reference by'):
        check_against_reference('sape2', lambda x: wrong(model(x)), model, images, 1e-3)


@pytest.mark.parametrize('wrong', [lambda x: x * 1.01, torch.zeros_like, lambda x: x * torch.nan])
def test_wrong_fused_attention(monkeypatch, tiny_vit, wrong):
    monkeypatch.setattr(
        'timm_sape2.positions.sape2.sape2_attention', lambda *args, **kwargs: wrong(sape2_attention(*args, **kwargs))
    )
    model, images = tiny_vit('sape2'), torch.randn(1, 3, 56, 72)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r'^sape2, block 0: attention differs from the'),
    ):
        check_fused('sape2', model, images, 1e-3)


def test_gradients_by_hand():
    """One patch and a class token attend to themselves alike, 0.5 each, as q = k = 0; there are no distances."""
    zeros, tables = torch.zeros(1, 1, 2, 1), torch.zeros(2, 1)
    value = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    grad_output = torch.tensor([2.0, 0.0]).view(1, 1, 2, 1)
    found = output_and_gradients(reference_attention, Inputs(zeros, zeros, value, tables, tables), (1, 1), grad_output)
    assert found['output'].flatten().tolist() == [2, 2]
    assert found['gradient of value'].flatten().tolist() == [1, 1]
    assert all(not found[f'gradient of {name}'].any() for name in ('query', 'key', 'row table', 'column table'))


@pytest.fixture
def inputs():
    return draw_inputs(2, 2, 16, (3, 4), torch.float32, torch.device('cpu'))


def test_attention_passes(inputs):
    for attention in (reference_attention, cpu_attention):
        check_attention('cpu', attention, inputs, (3, 4), 1e-5)


class WrongGradient(torch.autograd.Function):
    """The identity with a gradient 1% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@pytest.mark.parametrize('name', Inputs._fields)
def test_a_wrong_gradient(inputs, name):
    def attention(inputs, grid):
        return cpu_attention(inputs._replace(**{name: WrongGradient.apply(getattr(inputs, name))}), grid)

    what = f'gradient of {name.replace("_", " ")}'
    with pytest.raises(RuntimeError, match=f'^cpu: the {what} of attention differs from the reference by'):
        check_attention('cpu', attention, inputs, (3, 4), 1e-3)


@pytest.mark.parametrize('wrong', [plain_attention, lambda inputs, grid: cpu_attention(inputs, grid[::-1])])
def test_wrong_attention(inputs, wrong):
    with pytest.raises(RuntimeError, match=r'^cpu: the output of attention differs'):
        check_attention('cpu', wrong, inputs, (3, 4), 1e-3)


def test_a_grid_without_distances():
    """One patch: nothing trains the tables."""
    inputs = draw_inputs(1, 2, 16, (1, 1), torch.float32, torch.device('cpu'))
    check_attention('cpu', cpu_attention, inputs, (1, 1), 1e-5)
