"""Intermediate features of the host, through each of timm's ways to get them."""

import pytest
import timm
import torch

TINY = dict(img_size=(56, 72), patch_size=8, embed_dim=32, depth=4, num_heads=2)


@pytest.fixture
def x():
    return torch.randn(2, 3, 56, 72)


@pytest.fixture
def model(tiny_vit, position):
    return tiny_vit(position, reg_tokens=3, depth=4)


def block_outputs(model, x, mixed=True):
    """What each block puts out, by hooks, and what encodings make of it that mix tokens after a block."""
    outputs = []
    handles = [block.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in model.blocks]
    features = model.forward_features(x)
    for handle in handles:
        handle.remove()
    if mixed:
        outputs = [model.position.mix(out, (7, 9), i) for i, out in enumerate(outputs)]
    return features, outputs


def as_map(tokens, prefix=4, grid=(7, 9)):
    return torch.stack([t[prefix:].reshape(*grid, -1).permute(2, 0, 1) for t in tokens])


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class TestForwardIntermediates:
    @pytest.mark.parametrize(
        ('indices', 'taken'), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ([1, -2], [1, 2])]
    )
    def test_takes_the_blocks_asked_for(self, model, x, indices, taken):
        features, outputs = block_outputs(model, x)
        final, maps = model.forward_intermediates(x, indices=indices)
        equal(final, features)
        equal(maps, [as_map(outputs[i]) for i in taken])
        assert all(m.shape == (2, 32, 7, 9) and m.is_contiguous() for m in maps)

    def test_norm_is_applied_to_all(self, model, x):
        features, outputs = block_outputs(model, x)
        _, maps = model.forward_intermediates(x, norm=True)
        equal(maps, [as_map(model.norm(out)) for out in outputs])
        equal(maps[-1], as_map(features))

    def test_tokens_and_prefix_tokens(self, model, x):
        _, outputs = block_outputs(model, x)
        _, tokens = model.forward_intermediates(x, output_fmt='NLC')
        equal(tokens, [out[:, 4:] for out in outputs])
        _, pairs = model.forward_intermediates(x, output_fmt='NLC', return_prefix_tokens=True)
        equal(pairs, [(out[:, 4:], out[:, :4]) for out in outputs])
        _, pairs = model.forward_intermediates(x, return_prefix_tokens=True)
        equal(pairs, [(as_map(out), out[:, :4]) for out in outputs])

    def test_without_prefix_tokens_none_are_returned(self, tiny_vit, x, position):
        model = tiny_vit(position, class_token=False, global_pool='avg')
        (tokens,) = model.forward_intermediates(
            x, indices=1, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True
        )
        assert tokens.shape == (2, 63, 32)
        result = model.forward_intermediates(x, return_prefix_tokens=True, output_dict=True)
        assert set(result) == {'image_features', 'image_intermediates'}

    def test_stop_early_leaves_later_blocks_out(self, model, x):
        _, outputs = block_outputs(model, x)
        calls = []
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: calls.append(i))
        final, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert calls == [0, 1]
        equal(maps, [as_map(outputs[1])])
        equal(final, model.norm(outputs[1]))
        model.forward_intermediates(x, indices=[1])
        assert calls == [0, 1, 0, 1, 2, 3]

    def test_dictionary(self, model, x):
        final, maps = model.forward_intermediates(x, indices=2)
        result = model.forward_intermediates(x, indices=2, output_dict=True)
        assert set(result) == {'image_features', 'image_intermediates'}
        equal((result['image_features'], result['image_intermediates']), (final, maps))
        result = model.forward_intermediates(
            x, indices=2, output_dict=True, return_prefix_tokens=True, intermediates_only=True
        )
        assert set(result) == {'image_intermediates', 'image_intermediates_prefix'}
        assert [p.shape for p in result['image_intermediates_prefix']] == [(2, 4, 32)] * 2

    def test_unknown_format_is_refused(self, model, x):
        with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
            model.forward_intermediates(x, output_fmt='NHWC')

    def test_gradients_reach_every_block(self, model, x):
        maps = model.forward_intermediates(x, indices=[3], intermediates_only=True)
        maps[0].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.blocks.parameters())


class TestIntermediateLayers:
    def test_equal_forward_intermediates(self, model, x):
        equal(list(model.get_intermediate_layers(x, 2)), model.forward_intermediates(x, 2, output_fmt='NLC')[1])
        pairs = model.get_intermediate_layers(x, [1, 3], reshape=True, return_prefix_tokens=True, norm=True)
        equal(list(pairs), model.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True)[1])


class TestPruning:
    @pytest.mark.parametrize('index', [0, 1, 3])
    def test_features_survive(self, model, x, index):
        _, outputs = block_outputs(model, x)
        taken = model.prune_intermediate_layers([index], prune_norm=True)
        assert taken == [index] and len(model.blocks) == index + 1 and model.num_classes == 0
        equal(model.forward_intermediates(x, taken, intermediates_only=True), [as_map(outputs[index])])
        equal(model.forward_features(x), outputs[index])
        model.set_input_size((72, 56))
        assert model.forward_features(x.transpose(2, 3)).shape == (2, 67, 32)

    def test_head_can_stay(self, model, x):
        out = model(x)
        model.prune_intermediate_layers(1, prune_head=False)
        equal(model(x), out)


class TestFeaturesOnly:
    def test_maps_of_the_blocks_asked_for(self, tiny_vit, x, position):
        getter = tiny_vit(position, depth=4, features_only=True, out_indices=(0, 2))
        assert getter.feature_info.channels() == [32, 32] and getter.feature_info.reduction() == [8, 8]
        assert getter.feature_info.module_name() == ['blocks.0', 'blocks.2']
        assert len(getter.model.blocks) == 3
        _, outputs = block_outputs(getter.model, x)
        equal(getter(x), [as_map(outputs[i], prefix=1) for i in (0, 2)])

    def test_default_is_the_last_three_blocks(self, x):
        getter = timm.create_model('vit_tiny_sape2', features_only=True, **TINY)
        assert getter.out_indices == [1, 2, 3]
        assert [m.shape for m in getter(x)] == [(2, 32, 7, 9)] * 3

    def test_dynamic_and_padded_sizes(self, tiny_vit, position):
        getter = tiny_vit(position, features_only=True, out_indices=(1,), dynamic_img_size=True, dynamic_img_pad=True)
        assert getter(torch.randn(1, 3, 37, 81))[0].shape == (1, 32, 5, 11)
        assert getter(torch.randn(1, 3, 112, 112))[0].shape == (1, 32, 14, 14)

    @pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
    def test_hooks_and_graph_give_the_tokens(self, tiny_vit, x, position, feature_cls):
        """timm's other two feature classes know nothing of the model but its module names."""
        model = tiny_vit(position)
        _, outputs = block_outputs(model, x, mixed=False)
        getter = tiny_vit(position, features_only=True, out_indices=(0, 1), feature_cls=feature_cls)
        getter.load_state_dict({k: model.state_dict()[k.partition('.')[2]] for k in getter.state_dict()})
        torch.testing.assert_close(getter(x), outputs)  # a graph has the plain path in it
