"""Attention is recorded without changing the model; its biases are the right numbers at the right places."""

import pytest
import timm
import torch
from torch import nn

from timm_sape2.positions import ENCODINGS, PositionEncoding, Positions
from timm_sape2.studies.bias_maps.biases import (
    attention_biases,
    blocks_with_bias,
    record_attention_inputs,
    trained_blocks,
)
from timm_sape2.studies.cost.variants import use_reference


class Numbered(PositionEncoding):
    """The bias from patch i to patch j is N * i + j."""

    place = 'block'

    def __init__(self, host, *, device=None, dtype=None):
        super().__init__()

    def attention_bias(self, query, key, value, grid, shared=None):
        length = query.shape[2]
        return torch.arange(float(length**2)).reshape(length, length)


class NumberedWithPrefix(Numbered):
    """The bias from token i to token j, prefix tokens being the first, is (P + N) * i + j."""

    bias_has_prefix_tokens = True

    def attention_bias(self, query, key, value, grid, shared=None):
        length = grid[0] * grid[1] + 3
        return torch.arange(float(length**2)).reshape(1, 1, length, length)


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'numbered', Numbered)
    monkeypatch.setitem(ENCODINGS, 'numbered-with-prefix', NumberedWithPrefix)


def vit(position, size, **kwargs):
    """A model with patches of 8, a class token and two registers."""
    sizes = dict(img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=2)
    return timm.create_model('test_vit_sape2', position=position, **sizes, **kwargs).eval()


class TestBias:
    def test_by_hand(self):
        """On a 2x3 grid, the patch in row 1, column 0 is the fourth: 6 * 3 + 0, 1, ..., 5."""
        biases = attention_biases(vit('numbered', (16, 24)), torch.randn(1, 3, 16, 24))
        assert list(biases) == [0, 1]
        for bias in biases.values():
            assert bias.shape == (1, 2, 2, 3, 2, 3)
            for head in bias[0]:
                assert head[1, 0].tolist() == [[18, 19, 20], [21, 22, 23]]
                assert head[0, 2].tolist() == [[12, 13, 14], [15, 16, 17]]

    def test_by_hand_with_a_bias_of_prefix_tokens(self):
        """Three prefix tokens and six patches: the patch in row 1, column 0 is token 6, 9 * 6 + 3, ..., 8."""
        biases = attention_biases(vit('numbered-with-prefix', (16, 24)), torch.randn(1, 3, 16, 24), [1])
        assert list(biases) == [1]
        assert biases[1][0, 0, 1, 0].tolist() == [[57, 58, 59], [60, 61, 62]]

    @pytest.mark.parametrize('size', [(56, 72), (8, 40), (112, 112)])
    def test_map_of_a_query_is_its_row_of_the_bias(self, monkeypatch, size):
        used, position_bias = [], Positions.stored_bias

        def spy(self, *inputs):
            used.append(position_bias(self, *inputs))
            return used[-1]

        monkeypatch.setattr(Positions, 'stored_bias', spy)
        model, images = vit('learned+sape2', size), torch.randn(2, 3, *size)
        use_reference(model)
        with torch.inference_mode():
            model(images)
        in_model = used.copy()
        rows, columns = model.patch_embed.grid_size
        for block, maps in attention_biases(model, images).items():
            for row, column in {(0, 0), (rows - 1, 0), (rows // 2, columns // 2), (0, columns - 1)}:
                expected = in_model[block][:, :, 3 + row * columns + column, 3:]
                assert torch.equal(maps[:, :, row, column].flatten(2), expected)

    def test_joined_encodings_are_summed(self):
        images = torch.randn(1, 3, 16, 24)
        model = vit('sape2', (16, 24))
        together = vit('sape2+numbered', (16, 24))
        together.load_state_dict(model.state_dict())
        alone, both = (attention_biases(m, images, [0])[0] for m in (model, together))
        assert torch.equal(both, alone + torch.arange(36.0).reshape(2, 3, 2, 3))

    def test_models_without_a_bias(self):
        for model, problem in (
            (vit('learned', 16), r"position='learned' has no attention bias"),
            (timm.create_model('test_resnet'), 'the model has no exchangeable position encoding'),
        ):
            with pytest.raises(ValueError, match=rf'^{problem}; encodings with one: .*sape2.*numbered'):
                blocks_with_bias(model)

    def test_what_is_not_finite(self):
        model = vit('sape2', 16)
        nn.init.constant_(model.blocks[1].attn.position.sape2.row_table, torch.nan)
        with pytest.raises(ValueError, match='the bias of block 1 is not finite'):
            attention_biases(model, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize('global_pool', ['token', 'avg'])
@pytest.mark.parametrize('position', ['sape2', 'learned+sape2'])
def test_blocks_that_are_trained_are_those_with_a_gradient(global_pool, position):
    model = vit(position, 16, global_pool=global_pool)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    gradients = [block.attn.position.sape2.row_table.grad for block in model.blocks]
    assert trained_blocks(model) == [block for block, gradient in enumerate(gradients) if gradient.any()]


def test_a_bias_of_prefix_tokens_is_trained_in_the_last_block():
    assert trained_blocks(vit('numbered-with-prefix', 16)) == [0, 1]
    assert trained_blocks(vit('numbered', 16)) == [0]
    one_block = timm.create_model('test_vit_sape2', position='numbered', depth=1)
    assert trained_blocks(one_block) == [0], 'there is no other'


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
