"""The seam: hooks do nothing unless an encoding overrides them."""

import torch

from timm_sape2.positions import Host, PositionEncoding


def test_hooks_do_nothing_by_default():
    encoding = PositionEncoding()
    tokens, grid = torch.randn(1, 63, 8), (7, 9)
    query, key, value = torch.randn(3, 1, 2, 63, 4)
    assert encoding.add_to_tokens(tokens, grid) is tokens
    assert encoding.mix_tokens(tokens, grid, 0) is None
    assert encoding.rotate(query, key, grid) == (query, key)
    assert encoding.attention_bias(query, key, value, grid) is None
    state = {'x': tokens}
    encoding.adapt_state_dict(state, 'blocks.0.', None)
    encoding.set_grid((1, 5))
    assert state == {'x': tokens}


def test_overrides_tells_which_hooks_do_something():
    class Rotation(PositionEncoding):
        def rotate(self, query, key, grid):
            return -query, -key

    class Child(Rotation):
        pass

    assert Rotation.overrides('rotate')
    assert Child.overrides('attention_bias', 'rotate')
    assert not Rotation.overrides('attention_bias', 'add_to_tokens', 'mix_tokens')


def test_head_dim_of_the_host():
    assert Host(embed_dim=96, num_heads=3, grid=(1, 5), num_prefix_tokens=0).head_dim == 32
