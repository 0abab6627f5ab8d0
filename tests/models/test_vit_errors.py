"""What the host says about bad input."""

import pytest
import timm
import torch

from timm_sape2 import PositionVisionTransformer


def images(height=56, width=72, channels=3):
    return torch.randn(2, channels, height, width)


class TestImages:
    @pytest.mark.parametrize('size', [(55, 72), (56, 71), (1, 1)])
    def test_indivisible_size_names_the_padding_option(self, tiny_vit, position, size):
        model = tiny_vit(position, dynamic_img_size=True)
        message = rf'Images are {size[0]}x{size[1]}, not divisible by the patch size 8x8; .*dynamic_img_pad=True'
        with pytest.raises(ValueError, match=message):
            model(images(*size))

    @pytest.mark.parametrize('size', [(72, 56), (56, 80), (48, 72), (55, 72)])
    @pytest.mark.parametrize('forward', ['forward', 'forward_features', 'forward_intermediates'])
    def test_wrong_size_names_both_remedies(self, tiny_vit, position, size, forward):
        message = (
            rf'Images are {size[0]}x{size[1]}, the model takes 56x72; create it with '
            rf'img_size=\({size[0]}, {size[1]}\), or with dynamic_img_size=True for any size\.'
        )
        with pytest.raises(ValueError, match=message):
            getattr(tiny_vit(position), forward)(images(*size))

    @pytest.mark.parametrize('dynamic', [True, False])
    @pytest.mark.parametrize(('channels', 'in_chans'), [(1, 3), (4, 3), (3, 1)])
    def test_wrong_channels_name_in_chans(self, tiny_vit, position, dynamic, channels, in_chans):
        model = tiny_vit(position, in_chans=in_chans, dynamic_img_size=dynamic)
        message = f'Images have {channels} channels, the model takes {in_chans}; create it with in_chans={channels}'
        with pytest.raises(ValueError, match=message):
            model(images(channels=channels))

    def test_one_image_without_a_batch_is_refused(self, tiny_vit):
        with pytest.raises(ValueError, match=r'\(batch, channels, height, width\), got 3 dimensions'):
            tiny_vit()(images()[0])

    @pytest.mark.filterwarnings('ignore::FutureWarning')
    def test_scripted_model_refuses_too(self, tiny_vit):
        with pytest.raises(torch.jit.Error, match='the model takes 56x72'):
            torch.jit.script(tiny_vit())(images(72, 56))


class TestArguments:
    @pytest.mark.parametrize(
        'sizes', [{'img_size': (55, 72)}, {'img_size': 60}, {'img_size': 56, 'patch_size': (7, 9)}]
    )
    def test_native_size_must_be_tiled(self, tiny_vit, sizes):
        message = r'img_size .* is not divisible by patch_size .*; use another size, or .*dynamic_img_pad=True'
        with pytest.raises(ValueError, match=message):
            tiny_vit(**sizes)

    def test_padding_needs_a_dynamic_size(self, tiny_vit):
        """Patches tile a fixed size as it is, since timm's patch embedding would pad but the grid would not grow."""
        with pytest.raises(ValueError, match='dynamic_img_size=True with dynamic_img_pad=True'):
            tiny_vit(img_size=(53, 70), dynamic_img_pad=True)
        model = tiny_vit(dynamic_img_pad=True)
        with pytest.raises(ValueError, match='dynamic_img_size=True with dynamic_img_pad=True'):
            model.set_input_size((53, 70))

    @pytest.mark.parametrize('name', ['rope3', '', 'learned+', 'SaPE2'])
    def test_unknown_encoding_lists_the_valid_ones(self, name):
        with pytest.raises(ValueError, match=r'Unknown position encoding .*Valid names.*: nope, learned, .*, sape2'):
            timm.create_model('test_vit_sape2', position=name)

    @pytest.mark.parametrize('position', ['nope+sape2', 'sape2+sape2'])
    def test_senseless_combination_is_refused(self, position):
        with pytest.raises(ValueError, match=r'combines "nope"|names an encoding twice'):
            timm.create_model('test_vit_sape2', position=position)

    def test_unknown_option_lists_the_valid_ones(self):
        message = r"Unknown option 'targets' of position encoding 'sape2'. Valid options: target, gating, gate_source, "
        with pytest.raises(ValueError, match=message):
            timm.create_model('test_vit_sape2', position_args={'sape2': {'targets': 'q'}})

    def test_options_of_an_absent_encoding_are_refused(self):
        with pytest.raises(ValueError, match="position_args has options for 'sape2', but position is 'learned'"):
            timm.create_model('test_vit_sape2', position='learned', position_args={'sape2': {'target': 'q'}})

    @pytest.mark.parametrize(
        ('option', 'value', 'valid'),
        [
            ('target', 'v', "'k', 'q', 'qk'"),
            ('gating', 'soft', "'semantic', 'none'"),
            ('gate_source', 'query', "'key', 'separate', 'value'"),
            ('axes', 'yx', "'xy', 'x', 'y'"),
            ('distance_scale', 'sqrt', "'none', 'grid'"),
            ('num_positions', 1, 'at least 2, got 1'),
            ('num_positions', 2.5, 'at least 2, got 2.5'),
        ],
    )
    def test_bad_value_lists_the_valid_ones(self, option, value, valid):
        with pytest.raises(ValueError, match=rf'{option} must be .*{valid}'):
            timm.create_model('test_vit_sape2', position_args={'sape2': {option: value}})

    def test_patch_dropout_needs_an_encoding_without_a_grid(self, tiny_vit, position):
        if position not in ('nope', 'learned', 'sincos'):
            name = position.split('+')[-1]
            with pytest.raises(ValueError, match=rf"patch_drop_rate=0.25 .* '{name}' needs the whole grid"):
                tiny_vit(position, patch_drop_rate=0.25)
        else:
            model = tiny_vit(position, patch_drop_rate=0.25).train()
            assert model.forward_features(images()).shape == (2, 1 + 47, 32)

    @pytest.mark.parametrize('name', ['pos_embed', 'block_fn', 'attn_layer'])
    @pytest.mark.parametrize(
        'create', [PositionVisionTransformer, lambda **k: timm.create_model('test_vit_sape2', **k)]
    )
    def test_what_the_encoding_decides_is_no_argument(self, create, name):
        with pytest.raises(TypeError, match=f'{name}: not an argument of this model, use position and position_args'):
            create(**{name: 'learn'})

    def test_unknown_argument_is_refused(self):
        with pytest.raises(TypeError, match='not_an_argument'):
            timm.create_model('test_vit_sape2', not_an_argument=1)

    @pytest.mark.parametrize(('wrong', 'right'), [('positon', 'position'), ('img_sizes', 'img_size')])
    def test_a_mistyped_argument_is_told_the_right_one(self, wrong, right):
        with pytest.raises(TypeError, match=rf"'{wrong}' \(did you mean '{right}'\?\)"):
            timm.create_model('test_vit_sape2', **{wrong: 'rope'})
