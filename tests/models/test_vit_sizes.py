"""Grids of the host: fixed, dynamic and padded images, and changing the native size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed

SIZES = [(56, 72), (72, 56), (112, 112), (8, 40), (40, 8), (8, 8)]


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width)


def to_grid(x, grid, patch=8):
    """The same patches in the same raster order, on a grid of another shape."""
    patches = F.unfold(x, patch, stride=patch)
    return F.fold(patches, (grid[0] * patch, grid[1] * patch), patch, stride=patch)


@pytest.mark.parametrize('size', SIZES)
def test_fixed_and_dynamic_model_agree_at_every_size(tiny_vit, position, size):
    dynamic = tiny_vit(position, dynamic_img_size=True)
    fixed = tiny_vit(position)
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(size)
    x = images(*size)
    torch.testing.assert_close(dynamic(x), fixed(x))
    maps = dynamic.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2:] for m in maps] == [(size[0] // 8, size[1] // 8)] * 2


@pytest.mark.parametrize('size', SIZES)
def test_created_at_a_size_equals_resized_to_it(tiny_vit, size):
    created = tiny_vit('sape2', img_size=size)
    resized = tiny_vit('sape2')
    resized.load_state_dict(created.state_dict())
    resized.set_input_size(size)
    x = images(*size)
    assert torch.equal(created(x), resized(x))


def test_same_patches_on_another_grid_are_another_image(tiny_vit, position):
    model = tiny_vit(position, dynamic_img_size=True)
    x = images(56, 72)
    native, transposed, flat = (model(to_grid(x, grid)) for grid in ((7, 9), (9, 7), (3, 21)))
    if position in ('nope', 'cope'):  # the one has no order, the other raster order, neither has a grid
        torch.testing.assert_close(native, transposed)
        torch.testing.assert_close(native, flat)
    else:
        for other in (transposed, flat):
            assert (native - other).abs().max() > 1e-4


@pytest.mark.parametrize('position', ['nope', 'sape2'])
@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 10), width=st.integers(1, 10), registers=st.sampled_from([0, 4]))
def test_transposed_image_and_swapped_tables_give_transposed_features(tiny_vit, position, height, width, registers):
    model = tiny_vit(position, dynamic_img_size=True, reg_tokens=registers, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.transpose(2, 3)
    for attention in (block.attn for block in twin.blocks if position == 'sape2'):
        tables = attention.position['sape2']
        tables.row_table, tables.column_table = tables.column_table, tables.row_table
    x = images(8 * height, 8 * width).double()
    features, maps = model.forward_intermediates(x)
    twin_features, twin_maps = twin.forward_intermediates(x.transpose(2, 3))
    torch.testing.assert_close(twin_maps, [m.transpose(2, 3) for m in maps])
    torch.testing.assert_close(twin_features[:, : 1 + registers], features[:, : 1 + registers])


def test_unequal_tables_break_the_transposition(tiny_vit):
    model = tiny_vit('sape2', dynamic_img_size=True)
    twin = copy.deepcopy(model)
    twin.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.transpose(2, 3)
    x = images(56, 72)
    assert (twin(x.transpose(2, 3)) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize(('size', 'padded'), [((53, 70), (56, 72)), ((37, 43), (40, 48)), ((1, 33), (8, 40))])
def test_padding_adds_zeros_at_the_bottom_right(tiny_vit, position, size, padded):
    model = tiny_vit(position, dynamic_img_size=True, dynamic_img_pad=True)
    plain = tiny_vit(position, dynamic_img_size=True)
    plain.load_state_dict(model.state_dict())
    x = images(*size)
    explicit = F.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0]))
    assert torch.equal(model(x), plain(explicit))
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert maps[0].shape[2:] == (padded[0] // 8, padded[1] // 8)


def test_native_size_that_is_padded(tiny_vit, position):
    model = tiny_vit(position, img_size=(53, 70), dynamic_img_size=True, dynamic_img_pad=True)
    assert model(images(53, 70)).shape == (2, 5)


def test_one_model_at_alternating_sizes_keeps_no_trace_of_them(tiny_vit, position):
    model = tiny_vit(position, dynamic_img_size=True)
    wide, tall = images(56, 72), images(72, 56)
    first = model(wide)
    model(tall)
    assert torch.equal(model(wide), first)


def test_backward_after_a_forward_at_another_size(tiny_vit, position):
    model = tiny_vit(position, dynamic_img_size=True, global_pool='avg')
    model.set_grad_checkpointing()
    wide, tall = images(56, 72), images(72, 56)
    expected = torch.autograd.grad(model(wide).square().sum(), list(model.parameters()))
    out = model(wide)
    model(tall)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(model.parameters())), expected)


class TestSetInputSize:
    def test_there_and_back_leaves_sape2_alone(self, tiny_vit):
        model = tiny_vit('sape2', reg_tokens=4, position_args={'sape2': {'distance_scale': 'grid'}})
        state = copy.deepcopy(model.state_dict())
        x = images(56, 72)
        out = model(x)
        model.set_input_size((112, 40))
        assert model.patch_embed.grid_size == (14, 5)
        assert model(images(112, 40)).shape == (2, 5)
        model.set_input_size((56, 72))
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert torch.equal(model(x), out)

    @pytest.mark.parametrize('options', [{}, {'reg_tokens': 4}, {'no_embed_class': True}, {'class_token': False}])
    @pytest.mark.parametrize('size', [(72, 56), (112, 112), (24, 168)])
    def test_resamples_pos_embed_to_the_grid_and_nothing_else(self, tiny_vit, size, options):
        model = tiny_vit(global_pool='avg', **options)
        state = copy.deepcopy(model.state_dict())
        model.set_input_size(size)
        expected = resample_abs_pos_embed(
            state.pop('pos_embed'),
            new_size=[size[0] // 8, size[1] // 8],
            old_size=[7, 9],
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
        torch.testing.assert_close(model.pos_embed.data, expected)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())

    def test_same_token_count_on_another_grid_is_resampled(self, tiny_vit):
        model = tiny_vit('learned')
        before = model.pos_embed.detach().clone()
        model.set_input_size((72, 56))
        assert model.pos_embed.shape == before.shape
        assert torch.equal(model.pos_embed[:, :1], before[:, :1])
        assert not torch.allclose(model.pos_embed[:, 1:], before[:, 1:], atol=0.01)

    def test_patch_size_changes_the_grid(self, tiny_vit, position):
        model = tiny_vit(position)
        tables = {k: v.clone() for k, v in model.state_dict().items() if 'position.' in k}
        weight = model.patch_embed.proj.weight.detach().clone()
        model.set_input_size(patch_size=4)
        assert model.patch_embed.grid_size == (14, 18)
        torch.testing.assert_close(model.patch_embed.proj.weight.data, resample_patch_embed(weight, [4, 4]))
        if position == 'sape2':
            assert all(torch.equal(v, model.state_dict()[k]) for k, v in tables.items())
        assert model.forward_intermediates(images(56, 72), intermediates_only=True)[0].shape[2:] == (14, 18)

    def test_patch_size_with_the_image_keeps_the_grid(self, tiny_vit):
        model = tiny_vit()
        before = model.pos_embed.detach().clone()
        model.set_input_size(img_size=(28, 36), patch_size=4)
        assert model.patch_embed.grid_size == (7, 9)
        assert torch.equal(model.pos_embed, before)
        assert model(images(28, 36)).shape == (2, 5)

    def test_frozen_parameters_stay_frozen(self, tiny_vit, position):
        model = tiny_vit(position).requires_grad_(False)
        model.set_input_size((112, 40), patch_size=4)
        assert not [name for name, p in model.named_parameters() if p.requires_grad]

    @pytest.mark.parametrize(
        'arguments', [{'img_size': (50, 72)}, {'patch_size': 16}, {'img_size': 50, 'patch_size': 16}]
    )
    def test_indivisible_size_is_refused_and_changes_nothing(self, tiny_vit, arguments):
        model = tiny_vit()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r'img_size .* is not divisible by patch_size .*dynamic_img_pad=True'):
            model.set_input_size(**arguments)
        assert model.patch_embed.img_size == (56, 72) and model.patch_embed.patch_size == (8, 8)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
