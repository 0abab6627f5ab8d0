"""What goes into attention is recorded without changing the model."""

import pytest
import torch

from timm_sape2.positions import Positions
from timm_sape2.studies.attention_inputs import record_attention_inputs


@pytest.mark.parametrize('qk_norm', [False, True])
def test_it_is_what_attention_is_computed_from(monkeypatch, tiny_vit, qk_norm):
    """Same queries, keys, values and grid as in forward, with prefix tokens, on a 7x9 grid."""
    used, attend = [], Positions.attend

    def spy(self, *inputs):
        used.append(inputs)
        return attend(self, *inputs)

    monkeypatch.setattr(Positions, 'attend', spy)
    model = tiny_vit('sape2', reg_tokens=2, qk_norm=qk_norm)
    recorded = record_attention_inputs(model, torch.randn(2, 3, 56, 72))
    assert list(recorded) == [0, 1]
    for inputs, expected in zip(recorded.values(), used, strict=True):
        assert inputs.grid == expected[3] == (7, 9)
        assert inputs.query.shape == (2, 2, 3 + 63, 16)
        for mine, real in zip(inputs[:3], expected[:3], strict=True):
            assert torch.equal(mine, real)


def test_blocks_are_chosen_and_the_model_is_left_as_it_was(tiny_vit):
    model, images = tiny_vit(), torch.randn(1, 3, 56, 72)
    before = model(images)
    assert list(record_attention_inputs(model, images, [1])) == [1]
    with pytest.raises(ValueError, match='Images are 56x56'):
        record_attention_inputs(model, torch.randn(1, 3, 56, 56))
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
    assert torch.equal(model(images), before)
