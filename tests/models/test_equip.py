"""Any plain vision transformer of timm takes any encoding, in place and by name, and what it learned stays."""

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Attention, resample_abs_pos_embed
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


PAGE = (Path(__file__).parents[2] / 'docs' / 'equip.md').read_text()


def test_families_of_the_page_are_those_of_the_tests():
    assert re.findall(r'^\| `(vit_\w+|deit\w+)` \|', PAGE, flags=re.MULTILINE) == list(FAMILIES)


def base(name, **kwargs):
    return timm.create_model(name, **{**SMALL, **FAMILIES[name], **kwargs}).eval()


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


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_exported_program_computes_the_same_for_any_batch(name):
    model = equip(base(name, depth=1), 'learned+sape2')
    batch = {0: torch.export.Dim('batch', min=1, max=64)}
    program = torch.export.export(model, (images(name),), dynamic_shapes=(batch,))
    x = images(name, batch=3)
    torch.testing.assert_close(program.module()(x), model(x))


def test_small_tables_hardly_move_the_features():
    """A bias is proportional to its tables, so these decide how far a model is moved before it has learned."""
    model, x = base('vit_tiny_patch16_224').double(), images('vit_tiny_patch16_224').double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    expected, moved = model.forward_features(x), {}
    for std in (0.02, 1e-4):
        torch.manual_seed(0)
        equipped = equip(copy.deepcopy(model), 'learned+sape2', {'sape2': {'initial_std': std}})
        moved[std] = ((equipped.forward_features(x) - expected).norm() / expected.norm()).item()
    assert moved[0.02] > 1e-3 and moved[0.02] / moved[1e-4] == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_equipped_is_refused_by_name_and_unchanged(name):
    model = timm.create_model(name, device='meta')
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[name]):
        equip(model, 'learned+rope')
    assert type(model) is kind and list(model.state_dict()) == names
    assert re.search(REFUSED[name], why_not_equip(model))


def test_a_model_inside_another_is_named():
    features = timm.create_model('vit_tiny_patch16_224', features_only=True, device='meta')
    assert why_not_equip(features).endswith("FeatureGetterNet, not timm's VisionTransformer; its .model is one")
    assert why_not_equip('vit_tiny_patch16_224') == "it is builtins.str, not timm's VisionTransformer"


def test_heads_of_another_width_are_refused():
    model = base('vit_tiny_patch16_224')
    model.blocks[1].attn = Attention(64, num_heads=2, attn_head_dim=12)
    with pytest.raises(ValueError, match='its heads have 12 channels, not embed_dim / num_heads'):
        equip(model, 'learned+sape2')


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
        with pytest.raises(ValueError, match=r"base='vit_equipped' is not .*; close names: (?!.*vit_equipped)"):
            timm.create_model('vit_equipped', base='vit_equipped')

    def test_base_that_cannot_be_equipped_says_why(self):
        with pytest.raises(ValueError, match='Cannot equip Eva'):
            timm.create_model('vit_equipped', base='eva02_tiny_patch14_224', device='meta')


def renamed(key, words):
    for ours, theirs in words.items():
        key = re.sub(ours, theirs, key)
    return key


def of_dinov2(state):
    """Names and shapes as in the checkpoints of DINOv2: embeddings have a class token, there is no classifier."""
    is_swiglu = len(state['blocks.0.mlp.fc1.weight']) > state['blocks.0.mlp.fc2.weight'].shape[1]
    words = {'reg_token': 'register_tokens'} | ({'mlp.fc1': 'mlp.w12', 'mlp.fc2': 'mlp.w3'} if is_swiglu else {})
    published = {renamed(key, words): value for key, value in state.items() if not key.startswith('head.')}
    if 'reg_token' in state:
        published['pos_embed'] = torch.cat([torch.randn(1, 1, 64), state['pos_embed']], dim=1)
    return {**published, 'mask_token': torch.randn(1, 64)}


def of_clip(state):
    """Names and shapes as in the checkpoints of CLIP, with a part of its text encoder."""
    words = {
        r'^patch_embed\.proj': 'conv1',
        r'^norm_pre': 'ln_pre',
        r'^norm\.': 'ln_post.',
        r'^blocks': 'transformer.resblocks',
        r'norm([12])': r'ln_\1',
        r'attn\.qkv\.': 'attn.in_proj_',
        r'attn\.proj': 'attn.out_proj',
        r'mlp\.fc1': 'mlp.c_fc',
        r'mlp\.fc2': 'mlp.c_proj',
    }
    elsewhere = ('cls_token', 'pos_embed', 'head.weight', 'head.bias')
    encoder = {f'visual.{renamed(key, words)}': value for key, value in state.items() if key not in elsewhere}
    return {
        **encoder,
        'visual.class_embedding': state['cls_token'][0, 0],
        'visual.positional_embedding': state['pos_embed'][0],
        'visual.proj': state['head.weight'].t(),
        'positional_embedding': torch.randn(7, 64),
        'transformer.resblocks.0.ln_1.weight': torch.randn(64),
    }


def of_open_clip(state):
    """Names as in the checkpoints of OpenCLIP whose image encoder is timm's, such as those of SigLIP."""
    published = {f'visual.trunk.{key}': value for key, value in state.items() if not key.startswith('head.')}
    return {**published, 'text.ln_final.weight': torch.randn(64), 'logit_scale': torch.ones(())}


PUBLISHED = {
    'vit_small_patch14_dinov2': of_dinov2,
    'vit_small_patch14_reg4_dinov2': of_dinov2,
    'vit_giant_patch14_dinov2': of_dinov2,
    'vit_base_patch16_clip_224': of_clip,
    'vit_base_patch16_clip_quickgelu_224': of_clip,
    'vit_base_patch16_siglip_224': of_open_clip,
}


class TestPublishedLayouts:
    """What the publishers of weights call them goes through timm's own filter."""

    @pytest.fixture(params=PUBLISHED)
    def name(self, request):
        return request.param

    @pytest.fixture
    def overlay(self, name, tmp_path):
        """Description of a file of weights that all differ from those of a new model."""
        source = base(name)
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        layout = PUBLISHED[name](source.state_dict())
        assert not layout.keys() <= source.state_dict().keys()
        torch.save(layout, tmp_path / 'published.pth')
        num_classes = 5 if PUBLISHED[name] is of_clip else 0
        return dict(
            file=str(tmp_path / 'published.pth'), num_classes=num_classes, input_size=(3, *FAMILIES[name]['img_size'])
        )

    def equipped(self, name, overlay, position, **changed):
        arguments = {**SMALL, **FAMILIES[name], **changed}
        return timm.create_model(
            'vit_equipped', True, base=name, position=position, pretrained_cfg_overlay=overlay, **arguments
        ).eval()

    def test_weights_are_those_that_timm_reads(self, name, overlay):
        expected = base(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
        state = self.equipped(name, overlay, 'learned+sape2').state_dict()
        same = [key for key in expected if overlay['num_classes'] or not key.startswith('head.')]
        assert all(torch.equal(state[key], expected[key]) for key in same)
        assert state['blocks.1.attn.position.sape2.column_table'].std() > 0.01

    @torch.no_grad()
    def test_features_are_those_of_timm(self, name, overlay):
        x, timms = images(name), base(name, pretrained=True, pretrained_cfg_overlay=overlay)
        features = self.equipped(name, overlay, 'learned').forward_features(x)
        assert features.std() > 0.1 and torch.equal(features, timms.forward_features(x))

    def test_embeddings_are_resampled_as_by_timm(self, name, overlay):
        size = [2 * side for side in FAMILIES[name]['img_size']]
        state = self.equipped(name, overlay, 'learned+sape2', img_size=size).state_dict()
        prefix = {'vit_small_patch14_reg4_dinov2': 0, 'vit_base_patch16_siglip_224': 0}.get(name, 1)
        native = base(name, pretrained=True, pretrained_cfg_overlay=overlay)
        grid = native.patch_embed.grid_size
        expected = resample_abs_pos_embed(
            native.pos_embed, [2 * side for side in grid], list(grid), num_prefix_tokens=prefix
        )
        torch.testing.assert_close(state['pos_embed'], expected)
