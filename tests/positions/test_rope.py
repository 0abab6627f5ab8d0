"""Rotary encodings: angles by hand, distances alone, and the logits of timm's models."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import RotaryEmbeddingDinoV3

from timm_sape2.models.convert import checkpoint_filter_fn, rename_from_timm_rope
from timm_sape2.positions import ENCODINGS, HostShape
from timm_sape2.positions.rope import AxialRotaryPosition, MixedRotaryPosition
from timm_sape2.training.processes import seed_epoch

CPU = torch.device('cpu')
SIZE = dict(embed_dim=128, num_heads=2, depth=3, num_classes=7)
HOST = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1)


def test_four_channels_by_hand():
    """One frequency, 1: the first two channels turn by the column, the last two by the row."""
    rope = AxialRotaryPosition(HostShape(embed_dim=4, num_heads=1, grid=(3, 2), num_prefix_tokens=0))
    query = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 1, 6, 4)
    rotated, _ = rope.rotate(query, query, (3, 2), rope.prepare((3, 2), CPU))
    expected = torch.tensor([math.cos(1), math.sin(1), math.cos(2), math.sin(2)])
    torch.testing.assert_close(rotated[0, 0, 2 * 2 + 1], expected)
    assert torch.equal(rotated[0, 0, 0], query[0, 0, 0])


@torch.no_grad()
def test_learned_frequencies_by_hand():
    """The angle is the column times the first frequency of the plane plus the row times the second."""
    rope = MixedRotaryPosition(HostShape(embed_dim=4, num_heads=1, grid=(3, 2), num_prefix_tokens=0))
    rope.freqs.copy_(torch.tensor([[[0.3, 0.5]], [[0.1, -0.2]]]))
    query = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 1, 6, 4)
    rotated, _ = rope.rotate(query, query, (3, 2), rope.prepare((3, 2), CPU))
    expected = torch.tensor([math.cos(0.5), math.sin(0.5), math.cos(0.1), math.sin(0.1)])
    torch.testing.assert_close(rotated[0, 0, 2 * 2 + 1], expected)


@pytest.mark.parametrize('name', ['rope', 'rope_mixed'])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9), data=st.data())
def test_products_of_rotated_queries_and_keys_depend_on_distance_alone(name, rows, columns, data):
    down, right = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    rope = ENCODINGS[name](HOST)
    query, key = (torch.randn(16).expand(1, 2, rows * columns, 16) for _ in range(2))
    rotated = rope.rotate(query, key, (rows, columns), rope.prepare((rows, columns), CPU))
    query, key = (x.reshape(2, rows, columns, 16) for x in rotated)
    products = torch.einsum('hrcd,hsed->hrcse', query, key)
    near = products[:, : rows - down, : columns - right, : rows - down, : columns - right]
    torch.testing.assert_close(products[:, down:, right:, down:, right:], near, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(query.norm(dim=-1), query[:, :1, :1].norm(dim=-1).expand(-1, rows, columns))


def test_prefix_tokens_are_not_rotated(tiny_vit):
    for name in ('rope', 'rope_mixed'):
        attention = tiny_vit(name, reg_tokens=2).blocks[0].attn
        query, key = torch.randn(2, 1, 2, 3 + 63, 16)
        for before, after in zip((query, key), attention.position.rotate(query, key, (7, 9)), strict=True):
            assert torch.equal(before[:, :, :3], after[:, :, :3])
            assert not torch.allclose(before[:, :, 4:], after[:, :, 4:])


def test_mixed_frequencies_start_as_the_axial_ones_turned():
    freqs = MixedRotaryPosition(HOST, temperature=10.0).freqs
    assert freqs.shape == (2, 2, 8)
    magnitudes = torch.tensor([10 ** (-k / 4) for k in range(4)]).repeat(2)
    torch.testing.assert_close(freqs.norm(dim=0), magnitudes.expand(2, -1))
    assert not torch.allclose(freqs[:, 0], freqs[:, 1])


def test_axial_has_nothing_to_store():
    assert not AxialRotaryPosition(HOST).state_dict()


class TestNormalizedCoordinates:
    OPTIONS = ({}, {'shift': 0.5}, {'jitter': 1.5}, {'rescale': 2.0}, {'shift': 0.1, 'jitter': 1.2, 'rescale': 3})

    @pytest.mark.parametrize('by', ['separate', 'max', 'min'])
    @pytest.mark.parametrize('options', OPTIONS, ids=str)
    @pytest.mark.parametrize('grid', [(7, 9), (1, 5)])
    def test_angles_are_those_of_timms_dinov3(self, by, options, grid):
        """In training and after it, with the same random numbers; DINOv3 has rows in the first half."""
        rope = AxialRotaryPosition(HOST, coordinates=by, **options)
        theirs = {f'{name}_coords': value for name, value in options.items()}
        timms = RotaryEmbeddingDinoV3(16, rotate_half=False, normalize_coords=by, **theirs)
        for training in (True, False):
            expected, found = [], []
            for module, results in ((timms.train(training), expected), (rope.train(training), found)):
                torch.manual_seed(3)
                results += [module.get_embed(grid) if module is timms else module.prepare(grid, CPU) for _ in range(2)]
            for theirs, (sin, cos) in zip(expected, found, strict=True):
                ours = torch.cat([sin.roll(8, dims=1), cos.roll(8, dims=1)], dim=1)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert torch.equal(found[0], found[1]) == (not training or not options)

    def test_three_columns_by_hand(self):
        """Their centres are at -2/3, 0 and 2/3; the only frequency is 2 pi."""
        host = HostShape(embed_dim=4, num_heads=1, grid=(1, 3), num_prefix_tokens=0)
        sin, cos = AxialRotaryPosition(host, coordinates='separate').prepare((1, 3), CPU)
        angles = torch.tensor([-2 / 3, 0, 2 / 3]) * 2 * math.pi
        torch.testing.assert_close(sin, torch.stack([angles.sin(), angles.sin(), *torch.zeros(2, 3)], dim=1))
        torch.testing.assert_close(cos, torch.stack([angles.cos(), angles.cos(), *torch.ones(2, 3)], dim=1))

    def test_one_draw_a_forward_for_all_blocks_in_training_alone(self, tiny_vit):
        options = {'coordinates': 'separate', 'shift': 0.5, 'jitter': 2.0, 'rescale': 2.0}
        model, images = tiny_vit('rope', position_args={'rope': options}), torch.randn(1, 3, 56, 72)
        assert torch.equal(model(images), model(images))
        model.train()
        first, second = model(images), model(images)
        assert not torch.allclose(first, second)
        seen = []
        for block in model.blocks:
            block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[4]['rope']))
        model(images)
        assert seen[0] is seen[1]

    def test_seeding_an_epoch_replays_its_draws(self):
        """So that a run that is resumed goes on as it would have."""
        rope = AxialRotaryPosition(HOST, coordinates='separate', jitter=2.0).train()
        draws = []
        for epoch in (4, 5, 4):
            seed_epoch(seed=1, epoch=epoch, rank=0)
            draws.append(torch.stack([rope.prepare((7, 9), CPU) for _ in range(3)]))
        assert torch.equal(draws[0], draws[2]) and not torch.allclose(draws[0], draws[1])

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'coordinates': 'pixels'}, "coordinates must be one of 'patches', 'separate', 'max', 'min', got 'pixels'"),
            ({'jitter': 2.0}, "jitter=2.0 needs normalised coordinates, such as coordinates='separate'"),
            ({'coordinates': 'max', 'jitter': 0.5}, 'jitter must be a number of at least 1, got 0.5'),
            ({'coordinates': 'max', 'shift': -1}, 'shift must be a number of at least 0, got -1'),
            ({'coordinates': 'max', 'rescale': True}, 'rescale must be a number of at least 1, got True'),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            AxialRotaryPosition(HOST, **options)


@pytest.mark.parametrize('name', ['rope', 'rope_mixed'])
class TestErrors:
    def test_head_dimension(self, name):
        message = rf"position='{name}' needs a head dimension \(embed_dim / num_heads\) divisible by 4, got 6"
        with pytest.raises(ValueError, match=message):
            ENCODINGS[name](HOST._replace(embed_dim=12))

    @pytest.mark.parametrize('temperature', [0, -1.0, float('nan'), float('inf'), '100', True])
    def test_temperature(self, name, temperature):
        with pytest.raises(ValueError, match='temperature must be a positive number'):
            ENCODINGS[name](HOST, temperature=temperature)


class TestTimm:
    """timm's rotary ViTs store LayerScale of 1e-5, so `init_values` is needed, and here it is drawn near 1."""

    MODELS = (
        ('vit_small_patch16_rope_224', dict(position='rope')),
        ('vit_small_patch16_rope_mixed_224', dict(position='rope_mixed')),
        ('vit_small_patch16_rope_ape_224', dict(position='learned+rope', no_embed_class=True)),
        ('vit_small_patch16_rope_mixed_ape_224', dict(position='learned+rope_mixed', no_embed_class=True)),
    )

    def timms(self, name, **kwargs):
        model = timm.create_model(name, **SIZE, **kwargs).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if 'gamma' in key:
                    parameter.uniform_(0.5, 1.5)
                elif 'qkv' in key or 'pos_embed' in key or 'head' in key:
                    parameter.normal_(std=0.1)
        return model

    def ours(self, model, tmp_path, **kwargs):
        save_file(model.state_dict(), tmp_path / 'model.safetensors')
        overlay = dict(
            file=str(tmp_path / 'model.safetensors'), input_size=(3, *model.patch_embed.img_size), num_classes=7
        )
        return timm.create_model(
            'vit_small_pos_nope',
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            init_values=1e-5,
            **dict(SIZE, **dict(dict(img_size=model.patch_embed.img_size), **kwargs)),
        ).eval()

    @pytest.mark.parametrize(
        ('name', 'arguments', 'size'),
        [*((*model, (112, 144)) for model in MODELS), (*MODELS[1], (224, 224))],
    )
    @torch.no_grad()
    def test_logits_with_their_weights(self, tmp_path, name, arguments, size):
        model = self.timms(name, img_size=size)
        images = torch.randn(2, 3, *size)
        expected = model(images)
        torch.testing.assert_close(self.ours(model, tmp_path, **arguments)(images), expected, rtol=1e-4, atol=1e-4)
        plain = self.ours(model, tmp_path, **arguments)
        for block in plain.blocks:
            block.attn.position.rotates = False
        assert (plain(images) - expected).abs().max() > 1e-2

    @pytest.mark.parametrize(('name', 'arguments'), MODELS[:2])
    @torch.no_grad()
    def test_logits_at_another_size(self, tmp_path, name, arguments):
        model = self.timms(name, img_size=112, dynamic_img_size=True)
        ours = self.ours(model, tmp_path, img_size=(80, 144), **arguments)
        images = torch.randn(2, 3, 80, 144)
        torch.testing.assert_close(ours(images), model(images), rtol=1e-4, atol=1e-4)

    def test_names_are_those_of_this_package(self):
        state = {
            'rope.freqs': torch.rand(2, 3, 6, 32),
            'blocks.1.gamma_2': torch.rand(384),
            'norm.weight': torch.rand(1),
        }
        renamed = rename_from_timm_rope(state)
        freqs = {f'blocks.{i}.attn.position.rope_mixed.freqs': state['rope.freqs'][:, i] for i in range(3)}
        assert renamed.keys() == {*freqs, 'blocks.1.ls2.gamma', 'norm.weight'}
        assert all(torch.equal(renamed[key], value) for key, value in freqs.items())
        assert 'rope.freqs' in state

    def test_without_layer_scale_the_message_names_it(self):
        model = self.timms('vit_small_patch16_rope_224', img_size=112)
        ours = timm.create_model('vit_small_pos_rope', img_size=112, **SIZE)
        ours.pretrained_cfg = dict(ours.pretrained_cfg, num_classes=7, input_size=(3, 112, 112))
        with pytest.raises(ValueError, match=r'unexpected keys: blocks\.0\.ls1\.gamma'):
            checkpoint_filter_fn(model.state_dict(), ours)
