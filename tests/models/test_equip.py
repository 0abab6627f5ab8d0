"""Any plain vision transformer of timm takes any encoding, in place and by name, and what it learned stays."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from timm_sape2 import PositionVisionTransformer, equip, why_not_equip

SMALL = dict(embed_dim=64, num_heads=2, depth=2, num_classes=5)  # what takes these is made small
FAMILIES = {
    'vit_tiny_patch16_224': dict(img_size=(64, 80)),
    'vit_small_patch14_dinov2': dict(img_size=(56, 84)),
    'vit_small_patch14_reg4_dinov2': dict(img_size=(56, 84)),
    'vit_base_patch16_clip_224': dict(img_size=(64, 80)),
    'vit_base_patch16_clip_quickgelu_224': dict(img_size=(64, 80)),
    'vit_base_patch16_siglip_224': dict(img_size=(64, 80)),
    'deit3_small_patch16_224': dict(img_size=(64, 80)),
    'deit_tiny_patch16_224': dict(img_size=(64, 80)),
    'vit_medium_patch16_gap_240': dict(img_size=(64, 80)),
    'vit_wee_patch16_reg1_gap_256': dict(img_size=(64, 80)),
    'vit_giant_patch14_dinov2': dict(img_size=(56, 84), mlp_ratio=4),
    'vit_tiny_r_s16_p8_224': dict(img_size=(256, 384)),
    'vit_small_r26_s32_224': dict(img_size=(64, 96)),
}
REFUSED = {
    'deit_tiny_distilled_patch16_224': r'VisionTransformerDistilled, a relative of',
    'vit_relpos_small_patch16_224': r'VisionTransformerRelPos',
    'eva02_tiny_patch14_224': r'timm\.models\.eva\.Eva',
    'vit_small_patch16_dinov3': r'timm\.models\.eva\.Eva',
    'beit_base_patch16_224': r'timm\.models\.beit\.Beit',
    'naflexvit_base_patch16_gap': r'NaFlexVit',
    'vit_small_patch16_18x2_224': r'its blocks are ParallelThingsBlock',
    'vit_pwee_patch16_reg1_gap_256': r'its blocks are ParallelScalingBlock',
    'vit_dpwee_patch16_reg1_gap_256': r'its blocks are DiffParallelScalingBlock',
    'test_vit_sape2': r"it has position='learned\+sape2' already",
}


def base(name, **kwargs):
    return timm.create_model(name, **dict(SMALL, **FAMILIES[name]), **kwargs).eval()


def images(name, batch=2):
    return torch.randn(batch, 3, *FAMILIES[name]['img_size'])


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_with_learned_embeddings_the_bits_are_the_same(name, dynamic):
    model, x = base(name, dynamic_img_size=dynamic), images(name)
    expected, names = model(x), list(model.state_dict())
    assert equip(model, 'learned') is model and isinstance(model, PositionVisionTransformer)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_without_embeddings_nothing_keeps_the_bits():
    model, x = timm.create_model('vit_tiny_patch16_224', pos_embed='none', img_size=64, **SMALL).eval(), images_of(64)
    expected = model(x)
    assert torch.equal(equip(model, 'nope')(x), expected)


def images_of(size):
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize('name', FAMILIES)
def test_weights_stay_new_tables_train_and_the_model_comes_back_from_a_folder(name, tmp_path):
    model, x = base(name), images(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equip(model, 'learned+sape2', {'sape2': {'num_positions': 7}})
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert {key.split('.')[-1] for key in state.keys() - before.keys()} == {'row_table', 'column_table'}

    loss = model.forward_features(x).square().mean()
    loss.backward()
    assert all(block.attn.position.sape2.row_table.grad.any() for block in model.blocks)

    save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'vit_equipped' and config['model_args']['base'] == name
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.position_options == {'learned': {}, 'sape2': {'num_positions': 7}}
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_equipped_is_refused_by_name_and_unchanged(name):
    model = timm.create_model(name, device='meta')
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[name]):
        equip(model, 'learned+rope')
    assert type(model) is kind and list(model.state_dict()) == names
    assert re.search(REFUSED[name], why_not_equip(model))


def test_the_same_encodings_again_change_nothing():
    model = equip(base('vit_tiny_patch16_224'), 'learned+sape2')
    table = model.blocks[0].attn.position.sape2.row_table
    assert equip(model, 'learned+sape2').blocks[0].attn.position.sape2.row_table is table


@pytest.mark.parametrize(
    ('position', 'position_args', 'message'),
    [
        ('learned+sape3', None, "Unknown position encoding 'sape3'"),
        ('sape2', {'sape2': {'target': 'x'}}, 'target must be one of'),
        ('rope', None, 'needs a head dimension'),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(position, position_args, message):
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=12, num_heads=2, depth=1)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        equip(model, position, position_args)
    assert not isinstance(model, PositionVisionTransformer) and list(model.state_dict()) == names


def test_patch_dropout_is_refused():
    model = base('vit_tiny_patch16_224', patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"patch_drop_rate=0.5 removes patches, but position encoding 'sape2'"):
        equip(model, 'sape2')
    assert not isinstance(model, PositionVisionTransformer)


def test_embeddings_that_are_not_named_are_dropped_with_a_warning(caplog):
    model = equip(base('vit_tiny_patch16_224'), 'sape2')
    assert model.pos_embed is None and 'learned position embeddings are dropped' in caplog.text
    assert equip(base('vit_tiny_patch16_224', pos_embed='none'), 'learned').pos_embed.std() > 0.01


def test_mode_dtype_and_frozen_weights_are_kept():
    model = base('vit_tiny_patch16_224').to(torch.bfloat16).train().requires_grad_(False)
    equip(model, 'learned+cpe+sape2')
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all('position.' in name for name in trained)


class TestByName:
    @pytest.mark.parametrize('name', ['vit_small_patch14_reg4_dinov2', 'vit_base_patch16_siglip_224'])
    def test_configuration_is_that_of_the_base_without_its_weights(self, name):
        model = timm.create_model('vit_equipped', base=name, **dict(SMALL, **FAMILIES[name]))
        cfg, of_base = model.pretrained_cfg, timm.get_pretrained_cfg(name)
        assert cfg['architecture'] == 'vit_equipped' and not {'url', 'hf_hub_id', 'file'} & set(cfg)
        assert (cfg['mean'], cfg['input_size'], cfg['crop_pct']) == (of_base.mean, of_base.input_size, of_base.crop_pct)

    @pytest.mark.parametrize(
        'name', ['vit_small_patch14_reg4_dinov2', 'vit_base_patch16_clip_224', 'vit_tiny_r_s16_p8_224']
    )
    @pytest.mark.parametrize('changed', [{}, {'in_chans': 1}, {'num_classes': 3}], ids=str)
    def test_checkpoint_of_the_base_loads(self, name, changed, tmp_path):
        source = base(name)
        save_file(source.state_dict(), tmp_path / 'base.safetensors')
        overlay = dict(
            file=str(tmp_path / 'base.safetensors'), num_classes=5, input_size=(3, *FAMILIES[name]['img_size'])
        )
        arguments = dict(SMALL, **FAMILIES[name]) | changed
        model = timm.create_model('vit_equipped', True, base=name, pretrained_cfg_overlay=overlay, **arguments)
        state = model.state_dict()
        same = [key for key in source.state_dict() if not key.startswith(('head.', 'patch_embed.'))]
        assert same and all(torch.equal(state[key], source.state_dict()[key]) for key in same)
        assert state['blocks.1.attn.position.sape2.row_table'].std() > 0.01

    def test_unknown_base_gets_a_hint(self):
        with pytest.raises(ValueError, match=r'not a vision transformer of timm; close names: .*vit_tiny_patch16_224'):
            timm.create_model('vit_equipped', base='vit_tiny_patch16_225')

    def test_base_that_cannot_be_equipped_says_why(self):
        with pytest.raises(ValueError, match='Cannot equip Eva'):
            timm.create_model('vit_equipped', base='eva02_tiny_patch14_224', device='meta')
