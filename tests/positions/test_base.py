"""The seam: hooks do nothing unless an encoding overrides them."""

import pytest
import torch

from timm_sape2.positions import HostShape, PositionEncoding


def test_hooks_do_nothing_by_default():
    encoding = PositionEncoding()
    tokens, grid = torch.randn(1, 63, 8), (7, 9)
    query, key, value = torch.randn(3, 1, 2, 63, 4)
    assert encoding.add_to_tokens(tokens, grid) is tokens
    assert encoding.mix_tokens(tokens, grid, 0) is None
    assert encoding.rotate(query, key, grid) == (query, key)
    assert encoding.prepare(grid, tokens.device) is None
    assert encoding.attention_bias(query, key, value, grid) is None
    assert encoding.look(tokens, grid, query) is query
    assert encoding.logit_channels(query, key, value, grid) is None
    assert encoding.value_channels(value, grid) is None
    assert encoding.add_to_output(value, key, grid) is value
    assert encoding.fused_attention(query, key, value, grid, 1) is None
    state = {'x': tokens}
    encoding.adapt_state_dict(state, 'blocks.0.', None)
    encoding.set_grid((1, 5))
    assert state == {'x': tokens}


def test_overrides_tells_which_hooks_do_something():
    class Rotation(PositionEncoding):
        place = 'block'

        def rotate(self, query, key, grid, shared=None):
            return -query, -key

    class Child(Rotation):
        pass

    assert Rotation.overrides('rotate')
    assert Child.overrides('attention_bias', 'rotate')
    assert not Rotation.overrides('attention_bias', 'add_to_tokens', 'mix_tokens')


def test_each_place_has_its_hooks():
    class Tokens(PositionEncoding):
        def mix_tokens(self, tokens, grid, block_index):
            return tokens

    class Bias(PositionEncoding):
        place = 'block'

        def attention_bias(self, query, key, value, grid, shared=None):
            return None

    assert (Tokens.place, Bias.place) == ('model', 'block')
    with pytest.raises(TypeError, match="Both has place = 'block', where add_to_tokens, mix_tokens is never called"):

        class Both(Bias):
            def add_to_tokens(self, tokens, grid):
                return tokens

            def mix_tokens(self, tokens, grid, block_index):
                return tokens

    with pytest.raises(TypeError, match="Undeclared has place = 'model', where rotate is never called"):

        class Undeclared(PositionEncoding):
            def rotate(self, query, key, grid, shared=None):
                return query, key

    with pytest.raises(TypeError, match=r"Nowhere\.place must be 'model' or 'block', got 'head'"):

        class Nowhere(PositionEncoding):
            place = 'head'


def test_head_dim_of_the_host():
    assert HostShape(embed_dim=96, num_heads=3, grid=(1, 5), num_prefix_tokens=0).head_dim == 32
